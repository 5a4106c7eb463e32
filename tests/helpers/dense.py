"""Dense checkpoints of the families that `parloop convert` reads."""

from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from parloop.corpus import train_tokenizer
from tests.helpers.models import randomize

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
SHORT = [1.0, 1.5, 2.0, 4.0]
TEXT = "def area(width, height):\n    return width * height\n\n\ndef volume(width, height, depth):\n    return area(width, height) * depth\n"


SHAPE = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


SOURCES = {
    "llama": (LlamaConfig, {}),
    "llama-tied-biased": (LlamaConfig, {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "llama3": (LlamaConfig, {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 64}, "rope_theta": 5e5}),
    "llama-yarn": (LlamaConfig, {"rope_scaling": YARN, "head_dim": 16, "rms_norm_eps": 1e-3}),
    "llama-linear": (LlamaConfig, {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
    "llama-dynamic": (LlamaConfig, {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": 32}),
    "llama-longrope": (
        LlamaConfig,
        {
            "rope_scaling": {
                "rope_type": "longrope",
                "short_factor": SHORT,
                "long_factor": [2 * x for x in SHORT],
                "original_max_position_embeddings": 32,
                "factor": 8.0,
            }
        },
    ),
    "mistral": (MistralConfig, {"sliding_window": None, "head_dim": 10, "hidden_act": "gelu"}),
    "qwen2": (Qwen2Config, {}),
    "qwen2-tied": (Qwen2Config, {"tie_word_embeddings": True, "num_key_value_heads": 1, "rope_theta": 1e6}),
    "qwen3": (Qwen3Config, {"head_dim": 16}),
    "qwen3-biased": (Qwen3Config, {"head_dim": 8, "attention_bias": True, "tie_word_embeddings": True}),
}


def make_source(folder, kind="llama", shard=None, **changes):
    """A random source with weights large enough that every mechanism shows, a tokenizer and a chat template."""
    config_class, fields = SOURCES[kind]
    model = AutoModelForCausalLM.from_config(config_class(**(SHAPE | fields | changes)))
    randomize(model)
    model.save_pretrained(folder, **({"max_shard_size": shard} if shard else {}))
    tokenizer = train_tokenizer([TEXT] * 5, 300)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    return folder
