"""`parloop check` on mlx-lm in this process: right as it is, and wrong in the way that a changed configuration makes it."""

import mlx.core as mx
import pytest
from conftest import load
from mlx_lm.generate import generate_step
from transformers import AutoTokenizer

from parloop.check import Answer, check
from parloop.check.check import PROBE

TOKENIZER = AutoTokenizer.from_pretrained(PROBE)


def verdict_of(dtype=mx.float32, **changes):
    model = load(PROBE, **changes)
    model.set_dtype(dtype)

    def complete(prompt: str, tokens: int) -> Answer:
        ids = TOKENIZER(prompt)["input_ids"]
        chosen, rows = zip(*generate_step(mx.array(ids), model, max_tokens=tokens))
        return Answer(TOKENIZER.decode(chosen), tuple(row[token].item() for token, row in zip(chosen, rows)), len(ids))

    return check(complete)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_right_in_32_and_in_16_bits(dtype):
    verdict = verdict_of(dtype)
    assert verdict.right, verdict


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"plt_num_loops": 1}, "one loop"),
        ({"plt_window_size": [3, 0]}, "window one short"),
        ({"plt_window_size": [5, 0]}, "window one long"),
        ({"plt_normalize_per_loop": False}, "norm at the end"),
        ({"plt_emb_scale": None, "plt_hidden_scale": None}, "no scales"),
    ],
)
def test_a_wrong_configuration_is_named(changes, fault):
    assert verdict_of(**changes).faults == (fault,)
