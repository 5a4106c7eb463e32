"""LoRA adapters. One is on the shared weights, so it acts in every loop."""

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

ADAPTER = "adapter"  # their folder in the run's


def lora_config(recipe: ChatRecipe, model: PLTForCausalLM) -> Any:
    from peft import LoraConfig

    linear = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    unknown = sorted(set(recipe.lora_targets) - linear)
    if unknown:
        raise RecipeError(
            f"lora_targets has {unknown[0]!r}, which the model does not: choose among {', '.join(sorted(linear))}."
        )
    return LoraConfig(
        r=recipe.lora_rank,
        lora_alpha=recipe.lora_alpha,  # type: ignore[arg-type]  # a float does
        lora_dropout=recipe.lora_dropout,
        target_modules=list(recipe.lora_targets),
        task_type="CAUSAL_LM",
    )


def merge_adapter(base: str, adapter: Path, out: Path, trained_loops: list[int] | None) -> None:
    """Write the base with an adapter merged into its weights.

    Args:
        trained_loops: the loop counts that the adapter was trained at, if they are several.

    Raises:
        CheckpointError: the adapter is not whole, or is another base's.
    """
    from peft import PeftModel

    model: Any = load_model(base, "cpu")
    model.config.plt_trained_loops = trained_loops
    with quiet():
        adapted: Any = PeftModel.from_pretrained(model, adapter)
        load_weights(adapted, adapter)  # raises: some are missing; peft would warn only
        adapted.merge_and_unload().save_pretrained(out)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what is said of things that are as they should be: other loop counts in training, and what peft asks transformers."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="num_loops=")
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        yield
