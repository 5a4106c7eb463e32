"""The Parallel Loop Transformer (PLT, arXiv 2510.24824; LoopCoder-v2, arXiv 2606.18023) for mlx-lm, in one file.

Part of parloop (Apache-2.0). mlx-lm finds it as `mlx_lm.models.iquestpltcoder` (`parloop run -m mlx_lm ...`), or as the `model_file` of an
exported folder, where it runs without parloop. It needs only mlx and mlx-lm, and imports nothing from its own folder.

    E      = Embed(x)
    loop 1 : h_1 = FinalNorm(stack(E)), ordinary causal attention; every layer keeps its keys and values (K1, V1)
    loop r : b_r = a * E + c * shift(h_{r-1})          token t reads token t - 1, the first token zeros
             h_r = FinalNorm(stack(b_r)), and in every layer
                 out = g * attention over (K1, V1) + (1 - g) * attention over this loop's own keys, the token itself and w before it
    logits = Head(h_R)

A step with one token is one pass over the weights with the R loops as rows (`PLTModel._one_token`); prompts and training run loop after
loop (`_loop_by_loop`). For prompts, loops 2..R are needed only on the tail that later tokens depend on, and MLX's lazy evaluation selects
it: a call on a chunk of a prompt builds two graphs, one for the caches, and one for all logits. Evaluating only the caches, as mlx-lm does
for all of a prompt but its last token, runs the first graph. Evaluating the logits gives all of them.

Caches are mlx-lm's own: L KVCache for loop 1, then one CacheList of L * (R - 1) RotatingKVCache (the windows) and one ArraysCache of R - 1
(the carry: each loop's state of the last token). Only loop 1's grow with the text. `--kv-bits` quantises them and leaves the others as
they are, since a CacheList cannot be quantised.

Axes, as suffixes: B sequences, T tokens of this call, S keys, D hidden size, H query heads, G key/value heads, K head size, R loops,
N rows (some or all of T tokens of one loop, or R loops of one token). Loops are numbered 1..R in prose, from 0 in code.
"""

import copy
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import BaseModelArgs, create_attention_mask, scaled_dot_product_attention
from mlx_lm.models.cache import ArraysCache, CacheList, KVCache, RotatingKVCache
from mlx_lm.models.rope_utils import initialize_rope

# RoPE scaling that mlx-lm computes as transformers does, and the fields that it reads.
ROPE_FIELDS = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": {"factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"},
}
# Fields of config.json that do not change the computation here, or that mlx-lm itself reads.
NOT_THE_MODELS = {
    "architectures", "attn_implementation", "auto_map", "bos_token_id", "chunk_size_feed_forward", "do_sample", "dtype", "eos_token_id",
    "id2label", "initializer_range", "is_decoder", "is_encoder_decoder", "label2id", "max_length", "max_new_tokens", "model_file",
    "output_attentions", "output_hidden_states", "pad_token_id", "plt_trained_loops", "pretraining_tp", "problem_type", "quantization",
    "quantization_config", "quantize_activations", "repetition_penalty", "return_dict", "sep_token_id", "task_specific_params",
    "temperature", "tokenizer_class", "top_k", "top_p", "torch_dtype", "torchscript", "transformers_version", "use_cache",
}  # fmt: skip


@dataclass
class ModelArgs(BaseModelArgs):
    """The fields of a PLT's `config.json` and their defaults, which are not the released values.

    Raises:
        ValueError: this file does not implement a field, or a value describes no model. mlx-lm itself would silently drop unknown
            fields.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int = None  # type: ignore[assignment]  # filled in below
    head_dim: int = None  # type: ignore[assignment]
    hidden_act: str = "silu"
    max_position_embeddings: int = 131072
    rms_norm_eps: float = 1e-5
    rope_theta: float | None = None
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None  # transformers 5's name for the two fields before
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    attention_output_bias: bool | None = None
    attention_dropout: float = 0.0
    mlp_bias: bool = False
    qk_norm: bool = False
    plt_num_loops: int = 2
    plt_window_size: list[int] = None  # type: ignore[assignment]
    plt_normalize_per_loop: bool = True
    plt_emb_scale: float | None = None
    plt_hidden_scale: float | None = None
    plt_gate_use_hidden_states: bool = False

    @classmethod
    def from_dict(cls, params):
        """Read the fields of a `config.json`."""
        known = cls.__dataclass_fields__.keys() | NOT_THE_MODELS
        for name, value in params.items():
            if name not in known and not name.startswith("_") and value not in (None, False, [], {}):
                raise ValueError(
                    f"config.json has {name}={value!r}, which the MLX model does not implement: remove it if it does not change "
                    f"the computation; otherwise this checkpoint cannot be run with MLX."
                )
        # null is the same as absent
        return super().from_dict({name: value for name, value in params.items() if value is not None})

    def __post_init__(self):
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        if self.attention_output_bias is None:
            self.attention_output_bias = self.attention_bias
        if self.plt_window_size is None:
            self.plt_window_size = [64, 0]
        window = self.plt_window_size
        is_pair = isinstance(window, (list, tuple)) and len(window) == 2 and all(type(n) is int for n in window)
        if not is_pair or window[0] < 0 or window[1] != 0:
            raise ValueError(f"plt_window_size={window!r} must be [w, 0] with w >= 0: w tokens before the token itself.")
        if type(self.plt_num_loops) is not int or self.plt_num_loops < 1:
            raise ValueError(f"plt_num_loops={self.plt_num_loops!r} must be an integer of at least 1.")
        if self.num_attention_heads % self.num_key_value_heads:
            heads = f"num_attention_heads={self.num_attention_heads}"
            raise ValueError(f"num_key_value_heads={self.num_key_value_heads} must divide {heads}.")
        if self.hidden_act != "silu":
            raise ValueError(f"hidden_act={self.hidden_act!r} is not implemented in MLX: the released value is 'silu'.")
        if self.attention_dropout:
            raise ValueError(
                f"attention_dropout={self.attention_dropout} is not implemented in MLX: set it to 0, which changes training only."
            )
        self.rope_theta, self.rope_scaling = self._rope()

    def _rope(self):
        """Return RoPE's base and scaling, in either spelling of the file; conflicts are resolved as in transformers."""
        rope = self.rope_scaling or self.rope_parameters or {}
        rope = {name: value for name, value in rope.items() if value is not None}
        theta = rope.pop("rope_theta", 500000.0 if self.rope_theta is None else self.rope_theta)
        kind = rope.pop("rope_type", rope.get("type", "default"))
        rope.pop("type", None)
        if kind not in ROPE_FIELDS:
            raise ValueError(
                f"rope_scaling has rope_type={kind!r}, which is not implemented in MLX as transformers computes it: "
                f"{', '.join(ROPE_FIELDS)} are."
            )
        neutral = {"partial_rotary_factor": 1.0, "truncate": True}
        rope = {name: value for name, value in rope.items() if name not in neutral or value != neutral[name]}
        if unknown := {name: value for name, value in rope.items() if name not in ROPE_FIELDS[kind]}:
            raise ValueError(f"rope_scaling has {unknown}, which is not implemented in MLX for rope_type={kind!r}.")
        if kind == "default":
            return theta, None
        if "factor" not in rope:
            raise ValueError(f"rope_scaling of rope_type={kind!r} lacks a factor.")
        if "original_max_position_embeddings" in ROPE_FIELDS[kind]:
            rope.setdefault("original_max_position_embeddings", self.max_position_embeddings)
        if not (rope.get("mscale") and rope.get("mscale_all_dim")):  # transformers ignores one without the other
            rope.pop("mscale", None)
            rope.pop("mscale_all_dim", None)
        return theta, {"rope_type": kind, **rope}


class Gate(nn.Module):
    """g = sigmoid(gate(x)), the share of global attention in a head's output. Not an nn.Linear, so that nothing quantises it."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.reads_hidden = args.plt_gate_use_hidden_states
        inputs = args.hidden_size if self.reads_hidden else args.head_dim
        self.weight = mx.zeros((args.num_attention_heads, inputs))
        self.bias = mx.zeros((args.num_attention_heads,))
        if self.reads_hidden:
            self.gate_norm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)

    def __call__(self, x_BND, q_BHNK):
        """Return g [B, H, N, 1] of the layer's input *before* the layer's own norm, or of the rotated query."""
        if self.reads_hidden:
            logits_BHN = (self.gate_norm(x_BND) @ self.weight.T + self.bias).transpose(0, 2, 1)
        else:
            logits_BHN = (q_BHNK * self.weight[:, None]).sum(-1) + self.bias[:, None]
        return mx.sigmoid(logits_BHN)[..., None].astype(x_BND.dtype)


def last_rows(mask, rows, keys=None):
    """Cut a mask [.., T, S] to the last rows and the last keys. The string "causal" always ends at the last row and key."""
    if mask is None or isinstance(mask, str):
        return mask
    return mask[..., -rows:, :] if keys is None else mask[..., -rows:, -keys:]


class Attention(nn.Module):
    """Attention of one layer for any loop: the same projections; from loop 2 on, a gated blend of global and local attention."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        D, H, G, K = args.hidden_size, args.num_attention_heads, args.num_key_value_heads, args.head_dim
        self.head_dim, self.window, self.scale = K, args.plt_window_size[0], K**-0.5
        self.q_proj = nn.Linear(D, H * K, bias=args.attention_bias)
        self.k_proj = nn.Linear(D, G * K, bias=args.attention_bias)
        self.v_proj = nn.Linear(D, G * K, bias=args.attention_bias)
        self.o_proj = nn.Linear(H * K, D, bias=args.attention_output_bias)
        self.qk_norm = args.qk_norm
        if args.qk_norm:
            self.q_norm = nn.RMSNorm(K, eps=args.rms_norm_eps)
            self.k_norm = nn.RMSNorm(K, eps=args.rms_norm_eps)
        if args.plt_num_loops > 1:
            self.plt_gate = Gate(args)
        self.rope = initialize_rope(K, args.rope_theta, False, args.rope_scaling, args.max_position_embeddings)

    def first(self, normed_BTD, offset, mask, full):
        """Run loop 1. Returns the output, and the keys and values that all later loops of this layer read."""
        q, k, v = self._project(normed_BTD, offset)
        if full is not None:
            k, v = full.update_and_fetch(k, v)
        return self._output(self._attend(q, k, v, mask, full)), (k, v)

    def later(self, x_BND, normed_BND, kv1, offset, masks, full, window, skipped):
        """Run one of the loops 2..R on the last N of `skipped` + N tokens. Returns the output."""
        q, k, v = self._project(normed_BND, offset)
        N = q.shape[2]
        if skipped:  # the window counts every token, so it gets zeros for skipped ones; no later token reads so far back
            k, v = (mx.pad(t, [(0, 0), (0, 0), (skipped, 0), (0, 0)]) for t in (k, v))
        if window is not None:
            k, v = window.update_and_fetch(k, v)
        if skipped:
            k, v = (t[:, :, -(N + self.window) :] for t in (k, v))
        # Note: attention over quantised keys scales the query in place, so it comes last. Otherwise local logits would be scaled twice.
        g_BHN1 = self.plt_gate(x_BND, q)
        local_BHNK = self._attend(q, k, v, last_rows(masks[1], N, k.shape[2]))
        k1, v1 = kv1
        global_BHNK = self._attend(q, k1, v1, last_rows(masks[0], N), full)
        return self._output(g_BHN1 * global_BHNK + (1 - g_BHN1) * local_BHNK)

    def one_token(self, x_BRD, normed_BRD, offset, masks, full, windows):
        """Run all loops of one token. Loop 1's new key is written before any row reads, and every key is read once for
        all rows."""
        q, k, v = self._project_loops(normed_BRD, offset)
        local_BHNK = []
        for r, window in enumerate(windows, 1):
            k_own, v_own = window.update_and_fetch(k[:, :, r : r + 1], v[:, :, r : r + 1])
            local_BHNK.append(self._attend(q[:, :, r : r + 1], k_own, v_own, masks[1]))
        g_BHN1 = self.plt_gate(x_BRD[:, 1:], q[:, :, 1:]) if windows else 0
        k1, v1 = full.update_and_fetch(k[:, :, :1], v[:, :, :1])
        out_BHRK = self._attend(q, k1, v1, masks[0], full)  # last, see `later`
        if windows:
            local = local_BHNK[0] if len(windows) == 1 else mx.concatenate(local_BHNK, axis=2)
            blend = g_BHN1 * out_BHRK[:, :, 1:] + (1 - g_BHN1) * local
            out_BHRK = mx.concatenate((out_BHRK[:, :, :1], blend), axis=2)
        return self._output(out_BHRK)

    def _heads(self, normed_BND):
        """Return queries [B, N, H, K], keys and values [B, N, G, K], not rotated."""
        B, N, _ = normed_BND.shape
        q, k, v = (p(normed_BND).reshape(B, N, -1, self.head_dim) for p in (self.q_proj, self.k_proj, self.v_proj))
        return (self.q_norm(q), self.k_norm(k), v) if self.qk_norm else (q, k, v)

    def _project(self, normed_BND, offset):
        """Return rotated queries [B, H, N, K] and keys, and values [B, G, N, K], of N consecutive tokens."""
        q, k, v = (t.transpose(0, 2, 1, 3) for t in self._heads(normed_BND))
        return self.rope(q, offset=offset), self.rope(k, offset=offset), v

    def _project_loops(self, normed_BRD, offset):
        """Project R rows at one position, as _project: for RoPE they are heads of one token."""
        q, k, v = self._heads(normed_BRD)
        B, R = q.shape[:2]
        q, k = (
            self.rope(t.reshape(B, -1, 1, self.head_dim), offset=offset).reshape(B, R, -1, self.head_dim) for t in (q, k)
        )
        return q.transpose(0, 2, 1, 3), k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)

    def _attend(self, q, k, v, mask, cache=None):
        return scaled_dot_product_attention(q, k, v, cache=cache, scale=self.scale, mask=mask)

    def _output(self, out_BHNK):
        B, _, N, _ = out_BHNK.shape
        return self.o_proj(out_BHNK.transpose(0, 2, 1, 3).reshape(B, N, -1))


class MLP(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.gate_proj = nn.Linear(args.hidden_size, args.intermediate_size, bias=args.mlp_bias)
        self.up_proj = nn.Linear(args.hidden_size, args.intermediate_size, bias=args.mlp_bias)
        self.down_proj = nn.Linear(args.intermediate_size, args.hidden_size, bias=args.mlp_bias)

    def __call__(self, x):
        return self.down_proj(nn.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.self_attn = Attention(args)
        self.mlp = MLP(args)
        self.input_layernorm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)

    def __call__(self, x_BND, kv1, offset, masks, full=None, window=None, skipped=0):
        """Run one loop over N tokens; loop 1 if kv1 is None. Returns the output and kv1. (`--grad-checkpoint` wraps this method.)"""
        normed_BND = self.input_layernorm(x_BND)
        if kv1 is None:
            out_BND, kv1 = self.self_attn.first(normed_BND, offset, masks[0], full)
        else:
            out_BND = self.self_attn.later(x_BND, normed_BND, kv1, offset, masks, full, window, skipped)
        return self._feed_forward(x_BND + out_BND), kv1

    def one_token(self, x_BRD, offset, masks, full, windows):
        """Run all loops of one token, as R rows."""
        return self._feed_forward(
            x_BRD + self.self_attn.one_token(x_BRD, self.input_layernorm(x_BRD), offset, masks, full, windows)
        )

    def _feed_forward(self, x):
        return x + self.mlp(self.post_attention_layernorm(x))


class PLTModel(nn.Module):
    """The stack and its loops."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        self.embed_tokens = nn.Embedding(args.vocab_size, args.hidden_size)
        self.layers = [Layer(args) for _ in range(args.num_hidden_layers)]
        self.norm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)

    def __call__(self, ids_BT, cache=None):
        """Return h_R [B, T, D] of ids [B, T]."""
        L, R, w = len(self.layers), self.args.plt_num_loops, self.args.plt_window_size[0]
        e_BTD = self.embed_tokens(ids_BT)
        full: list = list(cache[:L]) if cache else [None] * L
        held = cache[L] if cache and R > 1 else [None] * (L * (R - 1)) + [ArraysCache(R - 1)]
        windows = [[held[L * r + i] for i in range(L)] for r in range(R - 1)]
        carry = held[L * (R - 1)]
        masks = (
            create_attention_mask(e_BTD, full[0]),
            create_attention_mask(e_BTD, windows[0][0], window_size=w + 1) if windows else None,
        )
        offset = full[0].offset + 0 if cache else 0  # for a batch it is an array, which a cache may change in place
        if cache and ids_BT.shape[1] == 1:
            return self._one_token(e_BTD, offset, masks, full, windows, carry)
        return self._loop_by_loop(e_BTD, offset, masks, full, windows, carry)

    def _loop_by_loop(self, e_BTD, offset, masks, full, windows, carry):
        T, kv1, x_BTD = e_BTD.shape[1], [], e_BTD
        for layer, cached in zip(self.layers, full):
            x_BTD, kv = layer(x_BTD, None, offset, masks, cached)
            kv1.append(kv)
        h_BTD = self._after_loop(x_BTD, 0)
        if not windows:
            return h_BTD
        # In a right-padded batch, a row's tail ends before the padding.
        padding = 0 if carry.lengths is None else T - int(mx.clip(carry.lengths, 0, T).min())
        if full[0] is None or self._tail(1, 0) + padding >= T:
            h_BTD = self._later_loops(e_BTD, h_BTD, kv1, offset, masks, full, windows, carry, None)
        else:
            for_logits = copy.deepcopy((windows, carry))
            self._later_loops(e_BTD, h_BTD, kv1, offset, masks, full, windows, carry, padding)
            h_BTD = self._later_loops(e_BTD, h_BTD, kv1, offset, masks, full, *for_logits, None)
        carry.advance(T)
        return h_BTD

    def _later_loops(self, e_BTD, h_BND, kv1, offset, masks, full, windows, carry, padding):
        """Run loops 2..R: on all tokens, or (`padding` given) on the last ones that the caches need, fewer from layer to
        layer."""
        T = e_BTD.shape[1]
        for r in range(1, self.args.plt_num_loops):
            N = T if padding is None else self._tail(r, 0) + padding
            x_BND = self._combine(e_BTD[:, -N:], self._shift(h_BND, N, T, carry, r - 1))
            for i, layer in enumerate(self.layers):
                if padding is not None:
                    N = self._tail(r, i) + padding
                    x_BND = x_BND[:, -N:]
                x_BND, _ = layer(x_BND, kv1[i], offset + T - N, masks, full[i], windows[r - 1][i], T - N)
            h_BND = self._after_loop(x_BND, r)
        return h_BND

    def _tail(self, loop, layer):
        """Return the number of last tokens on which a layer must run in one of the loops 2..R, so that its cache can be continued.

        A layer's output reads its input at its own token and the w before it, so each layer is needed on w tokens more than the next one,
        and the last layer of loop R, of which only the keys are kept, on w. Loop r + 1 reads loop r one token to the left, and the next
        call reads loop r's last state.
        """
        L, R, w = len(self.layers), self.args.plt_num_loops, self.args.plt_window_size[0]
        keep = int(w == 0)  # with w = 0 nothing of loop R is needed, but a call must not have zero rows
        return keep + (R - 1 - loop) * (L * w + 1) + (L - layer) * w

    def _one_token(self, e_B1D, offset, masks, full, windows, carry):
        """Run a decode step: the loops of one token as R rows of one pass. Row r reads loop r - 1's state of the previous
        token."""
        R = self.args.plt_num_loops
        later = [self._combine(e_B1D, mx.zeros_like(e_B1D) if carry[r] is None else carry[r]) for r in range(R - 1)]
        x_BRD = mx.concatenate([e_B1D, *later], axis=1)
        for i, layer in enumerate(self.layers):
            x_BRD = layer.one_token(x_BRD, offset, masks, full[i], [of_loop[i] for of_loop in windows])
        for r in range(R - 1):
            carry[r] = self._after_loop(x_BRD[:, r : r + 1], r)
        return self._after_loop(x_BRD[:, R - 1 :], R - 1)

    def _combine(self, e, shifted):
        """Return b = a * E + c * shift(h), the input of loops 2..R."""
        a, c = self.args.plt_emb_scale, self.args.plt_hidden_scale
        return (e if a is None else a * e) + (shifted if c is None else c * shifted)

    def _after_loop(self, x, loop):
        """Apply the final norm, after every loop; with plt_normalize_per_loop false, after the last one only."""
        return self.norm(x) if self.args.plt_normalize_per_loop or loop == self.args.plt_num_loops - 1 else x

    def _shift(self, h_BND, N, T, carry, loop):
        """Return shift(h) of the last N of T tokens, from the states of all T, or of some number above N. Keeps the state
        that the next token reads."""
        if (mask_BT := carry.make_mask(T)) is not None:  # a first token must not read the padding to its left
            h_BND = mx.where(mask_BT[:, -h_BND.shape[1] :, None], h_BND, 0)
        if h_BND.shape[1] == T:
            past_B1D = mx.zeros_like(h_BND[:, :1]) if carry[loop] is None else carry[loop]
            h_BND = mx.concatenate((past_B1D, h_BND), axis=1)
        if carry.lengths is None:
            carry[loop] = h_BND[:, -1:]
        else:  # of a right-padded row, the last real token's state
            last_B = h_BND.shape[1] - 1 - T + mx.clip(carry.lengths, 0, T)
            carry[loop] = mx.take_along_axis(h_BND, last_B[:, None, None], axis=1)
        return h_BND[:, -N - 1 : -1]


class Model(nn.Module):
    """The class that mlx-lm loads."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        self.model_type = args.model_type
        self.model = PLTModel(args)
        if not args.tie_word_embeddings:
            self.lm_head = nn.Linear(args.hidden_size, args.vocab_size, bias=False)

    def __call__(self, inputs, cache=None):
        """Return logits [B, T, V] of ids [B, T]."""
        h_BTD = self.model(inputs, cache)
        return self.model.embed_tokens.as_linear(h_BTD) if self.args.tie_word_embeddings else self.lm_head(h_BTD)

    @property
    def layers(self):
        """The decoder layers."""
        return self.model.layers

    def make_cache(self):
        """Return an empty cache, as the module's docstring describes it."""
        L, R, w = len(self.layers), self.args.plt_num_loops, self.args.plt_window_size[0]
        full: list = [KVCache() for _ in range(L)]
        if R == 1:
            return full
        windows = [RotatingKVCache(max_size=w + 1) for _ in range(L * (R - 1))]  # max_size counts the token itself
        return [*full, CacheList(*windows, ArraysCache(R - 1))]

    def sanitize(self, weights):
        """Return the checkpoint's weights under our names: one name for gates, and as many gates as the loop count needs.

        A checkpoint that was trained with one loop has no gates; at another count its gates are initialised to an even
        blend.
        """
        weights = {name.replace(".loop_gate_proj.", ".plt_gate."): weight for name, weight in weights.items()}
        weights = {name: weight for name, weight in weights.items() if not name.endswith("rotary_emb.inv_freq")}
        if self.args.tie_word_embeddings:
            weights = {name: weight for name, weight in weights.items() if not name.startswith("lm_head.")}
        if self.args.plt_num_loops == 1:
            return {name: weight for name, weight in weights.items() if ".plt_gate." not in name}
        if not any(".plt_gate." in name for name in weights):
            dtype = weights["model.norm.weight"].dtype
            for i, layer in enumerate(self.layers):
                gate, prefix = layer.self_attn.plt_gate, f"model.layers.{i}.self_attn.plt_gate"
                weights[f"{prefix}.weight"], weights[f"{prefix}.bias"] = gate.weight.astype(dtype), gate.bias.astype(dtype)
                if gate.reads_hidden:
                    weights[f"{prefix}.gate_norm.weight"] = gate.gate_norm.weight.astype(dtype)
        return weights
