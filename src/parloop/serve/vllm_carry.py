"""The carry in vLLM's paged cache: each loop's state of every token, so that the next loop can read that of the token before.

To vLLM a carry is a few more attention layers with a sliding window of two tokens (the current one and its predecessor). vLLM allocates
their blocks, finds them again by prefix, frees them at preemption and after they leave the window, as it does with keys and values. So
whatever the scheduler does, a position's state is where its block table points, or its request begins there.

    CarryLayer    one piece of the state in one layer of vLLM's cache: it declares the blocks and holds the tensor
    CarryBuilder  computes, once per step, every token's slot and its predecessor's
    Carry         one loop's state, [tokens, D], as its pieces

The state is cut into pieces because vLLM's cache has pages of one size, that of a layer's keys and values, in groups of as many layers as
the smallest kind has. One piece per decoder layer makes a group like the others; pieces that the state does not fill stay empty.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec, SlidingWindowSpec


@dataclass
class CarryMetadata(AttentionMetadata):
    slots: torch.Tensor
    """int64 [tokens]: slot of each token's state; below 0 for padding."""
    previous_slots: torch.Tensor
    """int64 [tokens]: slot of its predecessor's state; -1 for the first token of a request."""
    one_token: bool
    """Whether no request has more than one token in this step."""


class CarryBuilder(AttentionMetadataBuilder[CarryMetadata]):
    # A CUDA graph may hold steps of one token per request: it then reads these tensors from fixed addresses.
    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: VllmConfig, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        tokens = vllm_config.scheduler_config.max_num_batched_tokens
        self.previous = torch.full((tokens,), -1, dtype=torch.int64, device=device)
        self.token = torch.arange(tokens, device=device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> CarryMetadata:
        cm, block_size = common_attn_metadata, self.kv_cache_spec.block_size
        T = cm.num_actual_tokens
        if len(self.previous) < T:  # a padded batch
            self.previous = torch.full((T,), -1, dtype=torch.int64, device=self.device)
            self.token = torch.arange(T, device=self.device)
        token, ends = self.token[:T], cm.query_start_loc[1:].long()
        request = torch.searchsorted(ends, token, right=True).clamp_(max=len(ends) - 1)
        previous = cm.seq_lens.long()[request] - ends[request] + token - 1  # positions, -1 for a first token
        blocks = cm.block_table_tensor
        column = previous.div(block_size, rounding_mode="floor").clamp_(0, blocks.shape[1] - 1)
        slots = blocks[request, column].long() * block_size + previous % block_size
        self.previous[:T] = torch.where(previous < 0, -1, slots)
        return CarryMetadata(cm.slot_mapping[:T], self.previous[:T], one_token=cm.max_query_len == 1)


class CarryBackend(AttentionBackend):
    """Provides the builder to vLLM. It computes no attention."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float32, torch.float16, torch.bfloat16]

    @staticmethod
    def get_name() -> str:
        return "PLT_CARRY"

    @staticmethod
    def get_impl_cls() -> (
        Any
    ):  # abstract in vLLM, which catches this error where it calls it (for context parallelism, which is refused anyway)
        raise NotImplementedError("The carry is written and read by the model, not by an attention.")

    @staticmethod
    def get_builder_cls() -> type[CarryBuilder]:
        return CarryBuilder

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True


class CarryLayer(nn.Module, AttentionLayerBase):
    """One layer in vLLM's cache: per token `num_kv_heads` times `2 * head_size` numbers, as for keys and values."""

    def __init__(self, num_kv_heads: int, head_size: int, vllm_config: VllmConfig, name: str) -> None:
        super().__init__()
        self.num_kv_heads, self.head_size = num_kv_heads, head_size
        self.dtype = vllm_config.model_config.dtype
        self.kv_cache = torch.tensor([])  # vLLM binds the blocks here: [blocks, num_kv_heads, block size, 2 * head_size]
        layers = vllm_config.compilation_config.static_forward_context
        if name in layers:
            raise ValueError(f"Duplicate layer name: {name}")
        layers[name] = self

    def get_attn_backend(self) -> type[AttentionBackend]:
        return CarryBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        room: dict[str, Any] = {
            "block_size": vllm_config.cache_config.block_size,
            "num_kv_heads": self.num_kv_heads,
            "head_size": self.head_size,
            "dtype": self.dtype,
        }
        if vllm_config.scheduler_config.disable_hybrid_kv_cache_manager:  # then nothing is freed before its request ends
            return FullAttentionSpec(**room)
        return SlidingWindowSpec(**room, sliding_window=2)

    def write(self, slots_N: torch.Tensor, piece_ND: torch.Tensor) -> None:
        """Write pieces [N, width] of the state into slots."""
        block, offset = self._block_and_offset(slots_N)
        self.kv_cache[block, :, offset] = piece_ND.unflatten(1, (self.num_kv_heads, -1)).to(self.dtype)

    def read(self, slots_N: torch.Tensor) -> torch.Tensor:
        """Return the pieces [N, width] in slots."""
        block, offset = self._block_and_offset(slots_N)
        return self.kv_cache[block, :, offset].flatten(1)

    def _block_and_offset(self, slots_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        slots_N, size = slots_N.clamp(min=0), self.kv_cache.shape[2]  # padding goes to block 0, which vLLM never allocates
        return slots_N.div(size, rounding_mode="floor"), slots_N % size


class Carry(nn.Module):
    """One loop's state of every token in the cache.

    Args:
        hidden_size: D.
        num_kv_heads: key/value heads of this rank.
        head_size: size that makes a page as large as one of keys and values: K, or less if these are stored in fewer bits.
        num_layers: layers of the model.
        names: prefix and suffix of the layers' names in vLLM's cache; the index comes in between.
        vllm_config: vLLM's configuration.
    """

    def __init__(
        self,
        hidden_size: int,
        num_kv_heads: int,
        head_size: int,
        num_layers: int,
        names: tuple[str, str],
        vllm_config: VllmConfig,
    ) -> None:
        super().__init__()
        self.hidden_size, self.width = hidden_size, 2 * num_kv_heads * head_size
        self.used = -(-hidden_size // self.width)
        groups = -(-self.used // num_layers)  # more than one if tensor parallelism makes pages small
        self.names = [f"{names[0]}.{i}.{names[1]}{chr(97 + g)}" for i in range(num_layers) for g in range(groups)]
        self.pieces = [CarryLayer(num_kv_heads, head_size, vllm_config, name) for name in self.names]

    def metadata(self) -> list[CarryMetadata] | None:
        """Return the attention metadata of the pieces in use; None while vLLM measures memory, without a cache."""
        by_layer = get_forward_context().attn_metadata
        if isinstance(by_layer, list):  # in a speculative step; the first is the model's own
            by_layer = by_layer[0]
        return None if not by_layer else [by_layer[name] for name in self.names[: self.used]]

    def write(self, h_ND: torch.Tensor) -> None:
        """Write the state of this step's tokens, [tokens, D]."""
        padded_ND = F.pad(h_ND, (0, self.used * self.width - self.hidden_size))
        for piece_ND, layer, where in zip(padded_ND.split(self.width, dim=-1), self.pieces, self.metadata() or ()):
            layer.write(where.slots, piece_ND)

    def read(self, like_ND: torch.Tensor) -> torch.Tensor:
        """Return shift(h) [tokens, D]: the state of each token's predecessor, zeros for a request's first token."""
        metadata = self.metadata()
        if metadata is None:
            return torch.zeros_like(like_ND)
        rows = [layer.read(where.previous_slots) for layer, where in zip(self.pieces, metadata)]
        h_ND = torch.cat(rows, dim=-1)[:, : self.hidden_size].to(like_ND.dtype)
        return h_ND.masked_fill((metadata[0].previous_slots < 0)[:, None], 0)
