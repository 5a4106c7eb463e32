"""Stock mlx-lm with our model file, in this process. Run with `make test-mlx`, which has an environment of its own."""

import json
import os
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx_lm.utils import load_model
from safetensors.torch import load_file, save_file

from parloop.check import write_probe
from parloop.export.mlx import register
from parloop.model.reference import reference_forward

os.environ["HF_HUB_OFFLINE"] = "1"
register()

PARITY = Path(__file__).parents[1] / "parity"
FOLDERS = sorted(path.parent for path in Path(os.environ.get("PARLOOP_PARITY", PARITY)).glob("*/cases.npz"))
LENGTHS = (1, 5, 40, 200)
TOLERANCE = 1e-4  # log-probability, float32


def load(folder: Path, **changes):
    """The model, with fields of its configuration changed."""
    return load_model(folder, model_config=changes or None)[0]


def log_probabilities(logits: mx.array) -> np.ndarray:
    return np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))


class Checkpoint:
    """A folder; the equations decide."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.config = json.loads((folder / "config.json").read_text())
        self.weights = load_file(folder / "model.safetensors")
        self.model = load(folder)

    def prompt(self, T: int) -> list[int]:
        return np.random.default_rng(T).integers(self.config["vocab_size"], size=T).tolist()

    def reference(self, ids: list[int], **changes) -> np.ndarray:
        """Log-probabilities [T, vocabulary] by the equations, in float64."""
        weights = {name: weight.double() for name, weight in self.weights.items()}
        _, logits = reference_forward(weights, self.config | changes, torch.tensor(ids))
        return logits[-1].log_softmax(-1).numpy()


class Case(Checkpoint):
    """A parity folder: prompts, and what the vendor's code answers."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.outputs = dict(np.load(folder / "cases.npz"))

    def prompt(self, T: int) -> list[int]:
        return self.outputs[f"ids_{T}"].tolist()

    def expected(self, T: int) -> np.ndarray:
        return self.outputs[f"logprobs_{T}"]

    def check(self, T: int, tokens: list[int], logprobs: list) -> None:
        """Greedy tokens equal, and all log-probabilities of every step."""
        n = len(tokens)
        assert n > 0
        assert list(tokens) == self.outputs[f"gen_ids_{T}"][:n].tolist()
        close(np.stack([np.array(row) for row in logprobs]), self.outputs[f"gen_logprobs_{T}"][:n])


def close(found: np.ndarray, expected: np.ndarray, tolerance: float = TOLERANCE) -> None:
    np.testing.assert_allclose(found, expected, atol=tolerance, rtol=0)


@pytest.fixture(params=FOLDERS, ids=lambda folder: folder.name, scope="session")
def case(request):
    return Case(request.param)


def random_checkpoint(folder: Path, dtype=torch.float32, **changes) -> Path:
    """A small checkpoint in the released format, with random norms and gates, saved in the released names."""
    fields = {
        "architectures": ["IQuestPLTCoderForCausalLM"], "model_type": "iquestpltcoder", "torch_dtype": str(dtype).partition(".")[2],
        "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 32, "hidden_act": "silu", "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": None, "plt_num_loops": 2,
        "plt_window_size": [4, 0], "plt_emb_scale": 0.707, "plt_hidden_scale": 0.3, "plt_gate_use_hidden_states": True,
    } | changes  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    D, F, K = fields["hidden_size"], fields["intermediate_size"], fields["head_dim"]
    H, G, V = fields["num_attention_heads"], fields["num_key_value_heads"], fields["vocab_size"]

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return random(rows, columns) * columns**-0.5

    weights = {"model.embed_tokens.weight": random(V, D) * 0.5, "model.norm.weight": 1 + 0.2 * random(D)}
    if not fields["tie_word_embeddings"]:
        weights["lm_head.weight"] = matrix(V, D) * 2
    for i in range(fields["num_hidden_layers"]):
        layer = {
            "input_layernorm.weight": 1 + 0.2 * random(D), "post_attention_layernorm.weight": 1 + 0.2 * random(D),
            "self_attn.q_proj.weight": matrix(H * K, D), "self_attn.k_proj.weight": matrix(G * K, D),
            "self_attn.v_proj.weight": matrix(G * K, D), "self_attn.o_proj.weight": matrix(D, H * K),
            "mlp.gate_proj.weight": matrix(F, D), "mlp.up_proj.weight": matrix(F, D), "mlp.down_proj.weight": matrix(D, F),
        }  # fmt: skip
        if fields.get("attention_bias"):
            layer |= {f"self_attn.{p}_proj.bias": random(n * K) * 0.3 for p, n in (("q", H), ("k", G), ("v", G))}
        if fields.get("attention_output_bias", fields.get("attention_bias")):
            layer["self_attn.o_proj.bias"] = random(D) * 0.3
        if fields.get("mlp_bias"):
            layer |= {f"mlp.{p}_proj.bias": random(n) * 0.3 for p, n in (("gate", F), ("up", F), ("down", D))}
        if fields.get("qk_norm"):
            layer |= {f"self_attn.{p}_norm.weight": 1 + 0.2 * random(K) for p in "qk"}
        if fields["plt_num_loops"] > 1:
            hidden = fields["plt_gate_use_hidden_states"]
            layer["self_attn.plt_gate.weight"] = matrix(H, D if hidden else K)
            layer["self_attn.plt_gate.bias"] = random(H)
            if hidden:
                layer["self_attn.plt_gate.gate_norm.weight"] = 1 + 0.2 * random(D)
        weights |= {f"model.layers.{i}.{name}": weight for name, weight in layer.items()}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(fields))
    save_file({name: weight.to(dtype).contiguous() for name, weight in weights.items()}, folder / "model.safetensors")
    return folder


TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"  # every character of the probe is a token


@pytest.fixture(scope="session")
def probe(tmp_path_factory) -> Path:
    """The small checkpoint of `parloop check`, with a chat template that says nothing of its own."""
    folder = write_probe(tmp_path_factory.mktemp("checkpoints") / "probe")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder
