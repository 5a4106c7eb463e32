"""`parloop bench`."""

from typing import Annotated

from .options import Many, Output
from .terminal import name_files, terminal


def bench(
    checkpoint: str | None = None,
    /,
    *,
    shape: str | None = None,
    loops: Annotated[list[int] | None, Many] = None,
    contexts: Annotated[list[int] | None, Many] = None,
    batch_sizes: Annotated[list[int] | None, Many] = None,
    prefill_lengths: Annotated[list[int] | None, Many] = None,
    weights: Annotated[list[str] | None, Many] = None,
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
    """Time prefill and decode at every loop count, side by side with a plain Llama and the memory bandwidth.

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
    weights
        Quantised weights to measure beside the plain ones: int8, int4, as parloop quantize makes them; int8+head, int4+head.
    steps
        Timed decode steps per round.
    repeats
        Rounds that count; one more warms up.
    dtype
        Dtype of weights and cache: bfloat16, float16 or float32.
    device
        auto, cpu or cuda.
    static
        Use static caches for all lines.
    compile
        Add lines with a static cache and a compiled decode step.
    threads
        Threads of torch. Default: torch's own choice.
    output
        Folder of the bench. Default: runs/bench-NAME.
    fresh
        Discard the folder's results and measure again.
    """
    from ..bench import run_bench

    console = terminal()
    result = run_bench(
        checkpoint,
        shape=shape,
        loops=loops,
        contexts=contexts,
        batch_sizes=batch_sizes,
        prefill_lengths=prefill_lengths,
        weights=weights,
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
    name_files(console, "results", result.folder, "results.json", "bench.png")
