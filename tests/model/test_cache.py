"""The cache: what it is made of, and which caches are taken for one."""

import pytest
import torch
from transformers import DynamicCache, StaticCache

from parloop import cache_bytes, make_cache
from tests.helpers.models import random_ids, tiny_config, tiny_model

EXACT = {"atol": 1e-10, "rtol": 0}


def fed(model, ids, cache, first=6, **call):
    """Logits of a prompt and single steps."""
    with torch.no_grad():
        logits = [model(ids[:, :first], past_key_values=cache, **call).logits]
        logits += [model(ids[:, t : t + 1], past_key_values=cache, **call).logits for t in range(first, ids.shape[1])]
    return torch.cat(logits, dim=1)


def addresses(cache):
    """Where every tensor of a cache is."""
    tensors = [getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values")]
    tensors += [state for layer in cache.layers for state in getattr(layer, "conv_states", {}).values()]
    return [tensor.data_ptr() for tensor in tensors if tensor is not None]


@pytest.mark.parametrize("max_cache_len", [None, 16])
@pytest.mark.parametrize("w", [0, 4])
@pytest.mark.parametrize("s", [0, 1, 2])
@pytest.mark.parametrize("R", [1, 2, 3])
def test_layers_of_a_cache(R, s, w, max_cache_len):
    """As its table says, before anything is computed: full layers, a window per layer and later loop, a carry per boundary."""
    config = tiny_config(num_hidden_layers=3, plt_num_loops=5, plt_window_size=[w, 0], plt_offset=s)
    layers = make_cache(config, R, max_cache_len).layers
    carries = R - 1 if s else 0
    assert len(layers) == 3 * R + carries
    assert [hasattr(layer, "conv_states") for layer in layers] == [False] * 3 * R + [True] * carries
    assert [getattr(layer, "is_sliding", False) for layer in layers] == [False] * 3 + [w > 0] * 3 * (R - 1) + [
        False
    ] * carries
    assert [getattr(layer, "max_cache_len", None) for layer in layers[:3]] == [max_cache_len] * 3
    assert len(make_cache(config).layers) == 3 * 5 + (4 if s else 0)
    assert cache_bytes(make_cache(config, R, max_cache_len)) == {"full": 0, "window": 0, "carry": 0}


@pytest.mark.parametrize("s", [0, 1])
@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
def test_a_stock_cache_with_as_many_layers_is_not_taken_for_ours(kind, s):
    """Made for a model that has as many layers as ours has layers, windows and carries."""
    model = tiny_model(plt_num_loops=2, plt_offset=s)
    other = tiny_config(num_hidden_layers=4 + s)
    cache = DynamicCache(config=other) if kind is DynamicCache else StaticCache(other, max_cache_len=20)
    ids = random_ids(2, 12)
    torch.testing.assert_close(fed(model, ids, cache), model(ids).logits, **EXACT)


@pytest.mark.parametrize("max_cache_len", [None, 16])
@pytest.mark.parametrize(("made", "used"), [(3, 2), (2, 3), (1, 2), (2, 1)])
def test_an_empty_cache_serves_any_loop_count(made, used, max_cache_len):
    model = tiny_model(plt_num_loops=used)
    ids = random_ids(2, 12)
    cache = make_cache(model.config, made, max_cache_len)
    torch.testing.assert_close(fed(model, ids, cache), model(ids).logits, **EXACT)


@pytest.mark.parametrize("s", [0, 1])
@pytest.mark.parametrize("made", [1, 2, 3])
def test_a_used_cache_says_what_it_was_made_for(made, s):
    """From its first token on."""
    model = tiny_model(plt_num_loops=made, plt_offset=s, num_hidden_layers=3)
    cache = model(random_ids(1, 1)).past_key_values
    for other in {1, 2, 3} - {made}:
        with pytest.raises(ValueError, match=f"filled with num_loops={made} and cannot be continued with num_loops={other}"):
            model(random_ids(1, 1), past_key_values=cache, num_loops=other)


def test_a_used_cache_of_another_model_says_how_many_layers_it_has():
    model = tiny_model(plt_num_loops=2, num_hidden_layers=3)
    cache = DynamicCache(config=tiny_config(num_hidden_layers=5))
    for layer in range(5):
        cache.update(torch.zeros(1, 2, 1, 8), torch.zeros(1, 2, 1, 8), layer)
    with pytest.raises(ValueError, match="has 5 layers and cannot be continued with num_loops=2"):
        model(random_ids(1, 1), past_key_values=cache)


@pytest.mark.parametrize("R", [1, 3])
def test_a_static_cache_stays_where_it_is(R):
    """Compiled steps hold its addresses, over steps and over resets."""
    model = tiny_model(plt_num_loops=R)
    cache = make_cache(model.config, max_cache_len=16)
    fed(model, random_ids(2, 9), cache)
    before = addresses(cache)
    cache.reset()
    fed(model, random_ids(2, 9), cache)
    assert addresses(cache) == before


@pytest.mark.parametrize(("R", "kind"), [(1, "made"), (1, "dynamic"), (3, "made"), (3, "dynamic"), (3, "static")])
def test_rows_of_a_cache_before_and_after_it_is_used(R, kind):
    """An unused cache has no rows to repeat; a used one knows how many it has."""
    model = tiny_model(plt_num_loops=R)
    cache = {
        "made": lambda: make_cache(model.config, max_cache_len=20),
        "dynamic": lambda: DynamicCache(),
        "static": lambda: StaticCache(model.config, max_cache_len=20),
    }[kind]()
    if kind == "made":
        cache.batch_repeat_interleave(3)
        cache.batch_select_indices(torch.tensor([0]))
    ids = random_ids(2, 9)
    fed(model, ids, cache)
    cache.batch_repeat_interleave(3)
    cache.batch_select_indices(torch.tensor([5, 0, 3, 3, 2]))
    assert all(state.shape[0] == 5 for layer in cache.layers for state in getattr(layer, "conv_states", {}).values())
    if kind != "dynamic":  # growing layers do not say
        assert cache.batch_size == 5
    more = random_ids(5, 1, seed=1)
    rows = ids[[1, 0, 1, 1, 0]]
    with torch.no_grad():
        step = model(more, past_key_values=cache).logits
        torch.testing.assert_close(step, model(torch.cat((rows, more), dim=1)).logits[:, -1:], **EXACT)
