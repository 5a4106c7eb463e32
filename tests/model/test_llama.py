"""R = 1 is the plain transformer: transformers' Llama with the same weights."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from parloop import PLTForCausalLM
from tests.helpers.models import llama_config, random_ids, randomize, tiny_config

ROPE = [
    None,
    {"rope_type": "linear", "factor": 2.0},
    {"rope_type": "dynamic", "factor": 2.0},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
]


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("rope", ROPE, ids=lambda rope: rope["rope_type"] if rope else "plain")
def test_one_loop_is_llama(rope, tied, attn):
    config = tiny_config(
        plt_num_loops=1, rope_scaling=rope, tie_word_embeddings=tied, attention_bias=True, mlp_bias=True, head_dim=16
    )
    ours, llama = PLTForCausalLM(config).eval(), LlamaForCausalLM(llama_config(config)).eval()
    randomize(ours)
    assert set(ours.state_dict()) == set(llama.state_dict())
    llama.load_state_dict(ours.state_dict())
    ours.set_attn_implementation(attn)
    llama.set_attn_implementation(attn)
    ids = random_ids(2, 40)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    with torch.no_grad():
        for inputs in ({}, {"attention_mask": mask}):
            a, b = ours(ids, **inputs).logits, llama(ids, **inputs).logits
            torch.testing.assert_close(a[:, 7:], b[:, 7:], atol=2e-5, rtol=1e-4)
        options = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None}
        assert ours.generate(ids, **options).tolist() == llama.generate(ids, **options).tolist()


def test_every_parameter_gets_a_gradient():
    """DistributedDataParallel stops at a parameter without one, so one loop has no gates."""
    for loops in (1, 2, 3):
        for gate_hidden in (True, False):
            model = PLTForCausalLM(tiny_config(plt_num_loops=loops, plt_gate_use_hidden_states=gate_hidden)).train()
            ids = random_ids(2, 8)
            model(ids, labels=ids).loss.backward()
            assert [name for name, p in model.named_parameters() if p.grad is None] == []
            assert any("plt_gate" in name for name, _ in model.named_parameters()) == (loops > 1)


def test_a_llama_shaped_checkpoint_loads_with_one_loop(tmp_path):
    config = tiny_config(plt_num_loops=1)
    llama = LlamaForCausalLM(llama_config(config)).eval()
    llama.save_pretrained(tmp_path)
    config.save_pretrained(tmp_path)  # model_type: iquestpltcoder, plt_num_loops: 1
    ours, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(ours, PLTForCausalLM)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    ids = random_ids(1, 9)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, llama(ids).logits, atol=1e-5, rtol=1e-4)


def test_a_looped_checkpoint_loads_with_one_loop(tmp_path):
    PLTForCausalLM(tiny_config(plt_num_loops=2)).save_pretrained(tmp_path)
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path, plt_num_loops=1, output_loading_info=True)
    assert not report["unexpected_keys"]
    assert not any("plt_gate" in name for name in model.state_dict())
