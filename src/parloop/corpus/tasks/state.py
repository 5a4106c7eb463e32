"""State tracking: what a sequence of operations has come to, asked after every one of them.

Input and answer at each position, as in Liu et al., "Transformers learn shortcuts to automata" (arXiv 2210.10749), and Merrill et al.,
"The illusion of state in state-space models" (arXiv 2404.08819). A model of constant depth does parity of any length only with weights
that grow with it, and products of permutations of five, a group that is not solvable, not at all unless TC0 = NC1; so where a trained
model stops says how deep it is.

A held-out document is EIGHT times as long as a trained one, and its first part, as long as those, is none of them; of short
beginnings there are too few for that (every sequence of eight bits is seen in training).
"""

import itertools
import random
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from .task import HELD_OUT, SPECIAL, Document, Task, option

LONGER = 8  # times the trained length
PERMUTATIONS = tuple(itertools.permutations(range(5)))
ARRANGEMENTS = tuple("".join(str(i + 1) for i in permutation) for permutation in PERMUTATIONS)
NUMBER = {permutation: number for number, permutation in enumerate(PERMUTATIONS)}
# PRODUCT[x, y]: the arrangement x after its items are moved as y says, item y[i] to place i.
PRODUCT = np.array([[NUMBER[tuple(x[i] for i in y)] for y in PERMUTATIONS] for x in PERMUTATIONS])
ADJACENT_SWAPS = tuple(sorted(NUMBER[tuple({i: i + 1, i + 1: i}.get(j, j) for j in range(5))] for i in range(4)))


@dataclass(frozen=True)
class RunningTask(Task):
    """A state that every symbol changes; each is followed by the state after it. Groups are lengths: the group of an answer is the next
    one of a quarter, a half, three quarters, 1, 2, 4 and 8 times the trained length."""

    unit: ClassVar[str] = "length"
    longer: ClassVar[int] = LONGER
    length: int

    @property
    def table(self) -> np.ndarray:
        """[states, inputs]: the next state. State 0 is the first."""
        raise NotImplementedError

    @cached_property
    def table_rows(self) -> list[list[int]]:
        return self.table.tolist()

    @property
    def groups(self) -> tuple[int, ...]:
        n = self.length
        return (n // 4, n // 2, 3 * n // 4, *(n * 2**k for k in range(4)))

    @property
    def trained_groups(self) -> tuple[int, ...]:
        return tuple(group for group in self.groups if group <= self.length)

    @cached_property
    def group_of(self) -> np.ndarray:
        """int32 [8 * length]: the group of every position."""
        return np.repeat(self.groups, np.diff(self.groups, prepend=0)).astype(np.int32)

    def chance(self, group: int) -> float:
        begin = (0, *self.groups)[self.groups.index(group)]
        return float(np.mean(self._most_frequent()[begin:group]))

    def _most_frequent(self) -> np.ndarray:
        """How frequent the most frequent state is at every position."""
        table = self.table
        share, most = np.eye(len(table))[0], []
        for _ in range(LONGER * self.length):
            moved = np.zeros_like(share)
            np.add.at(moved, table, np.broadcast_to(share[:, None] / table.shape[1], table.shape))
            share = moved
            most.append(share.max())
        return np.array(most)

    def draw(self, rng: random.Random, split: str, group: int | None) -> tuple[str, Any]:
        n = self.length * (LONGER if split == HELD_OUT else 1)
        inputs = rng.choices(range(self.table.shape[1]), k=n)
        return " ".join(map(str, inputs[: self.length])), inputs

    def write(self, drawn: list[int]) -> Document:
        table, states, state = self.table_rows, [], 0
        for symbol in drawn:
            state = table[state][symbol]
            states.append(state)
        n = len(drawn)
        return Document.of(self.input_ids[drawn], np.array(states) + len(SPECIAL), self.group_of[:n], n)

    @cached_property
    def input_ids(self) -> np.ndarray:
        """int32 [inputs]: the ids of the symbols that are read."""
        return np.arange(self.table.shape[1], dtype=np.int32) + len(SPECIAL)


@dataclass(frozen=True)
class Parity(RunningTask):
    """Running parity of bits: after each, whether the ones so far are odd. `0 1 1 0` has the answers `0 1 0 0`."""

    name: ClassVar[str] = "parity"
    length: int = option(32, "bits of a training document; held-out ones have 8 times as many", at_least=16, at_most=4096)

    @property
    def symbols(self) -> tuple[str, ...]:
        return ("0", "1")

    @property
    def table(self) -> np.ndarray:
        return np.array([[0, 1], [1, 0]])


@dataclass(frozen=True)
class S5(RunningTask):
    """Running product of permutations of five: how five items are arranged after every rearrangement. `21345` swaps the first two places;
    `21345 13245` has the answers `21345 23145`."""

    name: ClassVar[str] = "s5"
    length: int = option(
        16, "permutations of a training document; held-out ones have 8 times as many", at_least=8, at_most=4096
    )
    form: str = option(
        "swaps", "swaps: of two neighbours, the easier form; all: any of the 120 permutations", choices=("swaps", "all")
    )

    @property
    def symbols(self) -> tuple[str, ...]:
        return ARRANGEMENTS

    @property
    def inputs(self) -> tuple[int, ...]:
        return ADJACENT_SWAPS if self.form == "swaps" else tuple(range(len(PERMUTATIONS)))

    @property
    def table(self) -> np.ndarray:
        return PRODUCT[:, list(self.inputs)]

    @cached_property
    def input_ids(self) -> np.ndarray:
        return np.array(self.inputs, dtype=np.int32) + len(SPECIAL)
