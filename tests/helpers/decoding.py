"""Ways to decode that must agree: recomputed, in pieces, step by step, by the reference."""

import torch
from hypothesis import strategies as st

from parloop import make_cache
from parloop.model.reference import reference_forward

GREEDY = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": None}


def recomputed(model, ids, n=12, num_loops=None):
    """Greedy tokens without any cache."""
    with torch.no_grad():
        for _ in range(n):
            logits = model(ids, use_cache=False, num_loops=num_loops).logits
            ids = torch.cat((ids, logits[:, -1:].argmax(-1)), dim=1)
    return ids


EXACT = {"atol": 1e-10, "rtol": 0}


def in_pieces(model, ids, pieces, attention_mask=None, cache=None, **kwargs):
    """Logits of `ids` [B, T] fed in calls of `pieces` tokens."""
    assert sum(pieces) == ids.shape[1]
    logits, done = [], 0
    cache = cache if cache is not None else make_cache(model.config, kwargs.get("num_loops"))
    for n in pieces:
        mask = None if attention_mask is None else attention_mask[:, : done + n]
        output = model(ids[:, done : done + n], attention_mask=mask, past_key_values=cache, use_cache=True, **kwargs)
        logits.append(output.logits)
        done += n
    return torch.cat(logits, dim=1)


@st.composite
def splits(draw, longest=24):
    return draw(st.lists(st.integers(1, 9), min_size=1, max_size=longest).filter(lambda p: sum(p) <= longest))


def reference(model, ids):
    return reference_forward(dict(model.state_dict()), model.config.to_diff_dict(), ids)[1][-1]


def steps(model, ids, cache, start):
    """Logits of the tokens from `start` on, a call per token."""
    calls = [model(ids[:, t : t + 1], past_key_values=cache, logits_to_keep=1) for t in range(start, ids.shape[1])]
    return torch.cat([call.logits for call in calls], dim=1)
