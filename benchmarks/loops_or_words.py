"""Loops or words? Does a model need its loops where it may write the steps down before it answers?

    parloop study task:hops --loops 1 2 3 --seeds 3
    parloop study task:hops,trace --loops 1 2 3 --seeds 3
    python benchmarks/loops_or_words.py runs/study-task-task-hops runs/study-task-task-hops-trace --figure loops-or-words.png

Reads the results.json of two studies of a task at equal training tokens, without worked steps and with them, and prints for every
loop count the answers that are right, what they take to decode, and the differences between the two at about equal decoding compute.

Decoding compute is the forward FLOPs of the tokens that are decoded for an answer, at the middle of a row: one token where the answer
is only said, all that is written and the end where it is worked out. Reading the question is prefill, and not in it. With written steps
a loop makes every one of them dearer.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from parloop.corpus.tasks import task_of
from parloop.model.flops import forward_flops_per_token
from parloop.report.drawing import look, panels, save_png, styled
from parloop.study.results import Row, StudyResult
from parloop.train.recipe import Recipe


@dataclass
class Way:
    """One loop count, with worked steps or without.

    Attributes:
        groups, right, low, high, chance: by group, the share of answers that are right and its interval.
        flops: by group, forward FLOPs to decode an answer.
    """

    loops: int
    trace: bool
    groups: list[int]
    right: np.ndarray
    low: np.ndarray
    high: np.ndarray
    chance: np.ndarray
    flops: np.ndarray

    @property
    def name(self) -> str:
        """Loops and words, as a legend says it."""
        return f"R = {self.loops}" + (" + steps" if self.trace else "")


def ways(folder: Path) -> tuple[StudyResult, list[Way]]:
    """Return a study and its arms without controls."""
    result = StudyResult.from_json((folder / "results.json").read_text(encoding="utf-8"))
    return result, [way(result, row) for row in result.rows if not row.arm.is_control]


def way(result: StudyResult, row: Row) -> Way:
    """Return what an arm's answers take and how many are right."""
    recipe = row.arm.recipe(Recipe(**result.recipe))
    task = task_of(recipe.source)
    config = recipe.plt_config(task.tokenizer())
    per_token = forward_flops_per_token(config, recipe.length, row.arm.loops)
    decoded = np.array([group.written + 1 if task.is_written else 1.0 for group in row.answers])
    right, low, high = np.array([group.correct for group in row.answers], dtype=float).T
    return Way(
        loops=row.arm.loops,
        trace=task.is_written,
        groups=[group.group for group in row.answers],
        right=right,
        low=low,
        high=high,
        chance=np.array([group.chance for group in row.answers]),
        flops=decoded * per_token,
    )


@styled()
def figure_of(studies: dict[str, list[Way]], units: dict[str, str]) -> Figure:
    """Draw answers that are right by group and against decoding compute, a row of panels for each task."""
    figure, grid = panels(len(studies), 2, (9.6, 3.6 * len(studies)), sharey=True)
    for (left, right), (task, found) in zip(np.atleast_2d(grid), studies.items()):
        for each in found:
            style = look(each.loops) | {
                "linestyle": "--" if each.trace else "-",
                "fillstyle": "none" if each.trace else "full",
            }
            left.plot(each.groups, each.right, label=each.name, markersize=5, **style)
            left.fill_between(each.groups, each.low, each.high, color=style["color"], alpha=0.12, linewidth=0)
            right.plot(
                each.flops.mean() / 1e3, each.right.mean(), label=each.name, markersize=8, **style | {"linestyle": ""}
            )
        left.plot(found[0].groups, found[0].chance, color="black", linestyle=":", linewidth=1, label="chance")
        left.set_xlabel(units[task])
        left.set_ylabel(f"{task}\nanswers that are right (share)")
        left.set_ylim(0, 1.02)
        right.set_xlim(left=0)
        right.set_xlabel("decoding compute (thousand FLOPs per answer, mean)")
        right.legend(fontsize=8, loc="lower right")
    return figure


def table_of(task: str, unit: str, found: list[Way]) -> Table:
    """Return answers that are right, group by group, and the compute of decoding one."""
    table = Table(title=f"{task}: answers that are right, in per cent", title_justify="left")
    for name in ("", *(f"{unit}\n{group}" for group in found[0].groups), "mean", "decode\nkFLOPs"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for each in found:
        cells = [f"{100 * share:.0f}" for share in (*each.right, each.right.mean())]
        table.add_row(each.name, *cells, f"{each.flops.mean() / 1e3:,.0f}")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", nargs="+", type=Path, help="folders of studies, in pairs: without steps, with steps")
    parser.add_argument("--figure", type=Path, help="where to draw")
    given = parser.parse_args()
    if len(given.studies) % 2:
        parser.error("give studies in pairs: without worked steps, with worked steps")
    console, drawn, units = Console(), {}, {}
    for said, written in zip(given.studies[::2], given.studies[1::2]):
        (one, plain), (other, traced) = ways(said), ways(written)
        if [plain[0].trace, traced[0].trace] != [False, True] or one.rows[0].training_tokens != other.rows[
            0
        ].training_tokens:
            sys.exit(f"{said} and {written} are not one task without and with worked steps, at equal training tokens.")
        task = one.recipe["source"]
        drawn[task], units[task] = plain + traced, one.group_unit
        console.print(table_of(task, one.group_unit, drawn[task]))
    if given.figure:
        save_png(figure_of(drawn, units), given.figure)
        console.print(f"figure: {given.figure}")


if __name__ == "__main__":
    main()
