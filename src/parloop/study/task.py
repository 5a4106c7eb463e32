"""A task in the place of a study's corpus, and the answers in its report."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console
from transformers import AutoTokenizer

from ..checkpoints import load_part
from ..corpus.tasks import Task, task_of
from ..statistics import Interval, mean_over, resample_weights
from ..train.recipe import Recipe
from ..train.task_accuracy import TaskAccuracy

SOLVED = 0.9  # share of a group's answers that are right


@dataclass
class TaskCorpus:
    """A task and its tokenizer. Documents are generated on the fly."""

    task: Task
    tokenizer: Any

    @classmethod
    def of(cls, recipe: Recipe) -> "TaskCorpus":
        """Return the task that a recipe trains on, with the recipe's tokenizer or its own."""
        task = task_of(recipe.source)
        tokenizer = task.tokenizer()
        if recipe.tokenizer is not None:
            tokenizer = load_part(AutoTokenizer, recipe.tokenizer, "tokenizer (tokenizer.json)")
        return cls(task, tokenizer)

    @property
    def summary(self) -> dict[str, Any]:
        """Source, unit of the groups, and size of the tokenizer."""
        return {"source": self.task.source, "unit": self.task.unit, "tokenizer": len(self.tokenizer)}

    def print_summary(self, console: Console) -> None:
        """Print the task and its groups."""
        groups = ", ".join(map(str, self.task.groups))
        console.print(
            f"{self.task.source}: documents are made on the fly; held-out answers by {self.task.unit}: {groups}",
            markup=False,
        )


@dataclass
class Answers:
    """Answers of one group, over all seeds.

    Attributes:
        group: a length, a number of look-ups, or a level.
        chance: accuracy of always giving the most frequent answer.
        correct: share of answers that are right.
        exact: share of instances whose answers in the group are all right.
        nll: nats per answer; after the true worked steps where the task has them.
        written: tokens that the model writes before it ends; 0 where it only gives answers.
    """

    group: int
    chance: float
    correct: Interval
    exact: Interval
    nll: Interval
    written: float

    @property
    def is_solved(self) -> bool:
        """Whether at least 90% of the answers are right."""
        return self.correct.value >= SOLVED


def answers_of(runs: list[TaskAccuracy]) -> list[Answers]:
    """Pool the outcomes of an arm's seeds, with intervals over instances and, if there are several, seeds."""
    weights = resample_weights(len(runs[0].correct), len(runs), np.random.default_rng(0))

    def over_all(name: str, column: int) -> Interval:
        return mean_over(np.stack([getattr(run, name)[:, column] for run in runs]).astype(float), weights)

    return [
        Answers(
            group=group,
            chance=runs[0].chance[column],
            correct=over_all("correct", column),
            exact=over_all("exact", column),
            nll=over_all("nll", column),
            written=float(np.mean([run.written[:, column] for run in runs])),
        )
        for column, group in enumerate(runs[0].groups)
    ]


def solved_up_to(answers: list[Answers]) -> int | None:
    """Return the hardest group that is solved together with all easier ones; None if the easiest is not."""
    solved = None
    for group in answers:
        if not group.is_solved:
            break
        solved = group.group
    return solved
