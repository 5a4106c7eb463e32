"""Floating-point operations of a PLT, counted from its shape (a multiply-add is two)."""

from .configuration import PLTConfig


def forward_flops_per_token(config: PLTConfig, length: int, num_loops: int | None = None) -> float:
    """Return the forward FLOPs of one token in a text of `length` tokens, averaged over the text.

    Matrix products of every visited layer, attention over loop 1's keys (half the text on average) and over windows, the
    gates, and the head once. Norms, activations and the embedding look-up are left out (below one per cent).
    """
    R = num_loops or config.plt_num_loops
    D, F = config.hidden_size, config.intermediate_size
    H, G, K = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    projections = 2 * D * K * (H + 2 * G) + 2 * H * K * D + 2 * 3 * D * F
    full = 4 * H * K * (length + 1) / 2  # scores and weighted values
    window = 4 * H * K * min(config.window_tokens + 1, (length + 1) / 2)
    gate = 2 * H * (D if config.plt_gate_use_hidden_states else K)
    layer_visits = R * (projections + full) + (R - 1) * (window + gate)
    return config.num_hidden_layers * layer_visits + 2 * D * config.vocab_size


def training_flops_per_token(config: PLTConfig, length: int, num_loops: int | None = None) -> float:
    """Return the FLOPs of one token's training step: the forward pass, and twice as much for the backward pass."""
    return 3 * forward_flops_per_token(config, length, num_loops)
