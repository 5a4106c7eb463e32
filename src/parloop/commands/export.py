"""`parloop export`."""

from .options import Output
from .terminal import terminal


def export(checkpoint: str, /, *, out: Output, to: str = "transformers", bits: int | None = None) -> None:
    """Write a run's checkpoint, of one process or of many, as a model that any tool loads; or a PLT for another engine.

    (A finished run has its model in its folder.)

    Example: parloop export runs/train/gpu-r2/checkpoint-500 --out after-500-steps

    For Macs: parloop export CHECKPOINT --to mlx --bits 4 --out for-my-mac

    Parameters
    ----------
    checkpoint
        Folder checkpoint-N of a run; for formats other than transformers also any PLT, a folder or a Hub name.
    out
        Folder to create.
    to
        transformers; mlx: a folder that mlx-lm runs without parloop; gguf: a file that no engine runs yet, for authors of engines.
    bits
        For mlx and gguf: quantise to 8 or 4 bits, except gates and norms. Default: the weights as they are; in gguf, float32.
    """
    from ..export.export import export as run
    from ..export.gguf import WARNING

    folder = run(checkpoint, out, to=to, bits=bits)
    terminal().print(f"model: {folder}", highlight=False, markup=False, soft_wrap=True)
    if to == "gguf":
        terminal().print(WARNING, style="yellow", highlight=False, markup=False)
