"""Floating-point operations, counted again one token after another; and the shapes that measurements share."""

import pytest
import torch

from parloop import PLTConfig, PLTForCausalLM
from parloop.model.flops import forward_flops_per_token, training_flops_per_token
from parloop.model.shapes import SHAPES, SHARED
from tests.helpers.models import tiny_config


def counted(config, T, R):
    """Multiply-adds, two operations each, of every token, loop and layer."""
    D, F, H, G, K = 24, 40, 6, 2, 10
    multiply_adds = 0
    for t in range(T):
        for loop in range(R):
            for _ in range(3):
                multiply_adds += D * H * K + 2 * D * G * K + H * K * D + 3 * D * F
                multiply_adds += 2 * H * K * (t + 1)  # scores and values, over loop 1's keys
                if loop > 0:
                    multiply_adds += 2 * H * K * min(t + 1, config.window_tokens + 1)
                    multiply_adds += H * (D if config.plt_gate_use_hidden_states else K)
        multiply_adds += D * 61
    return 2 * multiply_adds


@pytest.mark.parametrize("hidden", [True, False])
@pytest.mark.parametrize(("T", "w", "exact"), [(1, 5, 0), (9, 0, 0), (9, 8, 0), (9, 50, 0), (1000, 4, 1e-4)])
@pytest.mark.parametrize("R", [1, 2, 4])
def test_flops_of_a_forward_pass(R, T, w, exact, hidden):
    """In long texts the first w tokens, which see fewer keys, are counted as the others."""
    shape = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 6, "head_dim": 10}
    config = tiny_config(**shape, plt_num_loops=R, plt_window_size=[w, 0], plt_gate_use_hidden_states=hidden)
    expected = pytest.approx(counted(config, T, R) / T, rel=exact, abs=1e-6)
    assert forward_flops_per_token(config, T) == expected
    config.plt_num_loops = 3
    assert forward_flops_per_token(config, T, R) == expected
    assert training_flops_per_token(config, T, R) == 3 * forward_flops_per_token(config, T, R)
    assert training_flops_per_token(config, T) == 3 * forward_flops_per_token(config, T)


@pytest.mark.parametrize(
    ("name", "parameters", "layers", "heads", "window"),
    [
        ("600m", 617_924_736, 8, (16, 4, 128), 64),
        ("loopcoder-v2", 7_615_749_680, 14, (40, 8, 128), 64),
        ("tiny", 107_464, 2, (4, 2, 16), 8),
    ],
)
def test_shapes_that_measurements_share(name, parameters, layers, heads, window):
    config = PLTConfig(**SHARED | SHAPES[name])
    with torch.device("meta"):
        model = PLTForCausalLM(config)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert config.num_hidden_layers == layers
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == heads
    assert (config.plt_num_loops, config.window_tokens, config.plt_gate_use_hidden_states) == (2, window, True)
    assert (config.plt_emb_scale, config.plt_hidden_scale, config.eos_token_id) == (0.707, 0.053, 2)
    assert config.max_position_embeddings == (2048 if name == "tiny" else 131072)
