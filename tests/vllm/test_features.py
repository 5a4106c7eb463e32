"""The loop dial, one pass per token, and every option of vLLM that meets the loops: it works, or it is refused."""

import json

import numpy as np
import pytest
import torch
from conftest import Checkpoint, engine, free_blocks, model_of, random_checkpoint, tokens
from safetensors.torch import save_file
from vllm import SamplingParams


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return Checkpoint(random_checkpoint(tmp_path_factory.mktemp("checkpoint") / "r2"))


def check(case, llm, num_loops=None, lengths=(1, 40, 200), **options):
    prompts = [case.prompt(T) for T in lengths]
    for prompt, output in zip(prompts, llm.generate(tokens(*prompts), case.greedy(16), use_tqdm=False, **options)):
        case.check_by_reference(prompt, output.outputs[0], num_loops)


@pytest.mark.parametrize("loops", [1, 2, 3, 4])
def test_loop_dial(checkpoint, loops):
    with engine(checkpoint.folder, hf_overrides={"plt_num_loops": loops}) as llm:
        check(checkpoint, llm, loops)


@pytest.mark.parametrize(
    "changes",
    [
        {"plt_num_loops": 1},
        {"plt_window_size": [0, 0]},
        {"plt_num_loops": 3, "plt_window_size": [0, 0], "plt_gate_use_hidden_states": False},
        {"tie_word_embeddings": True},
        {"plt_window_size": [64, 0], "plt_emb_scale": None, "plt_hidden_scale": None, "plt_num_loops": 4},
        {
            "hidden_size": 320,
            "num_key_value_heads": 1,
            "plt_num_loops": 3,
        },  # a state longer than what the layers' pages hold
        {"num_hidden_layers": 5, "plt_num_loops": 2, "plt_normalize_per_loop": False},
        {"attention_bias": True, "mlp_bias": True},
        {"attention_bias": True, "attention_output_bias": False},  # Qwen2
        {"attention_output_bias": True},
        {"qk_norm": True, "plt_num_loops": 3, "plt_gate_use_hidden_states": False},  # Qwen3
    ],
    ids=lambda changes: ",".join(f"{k}={v}" for k, v in changes.items()),
)
def test_shapes(changes, tmp_path):
    case = Checkpoint(random_checkpoint(tmp_path / "c", **changes))
    with engine(case.folder, max_num_batched_tokens=64, max_num_seqs=8) as llm:
        check(case, llm)
        free, total = free_blocks(llm)
        assert free == total


def test_gates_by_their_other_name(checkpoint, tmp_path):
    weights = {name.replace("plt_gate", "loop_gate_proj"): w for name, w in checkpoint.weights.items()}
    (tmp_path / "config.json").write_text(json.dumps(checkpoint.config))
    save_file(weights, tmp_path / "model.safetensors")
    with engine(tmp_path) as llm:
        check(checkpoint, llm)


def test_a_checkpoint_without_gates_at_two_loops(tmp_path):
    folder = random_checkpoint(tmp_path / "c", plt_num_loops=1)
    case = Checkpoint(folder)
    gates = {f"model.layers.{i}.self_attn.plt_gate": i for i in range(2)}
    for name in gates:
        case.weights |= {f"{name}.weight": torch.zeros(4, 128), f"{name}.bias": torch.zeros(4)}
        case.weights[f"{name}.gate_norm.weight"] = torch.ones(128)
    with engine(folder, hf_overrides={"plt_num_loops": 2}) as llm:
        check(case, llm, 2)


@pytest.mark.parametrize(
    ("lacks", "config", "told"),
    [
        ("layers.1.self_attn.plt_gate", {}, "the files lack model.layers.1.self_attn.plt_gate.bias and 2 more"),
        ("plt_gate", {}, "the files lack model.layers.0.self_attn.plt_gate.bias and 5 more"),  # of a looped checkpoint
        ("layers.1.mlp.up_proj", {}, "the files lack model.layers.1.mlp.up_proj.weight"),  # half of a merged matrix
        ("lm_head", {}, "the files lack lm_head.weight"),
        ("nothing", {"intermediate_size": 160}, r"mlp.* has shape .*192.*, and not .*160"),  # vLLM would cut it off
        ("nothing", {"num_hidden_layers": 1}, r"the files hold model.layers.1.* does not have"),
        ("nothing", {"num_hidden_layers": 3}, r"the files lack model.layers.2.* and 11 more"),
    ],
)
def test_a_checkpoint_with_other_weights_is_refused(checkpoint, tmp_path, lacks, config, told):
    (tmp_path / "config.json").write_text(json.dumps(checkpoint.config | config))
    save_file({k: w for k, w in checkpoint.weights.items() if lacks not in k}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=told), engine(tmp_path):
        pass


@pytest.mark.parametrize("load_format", ["auto", "dummy"])
def test_weights_can_be_sent_later_one_by_one(checkpoint, load_format):
    """Trainers that sample with vLLM do this. (Weights that its kernels repacked on a CPU cannot be sent; a norm can.)"""
    with engine(checkpoint.folder, load_format=load_format) as llm:
        model, sent = model_of(llm), torch.full((128,), 2.0)
        assert model.load_weights([("model.norm.weight", sent)]) >= {"model.norm.weight"}
        assert torch.equal(model.model.norm.weight, sent)


@pytest.mark.parametrize("loops", [1, 2, 4])
@pytest.mark.parametrize("one_pass", [True, False])
def test_a_decode_step_is_one_pass(checkpoint, loops, one_pass):
    """Steps that hold a prompt are `loops` passes; counted at a linear layer."""
    options = {} if one_pass else {"additional_config": {"plt_one_pass": False}}
    with engine(
        checkpoint.folder, hf_overrides={"plt_num_loops": loops}, max_num_batched_tokens=64, max_num_seqs=8, **options
    ) as llm:
        rows = []
        model_of(llm).model.layers[0].mlp.gate_up_proj.register_forward_hook(
            lambda _m, inputs, _o: rows.append(len(inputs[0]))
        )
        server, params = llm.llm_engine, SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, detokenize=False)
        for i, T in enumerate((40, 17, 1)):
            server.add_request(str(i), tokens(checkpoint.prompt(T))[0], params)
        passes = []
        while server.has_unfinished_requests():
            rows.clear()
            server.step()
            passes.append(list(rows))
        assert passes[0] == [58] * loops  # all three prompts fit in the first step
        expected = [3 * loops] if one_pass else [3] * loops
        assert passes[1:6] == [expected] * 5


def test_without_the_hybrid_cache_manager(checkpoint):
    with engine(checkpoint.folder, disable_hybrid_kv_cache_manager=True) as llm:
        check(checkpoint, llm)


def test_not_eager(checkpoint):
    """With vLLM's compilation left on."""
    with engine(checkpoint.folder, enforce_eager=False) as llm:
        check(checkpoint, llm)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"pipeline_parallel_size": 2}, "pipeline"),
        ({"kv_sharing_fast_prefill": True}, "fast.prefill"),
        ({"hf_overrides": {"plt_num_loops": 0}}, "plt_num_loops=0"),
    ],
    ids=["pipeline", "fast-prefill", "no-loops"],
)
def test_refused(checkpoint, options, told):
    with pytest.raises(Exception, match=f"(?i){told}"), engine(checkpoint.folder, **options):
        pass


def test_lora(checkpoint, tmp_path):
    """An adapter acts in every loop. (vLLM 0.32 on CPUs gives it to the requests of a batch that asked for none, too, whatever the
    model; so there are none here.)"""
    from vllm.lora.request import LoRARequest

    torch.manual_seed(1)
    adapted, adapter = dict(checkpoint.weights), {}
    for name, weight in checkpoint.weights.items():
        if name.endswith(("q_proj.weight", "v_proj.weight", "down_proj.weight")):
            a, b = torch.randn(4, weight.shape[1]) * 0.2, torch.randn(weight.shape[0], 4) * 0.2
            key = "base_model.model." + name.removesuffix(".weight")
            adapter |= {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}
            adapted[name] = weight + 2 * b @ a
    save_file(adapter, tmp_path / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "bias": "none",
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    merged = Checkpoint(checkpoint.folder)
    merged.weights = adapted
    with engine(checkpoint.folder, enable_lora=True, max_lora_rank=8) as llm:
        prompts = [checkpoint.prompt(T) for T in (40, 200, 5)]
        request = LoRARequest("adapter", 1, str(tmp_path))
        outputs = llm.generate(tokens(*prompts), checkpoint.greedy(16), use_tqdm=False, lora_request=request)
        for prompt, output in zip(prompts, outputs):
            merged.check_by_reference(prompt, output.outputs[0])
        check(checkpoint, llm)


def mean_error(case, llm, lengths=(1, 40, 200)) -> float:
    """Return the mean error of log-probabilities against the reference."""
    errors = []
    for T in lengths:
        prompt = case.prompt(T)
        (output,) = llm.generate(tokens(prompt), case.greedy(8), use_tqdm=False)
        ids = [*prompt, *output.outputs[0].token_ids]
        errors.append(np.abs(case.table(output.outputs[0].logprobs) - case.reference(ids[:-1])[len(prompt) - 1 :]).mean())
    return float(np.mean(errors))


def test_compressed_tensors_leave_the_gates_alone(tmp_path):
    """Int8 weights per channel, int8 activations per token; the reference has the same weights, rounded likewise."""
    case = Checkpoint(random_checkpoint(tmp_path / "plain", plt_num_loops=3))
    quantised = {}
    for name, weight in case.weights.items():
        if name.endswith("proj.weight"):
            scale = weight.abs().amax(1, keepdim=True) / 127
            quantised |= {name: (weight / scale).round().to(torch.int8), f"{name}_scale": scale}
            case.weights[name] = quantised[name] * scale
        else:
            quantised[name] = weight
    scheme = {
        "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False},
        "input_activations": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True},
        "targets": ["Linear"],
    }
    how = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "ignore": ["lm_head"],
        "config_groups": {"g": scheme},
    }
    folder = tmp_path / "int8"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(case.config | {"quantization_config": how}))
    save_file(quantised, folder / "model.safetensors")
    with engine(folder, dtype="bfloat16") as llm:
        layer = model_of(llm).model.layers[0]
        assert type(layer.mlp.down_proj.quant_method).__name__ == "CompressedTensorsLinearMethod"
        assert layer.self_attn.plt_gate.weight.dtype == torch.float32
        assert 0 < mean_error(case, llm) < 0.1  # other answers are off by 3 and more


@pytest.mark.parametrize("loops", [1, 3])
def test_cache_in_eight_bits(loops, tmp_path):
    """Keys and values in fp8; the carry, in the same pages, keeps the model's precision."""
    case = Checkpoint(random_checkpoint(tmp_path / "c", plt_num_loops=loops))
    with engine(case.folder, dtype="bfloat16", kv_cache_dtype="fp8", enable_prefix_caching=True) as llm:
        assert mean_error(case, llm) < 0.2


@pytest.mark.parametrize(
    "changes",
    [{"plt_num_loops": 3, "hidden_size": 320, "num_key_value_heads": 1}, {"plt_gate_use_hidden_states": False}],
    ids=["one-key-head", "query-gate"],
)
def test_tensor_parallel(changes, tmp_path, monkeypatch):
    """Two processes, each with half the heads, gates and feed-forward."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    case = Checkpoint(random_checkpoint(tmp_path / "c", **changes))
    with engine(case.folder, tensor_parallel_size=2, enable_prefix_caching=True) as llm:
        check(case, llm)


def test_calibrated_scales_of_the_cache_are_refused(checkpoint, tmp_path):
    """The later loops read loop 1's cache through layers of their own, which would keep scales of 1."""
    scheme = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False}
    how = {"quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": {}, "kv_cache_scheme": scheme}
    (tmp_path / "config.json").write_text(json.dumps(checkpoint.config | {"quantization_config": how}))
    save_file(checkpoint.weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="--kv-cache-dtype bfloat16"), engine(tmp_path):
        pass
