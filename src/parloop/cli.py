"""The `parloop` command: one verb, one function, no logic."""

import dataclasses
import errno
import importlib.util
import io
import json
import os
import re
import runpy
import select
import shlex
import signal
import sys
import time
import typing
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Group, Parameter
from rich.console import Console
from rich.markup import escape

from . import __version__
from .errors import CheckpointError, EvaluationError, ParloopError, PortCheckError
from .record import printable
from .registration import too_old
from .train import ChatRecipe, Recipe, load_recipe

app = App(
    name="parloop",
    help="Run, train and diagnose Parallel Loop Transformers, and choose their loop count.",
    version=__version__,
    suppress_keyboard_interrupt=False,  # main says what to do then
)
MODEL_VERBS = {"bench", "convert", "diagnose", "export", "generate", "study", "train"}  # they need the model in transformers
Many = Parameter(consume_multiple=True, negative=())
Flag = Parameter(negative=())


def _can_be_a_folder(kind: Any, folder: Path | None) -> None:
    """Before there is work to lose. Raises ValueError: into a folder of such a name, weights for one could not be written."""
    if folder is None:
        return
    if printable(folder) != str(folder):
        raise ValueError(f"{printable(folder)!r} has bytes that are not UTF-8: choose another name.")
    folder.exists()  # raises OSError, of which main tells: the name is too long


Output = Annotated[Path, Parameter(validator=_can_be_a_folder)]


def _overrides(*kinds: type, without: tuple[str, ...] = ()) -> type:
    """The fields of these recipes as options that are None unless given."""
    options: dict[str, tuple] = {}
    for kind in kinds:
        hints = typing.get_type_hints(kind)
        for f in dataclasses.fields(kind):
            if f.name in options or f.name in without:
                continue
            hint = list[int] if f.name == "loops" else hints[f.name]
            default = f.default_factory() if callable(f.default_factory) else f.default
            shown = f"{f.metadata['doc']} [default: {default}]"
            group = CHAT if kind is ChatRecipe else RECIPE
            parameter = Parameter(help=shown, group=group, consume_multiple=True, negative=(), show_default=False)
            options[f.name] = (f.name, Annotated[hint | None, parameter], None)
    made = dataclasses.make_dataclass("Overrides", list(options.values()))
    made.__module__ = __name__  # cyclopts takes classes of the standard library for plain values
    return made


def _given(overrides: Any) -> dict[str, Any]:
    given = {name: value for name, value in vars(overrides).items() if value is not None}
    if len(given.get("loops", ())) == 1:
        given["loops"] = given["loops"][0]
    return given


RECIPE = Group("Fields of the recipe, to override it", sort_key=2)
CHAT = Group("Fields of recipes for conversations", sort_key=3)
Overrides: Any = _overrides(Recipe, ChatRecipe, without=("mixture",))
StudyOverrides: Any = _overrides(Recipe, without=("mixture", "loops", "init_from"))


@app.command
def train(
    recipe: str,
    /,
    *,
    output: Output | None = None,
    fresh: bool = False,
    plan: bool = False,
    overrides: Annotated[Overrides, Parameter(name="*")] = Overrides(),  # noqa: B008
) -> None:
    """Train a model on text, or fine-tune one on conversations, as a recipe says. Run it again to continue after an interruption.

    Example: parloop train quick --loops 2 --learning-rate 2e-3

    On several processes: torchrun --nproc-per-node 8 -m parloop train gpu

    Parameters
    ----------
    recipe
        A YAML file with the fields below, or the name of a shipped one: quick, laptop, gpu, loopcoder-v2-7b, task, chat, chat-lora, think.
    output
        Folder of the run. Default: runs/train/NAME-OF-THE-RECIPE-rR.
    fresh
        Delete the run in the folder and start over. Refused if the folder holds anything else.
    plan
        Train nothing; print parameters, FLOPs, memory and days, for several numbers of GPUs.
    """
    changes = _given(overrides)
    if plan:
        from .train.plan import plan_of
        from .train.plan_tables import plan_tables

        for part in plan_tables(plan_of(load_recipe(recipe, **changes))):
            _console().print(part, highlight=False)
        return
    from .train import train as run
    from .train.sharding import main_process

    result = run(recipe, output, changes=changes, fresh=fresh)
    if main_process():
        _console().print(result, highlight=False)


@app.command
def export(checkpoint: str, /, *, out: Output, to: str = "transformers", bits: int | None = None) -> None:
    """Write a run's checkpoint, of one process or of many, as a model that any tool loads; or a PLT for another engine.

    (A run that is finished has its model in its folder.)

    Example: parloop export runs/train/gpu-r2/checkpoint-500 --out after-500-steps

    For Macs: parloop export CHECKPOINT --to mlx --bits 4 --out for-my-mac

    Parameters
    ----------
    checkpoint
        Folder checkpoint-N of a run; for other forms than transformers also any PLT, a folder or a Hub name.
    out
        Folder to make.
    to
        transformers; mlx: a folder that mlx-lm runs without parloop; gguf: a file that no engine runs yet, for who writes one.
    bits
        For mlx and gguf: quantise to 8 or 4 bits, but for gates and norms. Default: the weights as they are; in gguf, float32.
    """
    from .export.export import export as run
    from .export.gguf import WARNING

    folder = run(checkpoint, out, to=to, bits=bits)
    _console().print(f"model: {folder}", highlight=False, markup=False, soft_wrap=True)
    if to == "gguf":
        _console().print(WARNING, style="yellow", highlight=False, markup=False)


@app.command
def study(
    source: str | None = None,
    /,
    *,
    loops: Annotated[list[int] | None, Many] = None,
    preset: str | None = None,
    seeds: int = 1,
    match: str = "tokens",
    control: Annotated[list[str] | None, Many] = None,
    output: Output | None = None,
    fresh: bool = False,
    overrides: Annotated[StudyOverrides, Parameter(name="*")] = StudyOverrides(),  # noqa: B008
) -> None:
    """Train one model per loop count under a matched protocol, and recommend a loop count.

    Prints tables and the path of a report. Run it again to continue after an interruption.

    Example: parloop study src/ --loops 1 2 3 --preset quick --seeds 3

    Parameters
    ----------
    source
        What to train on: stdlib (the default), installed (packages too), a folder, a glob, a .jsonl or .parquet file, hub:OWNER/NAME, or a task
        that takes depth: task:parity, task:s5, task:hops, task:run (docs/tasks.md).
    loops
        The loop counts to compare. Default: 1 2 3 4.
    preset
        Default: quick, or task for a task. quick (six minutes on two cores), task (minutes on two cores), laptop (planned for an hour), gpu (planned for half an hour on one large GPU), or a recipe file.
    seeds
        Trainings per loop count. Several make the intervals cover the luck of training.
    match
        tokens: the same training tokens for all. compute: the same training FLOPs.
    control
        Models of one loop beside every loop count above 1. deep: as many times the layers, each with its own weights. compute: as many more
        training tokens as the loops' compute buys.
    output
        Folder of the study. Default: runs/study-PRESET, with the match and the source if they are not the default.
    fresh
        Delete the runs in the folder and start over.
    """
    from .study import run_study

    changes = _given(overrides) | ({} if source is None else {"source": source})
    console = _console()
    preset = preset or ("task" if str(changes.get("source", "")).startswith("task:") else "quick")
    result = run_study(
        preset,
        output,
        loops=loops,
        seeds=seeds,
        match=match,
        controls=control,
        changes=changes,
        console=console,
        fresh=fresh,
    )
    console.print(result)
    _name_files(console, "report", result.folder, "report.html")


def _name_files(console: Console, what: str, folder: Path | None, *names: str) -> None:
    """Print where a verb's files are."""
    paths = ", ".join(str(Path(folder or "", name)) for name in names)
    console.print(f"{what}: {paths}", highlight=False, markup=False, soft_wrap=True)


@app.command
def generate(
    checkpoint: str,
    prompt: Annotated[str, Parameter(allow_leading_hyphen=True)] = "",
    /,
    *,
    loops: int | None = None,
    max_new_tokens: int = 200,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    think_budget: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
) -> None:
    """Stream text from a checkpoint.

    Example: parloop generate runs/study-quick/r2-seed0 "def fibonacci(n):" --loops 1

    Parameters
    ----------
    checkpoint
        Folder or Hub name of a PLT checkpoint.
    prompt
        Text to continue. "-" reads it from the standard input. One that is called as an option is goes after --.
    loops
        How often to run the stack. Default: as trained.
    max_new_tokens
        Length of the continuation, in tokens.
    temperature
        0: always the likeliest token. Higher: more variety.
    top_p
        Sample among the likeliest tokens that make up this probability.
    seed
        Seed of the sampling.
    think_budget
        Tokens of reasoning between <think> and </think>; it is closed then, and the answer follows. Default: as many as the model writes.
    device
        auto, cpu or cuda.
    dtype
        auto: as saved; or float32, bfloat16, float16.
    """
    from .generate import stream

    stream(
        checkpoint,
        _standard_input() if prompt == "-" else prompt,
        loops,
        max_new_tokens,
        temperature,
        top_p,
        seed,
        device,
        dtype,
        think_budget,
    )


def _standard_input() -> str:
    """Raises CheckpointError: it is closed, or no text."""
    if sys.stdin is None:
        raise CheckpointError("the prompt - is the standard input, which is closed.")
    try:
        return sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"the standard input is not UTF-8 ({error}): give the prompt as UTF-8.") from error


@app.command
def diagnose(
    *checkpoints: str,
    data: str | None = None,
    extensions: Annotated[list[str] | None, Many] = None,
    samples: int = 64,
    length: int | None = None,
    loops: int | None = None,
    batch_size: int = 1,
    device: str = "auto",
    dtype: str = "auto",
    center_rank: bool = False,
    output: Output | None = None,
) -> None:
    """What each loop of a checkpoint adds and costs, and whether one more or one fewer would pay.

    Prints a table and writes a report. Several checkpoints, say R = 2, 3 and 4 of a study, are put side by side.

    Example: parloop diagnose runs/study-quick/r2-seed0 runs/study-quick/r3-seed0

    Parameters
    ----------
    checkpoints
        Folders or Hub names of PLT checkpoints.
    data
        Text to look at it with: stdlib, installed, a folder, a glob, a .jsonl or .parquet file, or hub:OWNER/NAME. Default: the held-out
        part of what the model's recipe trained on, or stdlib.
    extensions
        Which files of a folder are read. Default: .py
    samples
        Rows of text, each from another document as far as there are enough.
    length
        Tokens per sample. Default: as in training, or 1024.
    loops
        How often to run the stack. Default: as trained.
    batch_size
        Samples at once: 1 needs the least memory.
    device
        auto, cpu or cuda.
    dtype
        auto: as saved; or float32, bfloat16, float16.
    center_rank
        Take the effective rank of states minus their mean.
    output
        Folder of the report. Default: runs/diagnose-NAMES, with a hash if another diagnosis has that folder.
    """
    from .diagnosis.checkpoint import diagnose_checkpoints

    console = _console()
    result = diagnose_checkpoints(
        checkpoints, output, data=data, extensions=extensions, samples=samples, length=length, loops=loops, batch_size=batch_size,
        device=device, dtype=dtype, center_rank=center_rank, console=console,
    )  # fmt: skip
    console.print(result)
    _name_files(console, "report", result.folder, "report.html")


@app.command
def convert(
    source: Path,
    /,
    *,
    out: Output,
    to: str = "plt",
    loops: int | None = None,
    start: str = "exact",
    window: int = 64,
    hidden_scale: float | None = None,
    gate_bias: float | None = None,
    data: str | None = None,
    samples: int = 8,
) -> None:
    """Turn a Llama, Mistral, Qwen2 or Qwen3 checkpoint into a PLT that computes the same, to train it on; or a PLT into a dense model.

    Every loop of the new PLT gives the source's logits, or nearly (see --start), until it is trained. Tensors, tokenizer, chat template
    and generation settings are copied. What the source computes and a PLT cannot is refused.

    Example: parloop convert Qwen3-0.6B --loops 2 --start open --out qwen3-plt

    And back: parloop convert qwen3-plt --to dense --out qwen3

    Parameters
    ----------
    source
        Folder of a checkpoint in safetensors. (From the Hub: hf download OWNER/NAME --local-dir FOLDER.)
    out
        Folder to make.
    to
        plt, or dense: loop 1 of a PLT as a Llama, or as another family that has its options.
    loops
        How often the PLT runs its stack. Default: 2.
    start
        exact: the source's logits to 1e-5, to serve or to check; loops learn nothing while c is 0. open: the loops are let in, and the change of the
        loss is printed; it learns best. See docs/upcycling.md.
    window
        Tokens before itself that a token sees in its own loop, from loop 2 on.
    hidden_scale
        c, the factor of the previous loop's state. Default: 0 for exact; for open, as large a state as the embedding.
    gate_bias
        What the gates start with: 0 is half window, half loop 1's cache; more is more cache. Default: 16 for exact, 0 for open.
    data
        Text to measure the loss on, as in `parloop diagnose`. Default: stdlib for the open start, none for the exact one.
    samples
        Rows of up to 512 tokens of that text. 0: do not measure. (Measuring loads the model; converting does not.)
    """
    from .convert import convert as run

    console = _console()
    done = run(
        source, out, to=to, loops=loops, start=start, window=window, hidden_scale=hidden_scale, gate_bias=gate_bias, data=data,
        samples=samples, console=console,
    )  # fmt: skip
    console.print(done, highlight=False, soft_wrap=True)


@app.command
def bench(
    checkpoint: str | None = None,
    /,
    *,
    shape: str | None = None,
    loops: Annotated[list[int] | None, Many] = None,
    contexts: Annotated[list[int] | None, Many] = None,
    batch_sizes: Annotated[list[int] | None, Many] = None,
    prefill_lengths: Annotated[list[int] | None, Many] = None,
    steps: int = 16,
    repeats: int = 7,
    dtype: str = "bfloat16",
    device: str = "auto",
    static: bool = False,
    compile: bool = False,
    threads: int | None = None,
    output: Output | None = None,
    fresh: bool = False,
) -> None:
    """Time prefill and decode at every loop count, side by side with a plain Llama and the memory's speed.

    Prints tables, and writes results.json and bench.png. Run it again to continue after an interruption.

    Example: parloop bench --shape 600m --loops 1 2 --contexts 256 4096

    Parameters
    ----------
    checkpoint
        Folder or Hub name of a PLT checkpoint.
    shape
        Instead of a checkpoint, random weights: 600m (the default; 1.2 GB), loopcoder-v2 (the released shape, 15 GB), tiny.
    loops
        The loop counts. Default: 1 2 3 4. 1 is always measured.
    contexts
        Tokens in the cache when decoding is timed; 0: no decoding. Default: 256 4096 16384, as far as the model allows.
    batch_sizes
        Sequences at a time. Default: 1.
    prefill_lengths
        Tokens of the prompts whose prefill is timed; 0: no prefill. Default: 2048.
    steps
        Timed decode steps per round.
    repeats
        Rounds that count; one more warms up.
    dtype
        Of weights and cache: bfloat16, float16 or float32.
    device
        auto, cpu or cuda.
    static
        Static caches, for all lines.
    compile
        Add lines with a static cache and a compiled decode step.
    threads
        Of torch. Default: as torch finds.
    output
        Folder of the bench. Default: runs/bench-NAME.
    fresh
        Measure again what the folder holds.
    """
    from .bench import run_bench

    console = _console()
    result = run_bench(
        checkpoint,
        shape=shape,
        loops=loops,
        contexts=contexts,
        batch_sizes=batch_sizes,
        prefill_lengths=prefill_lengths,
        steps=steps,
        repeats=repeats,
        dtype=dtype,
        device=device,
        static=static,
        compile=compile,
        threads=threads,
        output=output,
        fresh=fresh,
        console=console,
    )
    console.print(result)
    _name_files(console, "results", result.folder, "results.json", "bench.png")


@app.command
def serve(
    checkpoint: str,
    /,
    *arguments: Annotated[str, Parameter(allow_leading_hyphen=True)],
    loops: int | None = None,
    engine: str = "auto",
) -> None:
    """Serve a checkpoint to OpenAI clients: with vLLM if it is installed, else on a Mac with mlx-lm, else with transformers.

    The model answers to NAME@R, which shows the loop count, and to NAME.

    Example: parloop serve runs/study-quick/r2-seed0 --loops 1 --port 8001 --max-model-len 4096

    Parameters
    ----------
    checkpoint
        Folder or Hub name of a PLT checkpoint.
    arguments
        Options of the server: --port 8001, --host 0.0.0.0, and every option of `vllm serve` or `mlx_lm.server`.
    loops
        How often to run the stack. Default: as trained.
    engine
        auto, vllm, mlx or transformers.
    """
    from .serve.server import serve as run_server

    run_server(checkpoint, loops, engine, list(arguments))


@app.command(name="check")
def check_port(
    checkpoint: str | None = None,
    /,
    *,
    endpoint: str | None = None,
    model: str | None = None,
    engine: str = "auto",
    write: Output | None = None,
) -> None:
    """Does an engine compute a PLT, and if not, which mechanism does it lack? A minute, with a small checkpoint that is shipped.

    Write that checkpoint: parloop check --write probe

    Serve it with the engine, and: parloop check --endpoint http://127.0.0.1:8080/v1 --model probe

    Without a server: parloop check (what parloop serve starts here), or parloop check FOLDER (what became of the checkpoint).

    Ends with 0 if the model is right, else with 1.

    Parameters
    ----------
    checkpoint
        Folder that the small checkpoint was converted to. Default: itself. A server is started for it.
    endpoint
        A server that runs it, with /v1. Completions, greedy; log-probabilities if the server has them.
    model
        What that server calls it.
    engine
        Without --endpoint, which server to start: auto, vllm, mlx or transformers.
    write
        Folder to make, with the small checkpoint. Nothing is checked then.
    """
    from . import check

    console = _console()
    if write is not None:
        console.print(f"checkpoint: {check.write_probe(write)}", highlight=False, markup=False, soft_wrap=True)
        return
    if (endpoint is None) != (model is None) or (endpoint and checkpoint):
        raise PortCheckError("give --endpoint and --model together and no folder, or neither.")
    verdict = check.check_endpoint(endpoint, model) if endpoint and model else check.check_checkpoint(checkpoint, engine)
    console.print(f"[bold {'green' if verdict.right else 'red'}]{escape(verdict.headline)}[/]", highlight=False)
    for detail in verdict.details:
        console.print(f"  {detail}", highlight=False, markup=False)
    sys.exit(0 if verdict.right else 1)


@app.command(name="eval")
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

    Each tool is installed once, into an environment of its own; what models write runs in containers or a sandbox. Run it again to go on.

    What there is: parloop eval --list

    Example: parloop eval humaneval_plus bfcl_v3 CHECKPOINT --loops 1 2

    Of a server: parloop eval bfcl_v3 --endpoint http://127.0.0.1:8000/v1 --model NAME@2 --loops 2

    Then: parloop eval --report runs/eval

    Parameters
    ----------
    what
        Benchmarks, and a checkpoint (a folder, or OWNER/NAME of the Hub) unless --endpoint is given. With --report, folders with results.
    loops
        Loop counts; a server is started for each. Default: as trained. With --endpoint, what that server has, for the record.
    endpoint
        A server that runs, with /v1, instead of a checkpoint.
    model
        What that server calls the model.
    limit
        Only the first N items of each benchmark.
    data
        Local copies of data: BENCHMARK=PATH. docs/evaluation.md says what is in them.
    set
        Settings other than a benchmark's own: BENCHMARK.NAME=VALUE, the value as JSON or text.
    serve_options
        Options of `parloop serve`, in quotes: --serve-options "--engine vllm --max-model-len 32768"
    output
        Folder of the results.
    list
        Show the benchmarks and what they need.
    plan
        Show the commands, and check what they need; run nothing.
    report
        Tables and a plot of results, with intervals, tests and the paper's numbers; also written into --output, as report.html,
        evaluation.png and evaluation.json.
    fresh
        Delete what the folder holds of these benchmarks at these loop counts, answers and results, and start over. Refused if there
        is anything else.
    """
    from .evaluate import compare, run
    from .evaluate import report as tables

    console = _console()
    if list:
        console.print(tables.benchmark_table())
        return
    if report:
        comparison = compare.compare([Path(folder) for folder in what] or [output], output)
        console.print(comparison)
        _name_files(console, "report", comparison.folder, "report.html")
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
            f"--serve-options {options!r} cannot be split into words ({error}): look at its quotes."
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


@app.command
def run(
    module: Annotated[str, Parameter(name=["-m", "--module"])],
    *arguments: Annotated[str, Parameter(allow_leading_hyphen=True)],
) -> None:
    """Run any Python module that loads models by name, with PLT registered.

    Example: parloop run -m lm_eval --model hf --model_args pretrained=CHECKPOINT --tasks TASK

    With mlx-lm: parloop run -m mlx_lm generate --model CHECKPOINT --prompt "def "

    Parameters
    ----------
    module
        The module, as after `python -m`.
    arguments
        Its arguments.
    """
    sys.path.insert(0, os.getcwd())  # as python -m does
    if not _can_run(module):
        raise ParloopError(
            f"there is no module {module!r} that can be run: give one as after python -m, installed or in this folder."
        )
    from .export.mlx import register

    register()
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _can_run(module: str) -> bool:
    """Whether there is such a module, or a package with a __main__. (What goes wrong in it is its own.)"""
    try:
        found = importlib.util.find_spec(module)
        if found is not None and found.submodule_search_locations is not None:
            found = importlib.util.find_spec(f"{module}.__main__")
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise
        return False
    except (ValueError, ImportError):  # no name of a module
        return False
    return found is not None


class _Terminal(Console):
    def on_broken_pipe(self) -> None:
        raise BrokenPipeError  # main says what to do; rich would exit with 1


def _console() -> Console:
    """The terminal; where the output goes into a file, 100 columns."""
    console = _Terminal()
    return console if console.is_terminal or "COLUMNS" in os.environ else _Terminal(width=100)


def passed_through(tokens: list[str]) -> list[str]:
    """Of `parloop run`, with a -- after the module: what follows is the module's, even if it looks like an option of ours."""
    if tokens[:1] != ["run"] or len(tokens) < 2:
        return tokens
    place = 3 if tokens[1] in ("-m", "--module") else 2
    return tokens if tokens[1] in app.help_flags else [*tokens[:place], "--", *tokens[place:]]


def main() -> None:
    """Exits with 2 for what the user can put right, and as programs of a shell do with 130 after Ctrl-C, and with 141 if nobody reads
    what is printed."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # set by __init__.py
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # what cannot be printed, such as a file's name that is not UTF-8
    console = Console(stderr=True)
    runs_a_module = sys.argv[1:2] == ["run"]  # whose errors are its own
    try:
        try:
            _run()
        finally:
            if sys.stdout is not None and not sys.stdout.closed:
                sys.stdout.flush()  # so that it fails here, if it does
    except ParloopError as error:
        rank = os.environ.get("RANK", "0")
        if rank != "0":
            # Mostly the first process says the same, and the launcher ends the others when it does. If not, it is this one's alone.
            time.sleep(3)
        who = "" if rank == "0" else f" (process {rank})"
        _tell(console, f"error{who}:", str(error))
        sys.exit(2)
    except BrokenPipeError:
        if not _nobody_reads():
            raise
        _print_no_more()
        sys.exit(141)
    except OSError as error:
        output_is_full = error.errno == errno.ENOSPC and error.filename is None
        if not output_is_full and (runs_a_module or error.filename is None):
            raise
        if output_is_full:
            _print_no_more()
        named = "" if error.filename is None else f"{_short(printable(error.filename))!r}: "
        _tell(console, "error:", f"{named}{error.strerror}.")
        sys.exit(2)
    except KeyboardInterrupt:
        console.print("interrupted. Run the same command again to continue.")
        sys.exit(130)


def _run() -> None:
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # ours say what is going on
    app.console = _console()
    if too_old() and set(sys.argv[1:2]) & MODEL_VERBS:
        raise ParloopError(too_old())
    app(passed_through(sys.argv[1:]))


def _tell(console: Console, what: str, message: str) -> None:
    message = re.sub(r"\\udc[89a-f][0-9a-f]", "?", message)  # how repr() shows bytes of a name that are not UTF-8
    console.print(f"[bold red]{what}[/] {escape(message)}", highlight=False)


def _nobody_reads() -> bool:
    """Whether the other end of the standard output is closed."""
    poll = select.poll()
    poll.register(sys.stdout, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def _print_no_more() -> None:
    """Python would try again when it exits, and fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _short(name: str, longest: int = 120) -> str:
    return name if len(name) <= longest else f"{name[:longest]}..."
