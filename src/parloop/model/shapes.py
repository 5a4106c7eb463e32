"""Shapes that measurements and recipes share."""

from typing import Any

SHARED: dict[str, Any] = {
    "plt_window_size": [64, 0],
    "plt_emb_scale": 0.707,
    "plt_hidden_scale": 0.053,
    "plt_gate_use_hidden_states": True,
    "eos_token_id": 2,
}
SHAPES: dict[str, dict[str, Any]] = {
    "600m": {  # 618M parameters: 1.2 GB in bfloat16, well above any processor's cache
        "vocab_size": 32000,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 8,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 128,
    },
    "loopcoder-v2": {  # the released shape: 7.6B parameters, 15.2 GB in bfloat16
        "vocab_size": 76800,
        "hidden_size": 5120,
        "intermediate_size": 27648,
        "num_hidden_layers": 14,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
    "tiny": {  # for tests: its times are Python's, and say nothing about a model
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 2048,
        "plt_window_size": [8, 0],
    },
}
