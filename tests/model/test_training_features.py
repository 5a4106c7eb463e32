"""Gradients, gradient checkpointing, LoRA: what a trainer relies on."""

import copy

import pytest
import torch
from transformers import LlamaForCausalLM

from parloop.model.cache import PrefixCache
from tests.helpers.models import llama_config, random_ids, tiny_model


@pytest.mark.parametrize("offset", [0, 1, 2])
def test_gradcheck(offset):
    """The gradient of a toy, through every mechanism, against finite differences."""
    toy = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4}
    model = tiny_model(plt_num_loops=3, plt_offset=offset, **toy)
    names = [name for name, _ in model.named_parameters() if "embed" not in name]
    e = torch.randn(1, 6, 8, dtype=torch.float64, requires_grad=True)

    def logits(e, *values):
        call = {"inputs_embeds": e, "use_cache": False}
        return torch.func.functional_call(model, dict(zip(names, values)), kwargs=call).logits[..., :3]

    values = [model.get_parameter(name).detach().clone().requires_grad_() for name in names]
    assert torch.autograd.gradcheck(logits, (e, *values), fast_mode=True)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("R", [1, 3])
def test_gradient_checkpointing_changes_nothing_but_memory(R, use_reentrant):
    model = tiny_model(plt_num_loops=R).train()
    ids = random_ids(2, 40)

    def step():
        model.zero_grad()
        held = []

        def hold(tensor):
            held.append(tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
            loss = model(ids, labels=ids).loss
        held_bytes = sum(held)
        loss.backward()
        return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters()}, held_bytes

    loss, gradients, held = step()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    checkpointed_loss, checkpointed_gradients, checkpointed_held = step()
    assert checkpointed_loss == pytest.approx(loss, abs=1e-12)
    for name, gradient in gradients.items():
        torch.testing.assert_close(checkpointed_gradients[name], gradient, atol=1e-12, rtol=1e-9)
    assert checkpointed_held < held / 2


@pytest.mark.parametrize("layers", [False, True])
def test_loops_are_recomputed_whole(layers):
    """Alone, and with each layer recomputed within; the gradients are the same, and less is held."""
    ids = random_ids(2, 40)
    results = []
    for loops in (False, True):
        model = tiny_model(plt_num_loops=3).train()
        if layers and loops:
            model.activation_checkpointing_enable({"use_reentrant": False})
        model.model.checkpoint_loops = loops
        held = 0

        def hold(tensor):
            nonlocal held
            held += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
            loss = model(ids, labels=ids).loss
        loss.backward()
        results.append((loss.item(), {name: p.grad for name, p in model.named_parameters()}, held))
    (loss, gradients, held), (other_loss, other_gradients, other_held) = results
    assert other_loss == pytest.approx(loss, abs=1e-12)
    for name, gradient in gradients.items():
        torch.testing.assert_close(other_gradients[name], gradient, atol=1e-12, rtol=1e-9)
    assert other_held < held / 3


@pytest.fixture
def one_process_group():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


CHECKPOINTED = [(1, True, False), (2, False, False), (2, True, True), (3, None, False)]


@pytest.mark.parametrize(("R", "use_reentrant", "static_graph"), CHECKPOINTED)
def test_checkpointing_in_distributed_data_parallel(R, use_reentrant, static_graph, one_process_group):
    """All that works there gives the gradients of a plain model, two steps in a row."""
    ids = random_ids(2, 20)
    plain = tiny_model(plt_num_loops=R).train()
    plain(ids, labels=ids).loss.backward()
    model = tiny_model(plt_num_loops=R).train()
    model.activation_checkpointing_enable(None if use_reentrant is None else {"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    parallel = torch.nn.parallel.DistributedDataParallel(model, static_graph=static_graph)
    for _ in range(2):
        parallel.zero_grad()
        parallel(ids, labels=ids).loss.backward()
        for name, p in plain.named_parameters():
            torch.testing.assert_close(model.get_parameter(name).grad, p.grad, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("adapters", [False, True])
def test_reentrant_checkpointing_of_loops_in_distributed_data_parallel_is_refused(adapters, one_process_group):
    """DistributedDataParallel would fail in the backward pass, in terms of its own. Outside of it, and in evaluation, all is well."""
    from peft import LoraConfig, get_peft_model

    ids = random_ids(2, 20)
    model = tiny_model(plt_num_loops=2).train()
    if adapters:
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM"))
    model.activation_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    with pytest.raises(ValueError, match=r"a gradient per loop, 2 here.*'use_reentrant': False"):
        parallel(input_ids=ids, labels=ids)
    model(input_ids=ids, labels=ids).loss.backward()
    parallel.eval()
    parallel(input_ids=ids, labels=ids)


def test_loops_are_not_recomputed_where_nothing_is_learnt():
    model, visits = tiny_model(plt_num_loops=2), []
    model.model.layers[0].register_forward_hook(lambda *_: visits.append(1))
    expected = model(random_ids(1, 9)).logits
    model.model.checkpoint_loops = True
    assert torch.equal(model(random_ids(1, 9)).logits, expected)
    visits.clear()
    model(random_ids(1, 9), use_cache=False).logits.sum().backward()
    assert len(visits) == 2
    model.generate(random_ids(1, 9), max_new_tokens=3)


def test_loops_are_not_recomputed_where_a_cache_is_written():
    """It would be written twice. Through the cache, a learnt prefix gets the gradient that it gets without recomputation."""
    gradients = []
    for recomputed in (False, True):
        model = tiny_model(plt_num_loops=2).train()
        model.model.checkpoint_loops = recomputed
        keys = torch.ones(2, 1, 2, 5, 8, dtype=torch.float64, requires_grad=True)
        cache = PrefixCache([(keys[layer], keys[layer] * 2) for layer in range(2)])
        model(random_ids(1, 9), labels=random_ids(1, 9), past_key_values=cache).loss.backward()
        gradients.append(keys.grad)
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(*gradients, atol=1e-12, rtol=1e-9)


def test_masks_are_laid_out_once():
    """What the backward pass keeps of masks does not grow with layers or loops."""

    def kept(layers, loops):
        model = tiny_model(plt_num_loops=loops, num_hidden_layers=layers).train()
        positions = torch.arange(96).remainder(40)[None]
        sizes = {}

        def hold(tensor):
            if tensor.shape[-2:] == (96, 96):
                sizes[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
            model(random_ids(1, 96), position_ids=positions)
        return len(sizes)

    assert kept(1, 1) == kept(3, 1) == kept(3, 3) == 1


def test_training_mode_keeps_no_cache():
    model = tiny_model().train()
    assert model(random_ids(1, 4)).past_key_values is None


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("w", [0, 4, 40])
@pytest.mark.parametrize("R", [1, 2, 3])
def test_dropout_reaches_every_attention(R, w, attn):
    """Where all weights are dropped, global and local ones, a layer's attention gives nothing; without training, all of it."""
    model = tiny_model(attn=attn, attention_dropout=1.0, plt_num_loops=R, plt_window_size=[w, 0])
    plain = tiny_model(attn=attn, plt_num_loops=R, plt_window_size=[w, 0])
    with torch.no_grad():
        for T in (1, 50):
            ids = random_ids(2, T)
            attended = plain(ids).logits
            torch.testing.assert_close(model.eval()(ids).logits, attended, atol=1e-12, rtol=0)
            dropped = model.train()(ids).logits
            blind = copy.deepcopy(plain)
            for layer in blind.model.layers:
                layer.self_attn.o_proj.weight.zero_()
            torch.testing.assert_close(dropped, blind(ids).logits, atol=1e-12, rtol=0)
            assert (dropped - attended).abs().max() > 0.1


def test_dropout_of_one_loop_is_llamas():
    """The same weights are dropped for the same seed, and what is left is scaled alike."""
    model = tiny_model(attn="eager", dtype=torch.float32, attention_dropout=0.3, plt_num_loops=1).train()
    llama = LlamaForCausalLM(llama_config(model.config)).train()
    llama.load_state_dict(model.state_dict())
    llama.set_attn_implementation("eager")
    logits = []
    for either in (model, llama):
        torch.manual_seed(1)
        logits.append(either(random_ids(2, 20)).logits)
    torch.testing.assert_close(*logits, atol=2e-5, rtol=1e-4)


def test_lora_trains_saves_and_merges(tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    ids = random_ids(4, 20)
    model = get_peft_model(tiny_model(), LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(20):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3
    assert not any(p.requires_grad for name, p in model.named_parameters() if "lora_" not in name)

    model.eval()
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        loaded = PeftModel.from_pretrained(tiny_model(), tmp_path).eval()
        torch.testing.assert_close(loaded(input_ids=ids).logits, expected, atol=1e-10, rtol=0)
        merged = loaded.merge_and_unload()
        torch.testing.assert_close(merged(input_ids=ids).logits, expected, atol=1e-10, rtol=0)
        assert merged.generate(ids[:1], max_new_tokens=3, do_sample=False).shape == (1, 23)
