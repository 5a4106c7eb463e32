"""bfcl with our model in its table: bfcl_driver.py takes the arguments of the `bfcl` command, generate|evaluate ..

PARLOOP_KEY is bfcl's name of the model, PARLOOP_MODEL the server's, PARLOOP_MODE FC or prompt, PARLOOP_SAMPLING further fields of every
request as JSON. It runs in bfcl's environment, which lacks the clients of other vendors: their modules are replaced by empty ones.
"""

import importlib.abc
import importlib.machinery
import json
import os
import sys
from unittest.mock import MagicMock

ABSENT = {
    "anthropic", "bs4", "boto3", "botocore", "cohere", "datamodel_code_generator", "faiss", "google", "html2text", "huggingface_hub",
    "mistralai", "networkx", "qwen_agent", "rank_bm25", "sentence_transformers", "serpapi", "torch", "transformers", "writerai",
}  # fmt: skip


class Shell(MagicMock):
    __path__: list = []
    __all__: list = []

    def __mro_entries__(self, bases):
        return (object,)


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if name.split(".")[0] in ABSENT else None

    def create_module(self, spec):
        shell = Shell(name=spec.name)
        shell.__spec__ = spec
        return shell

    def exec_module(self, module):
        pass


sys.meta_path.append(Finder())  # after the real finders, so that installed modules are used

from bfcl_eval.constants.model_config import MODEL_CONFIG_MAPPING, ModelConfig  # noqa: E402
from bfcl_eval.model_handler.api_inference.openai_completion import OpenAICompletionsHandler  # noqa: E402

SAMPLING = json.loads(os.environ["PARLOOP_SAMPLING"])


class Handler(OpenAICompletionsHandler):
    def generate_with_backoff(self, **kwargs):
        kwargs.pop("store", None)
        return super().generate_with_backoff(**{**kwargs, **SAMPLING})


calls = os.environ["PARLOOP_MODE"] == "FC"
MODEL_CONFIG_MAPPING[os.environ["PARLOOP_KEY"]] = ModelConfig(
    model_name=os.environ["PARLOOP_MODEL"],
    display_name=os.environ["PARLOOP_KEY"],
    url="",
    org="",
    license="",
    model_handler=Handler,
    is_fc_model=calls,
    underscore_to_dot=calls,
)

if __name__ == "__main__":
    from bfcl_eval.__main__ import cli

    cli()
