"""The weights that vLLM receives, tested without vLLM: every weight of a checkpoint, and no other."""

import pytest
import torch
from safetensors.torch import load_file

from parloop.checkpoints import load_config
from parloop.quantize.quantization import quantize
from parloop.serve.vllm_weights import checked, shapes_of
from tests.helpers.models import tiny_config, tiny_model

KINDS = [
    {},
    {"plt_num_loops": 1},
    {"plt_gate_use_hidden_states": False},
    {"tie_word_embeddings": True},
    {"attention_bias": True, "mlp_bias": True},
    {"attention_bias": True, "attention_output_bias": False},
    {"attention_output_bias": True, "qk_norm": True, "num_hidden_layers": 3},
]


@pytest.mark.parametrize("changes", KINDS, ids=str)
def test_the_shapes_are_those_of_the_model(changes):
    model = tiny_model(**changes)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del expected["lm_head.weight"]
    assert shapes_of(model.config) == expected


@pytest.mark.parametrize("changes", KINDS, ids=str)
@pytest.mark.parametrize("gate", ["plt_gate", "loop_gate_proj"])
def test_a_whole_checkpoint_passes_unchanged(changes, gate):
    state = {name.replace("plt_gate", gate): tensor for name, tensor in tiny_model(**changes).state_dict().items()}
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    passed = dict(checked(state.items(), tiny_config(**changes)))
    assert list(passed) == list(state)
    assert all(passed[name] is tensor for name, tensor in state.items())


def test_gates_are_no_part_of_one_loop():
    state = tiny_model().state_dict()
    assert dict(checked(state.items(), tiny_config(plt_num_loops=1))).keys() == state.keys()


@pytest.mark.parametrize("name", ["lm_head.weight", "model.embed_tokens.weight", "model.layers.1.self_attn.k_proj.weight"])
def test_what_is_missing(name):
    state = tiny_model().state_dict()
    del state[name]
    with pytest.raises(ValueError, match=f"the files lack {name}:"):
        list(checked(state.items(), tiny_config()))


@pytest.mark.parametrize("name", ["lm_head.weight", "model.norm.weight", "model.layers.1.mlp.up_proj.weight"])
@pytest.mark.parametrize("rows", [-1, 1])
def test_what_has_another_shape(name, rows):
    state = tiny_model().state_dict()
    state[name] = torch.ones(state[name].shape[0] + rows, *state[name].shape[1:])
    with pytest.raises(ValueError, match=rf"{name} has shape \({state[name].shape[0]},.*, and not \("):
        list(checked(state.items(), tiny_config()))


def test_what_is_left_over():
    state = tiny_model(num_hidden_layers=3).state_dict()
    with pytest.raises(ValueError, match=r"the files hold model.layers.2.* does not have"):
        list(checked(state.items(), tiny_config()))


def test_gates_may_lack_together_if_the_loop_count_was_dialled():
    state = tiny_model(plt_num_loops=1).state_dict()
    assert dict(checked(state.items(), tiny_config(), gates_may_lack=True)).keys() == state.keys()
    with pytest.raises(ValueError, match=r"the files lack .*plt_gate.* and 5 more"):
        list(checked(state.items(), tiny_config()))
    state |= {name: tensor for name, tensor in tiny_model().state_dict().items() if "layers.0.self_attn.plt_gate" in name}
    with pytest.raises(ValueError, match=r"the files lack model.layers.1.self_attn.plt_gate"):
        list(checked(state.items(), tiny_config(), gates_may_lack=True))


@pytest.mark.parametrize("options", [{"bits": 4}, {"bits": 8}, {"bits": 4, "head": True}], ids=str)
def test_a_quantised_checkpoint_holds_packed_matrices(options, tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "attention_bias": True}
    tiny_model(dtype=torch.bfloat16, **sizes).save_pretrained(tmp_path / "plain")
    quantize(tmp_path / "plain", tmp_path / "packed", **options)
    config, state = load_config(tmp_path / "packed"), load_file(tmp_path / "packed" / "model.safetensors")
    assert shapes_of(config) == {name: tuple(tensor.shape) for name, tensor in state.items()}
    del state["model.layers.1.mlp.up_proj.weight_scale"]
    with pytest.raises(ValueError, match=r"the files lack model.layers.1.mlp.up_proj.weight_scale:"):
        list(checked(state.items(), config))
