"""What a benchmark is: which tool runs it, with which commands, what that needs, and how to read what the tool left.

Each benchmark is a small file in `benchmarks/` that ends in a `BENCHMARK`. Tools run in environments of their own (their dependencies
conflict with each other and with ours) and talk to a server; what they leave is read here.
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
        name: of the file in `requirements/` with every package and version.
        python: the oldest that it runs on, and that its packages were chosen on.
        with_ours: it also sees the packages that parloop runs with.
    """

    name: str
    python: tuple[int, int] = (3, 11)
    with_ours: bool = False


@dataclass(frozen=True)
class Needs:
    """What a run takes.

    Attributes:
        docker: containers, for what models write or for the tool's tasks.
        sandbox: bubblewrap, for what models write.
        disk_gb, memory_gb: free.
        network: hosts that data come from.
        registries: hosts that images come from.
        packages: of parloop's extra `eval`.
        hours: on one H200 for the released model at R = 2; an estimate, docs/evaluation.md has the arithmetic.
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
        folder: of the job; the tool works in `work`, below it.
        endpoint: address of the server, with /v1.
        model: what the server calls the model.
        loops: R; None: not known, for a server of somebody else's.
        checkpoint: the folder or Hub name, if it is our own server that runs.
        limit: only that many items.
        data: a local copy of the benchmark's data.
        settings: sampling and whatever else changes the number.
        bins: environment's name -> folder with its programs.
        drivers: folder with what runs in the tools' environments.
        lock: the file that says that a run works here, locked; what the run starts holds it too.
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
        return self.folder / "work"

    @property
    def key(self) -> str:
        """The model's name, of letters, digits, points and dashes only."""
        return as_file_name(self.model)

    def python(self, environment: str) -> str:
        return str(self.bins[environment] / "python")


def as_file_name(text: str, kept: str = ".-") -> str:
    """A text with dashes for what is neither letter nor digit nor kept, and for a point at its beginning: .. is another folder."""
    name = "".join(c if c.isalnum() or c in kept else "-" for c in text)
    return f"-{name[1:]}" if name.startswith(".") else name


@dataclass
class Step:
    """A command of a tool.

    Attributes:
        name: what it does; also of its log.
        sandbox: "" runs it as it is; "offline" and "online" where it can write to the job's folder only, without or with the network.
        server: it asks the server.
        exit_codes: that mean it went well. (Whether it did, `parse` finds out: several tools end with 0 whatever happened.)
        environment: variables, besides PATH and the like.
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
    """What a tool left.

    Attributes:
        items: id of each item -> its score from 0 to 1 (or a loss).
        value: the benchmark's number, in its unit. Default: 100 times the mean of the items.
        parts: more numbers.
        problems: why this is no result, and what to do.
        data: version or hash of the data.
        weights: of each item, where the value is no plain mean: bytes of a text.
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
    """A benchmark; see the fields' comments in docs/evaluation.md.

    Attributes:
        name: as on the command line.
        title: as in the paper's table.
        measures: in a line.
        metric: in words.
        tool: with its version.
        paper: loop count -> the paper's number.
        environments: that its steps run in.
        settings: the defaults; what a user sets otherwise is part of the result.
        fixed: those of them that the tool decides.
        silent: what the paper does not say.
        run_here: whether the tool itself ran in this project's tests, and how.
        steps, parse: see above.
        resolve: fills in settings that are None.
        prepare: before the first step of a run, or of one that goes on: writes configurations, takes away what failed.
        unit: "%", or "bits per byte" (less is better).
        needs_server: False: it loads the checkpoint by itself, unless an endpoint is given.
        memory_gb: what that takes.
        reads_data: `--data` is read.
        no_limit: why `--limit` is refused, and what to do instead.
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
    """All of them, by name."""
    found: dict[str, Benchmark] = {}
    for name in NAMES:
        module = import_module(f".benchmarks.{MODULES.get(name, name)}", __package__)
        benchmark = getattr(module, name.upper(), None) or module.BENCHMARK
        found[benchmark.name] = benchmark
    return found


MODULES = {"swe_bench_verified": "swe_bench", "swe_bench_multilingual": "swe_bench"}


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Around what reads a tool's file.

    Raises:
        EvaluationError: it is not there, was torn, or is another kind of file.
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
            f"{path} is not what its tool writes ({type(error).__name__}: {error}): see the logs of the steps, take the file away, and run "
            f"the same command again."
        ) from error


def read_lines(path: Path) -> list[dict[str, Any]]:
    """A file with a JSON object per line; a last line that was torn is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError):
            continue
    return rows


def digest(*paths: Path) -> str:
    """Of files, in this order: which data it was."""
    total = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(2**24):
                total.update(block)
    return f"sha256 {total.hexdigest()[:16]}"
