"""The equations of the Parallel Loop Transformer and nothing else: one sequence, no cache, no batching, any dtype.

The reference that the tests compare with. Written from the papers (PLT, arXiv 2510.24824; LoopCoder-v2, arXiv 2606.18023) and
independent of modeling.py, so that the same mistake would have to be made twice. Slow on purpose: every mask is dense.
"""

import math

import torch
import torch.nn.functional as F


def rms_norm(x, weight, eps):
    """Divide x [..., D] by its root mean square, and multiply by the weight [D]."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def linear(x, W, name, biased):
    """Apply the linear layer `name` of the weights W, with its bias if it has one."""
    y = x @ W[f"{name}.weight"].T
    return y + W[f"{name}.bias"] if biased else y


def rope(x, theta):
    """Rotate the pairs (i, i + K/2) of x [heads, T, K] by position * theta^(-2i/K)."""
    T, K = x.shape[1:]
    # Frequencies in float32, as every checkpoint was trained with; angles in the precision of x.
    frequency = (1.0 / theta ** (torch.arange(0, K, 2, dtype=torch.float32) / K)).to(x.dtype)
    angle = torch.arange(T).to(x.dtype)[:, None] * frequency  # [T, K/2]
    first, second = x[..., : K // 2], x[..., K // 2 :]
    return torch.cat((first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()), dim=-1)


def attention(q, k, v, visible):
    """Attend with q [H, T, K] to k and v [G, T, K] where `visible` (bool [T, T]) allows it. Returns [H, T, K]."""
    k, v = (x.repeat_interleave(q.shape[0] // k.shape[0], dim=0) for x in (k, v))
    score = (q @ k.transpose(1, 2)) / math.sqrt(q.shape[-1])
    return score.masked_fill(~visible, -math.inf).softmax(-1) @ v


def shift(h, s):
    """Give token t the state of token t - s; the first s tokens get zeros. (s = 1 in the paper.)"""
    return F.pad(h, (0, 0, s, 0))[: len(h)]


def reference_forward(weights, config, ids, num_loops=None):
    """Compute the states and logits of every loop.

    Args:
        weights: name -> tensor, in the released names; their dtype is the dtype of the computation.
        config: a mapping with the fields of a released `config.json` (no rope scaling).
        ids: int64 [T].
        num_loops: R; default: the configuration's.

    Returns:
        states: list of R tensors [T, D], each after the final norm; logits: list of R tensors [T, vocabulary].
    """
    R = num_loops or config["plt_num_loops"]
    L, H, G = config["num_hidden_layers"], config["num_attention_heads"], config["num_key_value_heads"]
    w, eps, theta = config["plt_window_size"][0], config["rms_norm_eps"], config["rope_theta"]
    a = 1.0 if config.get("plt_emb_scale") is None else config["plt_emb_scale"]
    c = 1.0 if config.get("plt_hidden_scale") is None else config["plt_hidden_scale"]
    s = config.get("plt_offset", 1)
    qkv_bias, mlp_bias = config.get("attention_bias", False), config.get("mlp_bias", False)
    o_bias = qkv_bias if config.get("attention_output_bias") is None else config["attention_output_bias"]

    T = len(ids)
    distance = torch.arange(T)[:, None] - torch.arange(T)[None, :]  # of query i from key j
    causal = distance >= 0
    window = causal & (distance <= w)  # the token itself and w before it

    E = weights["model.embed_tokens.weight"][ids]
    head = weights["model.embed_tokens.weight" if config.get("tie_word_embeddings") else "lm_head.weight"]
    shared = {}  # layer -> (K1, V1)
    states, h = [], None
    for r in range(1, R + 1):
        x = E if r == 1 else a * E + c * shift(h, s)
        for n in range(L):
            W = {name[len(p) :]: t for p in [f"model.layers.{n}."] for name, t in weights.items() if name.startswith(p)}
            normed = rms_norm(x, W["input_layernorm.weight"], eps)
            q = linear(normed, W, "self_attn.q_proj", qkv_bias).view(T, H, -1).transpose(0, 1)
            k = linear(normed, W, "self_attn.k_proj", qkv_bias).view(T, G, -1).transpose(0, 1)
            v = linear(normed, W, "self_attn.v_proj", qkv_bias).view(T, G, -1).transpose(0, 1)
            if config.get("qk_norm"):  # every head by itself
                q = rms_norm(q, W["self_attn.q_norm.weight"], eps)
                k = rms_norm(k, W["self_attn.k_norm.weight"], eps)
            q, k = rope(q, theta), rope(k, theta)
            if r == 1:
                shared[n] = (k, v)
                out = attention(q, k, v, causal)
            else:
                if config.get("plt_gate_use_hidden_states"):
                    gate_input = rms_norm(x, W["self_attn.plt_gate.gate_norm.weight"], eps)
                    logit = (gate_input @ W["self_attn.plt_gate.weight"].T + W["self_attn.plt_gate.bias"]).T  # [H, T]
                else:
                    logit = (q * W["self_attn.plt_gate.weight"][:, None]).sum(-1) + W["self_attn.plt_gate.bias"][:, None]
                g = logit.sigmoid()[:, :, None]
                out = g * attention(q, *shared[n], causal) + (1 - g) * attention(q, k, v, window)
            x = x + linear(out.transpose(0, 1).reshape(T, -1), W, "self_attn.o_proj", o_bias)
            normed = rms_norm(x, W["post_attention_layernorm.weight"], eps)
            ffn = F.silu(linear(normed, W, "mlp.gate_proj", mlp_bias)) * linear(normed, W, "mlp.up_proj", mlp_bias)
            x = x + linear(ffn, W, "mlp.down_proj", mlp_bias)
        final = rms_norm(x, weights["model.norm.weight"], eps)
        h = final if config.get("plt_normalize_per_loop", True) else x
        states.append(final)
    return states, [final @ head.T for final in states]
