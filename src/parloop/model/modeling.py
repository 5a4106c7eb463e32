"""The Parallel Loop Transformer: the forward pass, in the order of the equations.

PLT (arXiv 2510.24824) runs one stack of L layers R times with the same weights:

    E      = Embed(x)
    loop 1 : h_1 = FinalNorm(stack(E)), ordinary causal attention; every layer keeps its keys and values (K1, V1)
    loop r : b_r = a * E + c * shift(h_{r-1})          the cross-loop position offset: token t reads token t - 1
             h_r = FinalNorm(stack(b_r)), and in every layer, with q, k, v from the same weights as in loop 1:
                 global = attention of q over (K1, V1)        the whole past, nothing new is stored
                 local  = attention of q over this loop's own (k, v): the token itself and the w tokens before it
                 g      = sigmoid(gate(x))                    one number per token and head
                 out    = g * global + (1 - g) * local
    logits = Head(h_R)

Because of the shift, loop r of token t needs loop r-1 of token t-1 only. So to produce one token, all loops run as rows of
ONE pass over the weights (`PLTModel._one_token`); prompts and training go loop after loop (`PLTModel._loop_by_loop`). Both
read and write one cache (see cache.py), and any split of a text into calls gives the same logits. Where only the last tokens'
logits are wanted, loops 2..R run on the tail of the prompt that these depend on (cache.tail_tokens).

Axes, as suffixes of tensor names:
    B sequences    T tokens of this call    S keys (cached and new)    D hidden size    R loops
    H query heads  G key/value heads        K head size                N rows: T tokens of one loop, or R loops of one
Loops are numbered 1..R in prose and plots, from 0 in code.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_rope_utils import dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, slice_logits_to_keep
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRotaryEmbedding, apply_rotary_pos_emb, repeat_kv
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .cache import cached_loops, carry_index, catch_up, extend_cache, full_index, make_cache, tail_tokens, window_index
from .configuration import PLTConfig
from .masks import BANDED, Masks, TailView, band_block, check_inputs, fold_keys, fold_queries, plt_masks, unfold_bands


@dataclass
class PLTModelOutputWithPast(BaseModelOutputWithPast):
    """Adds `loop_states`: for each loop its state after the final norm, h_1 .. h_R, each [B, T, D]."""

    loop_states: tuple[torch.Tensor, ...] | None = None


@dataclass
class PLTCausalLMOutputWithPast(CausalLMOutputWithPast):
    """Adds `loop_states` (h_1 .. h_R, each [B, T, D]) and `loop_logits` (each loop's state through the head)."""

    loop_states: tuple[torch.Tensor, ...] | None = None
    loop_logits: tuple[torch.Tensor, ...] | None = None


class PLTRotaryEmbedding(LlamaRotaryEmbedding):
    """RoPE with every scaling rule of transformers; angles are computed in float32 or better."""

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x, position_ids):
        dtype = torch.promote_types(x.dtype, torch.float32)
        freqs = position_ids[..., None].to(dtype) * self.inv_freq.to(device=x.device, dtype=dtype)  # [B, T, K/2]
        angles = torch.cat((freqs, freqs), dim=-1)  # [B, T, K]
        return (angles.cos() * self.attention_scaling).to(x.dtype), (angles.sin() * self.attention_scaling).to(x.dtype)

    def _apply(self, fn, recurse=True):
        # Note: model.to(torch.bfloat16) casts buffers too, and frequencies of 8 bits turn far positions into noise
        # (logits drift with the length of the text). Device moves pass through, the frequencies stay as they are.
        exact = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, buffer in exact.items():
            if not buffer.is_meta:
                setattr(self, name, buffer.to(device=getattr(self, name).device))
        return self


def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, is_causal=None, **kwargs):
    """Plain attention. As in transformers' Llama, but float64 stays float64 and the weights are returned."""
    key, value = repeat_kv(key, module.num_key_value_groups), repeat_kv(value, module.num_key_value_groups)
    scores_BHTS = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores_BHTS = scores_BHTS + attention_mask
    dtype = torch.promote_types(query.dtype, torch.float32)
    weights_BHTS = F.softmax(scores_BHTS, dim=-1, dtype=dtype).to(query.dtype)
    weights_BHTS = F.dropout(weights_BHTS, p=dropout, training=module.training)
    return (weights_BHTS @ value).transpose(1, 2).contiguous(), weights_BHTS  # [B, T, H, K]


class PLTGate(nn.Module):
    """g = sigmoid(gate(x)): how much of a head's output is global (loop 1's cache); the rest is the window. Zero at birth,
    an even blend. Not an nn.Linear, so that quantisation leaves it alone."""

    def __init__(self, config: PLTConfig):
        super().__init__()
        self.reads_hidden = config.plt_gate_use_hidden_states
        inputs = config.hidden_size if self.reads_hidden else config.head_dim
        self.weight = nn.Parameter(torch.zeros(config.num_attention_heads, inputs))
        self.bias = nn.Parameter(torch.zeros(config.num_attention_heads))
        if self.reads_hidden:
            self.gate_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, x_BND: torch.Tensor, q_BHNK: torch.Tensor) -> torch.Tensor:
        """
        Args:
            x_BND: the layer's input before the layer's own norm.
            q_BHNK: the rotated query.

        Returns:
            g [B, N, H, 1], in (0, 1).
        """
        if self.reads_hidden:
            logits_BNH = F.linear(self.gate_norm(x_BND), self.weight, self.bias)
        else:
            logits_BNH = torch.einsum("bhnk,hk->bnh", q_BHNK, self.weight) + self.bias
        return logits_BNH.sigmoid()[..., None]


class AttentionView:
    """An attention module as a backend sees it in a decode step, when loops stand for something else: see `_attend_step`."""

    def __init__(self, attention: "PLTAttention", num_key_value_groups: int, is_causal: bool):
        self.num_key_value_groups = num_key_value_groups
        self.is_causal = is_causal
        self.training = attention.training
        self.layer_idx = attention.layer_idx
        self.config = attention.config


class PLTAttention(nn.Module):
    """Attention of one layer for any loop: the same projections, gated global and local attention from loop 2 on."""

    def __init__(self, config: PLTConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.num_heads, self.num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        self.num_key_value_groups = self.num_heads // self.num_kv_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = True
        D, bias = config.hidden_size, config.attention_bias
        self.q_proj = nn.Linear(D, self.num_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(D, self.num_kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(D, self.num_kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(self.num_heads * self.head_dim, D, bias=config.output_bias)
        self.q_norm = nn.RMSNorm(self.head_dim, eps=config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = nn.RMSNorm(self.head_dim, eps=config.rms_norm_eps) if config.qk_norm else None
        # One loop needs no gate, and a parameter without a gradient would stop DistributedDataParallel.
        self.plt_gate = PLTGate(config) if config.plt_num_loops > 1 else None

    def forward(
        self,
        x_BND: torch.Tensor,
        normed_BND: torch.Tensor,
        k1: torch.Tensor | None,
        v1: torch.Tensor | None,
        loop: int | None,
        num_loops: int,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        masks: Masks,
        past_key_values: Cache | None = None,
        **kwargs,
    ):
        """
        Args:
            x_BND: the layer's input; normed_BND: the same after the layer's norm.
            k1, v1: loop 1's keys and values of this layer, [B, G, S, K]; None when loop 1 is in this call.
            loop: which loop the N = T rows belong to; None: the N = R rows are the loops of one token.

        Returns:
            output [B, N, D]; attention weights or None; k1, v1.
        """
        B, N, _ = x_BND.shape
        q, k, v = self.project(normed_BND, position_embeddings)
        weights = None
        if loop is None:  # one token, its loops as rows
            k1, v1 = self._remember(past_key_values, k[:, :, :1], v[:, :, :1], full_index(self.config, self.layer_idx))
            out_BNHK = self._one_token(q, k, v, k1, v1, masks, past_key_values, x_BND, **kwargs)
        elif loop == 0:  # ordinary causal attention
            k1, v1 = self._remember(past_key_values, k, v, full_index(self.config, self.layer_idx))
            out_BNHK, weights = self._attend(self, q, k1, v1, masks["full"], **kwargs)
        else:
            global_BNHK, global_weights = self._attend(self, q, k1, v1, masks["full"], **kwargs)
            local_BNHK, local_weights = self._window(q, k, v, loop, masks, past_key_values, **kwargs)
            g = self.gate(x_BND, q).to(global_BNHK.dtype)  # [B, N, H, 1]
            out_BNHK = torch.lerp(local_BNHK, global_BNHK, g)  # g * global + (1 - g) * local
            if kwargs.get("output_attentions") and global_weights is not None:
                local_weights = self._dense(local_weights, global_weights)
                weights = torch.lerp(local_weights, global_weights, g.transpose(1, 2))  # one distribution over positions
        return self.o_proj(out_BNHK.reshape(B, N, -1)), weights, k1, v1

    def project(self, normed_BND: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor]):
        """Rotated queries [B, H, N, K] and keys [B, G, N, K], and values [B, G, N, K], of the layer's normed input."""
        B, N, _ = normed_BND.shape
        heads = (B, N, -1, self.head_dim)
        q, k, v = (proj(normed_BND).view(heads).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return *apply_rotary_pos_emb(q, k, *position_embeddings), v

    def _one_token(self, q, k, v, k1, v1, masks, cache, x_BRD, **kwargs) -> torch.Tensor:
        """All loops of one token, [B, R, H, K]: loop 1's keys are read once for all of them."""
        B, H, R, K = q.shape
        G = self.num_kv_heads
        global_BRHK = self._attend_step(q.reshape(B, G, -1, K), k1, v1, masks["full"], **kwargs)  # rows of a group: H/G * R
        global_BRHK = global_BRHK.reshape(B, H, R, K).transpose(1, 2)
        if R == 1:
            return global_BRHK
        own = [self._recall(cache, k[:, :, r : r + 1], v[:, :, r : r + 1], r) for r in range(1, R)]
        keys, values = (torch.cat(parts, dim=1) if R > 2 else parts[0] for parts in zip(*own))  # [B, (R-1) * G, W, K]
        q_own = q[:, :, 1:].transpose(1, 2).reshape(B, (R - 1) * G, -1, K)
        local_BRHK = self._attend_step(q_own, keys, values, masks["window"], windowed=True, **kwargs).reshape(B, R - 1, H, K)
        g = self.gate(x_BRD[:, 1:], q[:, :, 1:]).to(local_BRHK.dtype)  # [B, R-1, H, 1]
        return torch.cat((global_BRHK[:, :1], torch.lerp(local_BRHK, global_BRHK[:, 1:], g)), dim=1)

    def _attend_step(self, q_BGnK, k, v, mask, **kwargs) -> torch.Tensor:
        """Attention of n queries that share a key head and see the same keys: [B, G, n, K].

        To eager and sdpa they are n tokens of a text without causality, so that a key is read once for all of them: heads of a
        group would each read it again. To other backends, which may take masks for those of tokens, they are heads.
        """
        B, G, n, K = q_BGnK.shape
        if self.config._attn_implementation in BANDED:
            out = self._attend(AttentionView(self, 1, is_causal=False), q_BGnK, k, v, mask, **kwargs)[0]  # [B, n, G, K]
            out = out.transpose(1, 2)
        else:
            out = self._attend(AttentionView(self, n, is_causal=True), q_BGnK.reshape(B, G * n, 1, K), k, v, mask, **kwargs)[
                0
            ]
        return out.reshape(B, G, n, K)

    def _window(self, q, k, v, loop, masks, cache, **kwargs):
        """Attention of T tokens over their own loop's window, [B, T, H, K]."""
        B, T, w = q.shape[0], q.shape[2], self.config.window_tokens
        if w == 0:  # the token itself, with a weight of 1
            own_BTHK = repeat_kv(v, self.num_key_value_groups).transpose(1, 2)
            weight_BTH1 = F.dropout(own_BTHK.new_ones(*own_BTHK.shape[:3], 1), self.config.attention_dropout, self.training)
            return weight_BTH1 * own_BTHK, None
        held = 0 if cache is None else min(cache.get_seq_length(window_index(self.config, loop, self.layer_idx)), w)
        k, v = self._recall(cache, k, v, loop)
        if T == 1 or self.config._attn_implementation not in BANDED:
            return self._attend(self, q, k, v, masks["window"], windowed=True, **kwargs)
        block = band_block(w)
        k, v = (fold_keys(x[:, :, : held + T], T, w, block) for x in (k, v))
        out, weights = self._attend(self, fold_queries(q, block), k, v, masks["window"], **kwargs)
        return out.unflatten(0, (B, -1)).flatten(1, 2)[:, :T], weights

    def _dense(self, local_weights, like_BHTS) -> torch.Tensor:
        """The window's weights over all S positions, [B, H, T, S]."""
        B, _, T, S = like_BHTS.shape
        if local_weights is None:  # w = 0: the token itself
            own = torch.eye(T, dtype=like_BHTS.dtype, device=like_BHTS.device)
            return F.pad(own, (S - T, 0)).expand_as(like_BHTS)
        if T == 1:
            return F.pad(local_weights, (S - local_weights.shape[-1], 0))
        return unfold_bands(local_weights, B, T, S, self.config.window_tokens)

    def gate(self, x_BND, q_BHNK) -> torch.Tensor:
        """g [B, N, H, 1], see PLTGate."""
        if self.plt_gate is None:  # trained with one loop: the even blend that gates have at birth
            return q_BHNK.new_full((), 0.5).expand(*x_BND.shape[:2], self.num_heads, 1)
        return self.plt_gate(x_BND, q_BHNK)

    def _recall(self, cache: Cache | None, k, v, loop: int):
        """This loop's keys and values: those of the window so far, and the new ones."""
        if self.config.window_tokens == 0:
            return k, v
        return self._remember(cache, k, v, window_index(self.config, loop, self.layer_idx))

    @staticmethod
    def _remember(cache: Cache | None, k, v, index: int):
        return (k, v) if cache is None else cache.update(k, v, index)

    def _attend(self, module, q, k, v, mask, windowed: bool = False, **kwargs):
        """Attention through transformers' interface (eager, sdpa, flex, flash): [B, T, H, K], weights or None."""
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        if windowed:  # FlashAttention reads this; the library counts the token itself
            kwargs["sliding_window"] = self.config.window_tokens + 1
        dropout = self.config.attention_dropout if self.training else 0.0
        return attend(module, q, k, v, mask, dropout=dropout, scaling=self.scaling, **kwargs)


class PLTDecoderLayer(GradientCheckpointingLayer):
    """x + attention(norm(x)), then x + mlp(norm(x)): one layer, visited once per loop."""

    def __init__(self, config: PLTConfig, layer_idx: int):
        super().__init__()
        self.self_attn = PLTAttention(config, layer_idx)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, x_BND: torch.Tensor, k1: torch.Tensor | None, v1: torch.Tensor | None, **kwargs):
        # k1 and v1 are arguments and results, so that gradient checkpointing sees the path from loop 1 to later loops.
        attended_BND, _, k1, v1 = self.self_attn(x_BND, self.input_layernorm(x_BND), k1, v1, **kwargs)
        x_BND = x_BND + attended_BND
        x_BND = x_BND + self.mlp(self.post_attention_layernorm(x_BND))
        return x_BND, k1, v1


class PLTPreTrainedModel(PreTrainedModel):
    config: PLTConfig
    config_class = PLTConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["PLTDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values", "masks"]
    _keys_to_ignore_on_load_unexpected = [r"self_attn\.plt_gate\."]  # a looped checkpoint loaded with one loop
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": PLTDecoderLayer, "attentions": PLTAttention}

    def __init__(self, config: PLTConfig, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        # Note: save_pretrained undoes the renamings that loading did, and for a model that was never loaded it would undo
        # all that are registered, so that a new model's gates were saved as loop_gate_proj and a resumed run lost them.
        self._weight_conversions: list = []

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, PLTGate):
            init.zeros_(module.weight)
            init.zeros_(module.bias)


class PLTModel(PLTPreTrainedModel):
    """The stack and its loops, without the head."""

    def __init__(self, config: PLTConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList([PLTDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = PLTRotaryEmbedding(config)  # type: ignore[arg-type]
        self.gradient_checkpointing = False  # of each visit of a layer, see gradient_checkpointing_enable()
        self.checkpoint_loops = False  # of whole loops: set it to keep only what is between loops for the backward pass
        self._told: set[int] = set()
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | Masks | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        num_loops: int | None = None,
        one_pass: bool = True,
        output_loop_states: bool | None = None,
        states_to_keep: int | None = None,
        prompt_tokens: int = 0,
        **kwargs,
    ) -> PLTModelOutputWithPast:
        """
        Args:
            input_ids: [B, T]; or inputs_embeds: [B, T, D].
            attention_mask: [B, tokens so far], 0 for padding. None: no padding.
            position_ids: [B, T]. Without a cache, another document starts where they do not go up by one.
            past_key_values: a cache; an empty stock cache is extended in place.
            num_loops: R for this call; default: the configuration's.
            one_pass: run the loops of a single token as rows of one pass. False: a pass per loop, for comparison.
            output_loop_states: return `loop_states`. Default: if all states are needed.
            states_to_keep: only this many of the last states are needed; others may be left out, and what only they depend on
                is not computed. None: all.
            prompt_tokens: if this call is a chunk of a prompt, the tokens of the whole prompt, cached ones included: it is
                the prompt's last states that are needed. All chunks of a prompt must be called alike.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass exactly one of input_ids and inputs_embeds.")
        num_loops = self._loop_count(num_loops)
        e_BTD = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        T = e_BTD.shape[1]

        if past_key_values is not None:
            extend_cache(past_key_values, self.config, num_loops)
        if output_loop_states is None:
            output_loop_states = states_to_keep is None
        if isinstance(attention_mask, dict):  # made in advance by create_masks_for_generate
            masks = attention_mask
        else:
            backend = self.config._attn_implementation
            attention_mask, packed = check_inputs(e_BTD, attention_mask, position_ids, past_key_values, backend)
            if past_key_values is None and use_cache and not packed and not self.training:
                past_key_values = make_cache(self.config, num_loops)
            masks = plt_masks(self.config, num_loops, e_BTD, attention_mask, past_key_values, position_ids)
        if position_ids is None:
            past = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = (torch.arange(T, device=e_BTD.device) + past)[None]

        call = {
            "num_loops": num_loops,
            "position_embeddings": self.rotary_emb(e_BTD, position_ids),
            "masks": masks,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            **kwargs,
        }
        flags = ("output_hidden_states", "output_attentions")
        inspected = any(kwargs.get(flag, getattr(self.config, flag, False)) for flag in flags)
        keep = states_to_keep
        if inspected or output_loop_states or not self._may_keep_less(num_loops, masks, past_key_values):
            keep = None
        if keep is not None and prompt_tokens and past_key_values is not None:
            keep -= max(0, prompt_tokens - int(past_key_values.get_seq_length()) - T)  # these tokens of the prompt follow
        if T == 1 and one_pass and not inspected and (keep is None or keep > 0):
            states = self._one_token(e_BTD, **call)
        else:
            states = self._loop_by_loop(e_BTD, keep=keep, **call)
        if keep is not None:  # the first states of a tail have not seen their whole window
            states[-1] = states[-1][:, -keep:] if keep > 0 else e_BTD[:, :0]
        if output_loop_states and not self.config.plt_normalize_per_loop:
            states = [self.norm(h_BTD) for h_BTD in states[:-1]] + states[-1:]
        return PLTModelOutputWithPast(
            last_hidden_state=states[-1],
            past_key_values=past_key_values,
            loop_states=tuple(states) if output_loop_states else None,
        )

    def _may_keep_less(self, num_loops: int, masks: Masks, cache: Cache | None) -> bool:
        """Everything is computed where gradients may be wanted, for a cache that will be cropped, without a cache, and by what is
        compiled for every shape."""
        if torch.is_grad_enabled() or self.training or cache is None or "padding" not in masks:
            return False
        if torch.compiler.is_compiling() or self.config._attn_implementation == "flex_attention":
            return False
        return num_loops == 1 or not cache.is_recording_past(carry_index(self.config, num_loops, 0))

    def _loop_by_loop(
        self, e_BTD: torch.Tensor, num_loops: int, masks: Masks, past_key_values: Cache | None, keep: int | None, **call
    ):
        """Training and prompts: loop r over all tokens, then loop r + 1. If only the last `keep` states of loop R are needed,
        loops 2..R run on the tail that these and the cache depend on; it gets shorter from layer to layer."""
        T, w = e_BTD.shape[1], self.config.window_tokens
        past = 0 if keep is None or past_key_values is None else int(past_key_values.get_seq_length())
        states: list[torch.Tensor] = []
        k1: list[Any] = [None] * len(self.layers)
        v1: list[Any] = [None] * len(self.layers)
        call |= {"num_loops": num_loops, "masks": masks, "past_key_values": past_key_values}
        tails: dict[int, dict] = {}  # what layers are told, by the length of the tail
        for loop in range(num_loops):
            if loop == 0:
                x_BND = e_BTD
            else:
                shifted_BND = self._shift(states[-1], loop - 1, num_loops, masks, past_key_values)
                x_BND = self._combine(e_BTD[:, -shifted_BND.shape[1] :], shifted_BND)
            if self.checkpoint_loops and self.training:
                x_BND, k1, v1 = checkpoint(self._stack, x_BND, k1, v1, loop, call, use_reentrant=False)
                states.append(self._after_loop(x_BND, loop, num_loops))
                continue
            for i, layer in enumerate(self.layers):
                told = call
                if loop > 0 and keep is not None and past_key_values is not None:
                    N = min(T, tail_tokens(self.config, num_loops, keep, loop, i))
                    if N <= 0:  # what is needed comes later in the prompt
                        return states
                    x_BND, start, window = x_BND[:, -N:], past + T - N, window_index(self.config, loop, i)
                    catch_up(past_key_values, window, start, w, k1[i])
                    if N not in tails:
                        tails[N] = self._tail_call(x_BND, TailView(past_key_values, window, start, k1[i].shape[2]), **call)
                    told = tails[N]
                x_BND, k1[i], v1[i] = layer(x_BND, k1[i], v1[i], loop=loop, **told)
            states.append(self._after_loop(x_BND, loop, num_loops))
        return states

    def _stack(self, x_BTD: torch.Tensor, k1: list, v1: list, loop: int, call: dict):
        """All layers of one loop over all tokens."""
        k1, v1 = list(k1), list(v1)
        for i, layer in enumerate(self.layers):
            x_BTD, k1[i], v1[i] = layer(x_BTD, k1[i], v1[i], loop=loop, **call)
        return x_BTD, k1, v1

    def _tail_call(self, x_BND: torch.Tensor, view: TailView, masks, position_embeddings, position_ids, **call) -> dict:
        N = x_BND.shape[1]
        return call | {
            "masks": plt_masks(self.config, call["num_loops"], x_BND, masks["padding"], view),
            "position_embeddings": tuple(angles[:, -N:] for angles in position_embeddings),
            "position_ids": position_ids[:, -N:],
        }

    def _one_token(self, e_B1D: torch.Tensor, num_loops: int, masks: Masks, past_key_values: Cache | None, **call):
        """A decode step: the loops of one token as R rows of one pass. Exact, because every row's input is already known:
        row r reads loop r-1's state of the previous token, which the cache carries."""
        carries = [self._carry(past_key_values, loop, num_loops, e_B1D) for loop in range(num_loops - 1)]
        later = [self._combine(e_B1D, _where(masks["carry"], carry_B1D)) for carry_B1D in carries]
        x_BRD = torch.cat([e_B1D, *later], dim=1)
        for layer in self.layers:
            x_BRD, _, _ = layer(
                x_BRD, None, None, loop=None, num_loops=num_loops, masks=masks, past_key_values=past_key_values, **call
            )
        states = [self._after_loop(x_BRD[:, r : r + 1], r, num_loops) for r in range(num_loops)]
        for loop in range(num_loops - 1):
            self._keep_carry(past_key_values, states[loop], loop, num_loops)
        return states

    def _combine(self, e: torch.Tensor, shifted: torch.Tensor) -> torch.Tensor:
        """b = a * E + c * shift(h), the input of loops 2..R."""
        a, c = self.config.plt_emb_scale, self.config.plt_hidden_scale
        return (e if a is None else a * e) + (shifted if c is None else c * shifted)

    def _after_loop(self, x: torch.Tensor, loop: int, num_loops: int) -> torch.Tensor:
        """The same final norm after every loop; with plt_normalize_per_loop false, after the last one only."""
        return self.norm(x) if self.config.plt_normalize_per_loop or loop == num_loops - 1 else x

    def _shift(self, h_BTD: torch.Tensor, loop: int, num_loops: int, masks: Masks, cache: Cache | None) -> torch.Tensor:
        """shift(h): token t gets the state of token t - 1, and the first token of every text gets zeros."""
        shifted_BTD = torch.cat((self._carry(cache, loop, num_loops, h_BTD), h_BTD[:, :-1]), dim=1)
        self._keep_carry(cache, h_BTD, loop, num_loops)  # overwrites the carry in place, so only now
        return _where(masks["carry"], shifted_BTD)

    def _carry(self, cache: Cache | None, loop: int, num_loops: int, like_BTD: torch.Tensor) -> torch.Tensor:
        """This loop's state of the token before this call, [B, 1, D]; zeros if there is none."""
        state_BDn = None if cache is None else cache.get_conv_state(carry_index(self.config, num_loops, loop))
        if state_BDn is None or state_BDn.shape[-1] == 0:
            return like_BTD.new_zeros(like_BTD.shape[0], 1, like_BTD.shape[2])
        return state_BDn[..., -1:].transpose(1, 2).to(like_BTD.dtype)

    def _keep_carry(self, cache: Cache | None, h_BTD: torch.Tensor, loop: int, num_loops: int) -> None:
        if cache is None:
            return
        index = carry_index(self.config, num_loops, loop)
        if not cache.is_recording_past(index):  # assisted decoding records, so that rejected tokens can be cropped
            h_BTD = h_BTD[:, -1:]
        cache.update_conv_state(h_BTD.transpose(1, 2), index, conv_kernel_size=1)

    def _loop_count(self, num_loops: int | None) -> int:
        if num_loops is None or num_loops == self.config.plt_num_loops:
            return self.config.plt_num_loops
        if not isinstance(num_loops, int) or num_loops < 1:
            raise ValueError(f"num_loops={num_loops!r} must be an integer of at least 1.")
        trained = self.config.trained_loops
        if num_loops not in trained and not torch.compiler.is_compiling() and num_loops not in self._told:
            self._told.add(num_loops)
            warnings.warn(
                f"num_loops={num_loops}, but this model was trained with {' and '.join(map(str, trained))}: expect worse text.",
                stacklevel=2,
            )
        return num_loops


def _where(keep_BT: torch.Tensor | None, h_BTD: torch.Tensor) -> torch.Tensor:
    return h_BTD if keep_BT is None else torch.where(keep_BT[:, -h_BTD.shape[1] :, None], h_BTD, 0.0)


class PLTForCausalLM(PLTPreTrainedModel, GenerationMixin):
    """The stack, its loops and the language-model head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: PLTConfig):
        super().__init__(config)
        self.model = PLTModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | Masks | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_loops: int | None = None,
        one_pass: bool = True,
        output_loop_states: bool | None = None,
        output_loop_logits: bool = False,
        exact_tail: bool = True,
        **kwargs,
    ) -> PLTCausalLMOutputWithPast:
        """As in `LlamaForCausalLM`, with the loop dial.

        Args:
            num_loops: R for this call; default: the configuration's. A count that the model was not trained at warns once.
            one_pass: run the loops of a single token as rows of one pass. False: a pass per loop, for comparison.
            output_loop_states: return `loop_states`, each loop's state after the final norm. Default: unless `logits_to_keep`
                asks for the last logits only.
            output_loop_logits: return `loop_logits`, each loop's state through the head.
            exact_tail: if `logits_to_keep` asks for the last logits only, run loops 2..R on the tail that these and further
                steps depend on. The logits are the same. False: on all tokens, for comparison.

        Returns:
            loss, logits [B, T or logits_to_keep, V], past_key_values, loop_states, loop_logits.
        """
        tail = exact_tail and labels is None and isinstance(logits_to_keep, int) and logits_to_keep > 0
        outputs: PLTModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            num_loops=num_loops,
            one_pass=one_pass,
            output_loop_states=True if output_loop_logits else output_loop_states,
            states_to_keep=logits_to_keep if tail else None,
            **kwargs,
        )
        kept = slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep)  # type: ignore[arg-type]
        logits = self.lm_head(kept)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        loop_logits = None
        if output_loop_logits and outputs.loop_states is not None:
            earlier = outputs.loop_states[:-1]
            loop_logits = (*(self.lm_head(slice_logits_to_keep(h, logits_to_keep)) for h in earlier), logits)
        return PLTCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            loop_states=outputs.loop_states,
            loop_logits=loop_logits,
        )

    def prepare_inputs_for_generation(self: Any, *args, inputs_embeds=None, output_loop_states: bool = False, **kwargs):
        # Note: generate() looks for the name inputs_embeds in this signature. Per-loop states of a long prompt are memory that it
        # has no use for.
        kwargs["inputs_embeds"] = inputs_embeds
        inputs = GenerationMixin.prepare_inputs_for_generation(self, *args, **kwargs)
        return inputs | {"output_loop_states": output_loop_states}

    def _prefill(self: Any, input_ids, generation_config, model_kwargs, *args, **kwargs):
        # Only here is it known how long a prompt is that comes in chunks (prefill_chunk_size). `input_ids` either holds the
        # cached tokens too, and is then as long as the mask, or the new ones only.
        cache, mask = model_kwargs.get("past_key_values"), model_kwargs.get("attention_mask")
        if generation_config.prefill_chunk_size is not None and cache is not None:
            masked = getattr(generation_config, "_mask_length", -1) if mask is None else mask.shape[1]
            past = 0 if masked == input_ids.shape[1] else int(cache.get_seq_length())
            model_kwargs = model_kwargs | {"prompt_tokens": past + input_ids.shape[1]}
        return GenerationMixin._prefill(self, input_ids, generation_config, model_kwargs, *args, **kwargs)

    def _prepare_cache_for_generation(self: Any, generation_config, model_kwargs, *args, **kwargs):
        GenerationMixin._prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs)
        cache = model_kwargs.get("past_key_values")
        if cache is not None:
            extend_cache(cache, self.config, model_kwargs.get("num_loops") or self.config.plt_num_loops)
            if generation_config.is_assistant:
                cache.activate_past_recording()

    def init_continuous_batching(self, *args, **kwargs):
        raise ValueError(
            "transformers' continuous batching pages full and sliding layers only and cannot hold the state that a PLT "
            "carries from token to token: use generate() with a left-padded batch instead."
        )

    @staticmethod
    def create_masks_for_generate(config, inputs_embeds, attention_mask, past_key_values, position_ids=None, **kwargs):
        """All masks of a step in advance, for compiled decoding with a static cache."""
        loops = cached_loops(past_key_values, config) or config.plt_num_loops
        masks = plt_masks(config, loops, inputs_embeds, attention_mask, past_key_values, position_ids)
        if inputs_embeds.shape[1] == 1:  # it grows with the text, and a compiled step would be compiled again
            del masks["padding"]
        return masks
