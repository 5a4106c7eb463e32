"""Look-ups that follow one another: a shuffled table of facts, then questions that take 1 to 6 of them.

The task is also known as pointer chasing, sequential function composition (Chen et al., "Theoretical limitations of multi-layer
Transformer", arXiv 2412.02975) and k-hop induction (Sanford et al., arXiv 2402.09268; Saunshi et al., "Reasoning with latent thoughts",
arXiv 2502.17416): a transformer needs depth that grows with the number of look-ups, at best with its logarithm. A fact is one symbol here
(docs/log.md: to learn first which two symbols belong together takes longer than all the rest).
"""

import random
from dataclasses import dataclass
from typing import Any, ClassVar

from ...errors import SourceError
from ..tokenizer import EOS
from .task import EOS_ID, NO_TARGET, Document, Task, option

ENTITIES = tuple("abcdefghijklmnopqrstuvwxyz")
FURTHER, WRITE = ".", ":"
QUESTIONS = 4  # of a document without written steps


@dataclass(frozen=True)
class Hops(Task):
    """In the table `ac da cb bd` one look-up leads from a to c and one more to b. A question is a start and a dot for every further
    look-up, and is answered after each of them: `a . .` has the answers `c b d`. Facts form one cycle through all entities and are told
    in any order; a document asks from four starts for 1 to 6 look-ups. With `trace` the dots are followed by what is met, written one after
    another, and a document asks one question of every number of look-ups, in any order: `a . . : c b d`. No table of training is held
    out.
    """

    name: ClassVar[str] = "hops"
    unit: ClassVar[str] = "hops"
    facts: int = option(12, "entities, each of which one fact is told", at_least=4, at_most=len(ENTITIES))
    hops: int = option(6, "most look-ups that a question takes", at_least=1)
    trace: bool = option(False, "write what is met on the way before the answer")

    def __post_init__(self) -> None:
        super().__post_init__()
        if 2 * self.hops > self.facts:
            raise SourceError(
                f"source {self.source!r}: hops={self.hops} may be at most half of facts={self.facts}: else a question is answered sooner by "
                f"looking up backwards, round the cycle."
            )

    @property
    def symbols(self) -> tuple[str, ...]:
        entities = ENTITIES[: self.facts]
        return (*entities, FURTHER, WRITE, *(one + other for one in entities for other in entities if other != one))

    @property
    def groups(self) -> tuple[int, ...]:
        return tuple(range(1, self.hops + 1))

    def chance(self, group: int) -> float:
        return 1 / (self.facts - 1)  # all entities but the start are as likely

    def draw(self, rng: random.Random, split: str, group: int | None) -> tuple[str, Any]:
        cycle = rng.sample(ENTITIES[: self.facts], self.facts)  # a fact leads from each to the next
        told = rng.sample(range(self.facts), self.facts)
        if not self.trace:
            counts = [self.hops] * QUESTIONS
        else:
            counts = rng.sample(self.groups, self.hops) if group is None else [group]
        starts = rng.sample(range(self.facts), len(counts))
        first = cycle.index(ENTITIES[0])
        return " ".join(cycle[first:] + cycle[:first]), (cycle, told, list(zip(counts, starts)))

    def write(self, drawn: Any) -> Document:
        cycle, told, questions = drawn
        n = self.facts
        symbols = [cycle[start] + cycle[(start + 1) % n] for start in told]
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
        said = [NO_TARGET if target is None else EOS_ID if target == EOS else self.id_of[target] for target in targets]
        return Document.of(ids, said, groups, prompt if self.trace else len(ids))
