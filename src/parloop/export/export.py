"""`parloop export`: write a run's checkpoint, or any PLT, in the format of another tool."""

import shutil
import tempfile
from pathlib import Path

from ..errors import ExportError
from .gguf import export_gguf
from .mlx import export_mlx

FORMS = ("transformers", "mlx", "gguf")


def export(checkpoint: str | Path, out: str | Path, *, to: str = "transformers", bits: int | None = None) -> Path:
    """Write a checkpoint as a model that other tools load.

    Args:
        checkpoint: checkpoint-N of a run, written by any number of processes; for formats other than transformers also any PLT, a folder
            or a Hub name.
        out: folder to create. It appears when it is complete.
        to: transformers, mlx or gguf.
        bits: bits per quantised weight, 4 or 8. None: weights stay as they are.

    Returns:
        the folder.

    Raises:
        ExportError: the format is unknown, or cannot hold this checkpoint.
        CheckpointError: the checkpoint cannot be read.
    """
    checkpoint, out = Path(checkpoint), Path(out)
    if to not in FORMS:
        raise ExportError(f"--to {to!r} is unknown: use one of {', '.join(FORMS)}.")
    if to == "transformers" and bits is not None:
        raise ExportError(
            f"--bits {bits} says nothing to --to transformers, which keeps the weights as they are: leave it out."
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ExportError(f"--out {str(out)!r} exists and is not empty: choose another folder.")
    from ..checkpoints import local_folder
    from ..train.checkpoint import STATE
    from ..train.export import export as export_run

    if to == "transformers":
        return export_run(checkpoint, out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.partial-", dir=out.parent) as scratch:
        if (checkpoint / STATE).is_file():
            checkpoint = export_run(checkpoint, Path(scratch, "run"))
        folder = Path(scratch, "made")
        folder.mkdir()
        source, write = local_folder(str(checkpoint)), export_mlx if to == "mlx" else export_gguf
        if not list(source.glob("model*.safetensors")):
            raise ExportError(
                f"checkpoint {str(source)!r} has no model*.safetensors: it is not a checkpoint, or must be saved in that format first."
            )
        write(source, folder, bits)
        if out.exists():
            out.rmdir()
        shutil.move(folder, out)
    return out
