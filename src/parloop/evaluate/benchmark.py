"""Definition of a benchmark: its tool, the commands, their requirements, and how to read the tool's output.

Each benchmark is a small file in `benchmarks/` that ends in a `BENCHMARK`. Tools run in environments of their own (their dependencies
conflict with each other and with ours) and send requests to a server; their output files are read here.
"""

import contextlib
import hashlib
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from gzip import BadGzipFile
from importlib import import_module
from pathlib import Path
from typing import Any, TextIO

from ..errors import EvaluationError

NAMES = (
    "held_out", "humaneval_plus", "multipl_e", "bigcodebench", "livecodebench", "swe_bench_verified", "swe_bench_multilingual",
    "multi_swe_bench", "terminal_bench_v1", "terminal_bench_v2", "mind2web", "bfcl_v3",
)  # fmt: skip


@dataclass(frozen=True)
class Environment:
    """A Python environment that a tool runs in.

    Attributes:
        name: name of the file in `requirements/` with every package and version.
        python: the oldest version of Python that it runs on; its packages were chosen on this version.
        with_ours: whether it can also import the packages that parloop runs with.
    """

    name: str
    python: tuple[int, int] = (3, 11)
    with_ours: bool = False


@dataclass(frozen=True)
class Needs:
    """Requirements of a run.

    Attributes:
        docker: containers, for code that models write or for the tool's tasks.
        sandbox: bubblewrap, for code that models write.
        disk_gb: free disk, in GB.
        memory_gb: memory, in GB.
        network: hosts that data come from.
        registries: hosts that images come from.
        packages: packages of parloop's extra `eval`.
        hours: duration on one H200 for the released model at R = 2; an estimate, docs/evaluation.md has the arithmetic.
        commands: programs on the path.
    """

    docker: bool = False
    sandbox: bool = False
    disk_gb: float = 1
    memory_gb: float = 1
    network: tuple[str, ...] = ()
    registries: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()
    hours: float = 1
    commands: tuple[str, ...] = ()


@dataclass
class Job:
    """One benchmark of one model at one loop count.

    Attributes:
        folder: folder of the job; the tool works in `work`, below it.
        endpoint: address of the server, with /v1.
        model: the model's name at the server.
        loops: R; None if it is not known, for a server that we did not start.
        checkpoint: folder or Hub name of the model, if we started the server.
        limit: run only that many items.
        data: a local copy of the benchmark's data.
        settings: sampling and other settings that change the number.
        bins: environment's name -> folder with its programs.
        drivers: folder with our scripts that run in the tools' environments.
        lock: the locked file that marks the folder as in use; processes that the run starts hold it too.
    """

    folder: Path
    endpoint: str
    model: str
    loops: int | None
    settings: dict[str, Any]
    bins: dict[str, Path] = field(default_factory=dict)
    checkpoint: str | None = None
    limit: int | None = None
    data: Path | None = None
    drivers: Path = Path(__file__).parent / "drivers"
    lock: TextIO | None = None

    @property
    def work(self) -> Path:
        """Folder that the tool works in."""
        return self.folder / "work"

    @property
    def key(self) -> str:
        """The model's name, with letters, digits, points and dashes only."""
        return as_file_name(self.model)

    def python(self, environment: str) -> str:
        """Return the Python of an environment."""
        return str(self.bins[environment] / "python")


def as_file_name(text: str, kept: str = ".-") -> str:
    """Replace every character of a text that is not a letter, a digit or in `kept` by a dash.

    A leading point is replaced too, since .. would be another folder.
    """
    name = "".join(c if c.isalnum() or c in kept else "-" for c in text)
    return f"-{name[1:]}" if name.startswith(".") else name


@dataclass
class Step:
    """A command of a tool.

    Attributes:
        name: name of the step and of its log.
        command: the command line.
        sandbox: "" runs it without one; in "offline" and "online" it can write to the job's folder only, without or with network.
        server: whether it sends requests to the server.
        exit_codes: exit codes of success. (Several tools end with 0 in any case; `parse` checks their output.)
        environment: additional environment variables.
        folder: working directory; default: the job's `work`.
    """

    name: str
    command: list[str]
    sandbox: str = ""
    server: bool = True
    exit_codes: tuple[int, ...] = (0,)
    environment: dict[str, str] = field(default_factory=dict)
    folder: Path | None = None


@dataclass
class Outcome:
    """Output of a tool.

    Attributes:
        items: id of each item -> its score from 0 to 1 (or a loss).
        value: the benchmark's number, in its unit. Default: 100 times the mean of the items.
        parts: further numbers.
        problems: reasons why this is not a result, and the remedies.
        data: version or hash of the data.
        weights: weight of each item, if the value is not a plain mean: bytes of a text.
    """

    items: dict[str, float]
    value: float | None = None
    parts: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    data: str = ""
    weights: dict[str, float] | None = None

    def __post_init__(self) -> None:
        if self.value is None and self.items:
            self.value = 100 * sum(self.items.values()) / len(self.items)


@dataclass(frozen=True)
class Benchmark:
    """A benchmark. docs/evaluation.md explains the settings.

    Attributes:
        name: name on the command line.
        title: name in the paper's table.
        measures: what it measures, in one line.
        metric: the metric, in words.
        tool: the tool, with its version.
        paper: loop count -> the paper's number.
        environments: environments that its steps run in.
        needs: requirements of a run.
        settings: default settings; the result records those that were used.
        silent: details that the paper does not give.
        run_here: whether the tool itself ran in this project's tests, and how.
        steps: returns the commands.
        parse: reads the tool's output.
        resolve: fills in settings that are None.
        prepare: called before the first step, also when a run continues: writes configurations, removes failed items.
        unit: "%", or "bits per byte" (less is better).
        needs_server: False if the tool loads the checkpoint itself, unless an endpoint is given.
        memory_gb: returns the memory that this takes, in GB.
        reads_data: whether `--data` is read.
        no_limit: reason why `--limit` is refused, and the alternative.
        fixed: names of settings that the tool decides.
    """

    name: str
    title: str
    measures: str
    metric: str
    tool: str
    paper: dict[int, float]
    environments: tuple[Environment, ...]
    needs: Needs
    settings: dict[str, Any]
    silent: str
    run_here: str
    steps: Callable[[Job], list[Step]]
    parse: Callable[[Job], Outcome]
    resolve: Callable[[Job], None] = lambda job: None
    prepare: Callable[[Job], None] = lambda job: None
    unit: str = "%"
    needs_server: bool = True
    memory_gb: Callable[[Job], float] = lambda job: 0.0
    reads_data: bool = True
    no_limit: str = ""
    fixed: tuple[str, ...] = ()


@cache
def benchmarks() -> dict[str, Benchmark]:
    """Return all benchmarks, by name."""
    found: dict[str, Benchmark] = {}
    for name in NAMES:
        module = import_module(f".benchmarks.{MODULES.get(name, name)}", __package__)
        benchmark = getattr(module, name.upper(), None) or module.BENCHMARK
        found[benchmark.name] = benchmark
    return found


MODULES = {"swe_bench_verified": "swe_bench", "swe_bench_multilingual": "swe_bench"}


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn errors in the block, which reads a tool's file, into an EvaluationError.

    Raises:
        EvaluationError: the file is missing, incomplete, or of another kind.
    """
    try:
        yield
    except (
        FileNotFoundError,
        BadGzipFile,
        EOFError,
        zlib.error,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        ArithmeticError,
        RecursionError,
    ) as error:
        raise EvaluationError(
            f"{path} is not what its tool writes ({type(error).__name__}: {error}): see the logs of the steps, remove the file, and run "
            f"the same command again."
        ) from error


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read a file with a JSON object per line. An incomplete last line is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError):
            continue
    return rows


def digest(*paths: Path) -> str:
    """Return a hash of files, in this order, that identifies the data."""
    total = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(2**24):
                total.update(block)
    return f"sha256 {total.hexdigest()[:16]}"
