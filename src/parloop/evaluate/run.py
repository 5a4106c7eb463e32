"""`parloop eval`: starts a server for each loop count, runs each benchmark's tool, and writes a result.

Nothing is lost when something fails: tools keep their answers, and the same command continues. Complete results are left alone.
"""

import contextlib
import difflib
import math
import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from ..checkpoints import check_weights, load_config, local_folder
from ..errors import EvaluationError, OutputError
from ..folder import LOCK, delete, disk_errors, locked, make_folder, sign, strangers
from ..record import command_line, environment
from ..registration import too_old
from ..serve.server import served_names
from . import results
from .benchmark import Benchmark, Job, Outcome, Step, as_file_name, benchmarks
from .environments import folder_of, make
from .meter import GIVE_UP, Meter, cost
from .needs import Check, check
from .results import EvaluationResult
from .sandbox import sandboxed
from .serving import Server, check_model, server_version, serving

STARTS = 3  # attempts to start our own server, per benchmark
SECONDS, REQUESTS = "seconds.txt", "requests.jsonl"
OF_A_JOB = r"(settings|result)\.json(\.partial)?|(\.parloop\.)?lock|port|seconds\.txt|requests\.jsonl|work|[\w-]+\.log"


@dataclass
class Request:
    """The arguments of `parloop eval`.

    Attributes:
        benchmarks: names of benchmarks.
        checkpoint: a folder or Hub name, served at each of `loops`.
        endpoint: instead of a checkpoint, address of a running server.
        model: the model's name at that server.
        loops: loop counts. None: the trained one.
        output: folder of the results.
        limit: number of items per benchmark.
        data: benchmark -> local copy of its data.
        settings: benchmark -> settings that differ from its defaults.
        serve_options: options of `parloop serve`.
        fresh: start over.
    """

    benchmarks: list[str]
    checkpoint: str | None = None
    endpoint: str | None = None
    model: str | None = None
    loops: list[int] | None = None
    output: Path = Path("runs/eval")
    limit: int | None = None
    data: dict[str, Path] = field(default_factory=dict)
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    serve_options: list[str] = field(default_factory=list)
    fresh: bool = False

    @classmethod
    def of(cls, what: Sequence[str], **options: Any) -> "Request":
        """Return the request for a list that mixes benchmarks and a checkpoint (a folder, or OWNER/NAME of the Hub).

        Raises:
            EvaluationError: there are several checkpoints.
        """
        checkpoints = [text for text in what if text not in benchmarks() and (Path(text).is_dir() or "/" in text)]
        if len(checkpoints) > 1:
            raise EvaluationError(f"{', '.join(checkpoints)}: give one checkpoint.")
        names = [text for text in what if text not in checkpoints]
        return cls(names, checkpoint=checkpoints[0] if checkpoints else None, **options)

    def check(self) -> None:
        """Check the arguments.

        Raises:
            EvaluationError: they cannot be carried out.
        """
        known = benchmarks()
        for name in [*self.benchmarks, *self.data, *self.settings]:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {near[0]}?" if near else f"parloop eval --list shows them ({', '.join(known)})."
                raise EvaluationError(
                    f"{name!r} is not a benchmark{'' if name in self.data | self.settings else ', and not a folder'}: {hint}"
                )
        if not self.benchmarks:
            raise EvaluationError("name at least one benchmark: parloop eval --list shows them.")
        if self.checkpoint is not None and self.endpoint is not None:
            raise EvaluationError(f"give the checkpoint {self.checkpoint!r} or --endpoint {self.endpoint}: one of both.")
        if self.checkpoint is None and self.endpoint is None:
            raise EvaluationError("give a checkpoint, or --endpoint URL with --model NAME.")
        if self.endpoint is not None and not self.model:
            raise EvaluationError(f"--endpoint {self.endpoint} needs --model NAME: what the server calls the model.")
        if self.endpoint is not None and self.loops is not None and len(self.loops) > 1:
            raise EvaluationError("a server that runs has one loop count: give --endpoint and --model once for each.")
        if self.loops is not None and min(self.loops, default=1) < 1:
            raise EvaluationError(f"loops={min(self.loops)} must be at least 1.")
        if self.limit is not None and self.limit < 1:
            raise EvaluationError(f"limit={self.limit} must be at least 1.")
        for name in self.benchmarks:
            if self.limit is not None and known[name].no_limit:
                raise EvaluationError(f"{name} has no --limit, since {known[name].no_limit}.")
        for name, changes in self.settings.items():
            unknown = changes.keys() - known[name].settings.keys()
            if unknown:
                raise EvaluationError(
                    f"{name} has no setting {sorted(unknown)[0]!r}: it has {', '.join(known[name].settings)}."
                )
            for setting, value in changes.items():
                default = known[name].settings[setting]
                if setting in known[name].fixed:
                    raise EvaluationError(f"{name}.{setting} is {default!r} with {known[name].tool}, and cannot be set.")
                if not _is_like(value, default):
                    raise EvaluationError(
                        f"{name}.{setting}={value!r} must be of the kind that its default is, {default!r}."
                    )
        for name, path in self.data.items():
            if not known[name].reads_data:
                raise EvaluationError(f"--data {name}={path}: {name} reads no local copy of its data; leave it out.")
            if not path.exists():
                raise EvaluationError(f"--data {name}={path}: there is no such file or folder.")
        if self.checkpoint is not None:
            load_config(self.checkpoint)  # raises: there is none
            if not too_old():  # otherwise vLLM serves, and checks them itself
                check_weights(self.checkpoint)

    def counts(self) -> list[int | None]:
        """Return the loop counts, without duplicates; None stands for an unknown one."""
        if self.loops:
            return list(dict.fromkeys(self.loops))
        return [None] if self.checkpoint is None else [load_config(self.checkpoint).plt_num_loops]

    def name(self, loops: int | None) -> str:
        """Return the model's name at the server."""
        return str(self.model) if self.checkpoint is None else served_names(self.checkpoint, loops or 1)[0]

    def folder(self, name: str, loops: int | None) -> Path:
        """Return the folder of a benchmark at a loop count; its parent is the model's folder."""
        return (self.output / as_file_name(self.name(loops), ".-@") / name).absolute()

    def finished(self, name: str, loops: int | None) -> bool:
        """Return whether a benchmark has a result at a loop count."""
        return (self.folder(name, loops) / results.RESULT).exists()

    def job(self, benchmark: Benchmark, loops: int | None, endpoint: str, bins: dict[str, Path]) -> Job:
        """Return the job of a benchmark at a loop count."""
        data = self.data.get(benchmark.name)
        return Job(
            folder=self.folder(benchmark.name, loops),
            endpoint=endpoint,
            model=self.name(loops),
            loops=loops,
            settings=benchmark.settings | self.settings.get(benchmark.name, {}),
            bins=bins,
            checkpoint=None if self.checkpoint is None else str(_absolute(self.checkpoint)),
            limit=self.limit,
            data=None if data is None else data.absolute(),
        )


def _is_like(value: Any, default: Any) -> bool:
    """Return whether a setting can have this value instead of its default."""
    if isinstance(default, float):
        return type(value) in (int, float) and math.isfinite(value)
    return type(value) is type(default) or (default is None and not isinstance(value, (dict, list)))


def _absolute(checkpoint: str) -> str | Path:
    return Path(checkpoint).absolute() if Path(checkpoint).is_dir() else checkpoint


@dataclass
class Planned:
    """A benchmark, its requirements, and the commands for the first of the loop counts `counts`."""

    benchmark: Benchmark
    checks: list[Check]
    commands: list[str]
    counts: list[int | None]

    def __rich__(self) -> Text:
        hours = f"{self.benchmark.needs.hours:g} hour" + ("" if self.benchmark.needs.hours == 1 else "s")
        head = f", {self.benchmark.tool}, about {hours} for each loop count"
        text = Text.assemble((self.benchmark.title, "bold"), head, no_wrap=True, overflow="ignore")
        for need in self.checks:
            mark = ("there", "green") if need.met else ("not there", "red")
            text.append("\n").append("  ").append(*mark).append(f" {need.what}" + ("" if need.met else f": {need.remedy}"))
        if self.counts[0] is not None:
            others = f" (for {', '.join(map(str, self.counts[1:]))} alike)" if self.counts[1:] else ""
            text.append(f"\n  with R = {self.counts[0]}{others}:")
        for command in self.commands:
            text.append(f"\n  $ {command}")
        return text


def plan(request: Request) -> list[Planned]:
    """Return the plan for each benchmark. Nothing is run or made.

    Raises:
        EvaluationError: the request cannot be carried out.
    """
    request.check()
    planned = []
    for name in request.benchmarks:
        benchmark = benchmarks()[name]
        bins = {e.name: folder_of(e) / "bin" for e in benchmark.environments}
        job = request.job(benchmark, request.counts()[0], request.endpoint or "http://127.0.0.1:PORT/v1", bins)
        try:
            benchmark.resolve(job)
            lines = [shown(step, job) for step in benchmark.steps(job)]
        except EvaluationError as error:
            lines = [f"(not before: {error})"]
        planned.append(Planned(benchmark, check(benchmark, job), lines, request.counts()))
    return planned


def shown(step: Step, job: Job) -> str:
    """Return a step as a command line."""
    variables = " ".join(f"{name}={shlex.quote(value)}" for name, value in sorted(step.environment.items()))
    where = f"  # in the sandbox, {step.sandbox}" if step.sandbox else ""
    return " ".join(filter(None, [variables, shlex.join(step.command)])) + where


def evaluate(request: Request, console: Console | None = None) -> EvaluationResult:
    """Run the benchmarks of a request, or continue them. `compare.compare` makes a report of the results.

    Args:
        request: the arguments.
        console: where progress is printed; default: the standard error.

    Returns:
        the results, in the order of loop counts and benchmarks.

    Raises:
        EvaluationError: a requirement is not met, or a benchmark gave no result. The others are run in any case, and finished work is kept.
        OutputError: a folder cannot be written, holds something else, or another run works in it.
    """
    with disk_errors(request.output):
        return EvaluationResult(_evaluate(request, console or Console(stderr=True)), request.output)


def _evaluate(request: Request, console: Console) -> list[results.BenchmarkResult]:
    request.check()
    counts = request.counts()
    waiting = [name for name in request.benchmarks if request.fresh or not all(request.finished(name, n) for n in counts)]
    for name in waiting:
        job = request.job(benchmarks()[name], counts[0], "", {})
        unmet = [c for c in check(benchmarks()[name], job) if not c.met]
        if unmet:
            raise EvaluationError(f"{name} cannot run here: " + "; ".join(f"{c.what}: {c.remedy}" for c in unmet) + ".")
    for folder in (request.folder(name, n) for name in waiting for n in counts):
        make_folder(folder)
        _refuse_others_files(folder, request.fresh)
        with locked(folder, keep=True):  # raises before a server is started
            for path in folder.iterdir() if request.fresh else ():
                if path.name != LOCK:
                    delete(path)
    bins = {e.name: make(e, console) for name in waiting for e in benchmarks()[name].environments}
    done, failed, can_continue = [], [], False
    for loops in counts:
        with _server(request, loops, console) as server:
            for name in request.benchmarks:
                try:
                    with disk_errors(request.output):
                        done.append(_measure(request, benchmarks()[name], loops, server, bins, console))
                except (EvaluationError, OutputError) as error:
                    failed.append(f"{name}, {request.name(loops)}: {error}")
                    can_continue |= not isinstance(error, results.AnotherRunError)
                    console.print(f"{name}, {request.name(loops)}: no result", style="red", markup=False, highlight=False)
    if failed:
        kept = "; answers are kept, and the same command continues" if can_continue else ""
        raise EvaluationError(f"{len(failed)} of {len(failed) + len(done)} gave no result{kept}:\n" + "\n".join(failed))
    return done


def _refuse_others_files(folder: Path, fresh: bool) -> None:
    """Raise OutputError if a job would overwrite files that parloop eval did not write, or delete them to start over."""
    claimed = results.is_claimed(folder)
    others = strangers(folder, OF_A_JOB if claimed else rf"{re.escape(LOCK)}|lock")
    if others and (fresh or not claimed):
        raise OutputError(
            f"{str(folder)!r} holds files that parloop eval did not write ({', '.join(others[:3])}): move them away, or choose another --output."
        )


@contextlib.contextmanager
def _timed(folder: Path) -> Iterator[None]:
    """Append the seconds of this run to the folder's file, however it ends."""
    started = time.monotonic()
    try:
        yield
    finally:
        with (folder / SECONDS).open("a", encoding="utf-8") as file:
            file.write(f"{time.monotonic() - started:.3f}\n")


def _seconds(folder: Path) -> float:
    """Return the seconds of all runs."""
    return sum(map(float, (folder / SECONDS).read_text(encoding="utf-8").split()))


@contextlib.contextmanager
def _server(request: Request, loops: int | None, console: Console) -> Iterator[Server | None]:
    """Start our server for this loop count, if any unfinished benchmark needs one."""
    waiting = [name for name in request.benchmarks if not request.finished(name, loops)]
    if request.checkpoint is None:
        if waiting:
            check_model(str(request.endpoint).rstrip("/"), str(request.model))
        yield None
        return
    if not any(benchmarks()[name].needs_server for name in waiting):
        yield None
        return
    log = request.folder("", loops) / "server.log"
    with serving(request.checkpoint, loops or 1, log, request.serve_options, console) as server:
        yield server


def _model_of(request: Request, loops: int | None) -> dict[str, Any]:
    """Return the model as results record it, without the engine."""
    weights = None if request.checkpoint is None else results.checkpoint_hash(local_folder(request.checkpoint))
    return {"name": request.name(loops), "loops": loops, "checkpoint": request.checkpoint, "hash": weights}


def _engine(request: Request, benchmark: Benchmark, server: Server | None) -> str:
    """Return the engine that ran the model, as the server reports it."""
    if request.checkpoint is None:
        return server_version(str(request.endpoint).rstrip("/"))
    # A benchmark without a server loads the checkpoint itself.
    return server.engine if server is not None and benchmark.needs_server else "transformers"


def _measure(
    request: Request, benchmark: Benchmark, loops: int | None, server: Server | None, bins: dict[str, Path], console: Console
) -> results.BenchmarkResult:
    """Return the result of one benchmark at one loop count, from an earlier run or measured now."""
    endpoint = server.url if server is not None else request.endpoint or ""
    job = request.job(benchmark, loops, endpoint, bins)
    make_folder(job.folder)
    _refuse_others_files(job.folder, False)
    model = _model_of(request, loops)
    benchmark.resolve(job)
    settings = results.settings_of(benchmark, job)
    if request.finished(benchmark.name, loops):
        (kept,) = results.load_results([job.folder])
        results.claim(job.folder, settings, model | {"engine": kept.model.engine})  # no server runs that would report it
        return kept
    with locked(job.folder, keep=True) as job.lock:
        model["engine"] = _engine(request, benchmark, server)
        results.claim(job.folder, settings, model)
        with _timed(job.folder):
            outcome = _run(benchmark, job, server, console)
        more = {
            "cost": cost(job.folder / REQUESTS),
            "seconds": _seconds(job.folder),
            "steps": [shown(step, job) for step in benchmark.steps(job)],
            "command": command_line(),
            "environment": environment(),
            "paper": benchmark.paper.get(loops or 0),
        }
        return results.save(benchmark, job, outcome, settings, model, more)


def _run(benchmark: Benchmark, job: Job, server: Server | None, console: Console) -> Outcome:
    """Run all steps, and read their output.

    Raises:
        EvaluationError: the output is not a result.
    """
    with Meter(job.endpoint or "http://127.0.0.1:9", job.folder / REQUESTS).running() as meter:
        job.endpoint = meter.url
        benchmark.prepare(job)
        for attempt in range(STARTS):
            try:
                for step in benchmark.steps(job):
                    run_step(step, job, meter, server, console, benchmark)
                break
            except ServerDiedError as error:
                if server is None or attempt + 1 == STARTS:
                    raise EvaluationError(f"{error} It was started {attempt + 1} time(s).") from error
                console.print(f"{error} Starting it again.", style="yellow", markup=False)
                server.start()
                meter.upstream, meter.failed_in_a_row = server.url, 0
                benchmark.prepare(job)
    outcome = benchmark.parse(job)
    if outcome.problems:
        raise EvaluationError("; ".join(outcome.problems))
    if not outcome.items or outcome.value is None:
        raise EvaluationError(f"{benchmark.tool} succeeded but left no items: see the logs in {job.folder}.")
    endless = [name for name, score in outcome.items.items() if not math.isfinite(score)]
    if endless:
        raise EvaluationError(
            f"{len(endless)} items have a score that is not a number, for instance {endless[0]}: see the logs in {job.folder}."
        )
    return outcome


class ServerDiedError(EvaluationError):
    """Our own server ended while a tool was using it."""


def run_step(step: Step, job: Job, meter: Meter, server: Server | None, console: Console, benchmark: Benchmark) -> None:
    """Run a command to its end.

    Raises:
        ServerDiedError: our server ended.
        EvaluationError: the command failed, or too many requests in a row did.
    """
    log = job.folder / f"{step.name}.log"
    job.work.mkdir(parents=True, exist_ok=True)
    command, variables = step.command, os.environ | step.environment
    if step.sandbox:
        readable = [*(folder.parent for folder in job.bins.values()), job.drivers, *([job.data] if job.data else [])]
        command = sandboxed(command, job.work, readable, step.environment, step.sandbox == "online")
    with log.open("a", encoding="utf-8") as output:
        output.write(f"\n$ {shown(step, job)}\n")
        output.flush()
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=output,
            stdin=subprocess.DEVNULL,
            cwd=step.folder or job.work,
            env=variables,
            start_new_session=True,
            pass_fds=[] if job.lock is None else [job.lock.fileno()],
        )
        if job.lock is not None:
            sign(job.lock, **({} if server is None else {"server": server.pid}), **{step.name: process.pid})
        try:
            with console.status("") as status:
                while (code := _wait(process)) is None:
                    spent = cost(meter.log) if step.server else {}
                    asked = (
                        f": {spent['requests']:,} requests, {spent['completion_tokens']:,} tokens written" if spent else ""
                    )
                    status.update(f"{benchmark.name}, {job.model}, {step.name}{asked}")
                    if step.server and meter.given_up:
                        if server is not None and not server.alive():
                            raise ServerDiedError(f"The server of {job.model} ended ({server.log}).")
                        raise EvaluationError(
                            f"the server failed {GIVE_UP} times in a row, the last time with: {meter.last_failure} When it works again, run the "
                            f"same command."
                        )
        finally:
            _end(process)
    if code not in step.exit_codes:
        if step.server and server is not None and not server.alive():
            raise ServerDiedError(f"The server of {job.model} ended ({server.log}).")
        last = " / ".join(log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-3:])[-600:]
        hint = f" The server's last failure: {meter.last_failure}" if step.server and meter.last_failure else ""
        raise EvaluationError(f"{benchmark.tool} ended with {code} ({log}): {last}{hint}")


def _wait(process: subprocess.Popen) -> int | None:
    with contextlib.suppress(subprocess.TimeoutExpired):
        return process.wait(0.5)
    return None


def _end(process: subprocess.Popen) -> None:
    """Stop the command and all processes that it started."""
    for how in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, how)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)
            return
