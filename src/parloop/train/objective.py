"""Objectives: what a training step minimises.

    next_token      the last loop predicts the next token: L = CE(h_R(t), x(t+1)), the paper's

An objective is a function of the model and of the inputs of its forward, among them `labels` [B, T] (-100: not predicted) and
`num_items_in_batch`, the predicted tokens of all micro-batches of a step and of all processes. It returns the forward's output, whose `loss`
is the micro-batch's sum over that number, so that micro-batches add up to the mean of a step. Another one stands beside `next_token`.
"""

from collections.abc import Callable
from typing import Any

Objective = Callable[..., Any]


def next_token(model: Any, **inputs: Any) -> Any:
    """Return the model's output with the loss of the last loop's predictions."""
    return model(**inputs)
