"""A model and its configuration are after a failed call what they were before it; drafts by an early exit."""

import copy

import numpy as np
import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.generation.candidate_generator import AssistedCandidateGenerator

from parloop import PLTConfig, make_cache
from parloop.model.generation import LayerExitCandidateGenerator, LoopExitCandidateGenerator
from tests.helpers.decoding import GREEDY, recomputed
from tests.helpers.models import random_ids, tiny_config, tiny_model


def snapshot(model):
    return copy.deepcopy(model.config.to_dict()), copy.deepcopy(model.generation_config.to_dict()), model.training


@pytest.mark.parametrize("R", [2, 3])
def test_early_exit_drafts_with_fewer_loops(R, monkeypatch):
    model = tiny_model(plt_num_loops=R)
    ids = random_ids(1, 5).repeat(1, 3)
    before, loops = snapshot(model), []
    draft = LoopExitCandidateGenerator._generate_candidates

    def counted(self, arguments):
        loops.append(self.assistant_kwargs["num_loops"])
        return draft(self, arguments)

    monkeypatch.setattr(LoopExitCandidateGenerator, "_generate_candidates", counted)
    for n in range(1, R):
        output = model.generate(ids, assistant_early_exit=n, **GREEDY)
        assert output.tolist() == recomputed(model, ids).tolist()
        assert set(loops) == {n}
        loops.clear()
    assert snapshot(model) == before


def test_early_exit_drafts_of_a_loop_dial():
    model = tiny_model(plt_num_loops=2)
    ids = random_ids(1, 9)
    output = model.generate(ids, num_loops=3, assistant_early_exit=2, **GREEDY)
    assert output.tolist() == recomputed(model, ids, num_loops=3).tolist()


def test_early_exit_samples_from_the_model():
    """Sampling with drafts keeps the model's distribution: over a vocabulary this small, its likeliest tokens come out."""
    model = tiny_model(plt_num_loops=2, dtype=torch.float32)
    ids = random_ids(1, 9)
    options = {"do_sample": True, "temperature": 1e-4, "max_new_tokens": 12, "eos_token_id": None}
    assert model.generate(ids, assistant_early_exit=1, **options).tolist() == recomputed(model, ids).tolist()


@pytest.mark.parametrize("bad", [0, -1, 2, 5, True, 1.5, "1"])
def test_impossible_early_exits_of_a_looped_model(bad):
    model = tiny_model(plt_num_loops=2)
    before, ids = snapshot(model), random_ids(1, 9)
    with pytest.raises(ValueError, match="assistant_early_exit="):
        model.generate(ids, assistant_early_exit=bad, **GREEDY)
    assert snapshot(model) == before
    assert model.generate(ids, **GREEDY).tolist() == recomputed(model, ids).tolist()


def test_early_exit_of_one_loop_is_that_of_llama():
    model = tiny_model(plt_num_loops=1, num_hidden_layers=3, dtype=torch.float32)
    fields = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim")
    config = LlamaConfig(
        **{name: getattr(model.config, name) for name in (*fields, "num_key_value_heads", "rms_norm_eps")},
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=None,
    )
    llama = LlamaForCausalLM(config).eval()
    llama.load_state_dict(model.state_dict())
    ids = random_ids(1, 9)
    with torch.no_grad():
        for n in (1, 2, 3):
            ours = model.generate(ids, assistant_early_exit=n, **GREEDY)
            assert ours.tolist() == llama.generate(ids, assistant_early_exit=n, **GREEDY).tolist()
        model.config.num_hidden_layers = llama.config.num_hidden_layers = 2  # what a draft runs
        torch.testing.assert_close(model(ids).logits, llama(ids).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("bad", [0, 4, True, "2"])
def test_impossible_early_exits_of_one_loop(bad):
    model = tiny_model(plt_num_loops=1, num_hidden_layers=3)
    before = snapshot(model)
    with pytest.raises(ValueError, match="number of layers from 1 to 3"):
        model.generate(random_ids(1, 9), assistant_early_exit=bad, **GREEDY)
    assert snapshot(model) == before


def test_a_draft_that_fails_leaves_the_model_whole(monkeypatch):
    model = tiny_model(plt_num_loops=1, num_hidden_layers=3)
    before, ids = snapshot(model), random_ids(1, 9)

    def fails(self, arguments):
        assert self.assistant_model.config.num_hidden_layers == 1
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(AssistedCandidateGenerator, "_generate_candidates", fails)
        with pytest.raises(RuntimeError, match="out of memory"):
            model.generate(ids, assistant_early_exit=1, **GREEDY)
    assert issubclass(LayerExitCandidateGenerator, AssistedCandidateGenerator)
    assert snapshot(model) == before
    assert model.generate(ids, **GREEDY).tolist() == recomputed(model, ids).tolist()


@pytest.mark.parametrize(
    "call",
    [
        {"num_loops": 0},
        {"num_loops": 1.5},
        {"attention_mask": torch.ones(1, 3)},
        {"past_key_values": "no cache"},
        {"prefill_chunk_size": -1},
        {"max_new_tokens": -3},
        {"cache_implementation": "unheard"},
    ],
)
def test_other_failed_calls_leave_the_model_whole(call):
    model = tiny_model()
    before, ids = snapshot(model), random_ids(1, 9)
    with pytest.raises((ValueError, TypeError, AttributeError, RuntimeError)):
        model.generate(ids, **{**GREEDY, **call})
    assert snapshot(model) == before
    assert model.generate(ids, **GREEDY).tolist() == recomputed(model, ids).tolist()


def test_a_refused_field_leaves_the_configuration_whole():
    config = tiny_config()
    before = config.to_dict()
    for name, value in (("plt_num_loops", 0), ("sliding_window", 4), ("layer_types", ["sliding_attention"] * 2)):
        with pytest.raises(ValueError, match=name):
            setattr(config, name, value)
    assert config.to_dict() | {"sliding_window": None, "layer_types": None} == before | {
        "sliding_window": None,
        "layer_types": None,
    }


# One rule for what a loop count is.

COUNTS = [0, -1, True, False, 1.0, 2.5, "2", np.float64(2), np.bool_(True), [2]]


@pytest.mark.parametrize("n", COUNTS)
def test_what_is_no_loop_count(n):
    model, ids = tiny_model(), random_ids(1, 5)
    with pytest.raises(ValueError, match=r"num_loops=.* must be an integer of at least 1"):
        model(ids, num_loops=n)
    with pytest.raises(ValueError, match=r"num_loops=.* must be an integer of at least 1"):
        make_cache(model.config, num_loops=n)
    with pytest.raises(ValueError, match=r"must be an integer of at least 1"):
        model.generate(ids, num_loops=n, **GREEDY)
    with pytest.raises(ValueError, match=r"plt_num_loops=.* must be an integer of at least 1"):
        PLTConfig(plt_num_loops=n)
    with pytest.raises(ValueError, match=r"plt_trained_loops.* must be"):
        PLTConfig(plt_trained_loops=[1, n])


@pytest.mark.parametrize("kind", [np.int32, np.int64, np.uint8])
def test_numpy_integers_are_loop_counts(kind):
    model, ids = tiny_model(), random_ids(1, 5)
    torch.testing.assert_close(model(ids, num_loops=kind(3)).logits, model(ids, num_loops=3).logits)
    assert len(make_cache(model.config, num_loops=kind(3)).layers) == len(make_cache(model.config, num_loops=3).layers)
    assert model.generate(ids, num_loops=kind(1), **GREEDY).tolist() == model.generate(ids, num_loops=1, **GREEDY).tolist()


# Fields that only stock caches read.


@pytest.mark.parametrize(
    "field",
    [
        {"sliding_window": 4},
        {"sliding_window": 4, "use_sliding_window": True},
        {"attention_chunk_size": 4},
        {"layer_types": ["full_attention", "sliding_attention"]},
        {"layer_types": ["chunked_attention"] * 2},
        {"layer_types": ["linear_attention"] * 2},
        {"kv_sharing_modes": [None, "reuse"]},
        {"per_layer_config": {0: {"sliding_window": 4}}},
    ],
)
def test_fields_by_which_stock_caches_would_forget_are_refused(field):
    with pytest.raises(ValueError, match=next(iter(field))):
        tiny_config(**field)


@pytest.mark.parametrize(
    "field",
    [
        {"sliding_window": None, "attention_chunk_size": None},
        {"sliding_window": 4, "use_sliding_window": False},
        {"layer_types": ["full_attention"] * 2},
    ],
)
def test_the_same_fields_where_they_are_off(field):
    model = tiny_model(**field)
    ids = random_ids(1, 20)
    assert model.generate(ids, **GREEDY).tolist() == recomputed(model, ids).tolist()


@pytest.mark.parametrize("field", [{"sliding_window": 4}, {"layer_types": ["linear_attention"] * 2}])
def test_a_cache_that_forgets_is_refused(field):
    model = tiny_model()
    cache = DynamicCache(config=LlamaConfig(num_hidden_layers=2, **field))
    with pytest.raises(ValueError, match="would forget tokens"):
        model(random_ids(1, 8), past_key_values=cache)
