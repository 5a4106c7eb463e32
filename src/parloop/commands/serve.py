"""`parloop serve`."""

from typing import Annotated

from cyclopts import Parameter


def serve(
    checkpoint: str,
    /,
    *arguments: Annotated[str, Parameter(allow_leading_hyphen=True)],
    loops: int | None = None,
    engine: str = "auto",
) -> None:
    """Serve a checkpoint to OpenAI clients: with vLLM if it is installed, otherwise on a Mac with mlx-lm, otherwise with transformers.

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
    from ..serve.server import serve as run_server

    run_server(checkpoint, loops, engine, list(arguments))
