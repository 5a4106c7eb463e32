"""Stock vLLM with the plugin, in this process, on the CPU. Run with `make test-vllm`, which has an environment of its own."""

import gc
import json
import os
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

os.environ.update(
    VLLM_CPU_KVCACHE_SPACE="1",  # GiB
    VLLM_ENABLE_V1_MULTIPROCESSING="0",  # the engine in this process
    VLLM_LOGGING_LEVEL="WARNING",
    HF_HUB_OFFLINE="1",
)

from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory

from parloop.model.reference import reference_forward

PARITY = Path(__file__).parents[1] / "parity"
FOLDERS = sorted(path.parent for path in Path(os.environ.get("PARLOOP_PARITY", PARITY)).glob("*/cases.npz"))
LENGTHS = (1, 5, 40, 200)
TOLERANCE = 1e-4  # log-probability, float32
BLOCK = 32  # tokens; the smallest that vLLM's CPU attention takes


class Case:
    """A parity folder: prompts, and what the vendor's code answers."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.config = json.loads((folder / "config.json").read_text())
        self.vocabulary = self.config["vocab_size"]
        self.outputs = dict(np.load(folder / "cases.npz"))
        self.weights = load_file(folder / "model.safetensors")

    def prompt(self, T: int) -> list[int]:
        return self.outputs[f"ids_{T}"].tolist()

    def check(self, T: int, completion) -> None:
        """Greedy tokens equal, full log-probabilities of every step within the tolerance, of a complete or partial answer."""
        n = len(completion.token_ids)
        assert n > 0
        assert list(completion.token_ids) == self.outputs[f"gen_ids_{T}"][:n].tolist()
        expected = self.outputs[f"gen_logprobs_{T}"][:n]
        np.testing.assert_allclose(self.table(completion.logprobs), expected, atol=TOLERANCE, rtol=0)

    def table(self, logprobs) -> np.ndarray:
        """[steps, vocabulary] of vLLM's dictionaries."""
        return np.array([[step[i].logprob for i in range(self.vocabulary)] for step in logprobs])

    def reference(self, ids: list[int], num_loops: int | None = None) -> np.ndarray:
        """Log-probabilities [T, vocabulary] by the equations."""
        _, logits = reference_forward(self.weights, self.config, torch.tensor(ids), num_loops)
        return logits[-1].log_softmax(-1).numpy()

    def check_by_reference(self, prompt: list[int], completion, num_loops: int | None = None) -> None:
        """Every token is a likeliest one, and every log-probability the reference's, whatever was sampled."""
        ids = [*prompt, *completion.token_ids]
        expected = self.reference(ids[:-1], num_loops)[len(prompt) - 1 :]
        np.testing.assert_allclose(self.table(completion.logprobs), expected, atol=TOLERANCE, rtol=0)

    def greedy(self, max_tokens: int = 48, **options) -> SamplingParams:
        return SamplingParams(
            temperature=0, max_tokens=max_tokens, ignore_eos=True, logprobs=self.vocabulary, detokenize=False, **options
        )


@pytest.fixture(params=FOLDERS, ids=lambda folder: folder.name, scope="module")
def case(request):
    return Case(request.param)


@contextmanager
def engine(folder: Path, **options):
    """vLLM's offline engine; float32, eager, small blocks, prefix caching off unless asked for."""
    defaults = {
        "dtype": "float32",
        "enforce_eager": True,
        "skip_tokenizer_init": True,
        "max_logprobs": -1,
        "max_model_len": 512,
        "block_size": BLOCK,
        "enable_prefix_caching": False,
        "disable_log_stats": False,
        "seed": 0,
    }
    llm = LLM(str(folder), **(defaults | options))
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()
        gc.collect()


def tokens(*prompts: list[int]) -> list[dict]:
    return [{"prompt_token_ids": prompt} for prompt in prompts]


def metric(llm, name: str) -> int:
    return sum(getattr(m, "value", 0) for m in llm.get_metrics() if m.name == name)


def model_of(llm):
    return llm.llm_engine.model_executor.driver_worker.worker.model_runner.model


def free_blocks(llm) -> tuple[int, int]:
    """Blocks of the cache that no request holds, and all that requests may hold."""
    pool = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
    return pool.get_num_free_blocks(), pool.num_gpu_blocks - 1


def random_checkpoint(folder: Path, **changes) -> Path:
    """A small checkpoint in the released format with random gates, saved in the released names."""
    fields = {
        "architectures": ["IQuestPLTCoderForCausalLM"], "model_type": "iquestpltcoder", "torch_dtype": "float32",
        "vocab_size": 512, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 32, "hidden_act": "silu", "max_position_embeddings": 1024, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "plt_num_loops": 2,
        "plt_window_size": [8, 0], "plt_emb_scale": 0.707, "plt_hidden_scale": 0.3, "plt_gate_use_hidden_states": True,
    } | changes  # fmt: skip
    torch.manual_seed(0)
    D, F_, K = fields["hidden_size"], fields["intermediate_size"], fields["head_dim"]
    H, G, V = fields["num_attention_heads"], fields["num_key_value_heads"], fields["vocab_size"]

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns) * columns**-0.5

    weights = {"model.embed_tokens.weight": torch.randn(V, D) * 0.5, "model.norm.weight": 1 + 0.1 * torch.randn(D)}
    if not fields["tie_word_embeddings"]:
        weights["lm_head.weight"] = matrix(V, D) * 2
    for i in range(fields["num_hidden_layers"]):
        layer = {
            "input_layernorm.weight": 1 + 0.1 * torch.randn(D), "post_attention_layernorm.weight": 1 + 0.1 * torch.randn(D),
            "self_attn.q_proj.weight": matrix(H * K, D), "self_attn.k_proj.weight": matrix(G * K, D),
            "self_attn.v_proj.weight": matrix(G * K, D), "self_attn.o_proj.weight": matrix(D, H * K),
            "mlp.gate_proj.weight": matrix(F_, D), "mlp.up_proj.weight": matrix(F_, D), "mlp.down_proj.weight": matrix(D, F_),
        }  # fmt: skip
        if fields.get("attention_bias"):
            layer |= {f"self_attn.{p}_proj.bias": torch.randn(n * K) * 0.3 for p, n in (("q", H), ("k", G), ("v", G))}
        if fields.get("attention_output_bias", fields.get("attention_bias")):
            layer["self_attn.o_proj.bias"] = torch.randn(D) * 0.3
        if fields.get("mlp_bias"):
            layer |= {f"mlp.{p}_proj.bias": torch.randn(n) * 0.3 for p, n in (("gate", F_), ("up", F_), ("down", D))}
        if fields.get("qk_norm"):
            layer |= {f"self_attn.{p}_norm.weight": 1 + 0.2 * torch.randn(K) for p in "qk"}
        if fields["plt_num_loops"] > 1:
            hidden = fields["plt_gate_use_hidden_states"]
            layer["self_attn.plt_gate.weight"] = matrix(H, D if hidden else K)
            layer["self_attn.plt_gate.bias"] = torch.randn(H)
            if hidden:
                layer["self_attn.plt_gate.gate_norm.weight"] = 1 + 0.1 * torch.randn(D)
        weights |= {f"model.layers.{i}.{name}": weight for name, weight in layer.items()}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(fields))
    save_file({name: weight.contiguous() for name, weight in weights.items()}, folder / "model.safetensors")
    return folder


class Checkpoint(Case):
    """A folder without recorded outputs: the reference decides."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.config = json.loads((folder / "config.json").read_text())
        self.vocabulary = self.config["vocab_size"]
        self.weights = load_file(folder / "model.safetensors")

    def prompt(self, T: int) -> list[int]:
        return np.random.default_rng(T).integers(self.vocabulary, size=T).tolist()
