"""parloop: the Parallel Loop Transformer in stock transformers. Importing it registers `model_type: iquestpltcoder`."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .registration import register, too_old

if TYPE_CHECKING:
    from .diagnosis import Diagnosis, diagnose
    from .model.cache import cache_bytes, make_cache
    from .model.configuration import PLTConfig
    from .model.modeling import PLTForCausalLM, PLTModel

__version__ = "0.1.0"
__all__ = ["Diagnosis", "PLTConfig", "PLTForCausalLM", "PLTModel", "cache_bytes", "diagnose", "make_cache"]

WHERE = {  # public name -> module, imported on first use
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
    """Import a public name on first use."""
    if name not in WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    why = too_old()
    if why and name != "PLTConfig":
        raise ImportError(f"parloop.{name}: {why}")
    value = getattr(import_module(f".{WHERE[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Return the module's names, those that are not imported yet included."""
    return sorted([*globals(), *WHERE])
