"""A cache is passed as `cache` or as `past_key_values`; what the library reads has the installed version's name, CACHE."""

import inspect
from dataclasses import fields

import pytest
import torch
from transformers.modeling_outputs import CausalLMOutputWithPast

from parloop import make_cache
from parloop.model.cache_argument import CACHE, takes_cache
from parloop.model.modeling import PLTForSequenceClassification
from tests.helpers.decoding import EXACT, GREEDY, recomputed
from tests.helpers.models import random_ids, tiny_config, tiny_model

NAMES = ["cache", "past_key_values"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("error::FutureWarning")
def test_a_cache_is_passed_by_either_name(name):
    causal = tiny_model()
    ids = random_ids(2, 9)
    with torch.no_grad():
        for model in (causal, causal.model):
            cache = make_cache(causal.config)
            model(ids[:, :5], **{name: cache})
            assert cache.get_seq_length() == 5
            torch.testing.assert_close(model(ids[:, 5:], **{name: cache})[0][:, -1], model(ids)[0][:, -1], **EXACT)


@pytest.mark.parametrize("name", NAMES)
def test_heads_of_the_library_pass_a_cache_on(name):
    model = PLTForSequenceClassification(tiny_config(num_labels=3)).eval()
    cache = make_cache(model.config)
    with torch.no_grad():
        assert getattr(model(random_ids(1, 5), **{name: cache}), CACHE) is cache
    assert cache.get_seq_length() == 5


def test_a_cache_passed_by_both_names_is_refused():
    model = tiny_model()
    cache = make_cache(model.config)
    with pytest.raises(ValueError, match="Both cache and past_key_values hold a cache"):
        model(random_ids(1, 4), cache=cache, past_key_values=cache)
    model(random_ids(1, 4), cache=cache, past_key_values=None)
    model(random_ids(1, 4), cache=None, past_key_values=cache)
    assert cache.get_seq_length() == 8


def test_a_name_that_shows_in_no_signature_is_not_an_argument():
    @takes_cache
    def call(ids, cache=None, **others):
        return ids, cache, others

    assert list(inspect.signature(call).parameters) == ["ids", CACHE, "others"]
    assert call(1, 2) == call(1, cache=2) == call(1, past_key_values=2) == (1, 2, {})
    assert call(ids=1, other=3) == (1, None, {"other": 3})
    with pytest.raises(TypeError, match="multiple values"):
        call(1, 2, past_key_values=3)


@pytest.mark.parametrize("name", [CACHE, "past_key_values"])
def test_generate_goes_on_from_a_cache_by_every_name_that_the_library_takes(name):
    model = tiny_model(plt_num_loops=3)
    ids = random_ids(1, 9)
    cache = make_cache(model.config)
    with torch.no_grad():
        model(ids[:, :5], cache=cache)
    assert model.generate(ids, **{name: cache}, **GREEDY).tolist() == recomputed(model, ids).tolist()
    assert cache.get_seq_length() == 20


def test_masks_are_made_in_advance_by_either_name():
    """As prepare_inputs_for_generation does for compiled steps."""
    model = tiny_model(dtype=torch.float32)
    cache = make_cache(model.config, max_cache_len=12)
    inputs = model.prepare_inputs_for_generation(random_ids(1, 1), **{CACHE: cache})
    assert inputs[CACHE] is cache
    for name in NAMES:
        masks = model.create_masks_for_generate(model.config, torch.empty(1, 1, 0), None, **{name: cache})
        assert masks.keys() == inputs["attention_mask"].keys()
        assert all(torch.equal(masks[kind], inputs["attention_mask"][kind]) for kind in ("full", "window"))
        assert masks["full"].shape == (1, 1, 1, 12)


def test_outputs_hold_the_cache_where_stock_outputs_do():
    model = tiny_model()
    output = model(random_ids(1, 4), output_hidden_states=True, labels=random_ids(1, 4))
    stock = [field.name for field in fields(CausalLMOutputWithPast) if field.name in output]
    assert [name for name in output if not name.startswith("loop_")] == stock
    assert output[CACHE] is output.past_key_values is getattr(output, CACHE)
    assert output.past_key_values.get_seq_length() == 4


def test_a_static_cache_that_records_its_past_is_still_static():
    """Its empty slots are masked. From transformers 5.24 on, it does not count as one that can be compiled."""
    model = tiny_model()
    ids = random_ids(1, 9)
    cache = make_cache(model.config, max_cache_len=20)
    cache.activate_past_recording()
    with torch.no_grad():
        logits = [model(ids[:, :6], cache=cache).logits]
        logits += [model(ids[:, t : t + 1], cache=cache).logits for t in range(6, 9)]
    torch.testing.assert_close(torch.cat(logits, dim=1), model(ids).logits, **EXACT)
