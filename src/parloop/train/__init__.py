from typing import TYPE_CHECKING, Any

from .recipe import ChatRecipe, Recipe, load_recipe

if TYPE_CHECKING:
    from .result import TrainingResult
    from .training import train

__all__ = ["ChatRecipe", "Recipe", "TrainingResult", "load_recipe", "train"]


def __getattr__(name: str) -> Any:
    """Import `train` and its result on first use: their imports take seconds."""
    if name == "train":
        from .training import train

        return train
    if name == "TrainingResult":
        from .result import TrainingResult

        return TrainingResult
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
