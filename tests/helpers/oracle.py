"""Wrong ports: the equations of `parloop.model.reference` with one mechanism or two left out or bent, as engines do it.

What is wrong is said by names, see FAULTS. The equations are written once more, and not imported, so that the right ones stay free of
switches; with no fault the two agree (test_oracle.py).
"""

import math

import torch
import torch.nn.functional as F

# name -> the mechanism it is about. Two faults of one mechanism exclude each other.
FAULTS = {
    "one loop": "loops",
    "no shift": "shift",
    "shift by two": "shift",
    "window one short": "window",
    "window one long": "window",
    "no window": "window",
    "gate reads the normed input": "gate",
    "gate without its norm": "gate",
    "gates even": "gate",
    "global only": "gate",
    "local only": "gate",
    "gates exchanged": "gate",
    "own keys": "keys",
    "norm at the end": "norm",
    "no scales": "scales",
    "neighbouring pairs": "rope",
}


def rms_norm(x, weight, eps):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def rope(x, theta, neighbours):
    T, K = x.shape[1:]
    angle = torch.arange(T).to(x.dtype)[:, None] * (1.0 / theta ** (torch.arange(0, K, 2, dtype=torch.float32) / K)).to(
        x.dtype
    )
    first, second = (x[..., ::2], x[..., 1::2]) if neighbours else (x[..., : K // 2], x[..., K // 2 :])
    turned = first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()
    return torch.stack(turned, dim=-1).flatten(-2) if neighbours else torch.cat(turned, dim=-1)


def attention(q, k, v, visible):
    k, v = (x.repeat_interleave(q.shape[0] // k.shape[0], dim=0) for x in (k, v))
    scores = (q @ k.transpose(1, 2)) / math.sqrt(q.shape[-1])
    return scores.masked_fill(~visible, -math.inf).softmax(-1) @ v


def shift(h, tokens):
    return torch.cat((torch.zeros_like(h[:tokens]), h))[: len(h)]


def wrong_logits(weights, config, ids, faults=(), zero_carry_at=None):
    """Logits [T, vocabulary] of the last loop.

    Args:
        weights: name -> tensor, of a checkpoint with the hidden-state gate. config: its configuration.
        ids: int64 [T].
        faults: names of FAULTS; none: the right model.
        zero_carry_at: the token that reads zeros instead of its predecessor's state, as the first uncached one does in an engine that
            does not keep carries with the prefixes that it reuses.
    """
    assert set(faults) <= FAULTS.keys()
    L, H, G = config["num_hidden_layers"], config["num_attention_heads"], config["num_key_value_heads"]
    w, eps, theta = config["plt_window_size"][0], config["rms_norm_eps"], config["rope_theta"]
    a, c = (1.0, 1.0) if "no scales" in faults else (config["plt_emb_scale"], config["plt_hidden_scale"])
    w += ("window one long" in faults) - ("window one short" in faults)
    T = len(ids)
    distance = torch.arange(T)[:, None] - torch.arange(T)[None, :]
    causal = distance >= 0
    window = causal if "no window" in faults else causal & (distance <= w)
    E, shared, h = weights["model.embed_tokens.weight"][ids], {}, None
    for r in range(1 if "one loop" in faults else config["plt_num_loops"]):
        if r == 0:
            x = E
        else:
            shifted = shift(h, 0 if "no shift" in faults else 2 if "shift by two" in faults else 1)
            if zero_carry_at is not None:
                shifted[zero_carry_at] = 0
            x = a * E + c * shifted
        for n in range(L):
            W = {
                name.removeprefix(f"model.layers.{n}."): t
                for name, t in weights.items()
                if name.startswith(f"model.layers.{n}.")
            }
            normed = rms_norm(x, W["input_layernorm.weight"], eps)
            q, k, v = (
                (normed @ W[f"self_attn.{p}_proj.weight"].T).view(T, m, -1).transpose(0, 1)
                for p, m in (("q", H), ("k", G), ("v", G))
            )
            q, k = (rope(t, theta, "neighbouring pairs" in faults) for t in (q, k))
            if r == 0:
                shared[n] = (k, v)
                out = attention(q, k, v, causal)
            else:
                gate_input = normed if "gate reads the normed input" in faults else x
                if "gate without its norm" not in faults:
                    gate_input = rms_norm(gate_input, W["self_attn.plt_gate.gate_norm.weight"], eps)
                g = (gate_input @ W["self_attn.plt_gate.weight"].T + W["self_attn.plt_gate.bias"]).T[:, :, None].sigmoid()
                g = {"gates even": 0.5 + 0 * g, "global only": 1 + 0 * g, "local only": 0 * g, "gates exchanged": 1 - g}.get(
                    next((name for name in faults if FAULTS[name] == "gate"), ""), g
                )
                past = (k, v) if "own keys" in faults else shared[n]
                out = g * attention(q, *past, causal) + (1 - g) * attention(q, k, v, window)
            x = x + out.transpose(0, 1).reshape(T, -1) @ W["self_attn.o_proj.weight"].T
            normed = rms_norm(x, W["post_attention_layernorm.weight"], eps)
            x = (
                x
                + (F.silu(normed @ W["mlp.gate_proj.weight"].T) * (normed @ W["mlp.up_proj.weight"].T))
                @ W["mlp.down_proj.weight"].T
            )
        final = rms_norm(x, weights["model.norm.weight"], eps)
        h = x if "norm at the end" in faults else final
    return final @ weights["lm_head.weight"].T


@torch.no_grad()
def greedy(weights, config, ids, tokens, faults=(), zero_carry_at=None):
    """The greedy continuation: ids, and each one's log-probability and how far ahead of the second it is."""
    ids, chosen, logprobs, leads = list(ids), [], [], []
    for _ in range(tokens):
        row = wrong_logits(weights, config, torch.tensor(ids), faults, zero_carry_at)[-1].log_softmax(-1)
        best = row.topk(2)
        chosen.append(int(best.indices[0]))
        logprobs.append(float(best.values[0]))
        leads.append(float(best.values[0] - best.values[1]))
        ids.append(chosen[-1])
    return chosen, logprobs, leads
