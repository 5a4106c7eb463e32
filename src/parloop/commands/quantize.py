"""`parloop quantize`."""

from typing import Annotated

from .options import Flag, Output
from .terminal import terminal


def quantize(
    checkpoint: str, /, *, out: Output, bits: int = 4, group: int | None = None, head: Annotated[bool, Flag] = False
) -> None:
    """Write a PLT with the weights of its linear layers in 4 or 8 bits, in the compressed-tensors format: a quarter of the memory or half of it.

    transformers loads the folder by `from_pretrained`, and on a CPU computes with the packed weights. Gates, norms and the embedding stay as they
    are. Files are quantised one by one: it takes about the memory of the largest.

    Example: parloop quantize LoopCoder-V2 --out coder-4bit

    Parameters
    ----------
    checkpoint
        Folder or Hub name of a PLT checkpoint.
    out
        Folder to make.
    bits
        4 or 8.
    group
        At 4 bits, weights that share a scale: 32 (more exact), 64 or 128 (smaller). Default: 64, or 32 where 64 does not divide.
    head
        Quantise the head, too.
    """
    from ..quantize.quantization import quantize as run

    console = terminal()
    console.print(run(checkpoint, out, bits=bits, group=group, head=head, console=console), highlight=False, soft_wrap=True)
