"""The bench: prefill and decode of every loop count side by side, compared with a plain Llama and with the memory bandwidth.

    settings -> model (once) -> for every block, that is (phase, tokens, batch size): rounds of all variants -> results.json

Machines are noisy, so variants are interleaved: every round measures the memory bandwidth and then runs each variant once, in rotating
order. Ratios are taken within a round; results are medians and quartiles over rounds. Finished blocks are kept: the same command continues
after an interruption, and further lengths and batch sizes can be added to a folder.
"""

import json
import os
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress, TaskID

from ..checkpoints import usable_device
from ..errors import BenchError
from ..folder import BENCH, OutputFolder, claimed
from ..model.configuration import PLTConfig
from ..record import command_line, environment
from ..report.terminal import progress_bars
from ..timing import Spread, interleaved, reset_peak
from .measure import Block, Run, read_bandwidth
from .models import DTYPES, build, bytes_read, check_memory, config_of, on_meta
from .report import write_report
from .results import BenchResult, BlockResult, Row, Skipped
from .settings import Settings, plan, too_large, work
from .variants import PLAIN, Variant, decode_variants, prefill_variants

WARM_UP = 1  # rounds that are not counted


def run_bench(
    checkpoint: str | None = None,
    *,
    shape: str | None = None,
    loops: list[int] | None = None,
    contexts: list[int] | None = None,
    batch_sizes: list[int] | None = None,
    prefill_lengths: list[int] | None = None,
    weights: list[str] | None = None,
    device: str = "auto",
    threads: int | None = None,
    output: str | Path | None = None,
    fresh: bool = False,
    console: Console | None = None,
    command: str | None = None,
    **others: Any,
) -> BenchResult:
    """Run a bench into a folder, or continue it there, and draw the figure.

    Args:
        checkpoint: folder or Hub name of a PLT.
        shape: name of a shape with random weights, if there is no checkpoint; default: 600m.
        loops: loop counts R; 1 is always added, since the others are compared with it.
        contexts: tokens in the cache when the timed decode steps begin; 0 leaves decoding out.
        batch_sizes: sequences at a time.
        prefill_lengths: tokens of the prompts; 0 leaves prefill out.
        weights: quantised weights to measure beside the plain ones: int8, int4, int8+head, int4+head.
        device: auto, cpu or cuda.
        threads: threads of torch; default: as set.
        output: the folder. Default: runs/bench-NAME.
        fresh: discard the folder's results and measure again.
        console: where progress is printed; default: the standard output.
        command: the command that results.json names; default: this process's own.
        **others: steps, repeats, dtype, compile, static, read_bytes: see Settings.

    Returns:
        the result. results.json in the folder holds the same.

    Raises:
        BenchError: the settings are impossible, the memory is too small, or the folder holds a bench with other settings.
        OutputError: the folder cannot be written, holds something other than a bench, or another command works in it.
        CheckpointError: the checkpoint is not a PLT, or there is no such device.
    """
    console = console or Console()
    if checkpoint is not None and shape is not None:
        raise BenchError(f"both a checkpoint ({checkpoint}) and --shape {shape} are given: leave one out.")
    shape = "600m" if checkpoint is None and shape is None else shape
    device = usable_device(device)
    counts = tuple(sorted({1, *(loops or (1, 2, 3, 4))}))
    before = torch.get_num_threads()
    packed = tuple(name for name in dict.fromkeys(weights or ()) if name != PLAIN)
    threads = before if threads is None else threads
    settings = Settings(checkpoint, shape, counts, device=device, threads=threads, weights=packed, **others)
    settings.check()
    config = config_of(checkpoint, shape, counts[-1])
    keys = plan(settings, config, contexts, batch_sizes or [1], prefill_lengths)
    folder = Path(output) if output else default_folder(checkpoint, shape)
    try:
        torch.set_num_threads(settings.threads)
        with claimed(folder, BENCH, going_on="finished blocks are kept") as out:
            return _measure_into(out, settings, config, keys, fresh, console, command)
    finally:
        torch.set_num_threads(before)


def _measure_into(
    out: OutputFolder,
    settings: Settings,
    config: PLTConfig,
    keys: list[tuple[str, int, int]],
    fresh: bool,
    console: Console,
    command: str | None,
) -> BenchResult:
    """Measure the blocks that the folder does not hold yet. Returns all results."""
    result = None if fresh else earlier_results(out.path, settings)
    result = result or BenchResult(settings, environment())
    result.folder, result.skipped = out.path, []
    done = {block.key for block in result.blocks}
    missing = [key for key in keys if key not in done]
    if missing:
        result.commands.append(command or command_line())
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="num_loops=")  # for times, the trained loop count does not matter
            measure_all(settings, config, missing, result, out, console)
    write_report(result, out)
    return result


def default_folder(checkpoint: str | None, shape: str | None) -> Path:
    """Return runs/bench-NAME, by the checkpoint's or the shape's name."""
    name = shape if checkpoint is None else Path(os.path.realpath(checkpoint)).name
    return Path("runs", f"bench-{name}")


def earlier_results(folder: Path, settings: Settings) -> BenchResult | None:
    """Return the results that the folder holds, or None.

    Raises:
        BenchError: they have other settings or come from another machine, or are not a bench's.
    """
    path = folder / BenchResult.FILE
    if not path.exists():
        return None
    try:
        result = BenchResult.load(folder)
    except ValueError as error:
        raise BenchError(
            f"{path} is not from a bench ({error}): choose another --output, or --fresh to start over."
        ) from error
    before, now = (
        {**vars(of), **machine} for of, machine in ((result.settings, result.environment), (settings, environment()))
    )
    changed = [f"{name} was {before.get(name)}, is {value}" for name, value in now.items() if before.get(name) != value]
    if changed:
        raise BenchError(
            f"{folder} holds a bench that differs ({'; '.join(changed)}): choose another --output, or --fresh to start over."
        )
    return result


def prepare(settings: Settings, config: PLTConfig, result: BenchResult, console: Console) -> dict[str, Any]:
    """Return the models. The result gets their description and the memory bandwidth."""
    device = torch.device(settings.device)
    weights = sum(p.nbytes for p in on_meta(config, DTYPES[settings.dtype]).parameters())
    packed = sum(weights * int(name[3]) / 16 for name in settings.weights)
    name = settings.checkpoint or f"shape {settings.shape!r}"
    check_memory(name, weights, int(settings.read_bytes + 2**29 + packed), settings.dtype, device)
    with console.status(f"building {name}: {weights / 1e9:.1f} GB of weights"):
        models = build(settings.checkpoint, config, settings.dtype, device, settings.weights)
    result.model = describe(models["plt"], name)
    if not result.read_bandwidth:
        with console.status("measuring how fast this machine reads memory"):
            result.read_bandwidth = read_bandwidth(settings.read_bytes, device)
    return models


def measure_all(
    settings: Settings,
    config: PLTConfig,
    keys: list[tuple[str, int, int]],
    result: BenchResult,
    out: OutputFolder,
    console: Console,
) -> None:
    """Measure blocks and add them to the result, which is saved after each."""
    models = prepare(settings, config, result, console)
    device, weights = models["plt"].device, result.model["bytes"]
    with progress_bars(console) as progress:
        task = progress.add_task("", loss="", total=sum(work(settings, config, weights, key) for key in keys))
        for number, key in enumerate(keys, 1):
            name = "{}, {:,} tokens, batch {}".format(*key)
            progress.update(task, description=f"block {number} of {len(keys)}: {name}")
            share = work(settings, config, weights, key)
            reason = too_large(settings, config, key, device)
            if reason is None:
                try:
                    on_run = partial(_advance, progress, task, share)
                    result.add(measure_block(settings, models, key, result.read_bandwidth, on_run))
                except torch.OutOfMemoryError:
                    reason = "the GPU's memory was not enough"
            if reason is not None:
                result.skipped.append(Skipped(*key, reason))
                console.print(f"skipped: {name}: {reason}.", highlight=False)
                progress.advance(task, share)
            out.write(result.FILE, result.to_json())


def _advance(progress: Progress, task: TaskID, share: float, part: float) -> None:
    progress.advance(task, share * part)


def measure_block(
    settings: Settings,
    models: dict[str, Any],
    key: tuple[str, int, int],
    bandwidths: dict[str, float],
    on_run: Callable[[float], None],
) -> BlockResult:
    """Measure all rounds of one block. `on_run` is called after every run with its share of the block."""
    phase, tokens, batch_size = key
    torch.compiler.reset()  # after code for other lengths, torch would compile this one for dynamic lengths
    loops, llama = list(settings.loops), "llama" in models
    decode = phase == "decode"
    packed = settings.weights
    variants = decode_variants(loops, llama, settings.compile, packed) if decode else prefill_variants(loops, llama, packed)
    block = Block(models, tokens, batch_size, settings.steps if decode else 0, settings.static)
    fastest = max(bandwidths, key=lambda way: bandwidths[way])
    device = models["plt"].device
    part = 1 / len(variants) / (WARM_UP + settings.repeats)
    reads: list[float] = []
    # Older versions of torch count all variants as one function, and stop compiling after eight.
    with torch._dynamo.config.patch(recompile_limit=64):
        runs = interleaved(
            {variant: partial(block.measure, variant) for variant in variants}, settings.repeats, warm_up=WARM_UP, rotate=True,
            before_round=lambda: reads.append(read_bandwidth(settings.read_bytes, device, [fastest])[fastest]),
            after_run=lambda: on_run(part),
        )  # fmt: skip
    reads = reads[WARM_UP:]
    return BlockResult(
        phase=phase,
        tokens=tokens,
        context_range=[tokens + 1, tokens + settings.steps] if decode else None,
        batch_size=batch_size,
        read_bytes_per_second=Spread.of(reads),
        peak_is_of="the variant" if reset_peak(device) else "the process so far",
        rows=[_row(variant, runs, reads, models, batch_size, decode) for variant in variants],
    )


def _row(
    variant: Variant,
    runs: dict[Variant, list[Run]],
    reads: list[float],
    models: dict[str, Any],
    batch_size: int,
    decode: bool,
) -> Row:
    """Return one variant's numbers: medians and quartiles over rounds, of ratios taken within rounds."""
    seconds = {other: [run.seconds for run in made] for other, made in runs.items()}
    own = seconds[variant]

    def over(other: Variant) -> Spread | None:
        return Spread.of_ratios(own, seconds[other]) if other in seconds else None

    passes = 1 if variant.one_pass else variant.loops
    plain = variant.weights == PLAIN
    size = bytes_read(models["plt" if plain else variant.weights], variant.loops, batch_size, passes) if decode else None
    return Row(
        label=variant.label,
        variant=variant,
        kind=variant.kind,
        ms=Spread.of([1e3 * value for value in own]),
        ms_rounds=[1e3 * value for value in own],
        over_one_loop=over(Variant(1, compiled=variant.compiled, weights=variant.weights)),
        over_llama=over(Variant(1, llama=True, compiled=variant.compiled)),
        weight_bytes=size,
        weight_bytes_per_second=Spread.of([size / value for value in own]) if size else None,
        bandwidth_share=Spread.of([size / value / read for value, read in zip(own, reads)]) if size else None,
        cache=runs[variant][-1].cache,
        peak_bytes=max(run.peak_bytes for run in runs[variant]),
        over_plain=None if plain else over(replace(variant, weights=PLAIN)),
    )


def describe(model: Any, name: str) -> dict[str, Any]:
    """Return a model's name, number of parameters, bytes, attention backend and configuration."""
    parameters = list(model.parameters())
    return {
        "name": name,
        "parameters": sum(p.numel() for p in parameters),
        "bytes": sum(p.nbytes for p in parameters),
        "attention": model.config._attn_implementation,
        "config": json.loads(model.config.to_json_string()),
    }
