"""parloop: the Parallel Loop Transformer in stock transformers. Importing it registers `model_type: iquestpltcoder`."""

import os.path
import signal
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

# Imports take seconds. Until the command's main is reached, Ctrl-C ends it as it ends other programs, without a traceback.
_started = "".join(sys.orig_argv[-len(sys.argv) :][:1])  # the word of the command line that says what is run
if os.path.basename(_started) == "parloop" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from .registration import register, too_old  # noqa: E402

if TYPE_CHECKING:
    from .diagnosis import Diagnosis, diagnose
    from .model.cache import cache_bytes, make_cache
    from .model.configuration import PLTConfig
    from .model.modeling import PLTForCausalLM, PLTModel

__version__ = "0.1.0"
__all__ = ["Diagnosis", "PLTConfig", "PLTForCausalLM", "PLTModel", "cache_bytes", "diagnose", "make_cache"]

WHERE = {  # public names, imported when they are first used
    "Diagnosis": "diagnosis",
    "PLTConfig": "model.configuration",
    "PLTForCausalLM": "model.modeling",
    "PLTModel": "model.modeling",
    "cache_bytes": "model.cache",
    "diagnose": "diagnosis",
    "make_cache": "model.cache",
}

register()


def __getattr__(name: str) -> Any:
    if name not in WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    why = too_old()
    if why and name != "PLTConfig":
        raise ImportError(f"parloop.{name}: {why}")
    value = getattr(import_module(f".{WHERE[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *WHERE])
