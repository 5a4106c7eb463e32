"""`parloop eval`."""

import json
import shlex
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from ..errors import EvaluationError
from .options import Flag, Many, Output
from .terminal import name_files, terminal


def evaluate(
    *what: str,
    loops: Annotated[list[int] | None, Many] = None,
    endpoint: str | None = None,
    model: str | None = None,
    limit: int | None = None,
    data: Annotated[list[str] | None, Many] = None,
    set: Annotated[list[str] | None, Many] = None,
    serve_options: Annotated[str, Parameter(allow_leading_hyphen=True)] = "",
    output: Output = Path("runs/eval"),
    list: Annotated[bool, Flag] = False,
    plan: Annotated[bool, Flag] = False,
    report: Annotated[bool, Flag] = False,
    fresh: Annotated[bool, Flag] = False,
) -> None:
    """Measure a checkpoint, or a server, with the tools of the paper's benchmarks, at each loop count.

    Each tool is installed once, into an environment of its own; code of models runs in containers or a sandbox. Run it again to continue.

    List the benchmarks: parloop eval --list

    Example: parloop eval humaneval_plus bfcl_v3 CHECKPOINT --loops 1 2

    On a server: parloop eval bfcl_v3 --endpoint http://127.0.0.1:8000/v1 --model NAME@2 --loops 2

    Then: parloop eval --report runs/eval

    Parameters
    ----------
    what
        Benchmarks, and a checkpoint (a folder, or OWNER/NAME of the Hub) unless --endpoint is given. With --report, folders with results.
    loops
        Loop counts; a server is started for each. Default: as trained. With --endpoint, that server's loop count, for the record.
    endpoint
        A running server, with /v1, instead of a checkpoint.
    model
        The model's name at that server.
    limit
        Only the first N items of each benchmark.
    data
        Local copies of data: BENCHMARK=PATH. docs/evaluation.md describes their files.
    set
        Settings that differ from a benchmark's defaults: BENCHMARK.NAME=VALUE, the value as JSON or text.
    serve_options
        Options of `parloop serve`, in quotes: --serve-options "--engine vllm --max-model-len 32768"
    output
        Folder of the results.
    list
        Show the benchmarks and their requirements.
    plan
        Show the commands, and check their requirements; run nothing.
    report
        Tables and a plot of results, with intervals, tests and the paper's numbers; also written into --output, as report.html,
        evaluation.png and evaluation.json.
    fresh
        Delete the answers and results of these benchmarks at these loop counts, and start over. Refused if the folder holds anything
        else.
    """
    from ..evaluate import compare, run
    from ..evaluate import report as tables

    console = terminal()
    if list:
        console.print(tables.benchmark_table())
        return
    if report:
        comparison = compare.compare([Path(folder) for folder in what] or [output], output)
        console.print(comparison)
        name_files(console, "report", comparison.folder, "report.html")
        return
    request = run.Request.of(
        what, endpoint=endpoint, model=model, loops=loops, output=output, limit=limit, fresh=fresh,
        data={name: Path(value) for name, value in _pairs(data, "data", "BENCHMARK=PATH")}, settings=_settings(set),
        serve_options=_words(serve_options),
    )  # fmt: skip
    if plan:
        for planned in run.plan(request):
            console.print(planned, soft_wrap=True)
        return
    console.print(run.evaluate(request, console))
    console.print(f"next:  parloop eval --report {shlex.quote(str(output))}", highlight=False, markup=False)


def _pairs(given: list[str] | None, option: str, form: str) -> list[tuple[str, str]]:
    pairs = [tuple(text.split("=", 1)) for text in given or []]
    for text, pair in zip(given or [], pairs):
        if len(pair) != 2 or not all(pair):
            raise EvaluationError(f"--{option} {text!r} must be {form}.")
    return pairs  # type: ignore[return-value]


def _words(options: str) -> list[str]:
    try:
        return shlex.split(options)
    except ValueError as error:
        raise EvaluationError(
            f"--serve-options {options!r} cannot be split into words ({error}): check its quotes."
        ) from error


def _settings(given: list[str] | None) -> dict[str, dict[str, Any]]:
    settings: dict[str, dict[str, Any]] = {}
    form = "BENCHMARK.NAME=VALUE"
    for name, value in _pairs(given, "set", form):
        benchmark, _, setting = name.partition(".")
        if not setting:
            raise EvaluationError(f"--set '{name}={value}' must be {form}.")
        try:
            settings.setdefault(benchmark, {})[setting] = json.loads(value)
        except RecursionError as error:
            raise EvaluationError(f"--set {name}: the value is nested too deeply.") from error
        except ValueError:
            settings.setdefault(benchmark, {})[setting] = value
    return settings
