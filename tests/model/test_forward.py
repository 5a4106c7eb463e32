"""What a call accepts and gives back, as any causal language model of transformers."""

import importlib.util

import pytest
import torch
import torch.nn.functional as F
from accelerate import dispatch_model, infer_auto_device_map
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from safetensors.torch import load_file, save_file
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, CompileConfig

from parloop import PLTForCausalLM, PLTModel, cache_bytes, make_cache
from tests.helpers.models import random_ids, tiny_config, tiny_model

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
    assert isinstance(named.loop_states, tuple)


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


@pytest.mark.parametrize("offset", ["cpu", "lazy:0", "nowhere"])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_a_model_is_split_over_two_devices(attn, offset):
    """By device_map="auto": its hooks move what a part is called with to where the part is. Fake tensors have shapes and devices
    alone ("lazy:0" is the second one), and fail where two devices meet. A prompt, its tail, and steps."""
    with FakeTensorMode():
        config = tiny_config(plt_num_loops=3)
        with torch.device("lazy:0"):
            second = PLTForCausalLM(config)
        model = PLTForCausalLM(config)
        model.set_attn_implementation(attn)
        model.model.layers[1], model.model.norm, model.lm_head = second.model.layers[1], second.model.norm, second.lm_head
        model.eval()
        skipped = model._skip_keys_device_placement
        layers, places = model.model.layers, {"cpu": [], "lazy:0": [], "nowhere": []}
        places["cpu"] += [model.model.embed_tokens, model.model.rotary_emb, layers[0]]
        places["lazy:0"] += [layers[1], model.model.norm, model.lm_head]
        places[offset].append(model.model.offset)
        for device in ("cpu", "lazy:0"):
            for part in places[device]:
                add_hook_to_module(part, AlignDevicesHook(device, skip_keys=skipped))
        with torch.no_grad():
            for keep in (0, 1):
                cache = make_cache(config)
                ids = torch.zeros(2, 30, dtype=torch.long)
                assert model(ids, past_key_values=cache, logits_to_keep=keep).logits.shape[1] == (keep or 30)
                for one_pass in (True, True, False):
                    assert model(ids[:, :1], past_key_values=cache, one_pass=one_pass).logits.shape == (2, 1, 61)


def test_a_call_makes_its_tensors_where_its_inputs_are():
    """Such as positions and masks: on a device (see the test above) that is not the processor."""
    with FakeTensorMode(), torch.no_grad():
        with torch.device("lazy:0"):
            model = PLTForCausalLM(tiny_config(plt_num_loops=3)).eval()
            ids = torch.zeros(2, 40, dtype=torch.long)
        for attn in ("sdpa", "eager"):
            model.set_attn_implementation(attn)
            for call in ({"use_cache": False}, {}, {"logits_to_keep": 1}):
                assert model(ids, **call).logits.device == ids.device


def test_positions_begin_at_zero_and_go_on_where_a_cache_ends():
    model, ids, seen = tiny_model(), random_ids(1, 9), []
    model.model.rotary_emb.register_forward_pre_hook(lambda module, args: seen.append(args[1].tolist()))
    cache = make_cache(model.config)
    model(ids, use_cache=False)
    model(ids[:, :6], past_key_values=cache)
    model(ids[:, 6:], past_key_values=cache)
    assert seen == [[[*range(9)]], [[*range(6)]], [[6, 7, 8]]]


def test_the_stack_alone_begins_as_in_the_whole_model():
    """Initialised, one pass over the weights per step, and with the padding's embedding left at zero."""
    config = tiny_config(hidden_size=128, initializer_range=0.1)
    stack = PLTModel(config).eval()
    for name in ("q_proj", "o_proj"):
        assert stack.layers[0].self_attn.get_submodule(name).weight.std().item() == pytest.approx(0.1, rel=0.1)
    assert not stack.embed_tokens.weight[config.pad_token_id].any()
    assert stack.embed_tokens.weight[1:].std().item() == pytest.approx(0.1, rel=0.1)
    cache, passes = make_cache(config), []
    stack.layers[0].register_forward_hook(lambda *_: passes.append(1))
    stack(random_ids(1, 5), past_key_values=cache)
    assert len(passes) == 2
    stack(random_ids(1, 1), past_key_values=cache)
    assert len(passes) == 3


def test_padding_learns_nothing():
    model, ids = tiny_model().train(), random_ids(2, 9)
    ids[1, 6:] = model.config.pad_token_id
    model(ids, labels=ids).loss.backward()
    gradient = model.model.embed_tokens.weight.grad
    assert not gradient[model.config.pad_token_id].any()
    assert gradient[ids[0]].any(-1).all()


def test_a_model_without_loops_blends_evenly_where_it_is_looped():
    """It has no gates: as gates that are initialised, a number per token and head."""
    model = tiny_model(plt_num_loops=1, plt_trained_loops=[1, 2], attn="eager")
    attention = model.model.layers[0].self_attn
    g = attention.gate(torch.ones(2, 5, 32), torch.ones(2, 4, 5, 8))
    assert torch.equal(g, torch.full((2, 5, 4, 1), 0.5))
    output = model(random_ids(2, 5), num_loops=2, output_attentions=True)
    assert [weights.shape for weights in output.attentions] == [(2, 4, 5, 5)] * 4


def test_attention_weights_of_a_backend_that_gives_none():
    model, ids = tiny_model(attn="sdpa"), random_ids(2, 9)
    output = model(ids, output_attentions=True)
    assert not any(torch.is_tensor(weights) for weights in output.attentions or ())
    torch.testing.assert_close(output.logits, model(ids).logits, **EXACT)


@pytest.mark.parametrize("attn", ["eager", "sdpa", "flex_attention", "flash_attention_2"])
def test_backends_of_transformers_can_be_chosen(attn):
    """One whose package is missing is refused for that alone."""
    model = tiny_model()
    if attn == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
        with pytest.raises(ImportError, match="package for FlashAttention2"):
            model.set_attn_implementation(attn)
    else:
        model.set_attn_implementation(attn)
        assert model.config._attn_implementation == attn


def test_steps_with_a_static_cache_are_compiled(monkeypatch):
    """By generate(), on a GPU; here it is asked to on any device."""
    model, compiled = tiny_model(), []

    def compile(config):
        compiled.append(config)
        return model.__call__

    monkeypatch.setattr(model, "get_compiled_call", compile)
    everywhere = CompileConfig()
    everywhere._compile_all_devices = True
    options = {"max_new_tokens": 2, "cache_implementation": "static", "compile_config": everywhere}
    model.generate(random_ids(1, 5), **options)
    assert compiled


def test_what_other_libraries_read():
    """TRL's clone_chat_template the size of the vocabulary; PEFT and classifiers the stack below the head."""
    model = tiny_model()
    assert model.vocab_size == model.config.vocab_size
    assert model.base_model is model.model
    model.resize_token_embeddings(70)
    assert (model.vocab_size, model.lm_head.out_features) == (70, 70)
