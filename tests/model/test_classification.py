"""Classifiers and reward models: transformers' heads on the stack, by name, from a language model, and back."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoModelForTokenClassification

from parloop.model.modeling import PLTForSequenceClassification, PLTForTokenClassification
from tests.helpers.models import random_ids, tiny_model

KINDS = {
    "ForSequenceClassification": (AutoModelForSequenceClassification, PLTForSequenceClassification),
    "ForTokenClassification": (AutoModelForTokenClassification, PLTForTokenClassification),
}


@pytest.fixture
def language_model(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path / "language-model")
    return model, tmp_path / "language-model"


@pytest.mark.parametrize("kind", KINDS)
def test_a_language_model_becomes_a_classifier_that_loads_by_name(kind, language_model, tmp_path):
    """With its own stack, gates included, and a head that is saved with it."""
    auto, expected = KINDS[kind]
    model, report = auto.from_pretrained(language_model[1], num_labels=3, output_loading_info=True)
    assert type(model) is expected
    assert {name.split(".")[0] for name in report["missing_keys"]} == {"score"}
    assert set(report["unexpected_keys"]) == {"lm_head.weight"}
    for name, tensor in language_model[0].model.state_dict().items():
        assert torch.equal(model.model.state_dict()[name], tensor), name

    model.save_pretrained(tmp_path / "classifier")
    config = json.loads((tmp_path / "classifier/config.json").read_text())
    assert config["architectures"] == [f"IQuestPLTCoder{kind}"]
    assert config["model_type"] == "iquestpltcoder"
    loaded = auto.from_pretrained(tmp_path / "classifier").eval()
    assert loaded.config.num_labels == 3
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


@pytest.mark.parametrize("loops", [1, 2, 3])
def test_a_text_is_scored_by_the_last_state_of_the_last_loop(loops, language_model):
    _, folder = language_model
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2).eval()
    stack = AutoModelForCausalLM.from_pretrained(folder).eval().model
    ids = random_ids(2, 9)
    with torch.no_grad():
        state = stack(ids, num_loops=loops).loop_states[loops - 1]
        torch.testing.assert_close(model(ids, num_loops=loops).logits, state[:, -1] @ model.score.weight.T)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_score(side, language_model):
    model = AutoModelForSequenceClassification.from_pretrained(language_model[1], num_labels=1).eval()
    long, short = random_ids(1, 12), random_ids(1, 7, seed=1)
    pad = torch.full((1, 5), model.config.pad_token_id)
    real, empty = torch.ones_like(short), torch.zeros_like(pad)
    row = torch.cat([pad, short] if side == "left" else [short, pad], dim=1)
    mask = torch.cat([empty, real] if side == "left" else [real, empty], dim=1)
    with torch.no_grad():
        expected = torch.cat([model(long).logits, model(short).logits])
        got = model(torch.cat([long, row]), attention_mask=torch.cat([torch.ones_like(long), mask])).logits
    torch.testing.assert_close(got, expected, atol=1e-10, rtol=0)


def test_tokens_are_classified_one_by_one(language_model):
    model = AutoModelForTokenClassification.from_pretrained(language_model[1], num_labels=4).eval()
    ids = random_ids(2, 9)
    labels = ids % 4
    with torch.no_grad():
        output = model(ids, labels=labels)
        assert output.logits.shape == (2, 9, 4)
        torch.testing.assert_close(model(ids[:, :5]).logits, output.logits[:, :5], atol=1e-10, rtol=0)
    expected = torch.nn.functional.cross_entropy(output.logits.float().flatten(0, 1), labels.flatten())
    torch.testing.assert_close(output.loss, expected)


def test_a_classifier_trains_its_gates_and_recomputes_its_layers(language_model):
    gradients = []
    for recomputed in (False, True):
        model = AutoModelForSequenceClassification.from_pretrained(language_model[1], num_labels=2).train()
        with torch.no_grad():
            model.score.weight.copy_(torch.linspace(-1, 1, 64).view(2, 32))
        if recomputed:
            model.activation_checkpointing_enable()
        model(random_ids(2, 9), labels=torch.tensor([0, 1])).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients[0].values())
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)
