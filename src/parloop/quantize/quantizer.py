"""Quantised checkpoints in transformers: which ones run on our kernels, by transformers' own registry of quantisers.

Their config.json names compressed-tensors, and other tools read them as that. transformers has a quantiser of that name, which needs the
package, and turns all weights back into the model's dtype before the first step. It stays what it is. A PLT whose checkpoint has the form of
form.py is handed to ours, which is registered under a name of its own; so is no other model, no other form, and no call that brings a
`quantization_config`. To have the package's: from_pretrained(.., quantization_config=CompressedTensorsConfig()).
"""

from copy import copy, deepcopy
from typing import Any

from torch import nn
from transformers import PreTrainedConfig
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .form import HEAD, METHOD, Scheme
from .linear import PackedLinear

NAME = "parloop-packed"
HUB = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "proxies",
    "revision",
    "subfolder",
    "token",
)  # options of a download
NOT_FIELDS = ("dtype", "torch_dtype", "attn_implementation")  # options of loading that a configuration has, too


@register_quantization_config(NAME)
class PackedConfig(QuantizationConfigMixin):
    """The `quantization_config` of a checkpoint, as it was read, and as it is saved again."""

    def __init__(self, **settings: Any):
        self.settings = settings | {"quant_method": METHOD}
        self.quant_method = NAME  # type: ignore[assignment]

    def to_dict(self) -> dict[str, Any]:
        return deepcopy(self.settings)


@register_quantizer(NAME)
class PackedQuantizer(HfQuantizer):
    """Puts packed layers in the places of a PLT's linear ones."""

    requires_calibration = True  # it loads what was quantised before

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        scheme = Scheme.of(self.quantization_config.to_dict())
        assert scheme is not None
        for name in linear_layers(model):
            if scheme.ignores(name):
                continue
            layer = model.get_submodule(name)
            size = layer.in_features, layer.out_features
            packed = PackedLinear(*size, layer.bias is not None, scheme.bits, scheme.group_of(size[0]), layer.weight.dtype)
            model.set_submodule(name, packed)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for module in model.modules():
            if isinstance(module, PackedLinear):
                module.arrange()
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def linear_layers(model: nn.Module) -> list[str]:
    """Names of the linear layers of a PLT's stack, and of its head. (A classifier's head is not among them: it is new.)"""
    names = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    return [name for name in names if "layers." in name or name == HEAD]


def handed_over(config_class: Any, checkpoint: Any, config: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return what `from_pretrained` is called with, so that a checkpoint of this form comes to our quantiser; unchanged for any other.

    Args:
        config, options: of the call. `config` is a configuration, the place of one, or None: that of the checkpoint.
    """
    if options.get("quantization_config") is not None:
        return config, options
    if not isinstance(config, PreTrainedConfig):
        hub = {name: value for name, value in options.items() if name in HUB}
        place = checkpoint if config is None else config
        try:
            settings, _ = config_class.get_config_dict(place, **hub)
        except (OSError, TypeError):  # no configuration there: the library finds out, or an adapter
            return config, options
        if Scheme.of(settings.get("quantization_config")) is None:
            return config, options
        config, options = config_class.from_pretrained(place, **hub), dict(options)
        for name in [name for name in options if hasattr(config, name) and name not in (*HUB, *NOT_FIELDS)]:
            setattr(config, name, options.pop(name))  # as the library does with fields of the configuration
    held: Any = getattr(config, "quantization_config", None)
    settings = held.to_dict() if isinstance(held, QuantizationConfigMixin) else held
    if Scheme.of(settings) is None:
        return config, options
    config = copy(config)
    config.quantization_config = dict(settings) | {"quant_method": NAME}
    return config, options
