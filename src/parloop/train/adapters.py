"""LoRA adapters. They change shared weights, so an adapter acts in every loop."""

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..checkpoints import load_model
from ..errors import RecipeError
from ..model.modeling import PLTForCausalLM
from .checkpoint import load_weights
from .recipe import ChatRecipe

ADAPTER = "adapter"  # subfolder of the run's folder


def lora_config(recipe: ChatRecipe, model: PLTForCausalLM) -> Any:
    """Return peft's LoraConfig for a recipe and the model that it adapts.

    Raises:
        RecipeError: lora_targets names a layer that the model does not have.
    """
    from peft import LoraConfig

    linear = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    unknown = sorted(set(recipe.lora_targets) - linear)
    if unknown:
        raise RecipeError(
            f"lora_targets has {unknown[0]!r}, which the model does not: choose among {', '.join(sorted(linear))}."
        )
    return LoraConfig(
        r=recipe.lora_rank,
        lora_alpha=recipe.lora_alpha,  # type: ignore[arg-type]  # floats work too
        lora_dropout=recipe.lora_dropout,
        target_modules=list(recipe.lora_targets),
        task_type="CAUSAL_LM",
    )


def merge_adapter(base: str, adapter: Path, out: Path, trained_loops: list[int] | None) -> None:
    """Write the base model with an adapter merged into its weights.

    Args:
        base: folder or Hub name of the model that the adapter was trained on.
        adapter: folder of the adapter.
        out: folder to write the merged model into.
        trained_loops: the loop counts that the adapter was trained at, if there are several.

    Raises:
        CheckpointError: the adapter is incomplete, or belongs to another base.
    """
    from peft import PeftModel

    model: Any = load_model(base, "cpu")
    model.config.plt_trained_loops = trained_loops
    with quiet():
        adapted: Any = PeftModel.from_pretrained(model, adapter)
        load_weights(adapted, adapter)  # raises if some are missing; peft would only warn
        adapted.merge_and_unload().save_pretrained(out)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence two warnings that are expected here: other loop counts in training, and a deprecated call from peft."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="num_loops=")
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        yield
