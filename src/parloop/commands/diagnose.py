"""`parloop diagnose`."""

from typing import Annotated

from .options import Many, Output
from .terminal import name_files, terminal


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
    """Measure what each loop of a checkpoint adds and costs, and whether one more or one fewer would pay.

    Prints a table and writes a report. Several checkpoints, such as R = 2, 3 and 4 of a study, are shown side by side.

    Example: parloop diagnose runs/study-quick/r2-seed0 runs/study-quick/r3-seed0

    Parameters
    ----------
    checkpoints
        Folders or Hub names of PLT checkpoints.
    data
        Text to diagnose it on: stdlib, installed, a folder, a glob, a .jsonl or .parquet file, or hub:OWNER/NAME. Default: the held-out
        part of the text in the model's recipe, or stdlib.
    extensions
        Extensions of the files to read in a folder. Default: .py
    samples
        Rows of text, each from a document of its own if there are enough.
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
        Folder of the report. Default: runs/diagnose-NAMES, followed by a hash if that folder holds another diagnosis.
    """
    from ..diagnosis.checkpoint import diagnose_checkpoints

    console = terminal()
    result = diagnose_checkpoints(
        checkpoints, output, data=data, extensions=extensions, samples=samples, length=length, loops=loops, batch_size=batch_size,
        device=device, dtype=dtype, center_rank=center_rank, console=console,
    )  # fmt: skip
    console.print(result)
    name_files(console, "report", result.folder, "report.html")
