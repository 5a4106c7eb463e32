"""What a call accepts and gives back, as any causal language model of transformers."""

import pytest
import torch
import torch.nn.functional as F
from accelerate import dispatch_model, infer_auto_device_map
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from parloop import PLTForCausalLM, cache_bytes, make_cache
from tests.helpers.models import random_ids, tiny_model

EXACT = {"atol": 1e-10, "rtol": 0}


def test_ids_or_embeddings_but_not_both():
    model, ids = tiny_model(), random_ids(1, 5)
    e = model.get_input_embeddings()(ids)
    with torch.no_grad():
        assert torch.equal(model(inputs_embeds=e).logits, model(ids).logits)
    for inputs in ({}, {"input_ids": ids, "inputs_embeds": e}):
        with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
            model(**inputs)


def test_the_loss_is_of_the_next_tokens_that_are_targets():
    model, ids = tiny_model(), random_ids(2, 9)
    labels = ids.clone()
    labels[0, 3:5], labels[1, :8] = -100, -100
    with torch.no_grad():
        output = model(ids, labels=labels)
        terms = F.cross_entropy(
            output.logits[:, :-1].transpose(1, 2).float(), labels[:, 1:], reduction="none", ignore_index=-100
        )
        assert output.logits.shape == (2, 9, 61)
        assert model(ids).loss is None
        n = (labels[:, 1:] != -100).sum()
        assert output.loss.item() == pytest.approx((terms.sum() / n).item(), rel=1e-5)
        # a trainer that accumulates gradients says how many targets there are in all
        assert model(ids, labels=labels, num_items_in_batch=50).loss.item() == pytest.approx(
            (terms.sum() / 50).item(), rel=1e-5
        )


@pytest.mark.parametrize("keep", [1, 4, torch.tensor([2, 7]), torch.tensor([0])], ids=str)
@pytest.mark.parametrize("exact_tail", [True, False])
def test_logits_to_keep(keep, exact_tail):
    model, ids = tiny_model(plt_num_loops=3), random_ids(2, 30)
    with torch.no_grad():
        whole = model(ids, output_loop_logits=True)
        some = model(ids, logits_to_keep=keep, exact_tail=exact_tail)
        each = model(ids, logits_to_keep=keep, exact_tail=exact_tail, output_loop_logits=True)
    at = slice(-keep, None) if isinstance(keep, int) else keep
    torch.testing.assert_close(some.logits, whole.logits[:, at], **EXACT)
    assert some.loop_logits is None
    for got, expected in zip(each.loop_logits, whole.loop_logits, strict=True):
        torch.testing.assert_close(got, expected[:, at], **EXACT)
    assert whole.loop_logits[-1] is whole.logits


def test_a_cache_is_made_unless_it_is_not_wanted():
    model, ids = tiny_model(), random_ids(1, 5)
    with torch.no_grad():
        assert model(ids).past_key_values.get_seq_length() == 5
        assert model(ids, use_cache=False).past_key_values is None
        model.config.use_cache = False
        assert model(ids).past_key_values is None
        assert model(ids, use_cache=True).past_key_values.get_seq_length() == 5
        given = make_cache(model.config)
        assert model(ids, past_key_values=given).past_key_values is given


def test_a_cache_that_is_made_serves_the_calls_loop_count():
    model, ids = tiny_model(plt_num_loops=2, plt_trained_loops=[1, 2, 3]), random_ids(1, 9)
    with torch.no_grad():
        for n in (1, 2, 3):
            cache = model(ids[:, :8], num_loops=n).past_key_values
            step = model(ids[:, 8:], num_loops=n, past_key_values=cache).logits
            torch.testing.assert_close(step, model(ids, num_loops=n).logits[:, 8:], **EXACT)


def test_as_a_tuple():
    model, ids = tiny_model(), random_ids(1, 5)
    with torch.no_grad():
        named = model(ids, labels=ids)
        loss, logits, *_ = model(ids, labels=ids, return_dict=False)
    assert torch.equal(loss, named.loss)
    assert torch.equal(logits, named.logits)


@pytest.mark.parametrize("where", ["call", "configuration"])
def test_hidden_states_of_a_step(where):
    """A step that is inspected goes loop by loop: an entry for each visited layer, and the same logits as one pass."""
    model, ids = tiny_model(plt_num_loops=3, attn="eager"), random_ids(2, 9)
    call = {"output_hidden_states": True} if where == "call" else {}
    with torch.no_grad():
        whole = model(ids, output_hidden_states=True)
        cache = make_cache(model.config)
        model(ids[:, :8], past_key_values=cache)
        model.config.output_hidden_states = where == "configuration"
        step = model(ids[:, 8:], past_key_values=cache, **call)
    torch.testing.assert_close(step.logits, whole.logits[:, 8:], **EXACT)
    for got, expected in zip(step.hidden_states, whole.hidden_states, strict=True):
        torch.testing.assert_close(got, expected[:, 8:], **EXACT)


def test_gates_that_a_checkpoint_lacks_are_an_even_blend(tmp_path):
    """A model without loops read with two: what is missing is initialised, not left as memory was."""
    tiny_model(plt_num_loops=1, dtype=torch.float32).save_pretrained(tmp_path)
    for name in ("plt_gate.weight", "plt_gate.bias"):
        model, report = AutoModelForCausalLM.from_pretrained(tmp_path, plt_num_loops=2, output_loading_info=True)
        assert {key.split("self_attn.")[1] for key in report["missing_keys"]} == {
            "plt_gate.weight", "plt_gate.bias", "plt_gate.gate_norm.weight",
        }  # fmt: skip
        for layer in model.model.layers:
            assert not layer.self_attn.get_parameter(name).any()
            assert (layer.self_attn.plt_gate.gate_norm.weight == 1).all()


def test_initialising_again_closes_nothing():
    model = tiny_model()
    for module in model.modules():
        module._is_hf_initialized = False
    for p in model.parameters():
        p._is_hf_initialized = False
    model.init_weights()
    for layer in model.model.layers:
        assert not layer.self_attn.plt_gate.weight.any()
        assert not layer.self_attn.plt_gate.bias.any()
    assert model.lm_head.weight.std().item() == pytest.approx(0.02, rel=0.2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_frequencies_survive_casts_and_moves(dtype):
    model = tiny_model(dtype=torch.float32)
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    assert {name.split(".")[-1] for name in buffers} >= {"inv_freq"}
    for changed in (model.to(dtype), model.to("cpu"), model.float()):
        for name, buffer in changed.named_buffers():
            assert buffer.dtype == torch.float32
            assert torch.equal(buffer, buffers[name])
    assert model.to(dtype).lm_head.weight.dtype == dtype


def test_a_model_without_memory_gets_some():
    with torch.device("meta"):
        model = PLTForCausalLM(tiny_model().config)
    model.to(torch.bfloat16)
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    model.to_empty(device="cpu")
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


def test_only_gates_may_be_left_over(tmp_path):
    """Of a looped checkpoint that is read with one loop: a name that nobody knows is reported."""
    tiny_model(plt_num_loops=2, dtype=torch.float32).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.layers.7.self_attn.q_proj.weight"] = weights["model.layers.0.self_attn.q_proj.weight"].clone()
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    _, report = AutoModelForCausalLM.from_pretrained(tmp_path, plt_num_loops=1, output_loading_info=True)
    assert report["unexpected_keys"] == {"model.layers.7.self_attn.q_proj.weight"}


@pytest.mark.parametrize("max_cache_len", [None, 16])
def test_bytes_of_a_cache(max_cache_len):
    """None before it is used; a static one holds its slots, with w + 1 of them in a window."""
    model = tiny_model(plt_num_loops=3, plt_window_size=[4, 0])
    cache = make_cache(model.config, max_cache_len=max_cache_len)
    assert cache_bytes(cache) == {"full": 0, "window": 0, "carry": 0}
    with torch.no_grad():
        model(random_ids(2, 9), past_key_values=cache)
    full, window = (9, 4) if max_cache_len is None else (16, 5)
    row = 2 * 2 * 2 * 8 * 8  # keys and values of 2 rows, 2 heads of 8 float64
    assert cache_bytes(cache) == {"full": 2 * full * row, "window": 2 * 2 * window * row, "carry": 2 * 2 * 32 * 8}


def test_a_layer_is_never_split_over_devices(tmp_path):
    """By device_map="auto"; here the second of two layers does not fit into memory, and is read from disk at each visit."""
    model = tiny_model(plt_num_loops=3, dtype=torch.float32)
    ids = random_ids(2, 12)
    with torch.no_grad():
        expected = model(ids).logits
        embedding, layer = (
            sum(p.nbytes for p in part.parameters()) for part in (model.model.embed_tokens, model.model.layers[0])
        )
        space = {"cpu": embedding + 2 * layer, "disk": 10**9}
        places = infer_auto_device_map(model, max_memory=space, no_split_module_classes=model._no_split_modules)
        assert (places["model.layers.0"], places["model.layers.1"]) == ("cpu", "disk")
        skipped = model._skip_keys_device_placement
        model = dispatch_model(model, places, main_device="cpu", offload_dir=tmp_path, skip_keys=skipped)
        torch.testing.assert_close(model(ids).logits, expected)
        cache = make_cache(model.config)
        model(ids[:, :8], past_key_values=cache)
        torch.testing.assert_close(model(ids[:, 8:9], past_key_values=cache).logits, expected[:, 8:9], atol=1e-5, rtol=1e-4)
