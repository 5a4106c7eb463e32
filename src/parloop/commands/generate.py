"""`parloop generate`."""

import sys
from typing import Annotated

from cyclopts import Parameter

from ..errors import CheckpointError


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
        Text to continue. "-" reads it from the standard input. A text that looks like an option goes after --.
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
        Tokens of reasoning after its opening tag; then it is closed, and the answer follows. Default: as many as the model writes.
    device
        auto, cpu or cuda.
    dtype
        auto: as saved; or float32, bfloat16, float16.
    """
    from ..generate import stream

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
    """Read the prompt from the standard input.

    Raises:
        CheckpointError: it is closed, or not UTF-8.
    """
    if sys.stdin is None:
        raise CheckpointError("the prompt - is the standard input, which is closed.")
    try:
        return sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"the standard input is not UTF-8 ({error}): give the prompt as UTF-8.") from error
