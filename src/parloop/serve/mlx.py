"""`parloop serve` with mlx-lm: its own server (`mlx_lm.server`), with all of its options, around one PLT at any loop count.

Three things are changed in this process: the names of the model; no request can load another model (mlx-lm's server itself loads whatever
folder a request names); and prompts that continue exactly where an answer ended work.
"""

import json
import os
import signal
import sys
import tempfile
from pathlib import Path

from ..errors import ServeError
from ..export.mlx import mlx_lm_version, read_config, register


def serve_with_mlx(checkpoint: Path, *, num_loops: int, names: list[str], arguments: list[str]) -> None:
    """Serve a PLT with mlx-lm's server, until it is interrupted.

    Args:
        checkpoint: folder of the checkpoint.
        num_loops: R, the loop count of all answers.
        names: names that clients may use for the model; the first is listed.
        arguments: options of `mlx_lm.server`.

    Raises:
        ServeError: mlx-lm is not installed, or an option cannot be given.
        ExportError: the checkpoint cannot be run with MLX.
    """
    if mlx_lm_version() is None:
        raise ServeError(
            'mlx-lm is not installed: pip install "parloop[mlx]" (on Linux too, for tests: it has no fast CPU code).'
        )
    for option, instead in (("--model", "the checkpoint is the command's argument"), ("--draft-model", DRAFTS)):
        if any(argument.partition("=")[0] == option for argument in arguments):
            raise ServeError(f"{option} cannot be given here: {instead}.")
    config = read_config(checkpoint)
    register()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the temporary folder is removed
    with tempfile.TemporaryDirectory(prefix="parloop-mlx-") as scratch:
        folder = with_loops(checkpoint, config, num_loops, Path(scratch, "checkpoint"))
        sys.argv = ["mlx_lm.server", "--model", str(folder), "--port", "8000", *arguments]
        run_server([*names, str(folder)])


DRAFTS = "a rejected draft would have to be removed from the cache, which is not possible for a PLT's carry"


def with_loops(checkpoint: Path, config: dict, num_loops: int, folder: Path) -> Path:
    """Make a folder of the checkpoint with another loop count, from links to its files and a new configuration. Return the folder.

    (The model file of an exported folder is left out, so that it needs no trust flag: our class is registered.)
    """
    folder.mkdir(parents=True)
    for path in checkpoint.iterdir():
        if path.name != "config.json":
            os.symlink(path.resolve(), folder / path.name)
    config = {name: value for name, value in config.items() if name != "model_file"}
    (folder / "config.json").write_text(json.dumps(config | {"plt_num_loops": num_loops}), encoding="utf-8")
    return folder


def run_server(names: list[str]) -> None:
    """Run the main function of `mlx_lm.server`, on the arguments in sys.argv. Its loading, listing and prompt cache are
    replaced, since it has no parameters for them."""
    from mlx_lm import server

    class OnePLT(server.ModelProvider):
        def load(self, model_path, adapter_path=None, draft_model_path=None):
            if model_path not in names and model_path != "default_model":
                raise ValueError(f"model {model_path!r} is not served here: use {names[0]!r}.")
            if adapter_path is not None:
                raise ValueError(f"adapters={adapter_path!r} cannot be requested: start the server with --adapter-path.")
            return super().load("default_model", None, None)

    class Handler(server.APIHandler):
        def do_GET(self):
            if self.path != "/version":  # `parloop eval` records it
                return super().do_GET()
            self._answer({"engine": "mlx-lm", "version": mlx_lm_version()})

        def handle_models_request(self):
            models = [{"id": names[0], "object": "model", "created": self.created, "owned_by": "parloop"}]
            self._answer({"object": "list", "data": models})

        def _answer(self, content: dict) -> None:
            body = json.dumps(content).encode()
            self._set_completion_headers(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    class PromptCache(server.LRUPromptCache):
        """Always leaves one token of a prompt to compute.

        Without one, as in a text that continues exactly where an answer ended, mlx-lm 0.32's generating thread dies, with any model.
        """

        def fetch_nearest_cache(self, model, tokens):
            cache, rest = super().fetch_nearest_cache(model, tokens[:-1])
            return cache, [*rest, *tokens[-1:]]

    def run(host, port, model_provider, **options):
        cache = PromptCache(model_provider.cli_args.prompt_cache_size)
        server._run_http_server(host, port, server.ResponseGenerator(model_provider, cache), handler_class=Handler)

    server.ModelProvider, server.run = OnePLT, run
    server.main()
