"""What from_pretrained() and save_pretrained() of transformers need to know of a PLT."""

from typing import Any


class PLTLoadingMixin:
    """Loads packed weights, and keeps the names of weights that are saved. In front of PreTrainedModel."""

    def __init__(self, config: Any):
        super().__init__(config)  # type: ignore[call-arg]
        # Note: save_pretrained undoes the renamings that loading did, and for a model that was never loaded it would undo
        # all that are registered, so that a new model's gates were saved as loop_gate_proj and a resumed run lost them.
        self._weight_conversions: list = []

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *model_args: Any, config: Any = None, **kwargs: Any) -> Any:
        """Load as the library does; a checkpoint of `parloop quantize` keeps its weights packed."""
        from ..quantize.quantizer import handed_over

        config, kwargs = handed_over(cls.config_class, pretrained_model_name_or_path, config, kwargs)  # type: ignore[attr-defined]
        return super().from_pretrained(pretrained_model_name_or_path, *model_args, config=config, **kwargs)  # type: ignore[misc]
