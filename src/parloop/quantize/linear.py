"""Linear layers whose weights stay packed, on torch's own kernels for CPUs.

A decode step waits for its weights to be read, and a quarter of the bytes takes a third of the time. But the kernels for few rows compute
every row anew: from some rows on, weights are turned back into the dtype of the model, a few outputs at a time so that they stay in the
processor's cache, and the ordinary product takes over. A prompt pays for that once.

Activations are never quantised. A scale shared by rows would make a loop's row depend on the other loops' rows, and one pass would no
longer be a pass per loop.

Axes: M rows, N outputs, K inputs.
"""

import math
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .form import PARTS, dequantised, pack, rounded, unpack

# Up to so many rows the kernel is the faster way (benchmarks/quantize.py rows). A row's result does not depend on how many there are
# below, but differs by bfloat16's rounding of the weights from what it is above.
KERNEL_ROWS = {4: 64, 8: 12}
KERNEL_GROUPS = (32, 64, 128, 256)
AT_ONCE = 2**20  # weights that are turned back at a time
PIECE = 2**23  # weights that are rounded at a time


def in_blocks(q_NK: torch.Tensor, block: int) -> torch.Tensor:
    """Lay 4-bit integers out as the kernel reads them: `block` outputs together, [N / block, K, block / 2] bytes, and in a byte output n in the
    low half and n + block / 2 in the high one."""
    N, K = q_NK.shape
    low, high = q_NK.view(N // block, 2, block // 2, K).unbind(1)
    return (low | (high << 4)).transpose(1, 2).contiguous()


def out_of_blocks(packed: torch.Tensor) -> torch.Tensor:
    """Return q [N, K] uint8 of what `in_blocks` laid out."""
    q = torch.stack((packed & 15, packed >> 4), 1)  # [N / block, 2, K, block / 2]
    return q.transpose(2, 3).reshape(-1, packed.shape[1])


@cache
def kernel_block() -> int | None:
    """How many outputs lie together for torch's int4 kernel, which depends on the processor. None: there is no such kernel, or it wants
    another layout, and weights are turned back for every call."""
    q = torch.randint(16, (128, 64), generator=torch.Generator().manual_seed(0), dtype=torch.int32, device="cpu")
    try:
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q, 1).flatten()
    except (RuntimeError, AttributeError):
        return None
    blocks = (block for block in (64, 32) if torch.equal(packed, in_blocks(q.to(torch.uint8), block).flatten()))
    return next(blocks, None)


class PackedLinear(nn.Module):
    """y = x w^T + bias of quantised weights, in the form of form.py while they are loaded, and saved in it.

    Args:
        inputs, outputs: K and N.
        bits: 4 or 8.
        group: inputs that share a scale.
    """

    def __init__(self, inputs: int, outputs: int, bias: bool, bits: int, group: int, dtype: torch.dtype | None = None):
        super().__init__()
        if inputs % group or inputs * bits % 32 or outputs % 2:
            raise ValueError(
                f"a layer of {outputs} outputs and {inputs} inputs cannot be packed to {bits} bits in groups of {group}: quantise the "
                f"checkpoint anew with parloop quantize."
            )
        self.in_features, self.out_features, self.bits, self.group = inputs, outputs, bits, group
        self.weight_packed = _fixed(torch.empty(outputs, inputs * bits // 32, dtype=torch.int32))
        self.weight_scale = _fixed(torch.empty(outputs, inputs // group, dtype=dtype))
        self.weight_shape = _fixed(torch.empty(2, dtype=torch.int64))
        self.bias = nn.Parameter(torch.empty(outputs, dtype=dtype)) if bias else None
        self.is_arranged = False

    @classmethod
    def of(cls, weight_NK: torch.Tensor, bias: nn.Parameter | None, bits: int, group: int) -> "PackedLinear":
        """Quantise a layer of floating-point weights, a piece of it at a time. A bias is shared, not copied."""
        N, K = weight_NK.shape
        with torch.device("meta"):
            layer = cls(K, N, False, bits, group)
        rows = [rounded(piece, bits, group) for piece in weight_NK.detach().split(max(1, PIECE // K))]
        layer.weight_packed = _fixed(torch.cat([pack(q, bits) for q, _ in rows]))
        layer.weight_scale = _fixed(torch.cat([scale for _, scale in rows]))
        layer.weight_shape = _fixed(torch.tensor([N, K], device=weight_NK.device))
        layer.bias = bias
        layer.arrange()
        return layer

    def arrange(self) -> None:
        """Lay the weights out as the kernels read them, once all are loaded."""
        if self.is_arranged or self.weight_packed.is_meta:
            return
        q_NK, scale_NG = unpack(self.weight_packed, self.bits), self.weight_scale.detach()
        if self.bits == 4:
            block = kernel_block() or 64
            block = block if self.out_features % block == 0 else math.gcd(self.out_features, 64)
            # The kernel wants an offset beside every scale.
            arranged, scale = in_blocks(q_NK, block), torch.stack((scale_NG.t(), torch.zeros_like(scale_NG.t())), -1)
        else:
            arranged, scale = (q_NK ^ 128).view(torch.int8), scale_NG
        del self.weight_packed, self.weight_scale
        self.arranged, self.scale = _fixed(arranged), _fixed(scale.contiguous())
        self.is_arranged = True

    def quantised(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return q [N, K] uint8 and scale [N, K / group]."""
        if not self.is_arranged:
            return unpack(self.weight_packed, self.bits), self.weight_scale
        if self.bits == 4:
            return out_of_blocks(self.arranged), self.scale[..., 0].t()
        return self.arranged.view(torch.uint8) ^ 128, self.scale

    def dequantised(self) -> torch.Tensor:
        """Return the weights [N, K] in the dtype of the scales."""
        return dequantised(*self.quantised(), self.bits)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[.., K] -> [.., N]."""
        x_MK = x.reshape(-1, self.in_features)
        if (torch.is_grad_enabled() and x.requires_grad) or x.device.type != "cpu" or not self.is_arranged:
            return F.linear(x, self.dequantised(), self.bias)
        if self.has_kernel(x.dtype) and 0 < len(x_MK) <= KERNEL_ROWS[self.bits]:
            y_MN = self._few(x_MK.contiguous())
        else:
            y_MN = self._many(x_MK)
        y = y_MN.view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias

    def has_kernel(self, dtype: torch.dtype) -> bool:
        """Whether a kernel takes these weights and activations of this dtype. (In other dtypes than bfloat16 torch has them, one number at a
        time: thirty times slower.)"""
        if not dtype == self.scale.dtype == torch.bfloat16:
            return False
        if self.bits == 8:
            return self.scale.shape[1] == 1
        return self.group in KERNEL_GROUPS and 2 * self.arranged.shape[2] == kernel_block()

    def _few(self, x_MK: torch.Tensor) -> torch.Tensor:
        if self.bits == 8:
            return torch._weight_int8pack_mm(x_MK, self.arranged, self.scale[:, 0])
        packed = self.arranged.view(self.out_features, -1)
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x_MK, packed, self.group, self.scale)

    def _many(self, x_MK: torch.Tensor) -> torch.Tensor:
        return self._many_of_four(x_MK) if self.bits == 4 else self._many_of_eight(x_MK)

    def _many_of_four(self, x_MK: torch.Tensor) -> torch.Tensor:
        blocks, K, half = self.arranged.shape
        n = max(1, AT_ONCE // (2 * half * K))
        w, y_MN = self.scale.new_empty(K, 2, n * half), x_MK.new_empty(len(x_MK), blocks, 2, half)
        scale = self.scale[..., 0].view(-1, blocks, 2, half)
        for at in range(0, blocks, n):
            octets = self.arranged[at : at + n].transpose(0, 1).reshape(K, -1)
            if octets.shape[1] != w.shape[2]:  # what is left at the end
                w = w.new_empty(K, 2, octets.shape[1])
            w[:, 0], w[:, 1] = octets & 15, octets >> 4
            grouped = w.view(K // self.group, self.group, -1).sub_(8)
            grouped.mul_(scale[:, at : at + n].transpose(1, 2).reshape(K // self.group, 1, -1))
            y = x_MK @ w.view(K, -1)
            y_MN[:, at : at + n] = y.view(len(x_MK), 2, -1, half).transpose(1, 2)
        return y_MN.view(len(x_MK), -1)

    def _many_of_eight(self, x_MK: torch.Tensor) -> torch.Tensor:
        n = max(1, AT_ONCE // self.in_features)
        parts = zip(self.arranged.split(n), self.scale.split(n))
        made = (q.to(s.dtype).unflatten(1, (s.shape[1], -1)).mul_(s[..., None]).flatten(1) for q, s in parts)
        return torch.cat([x_MK @ w.t() for w in made], -1)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}, group={self.group}"

    # What is saved, and loaded into a model that is there, is the form of the checkpoint, whatever the layout in memory.

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if not self.is_arranged:
            return super()._save_to_state_dict(destination, prefix, keep_vars)
        q_NK, scale_NG = self.quantised()
        values = (pack(q_NK, self.bits), scale_NG.contiguous(), self.weight_shape.detach())
        destination |= {f"{prefix}{part}": value for part, value in zip(PARTS, values)}
        if self.bias is not None:
            destination[f"{prefix}bias"] = self.bias if keep_vars else self.bias.detach()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *arguments: Any) -> None:
        was_arranged = self.is_arranged
        if was_arranged:
            q_NK, scale_NG = self.quantised()
            del self.arranged, self.scale
            self.weight_packed, self.weight_scale = _fixed(pack(q_NK, self.bits)), _fixed(scale_NG.contiguous())
            self.is_arranged = False
        super()._load_from_state_dict(state_dict, prefix, *arguments)
        if was_arranged:
            self.arrange()


def _fixed(values: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(values, requires_grad=False)
