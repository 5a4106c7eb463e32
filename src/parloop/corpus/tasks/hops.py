"""Look-ups that follow one another: a shuffled table of facts, then questions that take 1 to 6 of them.

The task is also known as pointer chasing, sequential function composition (Chen et al., "Theoretical limitations of multi-layer
Transformer", arXiv 2412.02975) and k-hop induction (Sanford et al., arXiv 2402.09268; Saunshi et al., "Reasoning with latent thoughts",
arXiv 2502.17416): a transformer needs depth that grows with the number of look-ups, at best with its logarithm.
"""

import random
from dataclasses import dataclass
from typing import Any, ClassVar

from ...errors import SourceError
from ..tokenizer import EOS
from .task import EOS_ID, NO_TARGET, Document, Task, option

ENTITIES = tuple("abcdefghijklmnopqrstuvwxyz")
QUESTION = "?"


@dataclass(frozen=True)
class Hops(Task):
    """`a c  d a  c b  b d  2 a ?` has the answer `b`: from a to c, from c to b. Facts form one cycle in which every entity is met once, and
    are told in any order; a document asks one question of every number of look-ups, in any order, from different starts. With `trace`
    the question is followed by what is met on the way: `2 a ? c b`. Tables are never seen twice.
    """

    name: ClassVar[str] = "hops"
    unit: ClassVar[str] = "hops"
    facts: int = option(8, "entities, each of which one fact is told", at_least=4, at_most=len(ENTITIES))
    hops: int = option(6, "most look-ups that a question takes", at_least=1, at_most=9)
    trace: bool = option(False, "write what is met on the way before the answer")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hops >= self.facts:
            raise SourceError(
                f"source {self.source!r}: hops={self.hops} must be less than facts={self.facts}, or a question leads back to its start."
            )

    @property
    def symbols(self) -> tuple[str, ...]:
        return (*ENTITIES[: self.facts], *map(str, range(1, self.hops + 1)), QUESTION)

    @property
    def groups(self) -> tuple[int, ...]:
        return tuple(range(1, self.hops + 1))

    def chance(self, group: int) -> float:
        return 1 / (self.facts - 1)  # all entities of the table but the start are as likely

    def draw(self, rng: random.Random, split: str, group: int | None) -> tuple[str, Any]:
        cycle = rng.sample(ENTITIES[: self.facts], self.facts)  # a fact leads from each to the next
        told = rng.sample(range(self.facts), self.facts)
        counts = rng.sample(self.groups, self.hops) if group is None else [group]
        starts = rng.sample(range(self.facts), len(counts))
        first = cycle.index(ENTITIES[0])
        return " ".join(cycle[first:] + cycle[:first]), (cycle, told, list(zip(counts, starts)))

    def write(self, drawn: Any) -> Document:
        cycle, told, questions = drawn
        n = self.facts
        symbols = [cycle[place % n] for start in told for place in (start, start + 1)]
        targets: list[str | None] = [None] * len(symbols)
        groups = [0] * len(symbols)
        prompt = 0
        for count, start in questions:
            symbols += [str(count), cycle[start], QUESTION]
            targets += [None, None]
            groups += [0, 0]
            prompt = prompt or len(symbols)
            met = [cycle[(start + hop) % n] for hop in range(1, count + 1)]
            if self.trace:
                symbols += met
                targets += [*met, EOS]
                groups += [0] * (count - 1) + [count, 0]
            else:
                targets.append(met[-1])
                groups.append(count)
        ids = [self.id_of[symbol] for symbol in symbols]
        said = [NO_TARGET if target is None else EOS_ID if target == EOS else self.id_of[target] for target in targets]
        return Document.of(ids, said, groups, prompt if self.trace else len(ids))
