"""Tiny models with random gates: a gate of zero hides half of what can go wrong."""

import torch
from transformers import LlamaConfig

from parloop import PLTConfig, PLTForCausalLM

VOCABULARY = 61


def tiny_config(**changes) -> PLTConfig:
    fields = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "bos_token_id": 1,
        "eos_token_id": None,
        "pad_token_id": 0,
        "plt_num_loops": 2,
        "plt_window_size": [4, 0],
        "plt_emb_scale": 0.707,
        "plt_hidden_scale": 0.3,
        "plt_gate_use_hidden_states": True,
    }
    return PLTConfig(**(fields | changes))


def randomize(model: torch.nn.Module, seed: int = 0) -> None:
    """Weights large enough, and norms and gates far enough from their neutral values, that every mechanism shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if "norm" in name:
                value = 1 + 0.2 * noise
            elif "plt_gate.bias" in name or "embed" in name:
                value = 0.5 * noise
            else:
                value = noise * parameter.shape[-1] ** -0.5
            parameter.copy_(value)


def tiny_model(seed: int = 0, dtype=torch.float64, attn: str = "sdpa", **changes) -> PLTForCausalLM:
    model = PLTForCausalLM(tiny_config(**changes))
    randomize(model, seed)
    model = model.to(dtype).eval()
    model.set_attn_implementation(attn)
    return model


def random_ids(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(2, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def llama_config(config: PLTConfig) -> LlamaConfig:
    fields = {name: value for name, value in config.to_dict().items() if not name.startswith("plt_")}
    fields.pop("model_type")
    return LlamaConfig(**fields)


def left_padded(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    T = max(len(row) for row in rows)
    ids = torch.stack([torch.nn.functional.pad(row, (T - len(row), 0)) for row in rows])
    mask = torch.stack([torch.nn.functional.pad(torch.ones_like(row), (T - len(row), 0)) for row in rows])
    return ids, mask


def shape(R, w, L, **changes):
    return {"plt_num_loops": R, "plt_window_size": [w, 0], "num_hidden_layers": L, **changes}
