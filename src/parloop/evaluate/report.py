"""The report of `parloop eval`: tables, a plot, and one page."""

import textwrap
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.markup import escape
from rich.table import Table

from ..folder import EVALUATION_REPORT, OutputFolder, claimed
from ..report.drawing import COLORS, legend_below, look, panels, styled
from ..report.page import put, render
from .benchmark import benchmarks
from .compare import Comparison, Entry, PairedTest, Row


def write_report(comparison: Comparison, folder: str | Path | OutputFolder) -> Path:
    """Write evaluation.json, report.html and evaluation.png. Return the path of report.html.

    Raises:
        OutputError: other files have these names, or the folder cannot be written.
    """
    with claimed(folder, EVALUATION_REPORT) as out:
        out.write(comparison.FILE, comparison.to_json())
        drawn = put({"evaluation": ("", scores_against_loops(comparison))}, out)
        page = render("evaluate/report.html", comparison=comparison, figure=drawn["evaluation"][1], named=named, told=told)
        out.write("report.html", page)
    return out.path / "report.html"


def benchmark_table() -> Table:
    """Return a table of the benchmarks that `parloop eval` can run, with their requirements."""
    table = Table(title="benchmarks", title_justify="left")
    table.add_column("name", no_wrap=True)
    for name in ("measures", "by", "needs", "hours", "paper, R = 1 / 2 / 3 / 4"):
        table.add_column(name, overflow="fold")
    for b in benchmarks().values():
        needs = [f"{b.needs.disk_gb:g} GB disk"]
        needs += ["Docker"] if b.needs.docker else []
        needs += ["bubblewrap"] if b.needs.sandbox else []
        needs += [f"Python {'.'.join(map(str, e.python))}" for e in b.environments if e.python > (3, 11)]
        needs += ["network"] if b.needs.network else []
        paper = " / ".join(f"{value:g}" for value in b.paper.values())
        table.add_row(b.name, b.measures, b.tool, ", ".join(needs), f"{b.needs.hours:g}", paper)
    return table


def tables(comparison: Comparison) -> list[Table]:
    """Return three tables: results, tests between loop counts, and the paper's numbers for benchmarks that were not run."""
    table = Table(title="results: ours, and the paper's", title_justify="left")
    for name in ("benchmark", "by", "R", "model"):
        table.add_column(name)
    for name in ("value", "95% interval", "items", "tokens per\nsolved", "seconds per\nsolved", "leaks"):
        table.add_column(name, justify="right")
    tests = Table(title="against the fewest loops, on the same items", title_justify="left")
    for name in ("benchmark", "compared", "difference", "test"):
        tests.add_column(name)
    counts = sorted({loops for entry in comparison.benchmarks for loops in entry.paper})
    others = Table("benchmark", *(f"R = {loops}" for loops in counts), title="not run: the paper's", title_justify="left")
    for entry in comparison.benchmarks:
        if not entry.ours:
            paper = {loops: f"{value:.1f}" for loops, value in entry.paper.items()}
            others.add_row(entry.title, *(paper.get(loops, "") for loops in counts))
            continue
        for number, row in enumerate(entry.rows):
            table.add_row("" if number else entry.title, *_cells(entry, row))
        for test in entry.tests:
            difference = "" if test.difference is None else f"{test.difference:+.4g}"
            tests.add_row(entry.title, f"{escape(test.other)} - {escape(test.base)}", difference, told(test))
    return [part for part in (table, tests, others) if part.row_count]


def _cells(entry: Entry, row: Row) -> list[str]:
    digits = 1 if entry.unit == "%" else 4
    value = "" if row.value is None else f"{row.value:.{digits}f}"
    interval = " .. ".join(f"{end:.{digits}f}" for end in row.interval or [])
    solved = ["" if cost is None else f"{cost:,.0f}" for cost in (row.tokens_per_solved, row.seconds_per_solved)]
    counts = ["" if count is None else str(count) for count in (row.items, row.leaks)]
    return [row.source, str(row.loops or ""), escape(named(row)), value, interval, counts[0], *solved, counts[1]]


def named(row: Row) -> str:
    """Return the model of a row, with the limit and settings that distinguish it."""
    part = "" if row.limit is None else f", first {row.limit}"
    return row.model + part + (f" [{row.settings[:6]}]" if row.settings else "")


def told(test: PairedTest) -> str:
    """Return a test in words."""
    if test.p is not None:
        return f"{test.test}: p = {test.p:.3g}, {test.won} won, {test.lost} lost"
    if test.interval is not None:
        return f"{test.test}: " + " .. ".join(f"{end:+.4f}" for end in test.interval)
    return test.test


@styled()
def scores_against_loops(comparison: Comparison) -> Figure:
    """Draw a panel per benchmark that was run: our values with intervals and the paper's, against the loop count."""
    entries = [entry for entry in comparison.benchmarks if any(row.loops for row in entry.ours)]
    columns = min(3, max(1, len(entries)))
    lines = -(-len(entries) // columns) or 1
    figure, grid = panels(lines, columns, (4.2 * columns, 3.6 * lines))
    grid = np.atleast_1d(grid)
    for axes in grid.flat[len(entries) :]:
        axes.set_visible(False)
    for axes, entry in zip(grid.flat, entries):
        _panel(axes, entry)
    return figure


def _panel(axes: Any, entry: Entry) -> None:
    ours = [row for row in entry.ours if row.loops]
    for number, settings in enumerate(sorted({row.settings for row in ours})):
        rows = [row for row in ours if row.settings == settings]
        x = [(row.loops or 0) + 0.05 * number for row in rows]
        y = np.array([row.value for row in rows], dtype=float)
        ends = np.array([row.interval or 2 * [row.value or 0.0] for row in rows], dtype=float).T
        style = look(number + 1) | {"linestyle": "none", "label": "ours" + (f" [{settings[:6]}]" if settings else "")}
        axes.errorbar(x, y, yerr=[y - ends[0], ends[1] - y], capsize=3, **style)
    paper = [row for row in entry.rows if row.source == "paper"]
    if paper:
        x, y = [row.loops for row in paper], [row.value for row in paper]  # type: ignore[assignment, misc]
        axes.plot(x, y, color=COLORS[-1], marker="x", linestyle=":", label="paper, 7B")
    axes.set_title(entry.title)
    axes.set_xlabel("loop count R")
    unit = f"{entry.metric.split(',')[0]}, {entry.unit}" if entry.unit == "%" else entry.unit
    axes.set_ylabel(textwrap.fill(unit, 30))
    axes.set_xticks(sorted({row.loops for row in [*ours, *paper] if row.loops}))
    legend_below(axes)
