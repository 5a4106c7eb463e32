"""State tracking: the state that a sequence of operations leads to, asked after every operation.

Input and answer at each position, as in Liu et al., "Transformers learn shortcuts to automata" (arXiv 2210.10749), and Merrill et al.,
"The illusion of state in state-space models" (arXiv 2404.08819). A model of constant depth computes parity of any length only with weights
that grow with it. Permutations of five items form a group that is not solvable, so it cannot compute their products at all unless
TC0 = NC1. The length at which a trained model fails therefore measures its depth.

A held-out document is EIGHT times as long as a training document. Its beginning of that length is not a training document; shorter beginnings
cannot be held out, because there are too few (every sequence of eight bits occurs in training).
"""

import itertools
import random
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from .task import HELD_OUT, SPECIAL, Document, Task, option

LONGER = 8  # length of held-out documents over that of training documents
PERMUTATIONS = tuple(itertools.permutations(range(5)))
ARRANGEMENTS = tuple("".join(str(i + 1) for i in permutation) for permutation in PERMUTATIONS)
NUMBER = {permutation: number for number, permutation in enumerate(PERMUTATIONS)}
# PRODUCT[x, y]: arrangement x after moving its items by y, item y[i] to position i.
PRODUCT = np.array([[NUMBER[tuple(x[i] for i in y)] for y in PERMUTATIONS] for x in PERMUTATIONS])
ADJACENT_SWAPS = tuple(sorted(NUMBER[tuple({i: i + 1, i + 1: i}.get(j, j) for j in range(5))] for i in range(4)))


@dataclass(frozen=True)
class RunningTask(Task):
    """A state that every symbol changes; the answer after each symbol is the new state.

    Groups are lengths: an answer's position is rounded up to a quarter, a half, three quarters, 1, 2, 4 or 8 times the trained length.
    """

    unit: ClassVar[str] = "length"
    longer: ClassVar[int] = LONGER
    length: int

    @property
    def table(self) -> np.ndarray:
        """The transition table [states, inputs]: next state. State 0 is the first."""
        raise NotImplementedError

    @cached_property
    def table_rows(self) -> list[list[int]]:
        """The transition table as lists."""
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
        """Group of every position, int32 [8 * length]."""
        return np.repeat(self.groups, np.diff(self.groups, prepend=0)).astype(np.int32)

    def chance(self, group: int) -> float:
        begin = (0, *self.groups)[self.groups.index(group)]
        return float(np.mean(self._most_frequent()[begin:group]))

    def _most_frequent(self) -> np.ndarray:
        """Return the share of the most frequent state at every position."""
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
        """Ids of the input symbols, int32 [inputs]."""
        return np.arange(self.table.shape[1], dtype=np.int32) + len(SPECIAL)


@dataclass(frozen=True)
class Parity(RunningTask):
    """Running parity of bits: after each, whether the number of ones so far is odd. `0 1 1 0` has the answers `0 1 0 0`."""

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
    """Running product of permutations of five items: their arrangement after every permutation.

    `21345` swaps the first two items; `21345 13245` has the answers `21345 23145`.
    """

    name: ClassVar[str] = "s5"
    length: int = option(
        16, "permutations of a training document; held-out ones have 8 times as many", at_least=8, at_most=4096
    )
    form: str = option(
        "swaps",
        "swaps: only swaps of two neighbours, the easier form; all: any of the 120 permutations",
        choices=("swaps", "all"),
    )

    @property
    def symbols(self) -> tuple[str, ...]:
        return ARRANGEMENTS

    @property
    def inputs(self) -> tuple[int, ...]:
        """Numbers of the permutations that occur as input."""
        return ADJACENT_SWAPS if self.form == "swaps" else tuple(range(len(PERMUTATIONS)))

    @property
    def table(self) -> np.ndarray:
        return PRODUCT[:, list(self.inputs)]

    @cached_property
    def input_ids(self) -> np.ndarray:
        return np.array(self.inputs, dtype=np.int32) + len(SPECIAL)
