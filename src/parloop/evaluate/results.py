"""Results: a file per benchmark, model and loop count, with everything that its number depends on.

What differs in anything but the model and its loop count is another measurement: results say so by a hash of their settings, runs of
different settings do not go into one folder, and the report does not put them into one comparison.
"""

import functools
import hashlib
import json
import math
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..errors import EvaluationError
from ..record import write_json
from .benchmark import Benchmark, Job, Outcome, reading

RESULT, SETTINGS = "result.json", "settings.json"
FIELDS = {"benchmark", "unit", "value", "items", "weights", "parts", "settings", "settings_hash", "model", "date"}


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
            while block := file.read(2**24):
                digest.update(block)
    return digest.hexdigest()[:16]


def save(
    benchmark: Benchmark, job: Job, outcome: Outcome, settings: dict[str, Any], model: dict[str, Any], more: dict[str, Any]
) -> dict[str, Any]:
    """Write the result; returns it."""
    content = {
        "benchmark": benchmark.name,
        "title": benchmark.title,
        "metric": benchmark.metric,
        "unit": benchmark.unit,
        "value": outcome.value,
        "items": outcome.items,
        "weights": outcome.weights,
        "parts": outcome.parts,
        "data": outcome.data,
        "settings": settings,
        "settings_hash": hash_of([settings, outcome.data]),
        "model": model,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **more,
    }
    write_json(job.folder / RESULT, content)
    return content


@dataclass
class Group:
    """Results that can be compared: one benchmark, one hash of settings, the same items."""

    benchmark: str
    settings_hash: str
    results: list[dict[str, Any]]

    def by_model(self) -> list[dict[str, Any]]:
        """Ordered by loop count, then by name; those of unknown loops last."""
        return sorted(self.results, key=lambda result: (result["model"]["loops"] or math.inf, result["model"]["name"]))


def load_results(folders: list[Path]) -> list[dict[str, Any]]:
    """All results below these folders.

    Raises:
        EvaluationError: there is none, or a file is no result.
    """
    found: dict[Path, dict[str, Any]] = {}
    for folder in folders:
        if not folder.exists():
            raise EvaluationError(f"{str(folder)!r} is not there: give folders with results of parloop eval.")
        for path in sorted(folder.rglob(RESULT)):
            try:
                content = dict(json.loads(path.read_text(encoding="utf-8")))
                if missing := FIELDS - content.keys():
                    raise ValueError(f"it has no {sorted(missing)[0]}")
                content["model"]["loops"], content["model"]["name"]
            except (ValueError, KeyError, TypeError) as error:
                raise EvaluationError(
                    f"{str(path)!r} is no result of parloop eval ({error}): take it away, and run parloop eval again if it was one."
                ) from error
            found[path.resolve()] = content | {"path": str(path)}
    if not found:
        raise EvaluationError(f"no result below {', '.join(map(str, folders))}: run parloop eval first.")
    return list(found.values())


def groups(results: list[dict[str, Any]]) -> list[Group]:
    """Results by what can be compared."""
    by_key: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for result in results:
        by_key.setdefault((result["benchmark"], result["settings_hash"]), []).append(result)
    return [Group(*key, members) for key, members in by_key.items()]
