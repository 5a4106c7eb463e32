"""Options of other families (biases, normed queries and keys): absent they are the release's, set they follow the equations."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from parloop.model.reference import reference_forward
from tests.helpers.models import random_ids, tiny_config, tiny_model

OPTIONS = [
    {"attention_bias": True, "mlp_bias": True},
    {"attention_bias": True, "attention_output_bias": False},  # Qwen2
    {"attention_output_bias": True},
    {"qk_norm": True},  # Qwen3
    {"qk_norm": True, "attention_bias": True, "plt_gate_use_hidden_states": False},
    {"num_key_value_heads": 1},
    {"num_key_value_heads": 1, "attn": "eager"},
]


@pytest.mark.parametrize("loops", [1, 3])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: ",".join(options))
def test_options_follow_the_equations(options, loops, tmp_path):
    model = tiny_model(plt_num_loops=loops, **options)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    prompt = random_ids(1, 12)
    ids = model.generate(prompt, max_new_tokens=8, do_sample=False)  # the last steps from the cache
    _, logits = reference_forward(model.state_dict(), config, ids[0])
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits[0], logits[-1], atol=1e-10, rtol=0)
    assert ids[0, 12:].tolist() == logits[-1][11:-1].argmax(-1).tolist()

    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert loaded.config.to_diff_dict() == config


def test_absent_options_are_not_written(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    assert not {"qk_norm", "attention_output_bias"} & json.loads((tmp_path / "config.json").read_text()).keys()


def test_an_option_that_is_turned_off_again_is_not_written(tmp_path):
    tiny_config(qk_norm=True, attention_output_bias=True).save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    config.qk_norm, config.attention_output_bias = False, None
    config.save_pretrained(tmp_path)
    assert not {"qk_norm", "attention_output_bias"} & json.loads((tmp_path / "config.json").read_text()).keys()


@pytest.mark.parametrize("name", ["attention_bias", "mlp_bias", "qk_norm", "attention_output_bias"])
def test_options_are_true_or_false(name):
    with pytest.raises(ValueError, match=f"{name}='yes' must be true"):
        tiny_config(**{name: "yes"})
