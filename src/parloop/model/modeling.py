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
read and write one cache, and any split of a text into calls gives the same logits.

The equations and the three passes are here. The other files:
    offset.py      b_r: how a loop reads the loop before it        masks.py       which token sees which
    backends.py    how attention is called                        window.py      the window as bands
    cache.py       state that later tokens read                   tail.py        the tokens of a prompt that later loops need
    call.py        checks of a call's arguments                   generation.py  overrides of generate()
    loading.py     from_pretrained() of packed weights            rotary.py      RoPE in float32
    cache_argument.py  the name that a cache is passed by         reference.py   the same equations with nothing else

Axes, as suffixes of tensor names:
    B sequences    T tokens of this call    S keys (cached and new)    D hidden size    R loops
    H query heads  G key/value heads        K head size                N rows: tokens of one loop, or R loops of one token
Loops are numbered 1..R in prose and plots, from 0 in code.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_layers import (
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.models.llama.modeling_llama import LlamaMLP, apply_rotary_pos_emb
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .backends import attend, attend_rows
from .cache import extend_cache, make_cache, remember, tokens_held, window_index
from .cache_argument import CACHE, takes_cache
from .call import check_call, check_inputs, chosen_loops
from .configuration import PLTConfig
from .generation import PLTGenerationMixin
from .loading import PLTLoadingMixin
from .masks import Masks, plt_masks
from .offset import Offset
from .rotary import PLTRotaryEmbedding
from .tail import Tail, states_needed
from .window import attend_window, dense_weights


@dataclass
class PLTModelOutputWithPast(BaseModelOutputWithPast):
    """Adds `loop_states`: for each loop its state after the final norm, h_1 .. h_R, each [B, T, D]."""

    loop_states: tuple[torch.Tensor, ...] | None = None


@dataclass
class PLTCausalLMOutputWithPast(CausalLMOutputWithPast):
    """Adds `loop_states` (h_1 .. h_R, each [B, T, D]) and `loop_logits` (each loop's state through the head)."""

    loop_states: tuple[torch.Tensor, ...] | None = None
    loop_logits: tuple[torch.Tensor, ...] | None = None


class PLTGate(nn.Module):
    """g = sigmoid(gate(x)): how much of a head's output is global (loop 1's cache); the rest is the window. Initialised
    to zero, an even blend. Not an nn.Linear, so that quantisation leaves it alone."""

    def __init__(self, config: PLTConfig):
        super().__init__()
        self.reads_hidden = config.plt_gate_use_hidden_states
        inputs = config.hidden_size if self.reads_hidden else config.head_dim
        self.weight = nn.Parameter(torch.zeros(config.num_attention_heads, inputs))
        self.bias = nn.Parameter(torch.zeros(config.num_attention_heads))
        if self.reads_hidden:
            self.gate_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, x_BND: torch.Tensor, q_BHNK: torch.Tensor) -> torch.Tensor:
        """Compute the gate.

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
        self.q_norm = nn.RMSNorm(self.head_dim, eps=config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(self.head_dim, eps=config.rms_norm_eps) if config.qk_norm else nn.Identity()
        # One loop needs no gate, and a parameter without a gradient would stop DistributedDataParallel.
        self.plt_gate = PLTGate(config) if config.plt_num_loops > 1 else None

    @takes_cache
    def forward(
        self,
        x_BND: torch.Tensor,
        normed_BND: torch.Tensor,
        k1: torch.Tensor | None,
        v1: torch.Tensor | None,
        *,
        loop: int,
        one_token: bool,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        masks: Masks,
        cache: Cache | None = None,
        **kwargs,
    ):
        """Attend, and project the output.

        Args:
            x_BND: the layer's input; normed_BND: the same after the layer's norm.
            k1, v1: loop 1's keys and values of this layer, [B, G, S, K]; None when loop 1 is in this call.
            one_token: the N = R rows are the loops of one token. Else they are tokens of `loop` (0 .. R-1).

        Returns:
            output [B, N, D]; attention weights or None; k1, v1.
        """
        layer = self.layer_idx
        q, k, v = self.project(normed_BND, position_embeddings)
        weights = None
        if one_token:  # all loops of it: loop 1's keys are read once for all of them
            k1, v1 = remember(cache, k[:, :, :1], v[:, :, :1], layer)
            out_BNHK = self._one_token(x_BND, q, k, v, k1, v1, masks, cache, **kwargs)
        elif loop == 0:  # ordinary causal attention
            k1, v1 = remember(cache, k, v, layer)
            out_BNHK, weights = attend(self, q, k1, v1, masks["full"], **kwargs)
        else:  # global attention to loop 1's keys, local attention to the loop's own, and the gate between them
            global_BNHK, global_weights = attend(self, q, k1, v1, masks["full"], **kwargs)
            held = tokens_held(cache, self.config, loop, layer)
            k, v = remember(cache, k, v, window_index(self.config, loop, layer))
            local_BNHK, local_weights = attend_window(self, q, k, v, held, masks["window"], **kwargs)
            g = self.gate(x_BND, q).to(global_BNHK.dtype)  # [B, N, H, 1]
            out_BNHK = torch.lerp(local_BNHK, global_BNHK, g)  # g * global + (1 - g) * local
            if kwargs.get("output_attentions") and global_weights is not None:  # as one distribution over positions
                local_weights = dense_weights(local_weights, global_weights, self.config.window_tokens)
                weights = torch.lerp(local_weights, global_weights, g.transpose(1, 2))
        return self.o_proj(out_BNHK.flatten(2)), weights, k1, v1

    def project(self, normed_BND: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor]):
        """Return rotated queries [B, H, N, K] and keys [B, G, N, K], and values [B, G, N, K], of the layer's normed
        input."""
        heads = (*normed_BND.shape[:2], -1, self.head_dim)
        q, k, v = (proj(normed_BND).view(heads).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj))
        return *apply_rotary_pos_emb(self.q_norm(q), self.k_norm(k), *position_embeddings), v

    def gate(self, x_BND: torch.Tensor, q_BHNK: torch.Tensor) -> torch.Tensor:
        """Return g [B, N, H, 1], see PLTGate. A model trained with one loop has no gate and gets the even blend that
        gates are initialised to."""
        if self.plt_gate is None:
            return q_BHNK.new_full((), 0.5).expand(*x_BND.shape[:2], self.num_heads, 1)
        return self.plt_gate(x_BND, q_BHNK)

    def _one_token(self, x_BRD, q, k, v, k1, v1, masks: Masks, cache: Cache | None, **kwargs) -> torch.Tensor:
        """Attend for all loops of one token, [B, R, H, K]. The rows are the queries of a key head: H/G per loop."""
        (B, H, R, K), G = q.shape, self.num_kv_heads
        global_BRHK = attend_rows(self, q.reshape(B, G, -1, K), k1, v1, masks["full"], **kwargs)
        global_BRHK = global_BRHK.reshape(B, H, R, K).transpose(1, 2)
        if R == 1:
            return global_BRHK
        windows = [window_index(self.config, r, self.layer_idx) for r in range(1, R)]
        own = [remember(cache, k[:, :, r : r + 1], v[:, :, r : r + 1], index) for r, index in enumerate(windows, 1)]
        keys, values = (torch.cat(parts, dim=1) if R > 2 else parts[0] for parts in zip(*own))  # [B, (R-1) * G, W, K]
        q_own = q[:, :, 1:].transpose(1, 2).reshape(B, (R - 1) * G, -1, K)
        local_BRHK = attend_rows(self, q_own, keys, values, masks["window"], **kwargs).reshape(B, R - 1, H, K)
        g = self.gate(x_BRD[:, 1:], q[:, :, 1:]).to(local_BRHK.dtype)  # [B, R-1, H, 1]
        return torch.cat((global_BRHK[:, :1], torch.lerp(local_BRHK, global_BRHK[:, 1:], g)), dim=1)


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


class PLTPreTrainedModel(PLTLoadingMixin, PreTrainedModel):
    config: PLTConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["PLTDecoderLayer"]
    _skip_keys_device_placement = [CACHE]
    _keys_to_ignore_on_load_unexpected = [r"self_attn\.plt_gate\."]  # a looped checkpoint loaded with one loop
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _can_compile_fullgraph = True
    _can_record_outputs = {
        "hidden_states": OutputRecorder(PLTDecoderLayer, num_hidden_layers_key="visited_layers"),
        "attentions": PLTAttention,
    }

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True  # the library looks for the call of its interface in this file's text; it is in backends.py

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
        self.offset = Offset(config)
        self.rotary_emb = PLTRotaryEmbedding(config)  # type: ignore[arg-type]
        self.gradient_checkpointing = False  # of each visit of a layer, see gradient_checkpointing_enable()
        self.checkpoint_loops = False  # of whole loops: set it to keep only what is between loops for the backward pass
        self.warned_loops: set[int] = set()  # loop counts that need no warning, or had it
        self.post_init()

    @takes_cache
    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | Masks | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        num_loops: int | None = None,
        one_pass: bool = True,
        output_loop_states: bool | None = None,
        states_to_keep: int | None = None,
        prompt_tokens: int = 0,
        **kwargs,
    ) -> PLTModelOutputWithPast:
        """Run the loops on T tokens.

        Args:
            input_ids: [B, T]; or inputs_embeds: [B, T, D].
            attention_mask: [B, tokens so far], 0 for padding. None: no padding.
            position_ids: [B, T]. Without a cache, another document starts where they do not go up by one.
            cache: an empty stock cache is extended in place. Also called past_key_values, see cache_argument.py.
            num_loops: R for this call; default: the configuration's.
            one_pass: run the loops of a single token as rows of one pass. False: a pass per loop, for comparison.
            output_loop_states: return `loop_states`. Default: if all states are needed.
            states_to_keep: only this many of the last states are needed; others may be left out, and what only they depend on
                is not computed. None: all.
            prompt_tokens: if this call is a chunk of a prompt, the tokens of the whole prompt, cached ones included: it is
                the prompt's last states that are needed. All chunks of a prompt must be called alike.
            output_hidden_states: return `hidden_states`, 1 + L * R tensors [B, T, D] in the order of computation: E, and the
                output of every layer, loop after loop. Entry (r - 1) * L + n is layer n's of loop r, before the final norm; but
                the last entry is h_R, after it. (Inputs of loops 2..R are not among them; states after the norm are
                `loop_states`.) Given numbers of entries, negative ones from the end, the others are None.
            output_attentions: return `attentions`, L * R tensors [B, H, T, S] in the same order. Of a later loop it is the
                mixture of its global and its local weights. Needs attn_implementation="eager".

        Returns:
            last_hidden_state: h_R [B, T, D] after the final norm, or its last `states_to_keep`; cache: the cache, if there
            is one; loop_states: h_1 .. h_R, [B, T, D] each, if asked for; hidden_states and attentions, if asked for.

        Raises:
            ValueError: inputs that contradict each other or the cache; reentrant checkpointing of loops in DistributedDataParallel.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass exactly one of input_ids and inputs_embeds.")
        num_loops = chosen_loops(self, num_loops)
        check_call(self, num_loops, kwargs.get("output_hidden_states", self.config.output_hidden_states))
        e_BTD = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        T = e_BTD.shape[1]

        if cache is not None:
            extend_cache(cache, self.config, num_loops)
        if isinstance(attention_mask, dict):  # made in advance by create_masks_for_generate
            masks = attention_mask
        else:
            attention_mask, packed = check_inputs(self.config, num_loops, e_BTD, attention_mask, position_ids, cache)
            if cache is None and use_cache and not packed and not self.training:
                cache = make_cache(self.config, num_loops)
            masks = plt_masks(self.config, num_loops, e_BTD, attention_mask, cache, position_ids)
        if position_ids is None:
            past = 0 if cache is None else cache.get_seq_length()
            position_ids = (torch.arange(T, device=e_BTD.device) + past)[None]

        angles = self.rotary_emb(e_BTD, position_ids)
        call = {"position_embeddings": angles, "masks": masks, "position_ids": position_ids, CACHE: cache, **kwargs}
        flags = ("output_hidden_states", "output_attentions")
        inspected = any(kwargs.get(flag, getattr(self.config, flag)) for flag in flags)
        if output_loop_states is None:
            output_loop_states = states_to_keep is None
        keep = None
        if not inspected and not output_loop_states and not self.training:
            keep = states_needed(self.config, masks, cache, T, states_to_keep, prompt_tokens)

        if T == 1 and one_pass and self.config.plt_offset > 0 and not inspected and (keep is None or keep > 0):
            states = self._one_token(e_BTD, num_loops, call)  # decoding
        else:
            states = self._loop_by_loop(e_BTD, num_loops, call, keep)  # training and prompts
        if output_loop_states and not self.config.plt_normalize_per_loop:
            states = [self.norm(h_BTD) for h_BTD in states[:-1]] + states[-1:]
        return PLTModelOutputWithPast(
            last_hidden_state=states[-1],
            loop_states=tuple(states) if output_loop_states else None,
            **{CACHE: cache},  # type: ignore[arg-type]
        )

    def _loop_by_loop(self, e_BTD: torch.Tensor, num_loops: int, call: dict, keep: int | None) -> list[torch.Tensor]:
        """Compute h_1 .. h_R, one loop after the other, each [B, T, D]; or only the last `keep` states of h_R (see tail.py)."""
        masks, cache = call["masks"], call[CACHE]
        visit: Any = self._stack
        if self.checkpoint_loops and self.training and cache is None:
            visit = partial(checkpoint, self._stack, use_reentrant=False)
        elif keep is not None:
            visit = Tail(self.config, self.layers, self._stack, keep, e_BTD.shape[1], num_loops, cache)
        states: list[torch.Tensor] = []
        k1: list = [None] * len(self.layers)
        v1: list = [None] * len(self.layers)
        for loop in range(num_loops):
            x_BND = e_BTD if loop == 0 else self.offset(e_BTD, states[-1], loop, num_loops, masks, cache)
            x_BND, k1, v1 = visit(x_BND, k1, v1, loop, call)
            states.append(self._after_loop(x_BND, loop, num_loops))
            if x_BND.shape[1] == 0:  # what is needed comes later in the prompt
                break
        if keep is not None:  # the first states of a tail have not seen their whole window
            states[-1] = states[-1][:, -keep:] if keep > 0 else states[-1][:, :0]
        return states

    def _stack(self, x_BTD: torch.Tensor, k1: list, v1: list, loop: int, call: dict):
        """Run all layers of one loop over all tokens. Returns [B, T, D], and loop 1's keys and values of every layer."""
        k1, v1 = list(k1), list(v1)
        for i, layer in enumerate(self.layers[: self.config.num_hidden_layers]):  # the library's early exit lowers it
            x_BTD, k1[i], v1[i] = layer(x_BTD, k1[i], v1[i], loop=loop, one_token=False, **call)
        return x_BTD, k1, v1

    def _one_token(self, e_B1D: torch.Tensor, num_loops: int, call: dict) -> list[torch.Tensor]:
        """Run a decode step: the loops of one token as R rows of one pass, h_1 .. h_R, each [B, 1, D]. Exact, because every row's
        input is already known: row r reads loop r-1's state of the previous token, which the cache carries."""
        masks, cache = call["masks"], call[CACHE]
        x_BRD = self.offset.of_one_token(e_B1D, num_loops, masks, cache)
        for layer in self.layers[: self.config.num_hidden_layers]:
            x_BRD, _, _ = layer(x_BRD, None, None, loop=0, one_token=True, **call)
        if self.config.plt_normalize_per_loop:
            x_BRD = self.norm(x_BRD)
        else:
            x_BRD = torch.cat((x_BRD[:, :-1], self.norm(x_BRD[:, -1:])), dim=1)
        self.offset.carry_one_token(x_BRD, cache)
        return list(x_BRD.split(1, dim=1))

    def _after_loop(self, x: torch.Tensor, loop: int, num_loops: int) -> torch.Tensor:
        """Apply the final norm, after every loop; with plt_normalize_per_loop false, after the last one only."""
        return self.norm(x) if self.config.plt_normalize_per_loop or loop == num_loops - 1 else x


class PLTForCausalLM(PLTPreTrainedModel, PLTGenerationMixin):
    """The stack, its loops and the language-model head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: PLTConfig):
        super().__init__(config)
        self.model = PLTModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @takes_cache
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | Masks | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
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
        """Compute logits, and the loss if there are labels: `LlamaForCausalLM.forward` with the loop dial.

        Args:
            num_loops: R for this call; default: the configuration's. A count that the model was not trained at warns once.
            one_pass: run the loops of a single token as rows of one pass. False: a pass per loop, for comparison.
            output_loop_states: return `loop_states`, each loop's state after the final norm. Default: unless `logits_to_keep`
                asks for the last logits only.
            output_loop_logits: return `loop_logits`, each loop's state through the head.
            exact_tail: if `logits_to_keep` asks for the last logits only, run loops 2..R on the tail that these and further
                steps depend on. The logits are the same. False: on all tokens, for comparison.

        Returns:
            loss, logits [B, T or logits_to_keep, V], cache, loop_states, loop_logits.
        """
        tail = exact_tail and labels is None and isinstance(logits_to_keep, int) and logits_to_keep > 0
        outputs: PLTModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            num_loops=num_loops,
            one_pass=one_pass,
            output_loop_states=True if output_loop_logits else output_loop_states,
            states_to_keep=logits_to_keep if tail else None,
            **kwargs,
        )
        logits = self._logits(outputs.last_hidden_state, logits_to_keep)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        loop_logits = None
        if output_loop_logits and outputs.loop_states is not None:
            earlier = outputs.loop_states[:-1]
            loop_logits = (*(self._logits(h, logits_to_keep) for h in earlier), logits)
        return PLTCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            loop_states=outputs.loop_states,
            loop_logits=loop_logits,
            **{CACHE: getattr(outputs, CACHE)},
        )

    def _logits(self, h_BTD: torch.Tensor | None, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
        kept = slice_logits_to_keep(h_BTD, logits_to_keep)  # type: ignore[arg-type]
        # Note: if the head takes no gradient, torch multiplies sequences whose rows lie apart by copies of the whole head, and a
        # frozen model's step took ten times as long. One row counts as contiguous wherever it lies, so contiguous() does nothing.
        if kept.stride(0) != kept.shape[1] * kept.stride(1):
            kept = kept.clone(memory_format=torch.contiguous_format)
        return self.lm_head(kept)


class PLTForSequenceClassification(GenericForSequenceClassification, PLTPreTrainedModel):
    """transformers' head on loop R's state of a text's last token: a score per label. With `num_labels=1`, a reward model."""


class PLTForTokenClassification(GenericForTokenClassification, PLTPreTrainedModel):
    """transformers' head on loop R's state of every token: a score per token and label."""
