"""`parloop convert`."""

from pathlib import Path

from .options import Output
from .terminal import terminal


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
    """Turn a Llama, Mistral, Qwen2 or Qwen3 checkpoint into a PLT that computes the same, to train it further; or a PLT into a dense model.

    Every loop of the new PLT gives the source's logits, or nearly (see --start), until it is trained. Tensors, tokenizer, chat template
    and generation settings are copied. A source that a PLT cannot compute is refused.

    Example: parloop convert Qwen3-0.6B --loops 2 --start open --out qwen3-plt

    And back: parloop convert qwen3-plt --to dense --out qwen3

    Parameters
    ----------
    source
        Folder of a checkpoint in safetensors. (From the Hub: hf download OWNER/NAME --local-dir FOLDER.)
    out
        Folder to create.
    to
        plt, or dense: loop 1 of a PLT as a Llama, or as another family that has its options.
    loops
        How often the PLT runs its stack. Default: 2.
    start
        exact: the source's logits to 1e-5, to serve or to check; loops learn nothing while c is 0. open: loops take effect at once, and the change
        of the loss is printed; it learns best. See docs/upcycling.md.
    window
        Tokens before itself that a token sees in its own loop, from loop 2 on.
    hidden_scale
        c, the factor of the previous loop's state. Default: 0 for exact; for open, as large a state as the embedding.
    gate_bias
        Initial bias of the gates: 0 is half window, half loop 1's cache; more is more cache. Default: 16 for exact, 0 for open.
    data
        Text to measure the loss on, as in `parloop diagnose`. Default: stdlib for the open start, none for the exact one.
    samples
        Rows of up to 512 tokens of that text. 0: do not measure. (Measuring loads the model; converting does not.)
    """
    from ..convert import convert as run

    console = terminal()
    done = run(
        source, out, to=to, loops=loops, start=start, window=window, hidden_scale=hidden_scale, gate_bias=gate_bias, data=data,
        samples=samples, console=console,
    )  # fmt: skip
    console.print(done, highlight=False, soft_wrap=True)
