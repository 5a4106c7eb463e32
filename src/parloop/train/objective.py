"""Objectives: what a training step minimises.

    next_token      the last loop predicts the next token: L = CE(h_R(t), x(t+1)), as in the paper

An objective is a function of the model and the inputs of its forward. Among these are `labels` [B, T] (-100: not predicted) and
`num_items_in_batch`, the number of predicted tokens in all micro-batches of a step, over all processes. It returns the forward's output,
whose `loss` is the micro-batch's sum divided by that number, so that micro-batches add up to the mean of a step. Add another objective
beside `next_token`.
"""

from collections.abc import Callable
from typing import Any

Objective = Callable[..., Any]


def next_token(model: Any, **inputs: Any) -> Any:
    """Return the model's output; its loss, in nats per token, is that of the last loop's predictions."""
    return model(**inputs)
