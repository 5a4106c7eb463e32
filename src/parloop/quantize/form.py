"""The form in which quantised weights are kept: compressed-tensors' `pack-quantized`, symmetric, of weights alone.

A matrix w [N outputs, K inputs] becomes integers and scales, w = (q - 2^(bits-1)) * scale, and lies in a file as

    weight_packed [N, K * bits / 32]  int32, the first input in the lowest bits; q is from 0 to 2^bits - 1
    weight_scale  [N, K / group]      in the dtype of the weights; at 8 bits one for each output (group = K)
    weight_shape  [2]                 int64: N, K

Equal to what the package compressed-tensors computes and reads (tests/quantize/test_form.py).
"""

import re
from dataclasses import dataclass
from typing import Any

import torch

METHOD, FORM = "compressed-tensors", "pack-quantized"
BITS, GROUPS = (4, 8), (32, 64, 128)
HEAD = "lm_head"
PARTS = ("weight_packed", "weight_scale", "weight_shape")


@dataclass(frozen=True)
class Scheme:
    """How matrices are quantised.

    Attributes:
        bits: 4 or 8.
        group: inputs that share a scale; None: all of an output.
        ignore: linear layers that are left as they are, names or `re:` and a regular expression.
    """

    bits: int
    group: int | None
    ignore: tuple[str, ...] = ()

    def ignores(self, name: str) -> bool:
        """Whether the layer of this name is left as it is."""
        return any(
            re.match(entry.removeprefix("re:"), name) if entry.startswith("re:") else entry == name for entry in self.ignore
        )

    def group_of(self, inputs: int) -> int:
        """How many of a layer's inputs share a scale."""
        return self.group or inputs

    def settings(self) -> dict[str, Any]:
        """Return the `quantization_config` of config.json."""
        weights = {
            "num_bits": self.bits, "type": "int", "symmetric": True, "strategy": "group" if self.group else "channel",
            "group_size": self.group, "dynamic": False, "observer": "minmax", "observer_kwargs": {}, "actorder": None,
            "block_structure": None,
        }  # fmt: skip
        # To vLLM a head is no linear layer, unless it is named.
        targets = ["Linear"] if self.ignores(HEAD) else ["Linear", HEAD]
        group = {"targets": targets, "weights": weights, "input_activations": None, "output_activations": None}
        return {
            "quant_method": METHOD, "format": FORM, "quantization_status": "compressed", "config_groups": {"group_0": group},
            "ignore": list(self.ignore), "kv_cache_scheme": None, "global_compression_ratio": None,
        }  # fmt: skip

    @classmethod
    def of(cls, settings: Any) -> "Scheme | None":
        """Read a `quantization_config`; None if it is another method, or another form than this one."""
        try:
            (group,) = settings["config_groups"].values()
            weights = group["weights"]
            bits, size, strategy = weights["num_bits"], weights.get("group_size"), weights.get("strategy", "group")
            others = (
                settings.get("kv_cache_scheme"), group.get("input_activations"), group.get("output_activations"),
                settings.get("transform_config"), settings.get("sparsity_config"), weights.get("dynamic"),
            )  # fmt: skip
            if not (
                settings["quant_method"] == METHOD
                and settings["format"] == FORM
                and group["targets"] in (["Linear"], ["Linear", HEAD])
                and weights.get("type", "int") == "int"
                and weights.get("symmetric", True)
                and weights.get("actorder") in (None, "static", "weight")
                and bits in BITS
                and (strategy == "channel" or (strategy == "group" and isinstance(size, int) and size > 0))
                and not any(others)
            ):
                return None
            return cls(bits, size if strategy == "group" else None, tuple(map(str, settings.get("ignore") or ())))
        except (KeyError, TypeError, ValueError, AttributeError):
            return None


def rounded(weight_NK: torch.Tensor, bits: int, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Round to the nearest of 2^bits levels.

    Returns:
        q [N, K] uint8, and scale [N, K / group] in the dtype of the weights: the largest of a group lies half a step beyond the last
        level, which is what spreads the error evenly. The scale is rounded to its dtype before weights are divided by it.
    """
    N, K = weight_NK.shape
    half = 2 ** (bits - 1)
    grouped = weight_NK.float().view(N, K // group, group)
    scale = (grouped.abs().amax(-1) / (half - 0.5)).to(weight_NK.dtype)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    q = (grouped / scale.float()[..., None]).round_().clamp_(-half, half - 1).add_(half)
    return q.view(N, K).to(torch.uint8), scale


def pack(q_NK: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack q [N, K] uint8 into int32 [N, K * bits / 32]."""
    octets = q_NK if bits == 8 else q_NK[:, 0::2] | (q_NK[:, 1::2] << 4)
    return octets.contiguous().view(torch.int32)


def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Return q [N, K] uint8 of what `pack` packed."""
    octets = packed.contiguous().view(torch.uint8)
    return octets if bits == 8 else torch.stack((octets & 15, octets >> 4), -1).flatten(1)


def dequantised(q_NK: torch.Tensor, scale_NG: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the weights [N, K] that integers and scales stand for, in the dtype of the scales."""
    N, K = q_NK.shape
    grouped = q_NK.to(scale_NG.dtype).view(N, scale_NG.shape[1], -1)
    return ((grouped - 2 ** (bits - 1)) * scale_NG[..., None]).view(N, K)
