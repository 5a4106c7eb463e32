"""Weight-only quantisation through from_pretrained: one-pass decoding, gates and norms as they are, saved and loaded again."""

import pytest
import torch
from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup
from transformers import AutoModelForCausalLM, TorchAoConfig

from parloop import PLTForCausalLM
from tests.helpers.models import random_ids, tiny_model


def int8():
    return Int8WeightOnlyConfig()


def int4():
    return IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(16))


@pytest.mark.parametrize(("way", "error"), [(int8, 0.1), (int4, 0.6)])
def test_decodes_in_one_pass_and_is_saved_and_loaded(way, error, tmp_path):
    tiny_model(plt_num_loops=3, dtype=torch.bfloat16).save_pretrained(tmp_path / "plain")
    config = TorchAoConfig(way())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.bfloat16, quantization_config=config)
    assert isinstance(model, PLTForCausalLM)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.bfloat16)
    kinds = {name: type(p).__name__ for name, p in model.named_parameters()}
    assert "Int" in kinds["model.layers.0.self_attn.q_proj.weight"]
    for name, parameter in plain.named_parameters():
        if "plt_gate" in name or "norm" in name:
            assert kinds[name] == "Parameter"
            assert torch.equal(model.get_parameter(name), parameter)

    ids = random_ids(1, 24)
    with torch.no_grad():
        exact, rough = plain(ids).logits.float(), model(ids).logits.float()
    assert 0 < (exact - rough).abs().mean() < error * exact.abs().mean()

    calls = 0

    def count(*_):
        nonlocal calls
        calls += 1

    text = model.generate(ids, max_new_tokens=6, do_sample=False)
    hook = model.model.layers[0].mlp.gate_proj.register_forward_hook(count)
    cache = model(ids, use_cache=True).past_key_values
    before = calls
    model(text[:, 24:25], past_key_values=cache)
    hook.remove()
    assert calls - before == 1

    model.save_pretrained(tmp_path / "small")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert torch.equal(again.generate(ids, max_new_tokens=6, do_sample=False), text)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
