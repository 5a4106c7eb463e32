"""Registration of the model with transformers, PEFT and mlx-lm, made by `import parloop` as soon as these are imported.

Importing transformers' models takes seconds, and `parloop --help`, vLLM's servers of other models and MLX do not need them. So each
registration waits until the module that it changes is imported by anyone; if it is imported already, it is made at once.
"""

import importlib.util
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from importlib.abc import MetaPathFinder
from importlib.metadata import PackageNotFoundError, version
from typing import Any

OLDEST = (5, 23)  # the first transformers that the model works with


@cache
def too_old() -> str | None:
    """Return why the model cannot be used here, or None. (vLLM pins an older transformers; its plugin needs only the configuration.)"""
    try:
        found = version("transformers")
    except PackageNotFoundError:  # for instance beside MLX
        return 'The model needs transformers, which is not installed: pip install "transformers>=5.23".'
    if tuple(int("".join(filter(str.isdigit, part)) or 0) for part in found.split(".")[:2]) >= OLDEST:
        return None
    return (
        f"The model needs transformers >= 5.23, and {found} is installed, as vLLM requires. Keep an environment "
        f"for vLLM, which serves PLT checkpoints, and another one to train, generate and diagnose: "
        f'pip install parloop "transformers>=5.23".'
    )


def _register_configuration() -> None:
    from transformers import AutoConfig

    from .model.configuration import PLTConfig

    AutoConfig.register(PLTConfig.model_type, PLTConfig, exist_ok=True)


def _register_models() -> None:
    ours = sys.modules.get("parloop.model.modeling")
    if too_old() or (
        ours is not None and not hasattr(ours, "PLTForCausalLM")
    ):  # the model is just being imported; this is called again afterwards
        return
    from transformers.conversion_mapping import register_checkpoint_conversion_mapping
    from transformers.core_model_loading import WeightRenaming
    from transformers.models.auto import modeling_auto

    from .model.configuration import GATE, GATE_ALIASES, PLTConfig

    try:
        from .model.modeling import PLTForCausalLM, PLTForSequenceClassification, PLTForTokenClassification, PLTModel
    except ImportError:
        if any(getattr(sys.modules[name].__spec__, "_initializing", False) for name in NEEDED if name in sys.modules):
            return  # a module that the model needs is just importing the auto classes; this is called again afterwards
        raise

    modeling_auto.AutoModel.register(PLTConfig, PLTModel, exist_ok=True)
    modeling_auto.AutoModelForCausalLM.register(PLTConfig, PLTForCausalLM, exist_ok=True)
    modeling_auto.AutoModelForSequenceClassification.register(PLTConfig, PLTForSequenceClassification, exist_ok=True)
    modeling_auto.AutoModelForTokenClassification.register(PLTConfig, PLTForTokenClassification, exist_ok=True)
    # Some checkpoints have another name for the gate. They are saved under the name that they were read with.
    register_checkpoint_conversion_mapping(
        PLTConfig.model_type,
        [WeightRenaming(rf"self_attn\.{alias}\.", f"self_attn.{GATE}.") for alias in GATE_ALIASES],
        overwrite=True,
    )


def _register_imported_models() -> None:
    if "transformers.models.auto.modeling_auto" in sys.modules:
        _register_models()


def _register_with_mlx_lm() -> None:
    from .export.mlx import register

    register()


def _register_adapters() -> None:
    """Register the default target layers of adapters, and the cache of a learnt prefix, which PEFT looks up by the model's type."""
    from peft.utils import constants

    from .model.configuration import PLTConfig

    for targets in vars(constants).values():
        if isinstance(targets, dict) and "llama" in targets:  # a PLT has Llama's layers
            targets.setdefault(PLTConfig.model_type, targets["llama"])
    caches: dict[str, Any] = constants.TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING
    caches[PLTConfig.model_type] = _prefix_cache


def _prefix_cache(keys_and_values: Any) -> Any:
    from .model.cache import PrefixCache

    return PrefixCache(keys_and_values)


# Modules that the model needs, and whose import imports the auto classes.
NEEDED = (
    "transformers.modeling_layers",
    "transformers.models.llama.configuration_llama",
    "transformers.models.llama.modeling_llama",
)
AFTER: dict[str, Callable[[], None]] = {
    **dict.fromkeys(NEEDED, _register_imported_models),
    "mlx_lm": _register_with_mlx_lm,
    "parloop.model.modeling": _register_imported_models,
    "peft.utils.constants": _register_adapters,
    "transformers.models.auto.configuration_auto": _register_configuration,
    "transformers.models.auto.modeling_auto": _register_models,
}


QUIET = ("torchao",)  # packages that warn at import: torchao, without a GPU, of every GPU library that it could not load


class _OnImport(MetaPathFinder):
    """Runs a function after a module's first import, and silences the warnings of some packages' import."""

    def __init__(self, after: dict[str, Callable[[], None]], quiet: tuple[str, ...]):
        self.after, self.quiet = after, quiet
        self.asked: set[str] = set()  # names that the other finders are searching for

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        quiet = name.partition(".")[0] in self.quiet
        if name in self.asked or (name not in self.after and not quiet):
            return None
        self.asked.add(name)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self.asked.discard(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: Any) -> None:
            with _without_warnings() if quiet else nullcontext():
                execute(module)
            self.after.pop(name, lambda: None)()

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


@contextmanager
def _without_warnings() -> Iterator[None]:
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(level)


_hook = _OnImport({}, QUIET)


def register() -> None:
    """Make all registrations, now or when their module is imported. Called by `import parloop`."""
    sys.meta_path.insert(0, _hook)
    for name, function in AFTER.items():
        when_imported(name, function)


def when_imported(name: str, function: Callable[[], None]) -> None:
    """Call a function after a module is imported, or at once if it is imported already."""
    if name in sys.modules:
        function()
    else:
        _hook.after[name] = function
