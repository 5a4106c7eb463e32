"""Results: a file per benchmark, model and loop count, with everything that its number depends on.

What differs in anything but the model and its loop count is another measurement: results say so by a hash of their settings, runs of
different settings do not go into one folder, and the report does not put them into one comparison.
"""

import functools
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar

from ..errors import EvaluationError
from ..record import write_json, write_text
from ..result import Result, not_kept
from .benchmark import Benchmark, Job, Outcome, reading

RESULT, SETTINGS = "result.json", "settings.json"


@dataclass
class Model:
    """Which model was measured.

    Attributes:
        name: what its server calls it.
        loops: its loop count; None if it is not known.
        checkpoint: folder or Hub name; None for a server that ran already. hash: of its weights and configuration.
        engine: what ran it, by its own word.
    """

    name: str
    loops: int | None
    checkpoint: str | None = None
    hash: str | None = None
    engine: str = "unknown"


@dataclass
class BenchmarkResult(Result):
    """One benchmark, of one model at one loop count.

    Attributes:
        benchmark, title, metric, unit: whose number it is, and what it says.
        value: the number.
        items: id -> score from 0 to 1, or loss.
        weights: of the items, where the value is no plain mean.
        parts: more numbers of the tool's.
        data: version or hash of the data.
        settings: what the number depends on besides the model. settings_hash: of them and the data; equal ones can be compared.
        model: whose it is.
        date: when it was made, UTC.
        cost: what the server was asked for.
        seconds: of all runs that led to it.
        steps: the tool's commands.
        command: the command that made it.
        environment: machine and versions.
        paper: the paper's number for this loop count.
        path: of the file.
    """

    FILE: ClassVar[str] = RESULT

    benchmark: str
    title: str
    metric: str
    unit: str
    value: float
    items: dict[str, float]
    weights: dict[str, float] | None
    parts: dict[str, Any]
    data: str
    settings: dict[str, Any]
    settings_hash: str
    model: Model
    date: str
    cost: dict[str, Any] = field(default_factory=dict)
    seconds: float | None = None
    steps: list[str] = field(default_factory=list)
    command: str = ""
    environment: dict[str, Any] = field(default_factory=dict)
    paper: float | None = None
    path: Path | None = not_kept(default=None)

    def shown(self) -> list[Any]:
        from rich.text import Text

        unit = "%" if self.unit == "%" else f" {self.unit}"
        return [Text(f"{self.title}, {self.model.name}: {self.value:.4g}{unit}, {len(self.items)} items")]


@dataclass
class EvaluationResult(Result, Sequence):
    """What a run of `parloop eval` measured, or had measured before: a sequence of results, by loop count and benchmark.

    Attributes:
        results: each of them is a file of its own.
        output: the folder that they are in.
    """

    results: list[BenchmarkResult]
    output: Path | None = not_kept(default=None)

    def __getitem__(self, place):
        return self.results[place]

    def __len__(self) -> int:
        return len(self.results)

    def shown(self) -> list[Any]:
        return [part for result in self.results for part in result.shown()]


def settings_of(benchmark: Benchmark, job: Job) -> dict[str, Any]:
    """What a number depends on besides the model: tool, sampling, scaffold, items."""
    own = {name: value for name, value in job.settings.items() if name not in NO_DIFFERENCE}
    return {"benchmark": benchmark.name, "tool": benchmark.tool, "limit": job.limit, **own}


# How fast, not what; and the tokenizer, which is a server's model's own.
NO_DIFFERENCE = {"workers", "threads", "connections", "parallel", "batch_size", "device", "tokenizer"}


def hash_of(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


class AnotherRunError(EvaluationError):
    """A folder is another measurement's."""


def is_claimed(folder: Path) -> bool:
    """Whether a folder is a measurement's."""
    try:
        return json.loads((folder / SETTINGS).read_text(encoding="utf-8")).keys() == {"settings", "model"}
    except (OSError, ValueError, AttributeError):
        return False


def claim(folder: Path, settings: dict[str, Any], model: dict[str, Any]) -> None:
    """Make a folder this measurement's, or see that it is.

    Raises:
        AnotherRunError: it is another's.
    """
    path = folder / SETTINGS
    now = {"settings": settings, "model": model}
    if path.exists():
        with reading(path):
            before = json.loads(path.read_text(encoding="utf-8"))
            differ = [
                f"{name} {before[part].get(name)!r} -> {now[part].get(name)!r}"
                for part in ("settings", "model")
                for name in {**before[part], **now[part]}
                if before[part].get(name) != now[part].get(name)
            ]
        if differ:
            raise AnotherRunError(
                f"{str(folder)!r} holds a run of another kind ({', '.join(differ)}), and results of different settings do not mix: "
                f"choose another --output, or start over with --fresh."
            )
        return
    write_json(path, now)


def checkpoint_hash(folder: Path) -> str:
    """Of the weights and the configuration; read once as long as they stay what they are."""
    paths = sorted([*folder.absolute().glob("*.safetensors"), folder.absolute() / "config.json"])
    return _hash(tuple((path, path.stat().st_size, path.stat().st_mtime_ns) for path in paths))


@functools.cache
def _hash(files: tuple[tuple[Path, int, int], ...]) -> str:
    digest = hashlib.sha256()
    for path, _, _ in files:
        digest.update(path.name.encode())
        with path.open("rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()[:16]


def save(
    benchmark: Benchmark, job: Job, outcome: Outcome, settings: dict[str, Any], model: dict[str, Any], more: dict[str, Any]
) -> BenchmarkResult:
    """Write the result; returns it.

    Args:
        model: fields of `Model`. more: further fields of the result.
    """
    if outcome.value is None:
        raise ValueError(f"{benchmark.name} has no value: there are no items.")
    result = BenchmarkResult(
        benchmark=benchmark.name,
        title=benchmark.title,
        metric=benchmark.metric,
        unit=benchmark.unit,
        value=outcome.value,
        items=outcome.items,
        weights=outcome.weights,
        parts=outcome.parts,
        data=outcome.data,
        settings=settings,
        settings_hash=hash_of([settings, outcome.data]),
        model=Model(**model),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        **more,
        path=job.folder / RESULT,
    )
    write_text(job.folder / RESULT, result.to_json())
    return result


@dataclass
class Group:
    """Results that can be compared: one benchmark, one hash of settings, the same items."""

    benchmark: str
    settings_hash: str
    results: list[BenchmarkResult]

    def by_model(self) -> list[BenchmarkResult]:
        """Ordered by loop count, then by name; those of unknown loops last."""
        return sorted(self.results, key=lambda result: (result.model.loops or math.inf, result.model.name))


def load_results(folders: list[Path]) -> list[BenchmarkResult]:
    """All results below these folders.

    Raises:
        EvaluationError: there is none, or a file is no result.
    """
    found: dict[Path, BenchmarkResult] = {}
    for folder in folders:
        if not folder.exists():
            raise EvaluationError(f"{str(folder)!r} is not there: give folders with results of parloop eval.")
        for path in sorted(folder.rglob(RESULT)):
            try:
                result = BenchmarkResult.from_json(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise EvaluationError(
                    f"{str(path)!r} is no result of parloop eval ({error}): take it away, and run parloop eval again if it was one."
                ) from error
            result.path = path
            found[path.resolve()] = result
    if not found:
        raise EvaluationError(f"no result below {', '.join(map(str, folders))}: run parloop eval first.")
    return list(found.values())


def groups(results: list[BenchmarkResult]) -> list[Group]:
    """Results by what can be compared."""
    by_key: dict[tuple[str, str], list[BenchmarkResult]] = {}
    for result in results:
        by_key.setdefault((result.benchmark, result.settings_hash), []).append(result)
    return [Group(*key, members) for key, members in by_key.items()]
