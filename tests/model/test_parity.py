"""The vendor's own outputs decide."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import parloop  # noqa: F401  (registers the model)
from parloop.model.reference import reference_forward
from tests.helpers.parity import CASES

LENGTHS = (1, 5, 40, 200)
TOLERANCE = 1e-4  # log-probability, float32


def test_there_are_cases():
    assert len(CASES) >= 4


@pytest.fixture(params=CASES, ids=lambda path: path.name, scope="module")
def case(request):
    return request.param, np.load(request.param / "cases.npz")


@pytest.fixture(scope="module")
def model(case):
    return AutoModelForCausalLM.from_pretrained(case[0]).eval()


@pytest.mark.parametrize("T", LENGTHS)
def test_reference(case, T):
    folder, outputs = case
    config = json.loads((folder / "config.json").read_text())
    ids = torch.tensor(outputs[f"ids_{T}"])
    _, logits = reference_forward(load_file(folder / "model.safetensors"), config, ids)
    np.testing.assert_allclose(logits[-1].log_softmax(-1), outputs[f"logprobs_{T}"], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("T", LENGTHS)
def test_full_forward(case, model, T, attn):
    model.set_attn_implementation(attn)
    ids = torch.tensor(case[1][f"ids_{T}"])[None]
    with torch.no_grad():
        log_probabilities = model(ids).logits[0].log_softmax(-1)
    np.testing.assert_allclose(log_probabilities, case[1][f"logprobs_{T}"], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("T", LENGTHS)
def test_cached_generation(case, model, T, cache):
    model.set_attn_implementation("sdpa")
    ids = torch.tensor(case[1][f"ids_{T}"])[None]
    output = model.generate(
        ids,
        max_new_tokens=48,
        do_sample=False,
        eos_token_id=None,
        cache_implementation=cache,
        return_dict_in_generate=True,
        output_logits=True,
    )
    assert output.sequences[0, T:].tolist() == case[1][f"gen_ids_{T}"].tolist()
    log_probabilities = torch.cat(output.logits).log_softmax(-1)
    np.testing.assert_allclose(log_probabilities, case[1][f"gen_logprobs_{T}"], atol=TOLERANCE, rtol=0)
