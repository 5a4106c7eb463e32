"""Chained look-ups: a shuffled table of facts, then questions that take 1 to 6 look-ups.

The task is also known as pointer chasing, sequential function composition (Chen et al., "Theoretical limitations of multi-layer
Transformer", arXiv 2412.02975) and k-hop induction (Sanford et al., arXiv 2402.09268; Saunshi et al., "Reasoning with latent thoughts",
arXiv 2502.17416): a transformer needs depth that grows with the number of look-ups, at best with its logarithm. A fact is one symbol here, since learning first
which two symbols belong together takes longer than all the rest (docs/log.md).
"""

import random
from dataclasses import dataclass
from typing import Any, ClassVar

from ...errors import SourceError
from ..tokenizer import EOS
from .task import EOS_ID, NO_TARGET, Document, Task, option

ENTITIES = tuple("abcdefghijklmnopqrstuvwxyz")
FURTHER, WRITE = ".", ":"
QUESTIONS = 4  # per document, without written steps


@dataclass(frozen=True)
class Hops(Task):
    """Chained look-ups in a table of facts.

    In the table `ac da cb bd` one look-up leads from a to c, the next one to b. A question is a start and one dot per further look-up, and is
    answered after each symbol: `a . .` has the answers `c b d`. Facts form one cycle through all entities and are listed in random order; a
    document asks from four starts for 1 to 6 look-ups. With `trace` the entities on the way are written after the dots, and a document asks
    one question of every number of look-ups, in random order: `a . . : c b d`. Training and held-out documents share no table.
    """

    name: ClassVar[str] = "hops"
    unit: ClassVar[str] = "hops"
    facts: int = option(12, "number of entities, each with one fact", at_least=4, at_most=len(ENTITIES))
    hops: int = option(6, "most look-ups that a question takes", at_least=1)
    trace: bool = option(False, "write the entities on the way before the answer")

    def __post_init__(self) -> None:
        super().__post_init__()
        if 2 * self.hops > self.facts:
            raise SourceError(
                f"source {self.source!r}: hops={self.hops} may be at most half of facts={self.facts}: else a question has a shorter way "
                f"backwards round the cycle."
            )

    @property
    def symbols(self) -> tuple[str, ...]:
        entities = ENTITIES[: self.facts]
        return (*entities, FURTHER, WRITE, *(one + other for one in entities for other in entities if other != one))

    @property
    def groups(self) -> tuple[int, ...]:
        return tuple(range(1, self.hops + 1))

    def chance(self, group: int) -> float:
        return 1 / (self.facts - 1)  # all entities but the start are equally likely

    def draw(self, rng: random.Random, split: str, group: int | None) -> tuple[str, Any]:
        cycle = rng.sample(ENTITIES[: self.facts], self.facts)  # a fact leads from each to the next
        order = rng.sample(range(self.facts), self.facts)
        if not self.trace:
            counts = [self.hops] * QUESTIONS
        else:
            counts = rng.sample(self.groups, self.hops) if group is None else [group]
        starts = rng.sample(range(self.facts), len(counts))
        first = cycle.index(ENTITIES[0])
        return " ".join(cycle[first:] + cycle[:first]), (cycle, order, list(zip(counts, starts)))

    def write(self, drawn: Any) -> Document:
        cycle, order, questions = drawn
        n = self.facts
        symbols = [cycle[start] + cycle[(start + 1) % n] for start in order]
        targets: list[str | None] = [None] * n
        groups = [0] * n
        prompt = 0
        for count, start in questions:
            met = [cycle[(start + hop) % n] for hop in range(1, count + 1)]
            symbols += [cycle[start], *[FURTHER] * (count - 1)]
            if not self.trace:
                targets += met
                groups += range(1, count + 1)
                continue
            symbols += [WRITE, *met]
            targets += [*[None] * count, *met, EOS]
            groups += [*[0] * (2 * count - 1), count, 0]
            prompt = prompt or len(symbols) - count
        ids = [self.id_of[symbol] for symbol in symbols]
        target_ids = [NO_TARGET if target is None else EOS_ID if target == EOS else self.id_of[target] for target in targets]
        return Document.of(ids, target_ids, groups, prompt if self.trace else len(ids))
