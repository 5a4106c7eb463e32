"""Results: a file per benchmark, model and loop count, with everything that its number depends on.

Results that differ in anything but the model and its loop count are different measurements: they have different hashes of their settings,
are kept in different folders, and are not compared with each other.
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
    """The model that was measured.

    Attributes:
        name: its name at the server.
        loops: its loop count; None if it is not known.
        checkpoint: folder or Hub name; None for a server that was running already.
        hash: hash of its weights and configuration.
        engine: the engine that ran it, as the server reports it.
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
        benchmark: name of the benchmark; title, metric and unit as in Benchmark.
        value: the number, in this unit.
        items: id -> score from 0 to 1, or loss.
        weights: weights of the items, if the value is not a plain mean.
        parts: further numbers of the tool.
        data: version or hash of the data.
        settings: settings that the number depends on, besides the model.
        settings_hash: hash of settings and data; results with the same hash can be compared.
        model: the model.
        date: when it was made, UTC.
        cost: requests, tokens and seconds of the server.
        seconds: duration of all runs that led to it.
        steps: the tool's commands.
        command: the command that made it.
        environment: machine and versions.
        paper: the paper's number for this loop count.
        path: path of the file.
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
        """Return what `rich` prints of the result."""
        from rich.text import Text

        unit = "%" if self.unit == "%" else f" {self.unit}"
        return [Text(f"{self.title}, {self.model.name}: {self.value:.4g}{unit}, {len(self.items)} items")]


@dataclass
class EvaluationResult(Result, Sequence):
    """Results of a run of `parloop eval`, earlier ones included: a sequence, ordered by loop count and benchmark.

    Attributes:
        results: the results, each in a file of its own.
        output: their folder.
    """

    results: list[BenchmarkResult]
    output: Path | None = not_kept(default=None)

    def __getitem__(self, index):
        return self.results[index]

    def __len__(self) -> int:
        return len(self.results)

    def shown(self) -> list[Any]:
        """Return what `rich` prints of the results."""
        return [part for result in self.results for part in result.shown()]


def settings_of(benchmark: Benchmark, job: Job) -> dict[str, Any]:
    """Return the settings that a number depends on, besides the model: tool, sampling, scaffold, items."""
    own = {name: value for name, value in job.settings.items() if name not in NO_DIFFERENCE}
    return {"benchmark": benchmark.name, "tool": benchmark.tool, "limit": job.limit, **own}


# Settings that change only the speed; and the tokenizer, which follows from a server's model.
NO_DIFFERENCE = {"workers", "threads", "connections", "parallel", "batch_size", "device", "tokenizer"}


def hash_of(content: Any) -> str:
    """Return a short hash of a value that JSON can hold."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


class AnotherRunError(EvaluationError):
    """The folder belongs to another measurement."""


def is_claimed(folder: Path) -> bool:
    """Return whether a folder belongs to a measurement."""
    try:
        return json.loads((folder / SETTINGS).read_text(encoding="utf-8")).keys() == {"settings", "model"}
    except (OSError, ValueError, AttributeError):
        return False


def claim(folder: Path, settings: dict[str, Any], model: dict[str, Any]) -> None:
    """Assign a folder to this measurement, or check that it is.

    Raises:
        AnotherRunError: it belongs to another one.
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
    """Return a hash of a checkpoint's weights and configuration; they are read once while they do not change."""
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
    """Write the result, and return it.

    Args:
        benchmark: the benchmark.
        job: its job.
        outcome: the tool's output.
        settings: see `settings_of`.
        model: fields of `Model`.
        more: further fields of the result.
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
        """Return the results ordered by loop count, then by name; those with unknown loop counts last."""
        return sorted(self.results, key=lambda result: (result.model.loops or math.inf, result.model.name))


def load_results(folders: list[Path]) -> list[BenchmarkResult]:
    """Return all results below these folders.

    Raises:
        EvaluationError: there is none, or a file is not a result.
    """
    found: dict[Path, BenchmarkResult] = {}
    for folder in folders:
        if not folder.exists():
            raise EvaluationError(f"{str(folder)!r} does not exist: give folders with results of parloop eval.")
        for path in sorted(folder.rglob(RESULT)):
            try:
                result = BenchmarkResult.from_json(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise EvaluationError(
                    f"{str(path)!r} is not a result of parloop eval ({error}): remove it, and run parloop eval again if it was one."
                ) from error
            result.path = path
            found[path.resolve()] = result
    if not found:
        raise EvaluationError(f"no result below {', '.join(map(str, folders))}: run parloop eval first.")
    return list(found.values())


def groups(results: list[BenchmarkResult]) -> list[Group]:
    """Group results that can be compared."""
    by_key: dict[tuple[str, str], list[BenchmarkResult]] = {}
    for result in results:
        by_key.setdefault((result.benchmark, result.settings_hash), []).append(result)
    return [Group(*key, members) for key, members in by_key.items()]
