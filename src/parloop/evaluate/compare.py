"""Results side by side: by loop count, with intervals and paired tests on the same items, beside the paper's numbers."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from ..record import command_line
from ..result import Result, not_kept
from ..statistics import Interval, bootstrap_mean, mcnemar, resample_weights, wilson
from .benchmark import Benchmark, benchmarks
from .results import BenchmarkResult, Group, groups, load_results


@dataclass
class Row:
    """A line in the table of a benchmark: our number, the paper's, or "not run".

    Attributes:
        source: "ours", "paper" or "not run".
        loops: loop count.
        model: the model's name; for the paper, its size.
        value: the number, in the benchmark's unit.
        interval: low and high end of its 95% interval over items; None if there is none.
        items: number of items.
        limit: the limit, if only the first items were run.
        settings: hash of the settings, if results with several exist.
        hash: hash of the model's weights.
        date: date of the result.
        path: file of the result.
        parts: further numbers of the tool.
        tokens_per_solved: tokens spent per solved item.
        seconds_per_solved: seconds of requests per solved item.
        leaks: number of items in which the agent read where the answer may be.
    """

    source: str
    loops: int | None
    model: str
    value: float | None
    interval: list[float] | None = None
    items: int | None = None
    limit: int | None = None
    settings: str = ""
    hash: str | None = None
    date: str | None = None
    path: str | None = None
    parts: dict[str, Any] = field(default_factory=dict)
    tokens_per_solved: float | None = None
    seconds_per_solved: float | None = None
    leaks: int | None = None


@dataclass
class PairedTest:
    """Paired test of two of our results on the same items.

    Attributes:
        base: name of the one model.
        other: name of the other model.
        test: name of the test, or the reason why there is none.
        items: number of items.
        difference: other minus base, in the benchmark's unit.
        p: p-value of McNemar's test, two-sided.
        won: number of items that only `other` passes.
        lost: number of items that only `base` passes.
        interval: low and high end of the difference's 95% bootstrap interval.
    """

    base: str
    other: str
    test: str
    items: int | None = None
    difference: float | None = None
    p: float | None = None
    won: int | None = None
    lost: int | None = None
    interval: list[float] | None = None


@dataclass
class Entry:
    """Comparison of one benchmark's results.

    Attributes:
        benchmark: name of the benchmark; title, metric, unit, tool and silent as in Benchmark.
        paper: loop count -> the paper's number.
        rows: lines of its table.
        tests: tests between our results.
    """

    benchmark: str
    title: str
    metric: str
    unit: str
    tool: str
    silent: str
    paper: dict[str, float]
    rows: list[Row] = field(default_factory=list)
    tests: list[PairedTest] = field(default_factory=list)

    @property
    def ours(self) -> list[Row]:
        """Our results; empty if it was not run."""
        return [row for row in self.rows if row.source == "ours"]


@dataclass
class Comparison(Result):
    """Results by loop count, beside the paper's.

    Attributes:
        benchmarks: one entry for each benchmark.
        folders: folders that results were read from.
        command: the command that made it.
        folder: folder of the report.
    """

    FORMAT: ClassVar[int] = 2
    FILE: ClassVar[str] = "evaluation.json"

    benchmarks: list[Entry]
    folders: list[str]
    command: str = ""
    folder: Path | None = not_kept(default=None)

    def shown(self) -> list[Any]:
        """Return what `rich` prints of the comparison."""
        from .report import tables

        return tables(self)


def compare(folders: list[Path], output: Path, command: str | None = None) -> Comparison:
    """Compare results, and write the report.

    Args:
        folders: folders with results.
        output: folder for report.html, evaluation.png and evaluation.json.
        command: the command that the report names; default: this process's own.

    Returns:
        the comparison. evaluation.json holds the same.

    Raises:
        EvaluationError: there are no results.
        OutputError: other files have these names, or the folder cannot be written.
    """
    from .report import write_report

    results = load_results(folders)
    by_benchmark: dict[str, list[Group]] = {}
    for group in groups(results):
        by_benchmark.setdefault(group.benchmark, []).append(group)
    entries = [_entry(benchmark, by_benchmark.get(name, [])) for name, benchmark in benchmarks().items()]
    comparison = Comparison(entries, [str(folder) for folder in folders], command or command_line(), output)
    write_report(comparison, output)
    return comparison


def _entry(benchmark: Benchmark, found: list[Group]) -> Entry:
    """Return a benchmark's part of the comparison."""
    entry = Entry(
        benchmark=benchmark.name, title=benchmark.title, metric=benchmark.metric, unit=benchmark.unit, tool=benchmark.tool,
        silent=benchmark.silent, paper={str(loops): value for loops, value in benchmark.paper.items()},
    )  # fmt: skip
    for group in found:
        members = group.by_model()
        entry.rows += [_row(result, len(found) > 1) for result in members]
        entry.tests += _tests(members)
    if found:
        entry.rows += [Row("paper", loops, "7B", value) for loops, value in benchmark.paper.items()]
    else:
        counts, values = (" / ".join(map(str, some)) for some in (benchmark.paper, benchmark.paper.values()))
        entry.rows.append(Row("not run", None, f"paper, R = {counts}: {values}" if benchmark.paper else "", None))
    return entry


def interval_of(result: BenchmarkResult) -> Interval | None:
    """Return the 95% interval of a result's value over items, in its unit; None if the value is not the mean of its
    items, or there is one item without a spread."""
    values, value, scale = np.array(list(result.items.values())), result.value, 100 if result.unit == "%" else 1
    passes = set(values) <= {0.0, 1.0} and not result.weights
    if len(values) < 2 and not passes:
        return None
    if not _is_mean(result):
        return None
    interval = wilson(float(values.sum()), len(values)) if passes else _mean(values, _weights(result))
    return Interval(value, min(value, scale * interval.low), max(value, scale * interval.high))  # rounding apart


def _is_mean(result: BenchmarkResult) -> bool:
    """Return whether the value is the weighted mean of the items. BFCL's and MultiPL-E's values are means of groups."""
    mean = np.average(list(result.items.values()), weights=_weights(result))
    return abs((100 if result.unit == "%" else 1) * float(mean) - result.value) <= 1e-6


def _weights(result: BenchmarkResult) -> np.ndarray | None:
    return np.array([result.weights[name] for name in result.items]) if result.weights else None


def _mean(values: np.ndarray, sizes: np.ndarray | None) -> Interval:
    """Return the mean weighted by `sizes`, with its bootstrap interval over items."""
    if sizes is None:
        return bootstrap_mean(values)
    weights = resample_weights(len(values), 1, np.random.default_rng(0)).by_document
    low, high = np.quantile((weights @ (values * sizes)) / (weights @ sizes), [0.025, 0.975])
    return Interval(float(values @ sizes / sizes.sum()), float(low), float(high))


def _row(result: BenchmarkResult, several_settings: bool) -> Row:
    interval, solved = interval_of(result), sum(result.items.values())
    row = Row(
        source="ours", loops=result.model.loops, model=result.model.name, value=result.value,
        interval=None if interval is None else [interval.low, interval.high], items=len(result.items),
        limit=result.settings.get("limit"), settings=result.settings_hash if several_settings else "",
        hash=result.model.hash, date=result.date, path=str(result.path), parts=result.parts,
    )  # fmt: skip
    if result.unit == "%" and solved and result.cost.get("requests"):
        row.tokens_per_solved = (result.cost["prompt_tokens"] + result.cost["completion_tokens"]) / solved
        row.seconds_per_solved = result.cost["seconds"] / solved
    if "leaks" in result.parts:
        row.leaks = len(result.parts["leaks"])
    return row


def _tests(members: list[BenchmarkResult]) -> list[PairedTest]:
    """Test each result against the one with the fewest loops, on the same items."""
    base = members[0]
    if base.model.loops is None:  # sorted last, so no result has a known loop count
        return []
    return [_test(base, other) for other in members[1:]]


def _test(base: BenchmarkResult, other: BenchmarkResult) -> PairedTest:
    names = list(base.items)
    test = PairedTest(base.model.name, other.model.name, "none: the items differ")
    if set(names) != set(other.items):
        return test
    test.items = len(names)
    one, two = (np.array([result.items[name] for name in names]) for result in (base, other))
    if set(one) | set(two) <= {0.0, 1.0}:
        test.test, test.p = "McNemar, exact", mcnemar(one.astype(bool), two.astype(bool))
        test.won, test.lost = int((two > one).sum()), int((two < one).sum())
        test.difference = 100 * float(two.mean() - one.mean())
    elif len(names) < 2:
        test.test = "none: one item"
    else:
        change, scale = _mean(two - one, _weights(base)), 100 if base.unit == "%" else 1
        test.test, test.difference = "paired bootstrap over items", scale * change.value
        test.interval = [scale * change.low, scale * change.high]
    if test.difference is not None and not (_is_mean(base) and _is_mean(other)):
        test.test += ", of the items' means, not of the values"
    return test
