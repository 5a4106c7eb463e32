"""`parloop check`."""

import sys

from rich.markup import escape

from ..errors import PortCheckError
from .options import Output
from .terminal import terminal


def check(
    checkpoint: str | None = None,
    /,
    *,
    endpoint: str | None = None,
    model: str | None = None,
    engine: str = "auto",
    write: Output | None = None,
) -> None:
    """Check in a minute whether an engine computes a PLT, and if not, which mechanism it lacks, with a small checkpoint that is shipped.

    Write that checkpoint: parloop check --write probe

    Serve it with the engine, and then: parloop check --endpoint http://127.0.0.1:8080/v1 --model probe

    Without a server: parloop check (checks parloop serve), or parloop check FOLDER (checks a converted copy of the checkpoint).

    Ends with 0 if the model is right, otherwise with 1.

    Parameters
    ----------
    checkpoint
        Folder that the small checkpoint was converted to. Default: the checkpoint itself. A server is started for it.
    endpoint
        A running server of it, with /v1. Completions, greedy; log-probabilities if the server has them.
    model
        Its name at that server.
    engine
        Without --endpoint, which server to start: auto, vllm, mlx or transformers.
    write
        Folder to create, with the small checkpoint. Nothing is checked then.
    """
    from .. import check as ports

    console = terminal()
    if write is not None:
        console.print(f"checkpoint: {ports.write_probe(write)}", highlight=False, markup=False, soft_wrap=True)
        return
    if (endpoint is None) != (model is None) or (endpoint and checkpoint):
        raise PortCheckError("give --endpoint and --model together and no folder, or neither.")
    verdict = ports.check_endpoint(endpoint, model) if endpoint and model else ports.check_checkpoint(checkpoint, engine)
    console.print(f"[bold {'green' if verdict.right else 'red'}]{escape(verdict.headline)}[/]", highlight=False)
    for detail in verdict.details:
        console.print(f"  {detail}", highlight=False, markup=False)
    sys.exit(0 if verdict.right else 1)
