"""Every option of the configuration, by whole prompts, chunks and one-pass steps, against the equations or transformers' model."""

import json

import mlx.core as mx
import numpy as np
import pytest
import torch
from conftest import Checkpoint, close, load, log_probabilities, random_checkpoint
from mlx_lm.models.cache import make_prompt_cache
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import parloop  # noqa: F401  (registers the model with transformers)

T = 40


def check(model, ids: list[int], expected: np.ndarray) -> None:
    """Without a cache; in chunks of 16, whose caches alone are evaluated first; the last tokens one by one."""
    ids = mx.array(ids)[None]
    close(log_probabilities(model(ids))[0], expected)
    cache, logits = make_prompt_cache(model), []
    for t in (0, 16):
        logits.append(model(ids[:, t : t + 16], cache=cache))
        mx.eval([c.state for c in cache])
    logits += [model(ids[:, t : t + 1], cache=cache) for t in range(32, T)]
    close(log_probabilities(mx.concatenate(logits, axis=1))[0], expected)


OPTIONS = {
    "hidden-gate": {},
    "query-gate": {"plt_gate_use_hidden_states": False},
    "no-window": {"plt_window_size": [0, 0]},
    "no-window-three-loops": {"plt_window_size": [0, 0], "plt_num_loops": 3},
    "window-longer-than-the-text": {"plt_window_size": [64, 0]},
    "no-norm-per-loop": {"plt_normalize_per_loop": False, "plt_num_loops": 3},
    "no-scales": {"plt_emb_scale": None, "plt_hidden_scale": None},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "qwen2-biases": {"attention_bias": True, "attention_output_bias": False},
    "qk-norm": {"qk_norm": True, "plt_num_loops": 3},
    "as-many-key-heads": {"num_key_value_heads": 4},
    "one-key-head": {"num_key_value_heads": 1},
    "one-layer": {"num_hidden_layers": 1, "plt_num_loops": 4},
}


@pytest.mark.parametrize("changes", OPTIONS.values(), ids=OPTIONS)
def test_options(tmp_path, changes):
    checkpoint = Checkpoint(random_checkpoint(tmp_path, **changes))
    ids = checkpoint.prompt(T)
    check(checkpoint.model, ids, checkpoint.reference(ids))


@pytest.mark.parametrize("loops", [1, 2, 3, 4])
@pytest.mark.parametrize("trained", [1, 3])
def test_the_loop_dial_is_a_field_of_the_configuration(tmp_path, trained, loops):
    """Also of a checkpoint that was trained with one loop, and has no gates: every gate is an even blend."""
    checkpoint = Checkpoint(random_checkpoint(tmp_path, plt_num_loops=trained))
    ids = checkpoint.prompt(T)
    if trained == 1 and loops > 1:  # what the equations need to blend evenly
        for i in range(checkpoint.config["num_hidden_layers"]):
            gate = f"model.layers.{i}.self_attn.plt_gate"
            checkpoint.weights |= {f"{gate}.weight": torch.zeros(4, 64), f"{gate}.bias": torch.zeros(4)}
            checkpoint.weights[f"{gate}.gate_norm.weight"] = torch.ones(64)
    check(load(tmp_path, plt_num_loops=loops), ids, checkpoint.reference(ids, plt_num_loops=loops))


def test_gates_that_are_there_in_part_only_are_refused(tmp_path):
    random_checkpoint(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.self_attn.plt_gate.bias"]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.plt_gate\.bias"):
        load(tmp_path)


def test_the_other_name_of_gates_and_old_buffers(tmp_path):
    checkpoint = Checkpoint(random_checkpoint(tmp_path))
    renamed = {name.replace("plt_gate", "loop_gate_proj"): weight for name, weight in checkpoint.weights.items()}
    renamed["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(16)
    save_file(renamed, tmp_path / "model.safetensors")
    ids = checkpoint.prompt(T)
    close(log_probabilities(load(tmp_path)(mx.array(ids)[None]))[0], checkpoint.reference(ids))


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
ROPE = {
    "theta": {"rope_theta": 500.0, "rope_scaling": None},
    "parameters": {"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "neither": {"rope_theta": None},
    "both": {"rope_theta": 7.0, "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}},
    "linear": {"rope_scaling": {"type": "linear", "factor": 2.0}},
    "llama3": {"rope_scaling": LLAMA3},
    "llama3-parameters": {"rope_theta": None, "rope_parameters": LLAMA3 | {"rope_theta": 500.0}},
    "llama3-positions-of-the-model": {"rope_scaling": {**LLAMA3, "original_max_position_embeddings": None}},
    "yarn": {"rope_scaling": YARN},
    "yarn-mscale": {
        "rope_scaling": YARN | {"mscale": 0.7, "mscale_all_dim": 0.3, "beta_fast": 16, "beta_slow": 2, "truncate": True}
    },
    "yarn-one-mscale": {"rope_scaling": YARN | {"mscale": 0.7}},
    "yarn-positions-of-the-model": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
}


@pytest.mark.parametrize("changes", ROPE.values(), ids=ROPE)
def test_rope_in_both_spellings_is_that_of_transformers(tmp_path, changes):
    folder = random_checkpoint(tmp_path, **changes)
    config = {name: value for name, value in json.loads((folder / "config.json").read_text()).items() if value is not None}
    if isinstance(config.get("rope_scaling"), dict):
        config["rope_scaling"] = {name: value for name, value in config["rope_scaling"].items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    checkpoint = Checkpoint(folder)
    ids = checkpoint.prompt(T)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = theirs(torch.tensor(ids)[None]).logits[0].log_softmax(-1).numpy()
    check(checkpoint.model, ids, expected)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"attention_dropout": 0.1}, "attention_dropout=0.1"),
        ({"plt_new_option": "x"}, "plt_new_option='x'"),
        ({"sliding_window": 128}, "sliding_window=128"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type='dynamic'"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "rope_type='longrope'"),
        ({"rope_scaling": YARN | {"attention_factor": 0.5}}, "'attention_factor': 0.5"),
        ({"rope_scaling": YARN | {"truncate": False}}, "'truncate': False"),
        ({"rope_scaling": {"rope_type": "linear"}}, "lacks a factor"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "'partial_rotary_factor': 0.5"),
        ({"plt_num_loops": 0}, "plt_num_loops=0"),
        ({"plt_window_size": [8, 1]}, r"plt_window_size=\[8, 1\]"),
        ({"plt_window_size": 8}, "plt_window_size=8"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(tmp_path, changes, named):
    random_checkpoint(tmp_path)
    with pytest.raises(ValueError, match=named):
        load(tmp_path, **changes)


def test_bfloat16_stays_bfloat16_and_near_the_equations(tmp_path):
    checkpoint = Checkpoint(random_checkpoint(tmp_path, dtype=torch.bfloat16))
    ids = checkpoint.prompt(T)
    cache = make_prompt_cache(checkpoint.model)
    logits = [checkpoint.model(mx.array(ids[:32])[None], cache=cache)]
    logits += [checkpoint.model(mx.array([[token]]), cache=cache) for token in ids[32:]]
    assert {part.dtype for part in logits} == {mx.bfloat16}
    found = log_probabilities(mx.concatenate(logits, axis=1).astype(mx.float32))[0]
    assert np.abs(found - checkpoint.reference(ids)).mean() < 0.05
