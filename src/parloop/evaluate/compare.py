"""Results side by side: against the loop count, with intervals, with tests on the same items, beside the paper's numbers."""

from pathlib import Path
from typing import Any

import numpy as np

from ..folder import EVALUATION_REPORT, claimed
from ..statistics import Interval, bootstrap_mean, mcnemar, resample_weights, wilson
from .benchmark import benchmarks
from .results import Group, groups, load_results


def compare(folders: list[Path], output: Path) -> dict[str, Any]:
    """Everything that the report shows; also written to evaluation.json.

    Returns:
        {"benchmarks": one entry each, with "rows" ("ours" and "paper", or one that says "not run"), "tests" and the "paper"'s values}

    Raises:
        EvaluationError: there are no results.
        OutputError: others' files are in the way, or the folder cannot be written.
    """
    results = load_results(folders)
    by_benchmark: dict[str, list[Group]] = {}
    for group in groups(results):
        by_benchmark.setdefault(group.benchmark, []).append(group)
    entries = []
    for name, benchmark in benchmarks().items():
        entry: dict[str, Any] = {
            "benchmark": name, "title": benchmark.title, "metric": benchmark.metric, "unit": benchmark.unit, "tool": benchmark.tool,
            "silent": benchmark.silent, "paper": {str(loops): value for loops, value in benchmark.paper.items()}, "rows": [], "tests": [],
        }  # fmt: skip
        for group in by_benchmark.get(name, []):
            members = group.by_model()
            entry["rows"] += [_row(result, len(by_benchmark[name]) > 1) for result in members]
            entry["tests"] += _tests(members)
        if by_benchmark.get(name):
            entry["rows"] += [
                {"source": "paper", "loops": loops, "model": "7B", "value": value}
                for loops, value in benchmark.paper.items()
            ]
        else:
            counts, values = (" / ".join(map(str, some)) for some in (benchmark.paper, benchmark.paper.values()))
            model = f"paper, R = {counts}: {values}" if benchmark.paper else ""
            entry["rows"].append({"source": "not run", "loops": None, "model": model, "value": None})
        entries.append(entry)
    content = {"benchmarks": entries, "folders": [str(folder) for folder in folders]}
    with claimed(output, EVALUATION_REPORT) as out:
        out.write_json("evaluation.json", content)
    return content


def interval_of(result: dict[str, Any]) -> Interval | None:
    """Of the value, over the choice of items, in its unit; None where the value is no mean of them, or one item has no spread."""
    values, value, scale = np.array(list(result["items"].values())), result["value"], 100 if result["unit"] == "%" else 1
    passes = set(values) <= {0.0, 1.0} and not result["weights"]
    if len(values) < 2 and not passes:
        return None
    if not _is_mean(result):
        return None
    interval = wilson(float(values.sum()), len(values)) if passes else _mean(values, _weights(result))
    return Interval(value, min(value, scale * interval.low), max(value, scale * interval.high))  # rounding apart


def _is_mean(result: dict[str, Any]) -> bool:
    """Of the items, by their weights. BFCL's and MultiPL-E's values are means of groups."""
    mean = np.average(list(result["items"].values()), weights=_weights(result))
    return abs((100 if result["unit"] == "%" else 1) * float(mean) - result["value"]) <= 1e-6


def _weights(result: dict[str, Any]) -> np.ndarray | None:
    return np.array([result["weights"][name] for name in result["items"]]) if result["weights"] else None


def _mean(values: np.ndarray, sizes: np.ndarray | None) -> Interval:
    """Of items of these sizes, bootstrapped over items."""
    if sizes is None:
        return bootstrap_mean(values)
    weights = resample_weights(len(values), 1, np.random.default_rng(0)).by_document
    low, high = np.quantile((weights @ (values * sizes)) / (weights @ sizes), [0.025, 0.975])
    return Interval(float(values @ sizes / sizes.sum()), float(low), float(high))


def _row(result: dict[str, Any], several_settings: bool) -> dict[str, Any]:
    interval, cost, solved = interval_of(result), result.get("cost") or {}, sum(result["items"].values())
    row = {
        "source": "ours", "loops": result["model"]["loops"], "model": result["model"]["name"], "value": result["value"],
        "interval": None if interval is None else [interval.low, interval.high], "items": len(result["items"]),
        "hash": result["model"].get("hash"), "date": result["date"], "path": result["path"], "limit": result["settings"].get("limit"),
        "settings": result["settings_hash"] if several_settings else "", "parts": result["parts"],
    }  # fmt: skip
    if result["unit"] == "%" and solved and cost.get("requests"):
        row["tokens_per_solved"] = (cost["prompt_tokens"] + cost["completion_tokens"]) / solved
        row["seconds_per_solved"] = cost["seconds"] / solved
    if "leaks" in result["parts"]:
        row["leaks"] = len(result["parts"]["leaks"])
    return row


def _tests(members: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each result against the one of the fewest loops, on the same items."""
    base = members[0]
    tests: list[dict[str, Any]] = []
    if base["model"]["loops"] is None:  # of no result it is known
        return tests
    for other in members[1:]:
        names = list(base["items"])
        if set(names) != set(other["items"]):
            tests.append({"base": base["model"]["name"], "other": other["model"]["name"], "test": "none: the items differ"})
            continue
        one, two = (np.array([result["items"][name] for name in names]) for result in (base, other))
        test: dict[str, Any] = {"base": base["model"]["name"], "other": other["model"]["name"], "items": len(names)}
        if set(one) | set(two) <= {0.0, 1.0}:
            test |= {
                "test": "McNemar, exact", "p": mcnemar(one.astype(bool), two.astype(bool)), "won": int((two > one).sum()),
                "lost": int((two < one).sum()), "difference": 100 * float(two.mean() - one.mean()),
            }  # fmt: skip
        elif len(names) < 2:
            test |= {"test": "none: one item"}
        else:
            change = _mean(two - one, _weights(base))
            scale = 100 if base["unit"] == "%" else 1
            test |= {
                "test": "paired bootstrap over items", "difference": scale * change.value, "interval": [scale * change.low, scale * change.high],
            }  # fmt: skip
        if "difference" in test and not (_is_mean(base) and _is_mean(other)):
            test["test"] += ", of the items' means and not of the values"
        tests.append(test)
    return tests
