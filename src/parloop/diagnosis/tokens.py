"""The token view: the prediction of every loop, token by token, on a piece of real text."""

from typing import Any

import torch

TOP = 3


@torch.no_grad()
def token_view(model: Any, tokenizer: Any, ids: list[int], num_loops: int) -> list[dict[str, Any]]:
    """Return the predictions of every loop for every token but the first.

    Args:
        model: a PLTForCausalLM.
        tokenizer: its tokenizer.
        ids: token ids of one text.
        num_loops: R.

    Returns:
        one dictionary per token: `text`, the token; `settled`, the first loop (1..R) from which on the likeliest token is the last loop's;
        `right`, whether the last loop's likeliest token is this one; `loops`, for every loop this token's `rank` and probability `p`, and
        `top`, the likeliest tokens with their probabilities.
    """
    ids_1T = torch.tensor([ids], device=model.device)
    states = model.model(ids_1T, use_cache=False, num_loops=num_loops).loop_states
    target = ids_1T[0, 1:]
    by_loop, best = [], []
    for state in states:
        p = model.lm_head(state[0, :-1]).float().softmax(-1)  # [T-1, V]
        own = p.gather(-1, target[:, None])
        top = p.topk(min(TOP, p.shape[-1]), dim=-1)
        best.append(top.indices[:, 0])
        rank = 1 + (p > own).sum(-1)
        by_loop.append((rank.tolist(), own[:, 0].tolist(), top.indices.tolist(), top.values.tolist()))
    final = torch.stack(best)  # [R, T-1]
    stays = (final == final[-1]).flip(0).cumprod(0).sum(0)  # number of final loops that agree with the last one
    tokens = []
    for t, id_ in enumerate(ids[1:]):
        loops = [
            {
                "rank": ranks[t],
                "p": round(own[t], 4),
                "top": [[tokenizer.decode([i]), round(q, 4)] for i, q in zip(top[t], values[t])],
            }
            for ranks, own, top, values in by_loop
        ]
        settled = num_loops - int(stays[t]) + 1
        tokens.append({"text": tokenizer.decode([id_]), "settled": settled, "right": loops[-1]["rank"] == 1, "loops": loops})
    return tokens
