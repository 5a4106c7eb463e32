"""The bench: prefill and decode of every loop count side by side, against a plain Llama and the memory's speed.

    settings -> model (once) -> for every block, that is (phase, tokens, batch size): rounds of all variants -> results.json

Machines are noisy, so variants are interleaved: every round runs each once, in rotating order, after a reading of the memory
bandwidth; ratios are taken within a round, and reported are medians and quartiles over rounds. Finished blocks are kept: the
same command continues after an interruption, and other lengths and batch sizes can be added to a folder.
"""

import json
import os
import statistics
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress, TaskID

from ..errors import BenchError
from ..folder import BENCH, OutputFolder, claimed
from ..model.configuration import PLTConfig
from ..record import command_line, environment
from ..report.terminal import progress_bars
from .measure import Block, Variant, cache_report, decode_variants, peak_bytes, prefill_variants, read_bandwidth, reset_peak
from .models import DTYPES, build, bytes_read, check_memory, config_of, on_meta
from .settings import Settings, plan, too_large, work

WARM_UP = 1  # rounds that are not counted


def run_bench(
    checkpoint: str | None = None,
    *,
    shape: str | None = None,
    loops: list[int] | None = None,
    contexts: list[int] | None = None,
    batch_sizes: list[int] | None = None,
    prefill_lengths: list[int] | None = None,
    device: str = "auto",
    threads: int | None = None,
    output: str | Path | None = None,
    fresh: bool = False,
    console: Console | None = None,
    command: str | None = None,
    **others: Any,
) -> dict[str, Any]:
    """Measure into a folder, or continue there.

    Args:
        checkpoint, shape: one of the two, or neither for the shape 600m.
        loops: R; 1 is always among them, since everything is compared with it.
        contexts: tokens held when the timed decode steps begin; 0 leaves decoding out.
        prefill_lengths: tokens; 0 leaves prefill out.
        others: steps, repeats, dtype, compile, static, read_bytes: see Settings.

    Returns:
        what results.json holds.

    Raises:
        BenchError: impossible settings, too little memory, or a folder with another bench.
        OutputError: the folder cannot be written, holds something else than a bench, or another command works in it.
        CheckpointError: no PLT checkpoint.
    """
    console = console or Console()
    if checkpoint is not None and shape is not None:
        raise BenchError(f"both a checkpoint ({checkpoint}) and --shape {shape} are given: leave one out.")
    shape = "600m" if checkpoint is None and shape is None else shape
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    counts = tuple(sorted({1, *(loops or (1, 2, 3, 4))}))
    before = torch.get_num_threads()
    settings = Settings(checkpoint, shape, counts, device=device, threads=before if threads is None else threads, **others)
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
    keys: list[tuple],
    fresh: bool,
    console: Console,
    command: str | None,
) -> dict[str, Any]:
    """Measure the blocks that the folder does not hold yet. Returns all results."""
    results = {} if fresh else earlier_results(out.path, settings)
    results = results or {"settings": settings.as_json(), "environment": environment(), "commands": [], "blocks": []}
    results["skipped"] = []
    done = {(block["phase"], block["tokens"], block["batch_size"]) for block in results["blocks"]}
    missing = [key for key in keys if key not in done]
    if missing:
        results["commands"].append(command or command_line())
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="num_loops=")  # a random model is as bad at every loop count
            measure_all(settings, config, missing, results, out, console)
    return results


def default_folder(checkpoint: str | None, shape: str | None) -> Path:
    name = shape if checkpoint is None else Path(os.path.realpath(checkpoint)).name
    return Path("runs", f"bench-{name}")


def earlier_results(folder: Path, settings: Settings) -> dict[str, Any]:
    """What the folder holds, if it can be continued."""
    path = folder / "results.json"
    if not path.exists():
        return {}
    results = json.loads(path.read_text(encoding="utf-8"))
    now = {"settings": settings.as_json(), "environment": environment()}
    changed = [
        f"{name} was {results.get(part, {}).get(name)}, is {value}"
        for part, values in now.items()
        for name, value in values.items()
        if results.get(part, {}).get(name) != value
    ]
    if changed:
        raise BenchError(
            f"{folder} holds a bench that differs ({'; '.join(changed)}): choose another --output, or --fresh to start over."
        )
    return results


def prepare(settings: Settings, config: PLTConfig, results: dict[str, Any], console: Console) -> dict[str, Any]:
    """The models; what they are and how fast the machine reads memory goes into `results`."""
    device = torch.device(settings.device)
    weights = sum(p.nbytes for p in on_meta(config, DTYPES[settings.dtype]).parameters())
    name = settings.checkpoint or f"shape {settings.shape!r}"
    check_memory(name, weights, settings.read_bytes + 2**29, settings.dtype, device)
    with console.status(f"building {name}: {weights / 1e9:.1f} GB of weights"):
        models = build(settings.checkpoint, config, settings.dtype, device)
    results["model"] = describe(models["plt"], name)
    if "read_bandwidth" not in results:
        with console.status("measuring at what rate this machine reads memory"):
            results["read_bandwidth"] = read_bandwidth(settings.read_bytes, device)
    return models


def measure_all(
    settings: Settings, config: PLTConfig, keys: list[tuple], results: dict[str, Any], out: OutputFolder, console: Console
) -> None:
    """Measure blocks and add them to `results`, which is saved after each."""
    models = prepare(settings, config, results, console)
    device, weights = models["plt"].device, results["model"]["bytes"]
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
                    block = measure_block(settings, models, key, results["read_bandwidth"], on_run)
                    results["blocks"] = sorted([*results["blocks"], block], key=_order)
                except torch.OutOfMemoryError:
                    reason = "the GPU's memory was not enough"
            if reason is not None:
                results["skipped"].append(dict(zip(("phase", "tokens", "batch_size"), key)) | {"reason": reason})
                console.print(f"skipped: {name}: {reason}.", highlight=False)
                progress.advance(task, share)
            out.write_json("results.json", results)


def _advance(progress: Progress, task: TaskID, share: float, part: float) -> None:
    progress.advance(task, share * part)


def measure_block(
    settings: Settings,
    models: dict[str, Any],
    key: tuple[str, int, int],
    bandwidths: dict[str, float],
    on_run: Callable[[float], None],
) -> dict[str, Any]:
    """All rounds of one block; `on_run` hears after every run which part of the block it was."""
    phase, tokens, batch_size = key
    torch.compiler.reset()  # what was compiled for other lengths would make this one compile for any length
    loops, llama = list(settings.loops), "llama" in models
    decode = phase == "decode"
    variants = decode_variants(loops, llama, settings.compile) if decode else prefill_variants(loops, llama)
    block = Block(models, tokens, batch_size, settings.steps if decode else 0, settings.static)
    fastest = max(bandwidths, key=lambda way: bandwidths[way])
    device = models["plt"].device
    seconds: dict[Variant, list[float]] = {variant: [] for variant in variants}
    reads: list[float] = []
    peaks, caches = dict.fromkeys(variants, 0), {}
    own_peaks = reset_peak(device)
    # Older versions of torch count all variants as one function, and give up compiling after eight.
    with torch._dynamo.config.patch(recompile_limit=64):
        for round_ in range(WARM_UP + settings.repeats):
            read = read_bandwidth(settings.read_bytes, device, [fastest])[fastest]
            turn = round_ % len(variants)
            for variant in variants[turn:] + variants[:turn]:
                reset_peak(device)
                elapsed, cache = block.run(variant)
                peaks[variant] = max(peaks[variant], peak_bytes(device))
                caches[variant] = cache_report(block, variant, cache)
                del cache
                if round_ >= WARM_UP:
                    seconds[variant].append(elapsed)
                on_run(1 / len(variants) / (WARM_UP + settings.repeats))
            if round_ >= WARM_UP:
                reads.append(read)
    rows = [row(variant, seconds, reads, models, batch_size, decode) for variant in variants]
    for variant, values in zip(variants, rows):
        values |= {"cache": caches[variant], "peak_bytes": peaks[variant]}
    return {
        "phase": phase,
        "tokens": tokens,
        "context_range": [tokens + 1, tokens + settings.steps] if decode else None,
        "batch_size": batch_size,
        "read_bytes_per_second": spread(reads),
        "peak_is_of": "the variant" if own_peaks else "the process so far",
        "rows": rows,
    }


def row(
    variant: Variant,
    seconds: dict[Variant, list[float]],
    reads: list[float],
    models: dict[str, Any],
    batch_size: int,
    decode: bool,
) -> dict[str, Any]:
    """One variant's numbers: medians and quartiles over rounds, of ratios that were taken within rounds."""
    own = seconds[variant]

    def over(other: Variant) -> dict[str, float] | None:
        return spread([a / b for a, b in zip(own, seconds[other])]) if other in seconds else None

    result: dict[str, Any] = {
        "label": variant.label,
        "kind": variant.kind,
        "loops": variant.loops,
        "compiled": variant.compiled,
        "ms": spread([1e3 * value for value in own]),
        "ms_rounds": [1e3 * value for value in own],
        "over_one_loop": over(Variant(1, compiled=variant.compiled)),
        "over_llama": over(Variant(1, llama=True, compiled=variant.compiled)),
    }
    if decode:
        passes = 1 if variant.one_pass else variant.loops
        size = bytes_read(models["plt"], variant.loops, batch_size, passes)
        result |= {
            "weight_bytes": size,
            "weight_bytes_per_second": spread([size / value for value in own]),
            "bandwidth_share": spread([size / value / read for value, read in zip(own, reads)]),
        }
    return result


def spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, _, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else 3 * values
    return {"median": statistics.median(values), "low": low, "high": high}


def describe(model: Any, name: str) -> dict[str, Any]:
    parameters = list(model.parameters())
    return {
        "name": name,
        "parameters": sum(p.numel() for p in parameters),
        "bytes": sum(p.nbytes for p in parameters),
        "attention": model.config._attn_implementation,
        "config": json.loads(model.config.to_json_string()),
    }


def _order(block: dict[str, Any]) -> tuple:
    return block["phase"], block["batch_size"], block["tokens"]
