"""generate(): every decoding method gives what recomputing the whole text gives."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from parloop import cache_bytes, make_cache
from parloop.model.cache_argument import CACHE
from tests.helpers.decoding import GREEDY, recomputed
from tests.helpers.models import left_padded, random_ids, tiny_model


@pytest.mark.parametrize("R", [1, 2, 3, 4])
@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"one_pass": False}, {"prefill_chunk_size": 4}])
def test_greedy(R, options):
    model = tiny_model(plt_num_loops=R)
    ids = random_ids(2, 9)
    assert model.generate(ids, **GREEDY, **options).tolist() == recomputed(model, ids).tolist()


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"prefill_chunk_size": 7}])
def test_greedy_left_padded(options):
    model = tiny_model(plt_num_loops=3)
    rows = [random_ids(n, seed=n) for n in (1, 5, 20)]
    ids, mask = left_padded(rows)
    output = model.generate(ids, attention_mask=mask, **GREEDY, **options)
    for row, tokens in zip(rows, output):
        assert tokens[20:].tolist() == recomputed(model, row[None])[0, len(row) :].tolist()


@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_loop_dial(n, cache):
    model = tiny_model(plt_num_loops=2)
    ids = random_ids(1, 9)
    output = model.generate(ids, num_loops=n, cache_implementation=cache, **GREEDY)
    assert output.tolist() == recomputed(model, ids, num_loops=n).tolist()


@pytest.mark.parametrize("R", [1, 3])
def test_beam_search(R):
    model = tiny_model(plt_num_loops=R)
    ids = random_ids(2, 9)
    options = {**GREEDY, "num_beams": 3, "num_return_sequences": 2, "return_dict_in_generate": True, "output_scores": True}
    cached, plain = model.generate(ids, **options), model.generate(ids, use_cache=False, **options)
    assert cached.sequences.tolist() == plain.sequences.tolist()
    torch.testing.assert_close(cached.sequences_scores, plain.sequences_scores)


def test_several_samples_per_prompt():
    model = tiny_model(plt_num_loops=3)
    ids = random_ids(2, 9)
    options = {"do_sample": True, "num_return_sequences": 3, "max_new_tokens": 12, "eos_token_id": None}
    torch.manual_seed(1)
    cached = model.generate(ids, **options)
    torch.manual_seed(1)
    assert cached.tolist() == model.generate(ids, use_cache=False, **options).tolist()
    assert len({tuple(row) for row in cached.tolist()}) > 2


@pytest.mark.parametrize("w", [0, 2, 30])
@pytest.mark.parametrize("R", [1, 2, 3])
def test_assisted_decoding(R, w):
    """Prompt lookup proposes tokens, rejected ones are cropped out of full layers, windows and carries."""
    model = tiny_model(plt_num_loops=R, plt_window_size=[w, 0])
    ids = random_ids(1, 4).repeat(1, 5)
    options = {**GREEDY, "max_new_tokens": 30}
    assert model.generate(ids, prompt_lookup_num_tokens=4, **options).tolist() == recomputed(model, ids, 30).tolist()


@pytest.mark.parametrize(("w", "refused"), [(0, "Static cache"), (64, "Static cache"), (4, "Static cache|can be cropped")])
def test_assisted_decoding_on_a_static_cache(w, refused):
    """From transformers 5.24 on, if no window can lose a token that a rejected draft needs back; before, it is refused."""
    model = tiny_model(plt_window_size=[w, 0])
    ids, options = random_ids(1, 9), {"assistant_early_exit": 1, "cache_implementation": "static"}
    if CACHE == "cache" and w != 4:
        assert model.generate(ids, **options, **GREEDY).tolist() == recomputed(model, ids).tolist()
    else:
        with pytest.raises(ValueError, match=refused):
            model.generate(ids, **options, **GREEDY)


def test_a_draft_model():
    model, draft = tiny_model(plt_num_loops=3), tiny_model(plt_num_loops=2)
    ids = random_ids(1, 9)
    assert model.generate(ids, assistant_model=draft, **GREEDY).tolist() == recomputed(model, ids).tolist()


def test_continuing_a_conversation_on_a_returned_cache():
    model = tiny_model(plt_num_loops=3)
    ids = random_ids(1, 9)
    first = model.generate(ids, return_dict_in_generate=True, **GREEDY)
    longer = torch.cat((first.sequences, random_ids(1, 6, seed=5)), dim=1)
    second = model.generate(longer, past_key_values=first.past_key_values, **GREEDY)
    assert second.tolist() == recomputed(model, longer).tolist()


def test_a_prompt_cache_serves_many_continuations():
    model = tiny_model(plt_num_loops=3)
    prompt = random_ids(1, 9)
    cache = make_cache(model.config)
    with torch.no_grad():
        model(prompt, past_key_values=cache)
    for seed in (1, 2):
        ids = torch.cat((prompt, random_ids(1, 4, seed=seed)), dim=1)
        output = model.generate(ids, past_key_values=copy.deepcopy(cache), **GREEDY)
        assert output.tolist() == recomputed(model, ids).tolist()


def test_decode_steps_are_one_pass_over_the_weights():
    """Every linear layer is called once per new token, with one row per loop; with one_pass=False once per loop."""
    model = tiny_model(plt_num_loops=4)
    calls = []
    for module in model.model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda m, inputs, _: calls.append(tuple(inputs[0].shape)))
    cache = make_cache(model.config)
    linears = 7 * model.config.num_hidden_layers
    with torch.no_grad():
        model(random_ids(3, 9), past_key_values=cache)
        assert len(calls) == 4 * linears
        calls.clear()
        model(random_ids(3, 1), past_key_values=cache)
        assert len(calls) == linears
        assert {shape[:2] for shape in calls} == {(3, 4)}  # rows, not passes
        calls.clear()
        model(random_ids(3, 1), past_key_values=cache, one_pass=False)
        assert len(calls) == 4 * linears


def test_cache_holds_one_full_layer_and_windows():
    model = tiny_model(plt_num_loops=3, plt_window_size=[4, 0])
    output = model.generate(random_ids(2, 50), return_dict_in_generate=True, **GREEDY)
    B, G, K, L, R, w, D, size, S = 2, 2, 8, 2, 3, 4, 32, 8, 50 + 12 - 1
    assert cache_bytes(output.past_key_values) == {
        "full": B * 2 * L * S * G * K * size,
        "window": B * 2 * L * (R - 1) * w * G * K * size,
        "carry": B * (R - 1) * D * size,
    }


def test_loop_states_are_not_kept_while_generating():
    model = tiny_model()
    assert model.prepare_inputs_for_generation(random_ids(1, 4))["output_loop_states"] is False


def test_hidden_states_and_attentions():
    """Every visited layer in the order of computation: the embedding, then L entries per loop. Weights sum to one."""
    model = tiny_model(plt_num_loops=3, attn="eager")
    output = model(random_ids(2, 40), output_hidden_states=True, output_attentions=True)
    assert len(output.hidden_states) == 1 + 3 * 2
    assert len(output.attentions) == 3 * 2
    for weights in output.attentions:
        assert weights.shape == (2, 4, 40, 40)
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 40, dtype=torch.float64))
        assert weights.triu(1).abs().max() == 0
    step = model(random_ids(2, 1), past_key_values=output.past_key_values, output_attentions=True)
    assert [weights.shape[-1] for weights in step.attentions] == [41] * 6


def test_hidden_states_are_every_layers_output_loop_after_loop():
    """Entry 0 is the embedding, entry (r - 1) * L + n layer n's output of loop r before the final norm, and the last is after it:
    taken from the layers themselves."""
    L, R = 2, 3
    model = tiny_model(plt_num_loops=R, num_hidden_layers=L)
    ids, seen = random_ids(2, 9), []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda layer, args, output: seen.append(output[0]))
    with torch.no_grad():
        output = model(ids, output_hidden_states=True)
        states = output.hidden_states
        assert len(states) == 1 + L * R
        assert torch.equal(states[0], model.model.embed_tokens(ids))
        for entry, layer_output in zip(states[1:-1], seen[:-1]):
            assert torch.equal(entry, layer_output)
        for loop in range(R - 1):
            torch.testing.assert_close(model.model.norm(states[(loop + 1) * L]), output.loop_states[loop])
        assert torch.equal(states[-1], output.loop_states[-1])
        torch.testing.assert_close(states[-1], model.model.norm(seen[-1]))


@pytest.mark.parametrize("wanted", [-1, 6, [-1], [0, 3, -2]])
def test_hidden_states_are_chosen_by_number_over_all_loops(wanted):
    """Negative ones from the end of the last loop, not of the first."""
    model = tiny_model(plt_num_loops=3)
    ids = random_ids(2, 9)
    with torch.no_grad():
        states = model(ids, output_hidden_states=True).hidden_states
        chosen = model(ids, output_hidden_states=wanted).hidden_states
    numbers = {n % 7 for n in ([wanted] if isinstance(wanted, int) else wanted)}
    assert {n for n, state in enumerate(chosen) if state is not None} == numbers
    for n in numbers:
        assert torch.equal(chosen[n], states[n])


def test_hidden_states_cannot_be_chosen_by_number_at_another_loop_count():
    model = tiny_model(plt_num_loops=3, plt_trained_loops=[1, 3])
    refused = r"output_hidden_states=\[-1\] counts what 3 loops return, and this call has num_loops=1"
    with pytest.raises(ValueError, match=refused):
        model(random_ids(2, 9), num_loops=1, output_hidden_states=[-1])
    assert len(model(random_ids(2, 9), num_loops=1, output_hidden_states=True).hidden_states) == 1 + 2
    model.config.output_hidden_states = [-1]
    with pytest.raises(ValueError, match=refused):
        model(random_ids(2, 9), num_loops=1)


def test_hidden_states_of_generated_tokens():
    """One tuple per step, and all loops of every token in it."""
    model = tiny_model(plt_num_loops=3)
    ids = random_ids(2, 9)
    output = model.generate(ids, output_hidden_states=True, return_dict_in_generate=True, max_new_tokens=3, do_sample=False)
    whole = model(output.sequences[:, :-1], output_hidden_states=True).hidden_states
    assert [[tuple(state.shape[:2]) for state in step] for step in output.hidden_states] == [[(2, 9)] * 7] + [
        [(2, 1)] * 7
    ] * 2
    for n, expected in enumerate(whole):
        parts = torch.cat([step[n] for step in output.hidden_states], dim=1)
        torch.testing.assert_close(parts, expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("w", [0, 3, 50])
def test_attentions_of_later_loops_are_the_gated_mixture(w):
    """Multiplying the returned weights of a later loop with one-hot values gives back what the layer attended to."""
    model = tiny_model(plt_num_loops=2, attn="eager", plt_window_size=[w, 0], num_hidden_layers=1)
    ids = random_ids(1, 40)
    cache = make_cache(model.config)
    with torch.no_grad():
        whole = model(ids, output_attentions=True).attentions[1]
        model(ids[:, :25], past_key_values=cache)
        chunk = model(ids[:, 25:], past_key_values=cache, output_attentions=True).attentions[1]
    torch.testing.assert_close(chunk, whole[:, :, 25:], atol=1e-10, rtol=0)
    gate = model.model.layers[0].self_attn.plt_gate
    maps = []
    with torch.no_grad():
        gate.weight.zero_()
        for bias in (-1e9, 1e9, 0.5):
            gate.bias.fill_(bias)
            maps.append(model(ids, output_attentions=True).attentions[1])
    local, whole, mixed = maps
    assert (local[0, 0] > 0).sum(-1).tolist() == [min(t + 1, w + 1) for t in range(40)]
    torch.testing.assert_close(mixed, torch.lerp(local, whole, torch.tensor(0.5).sigmoid().double()))


def test_continuous_batching_is_refused():
    with pytest.raises(ValueError, match="left-padded batch instead"):
        tiny_model().generate_batch([[3, 4, 5]], max_new_tokens=2)


def test_generating_from_embeddings():
    model = tiny_model()
    ids = random_ids(1, 12)
    expected = model.generate(ids, max_new_tokens=8, do_sample=False)[:, 12:]
    got = model.generate(inputs_embeds=model.get_input_embeddings()(ids), max_new_tokens=8, do_sample=False)
    assert got.tolist() == expected.tolist()


class Products(TorchDispatchMode):
    """Sizes of what batched products read."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.bmm.default:
            self.sizes.append(max(args[0].numel(), args[1].numel()))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("loops", [1, 2, 3])
@torch.no_grad()
def test_the_head_of_a_frozen_model_is_not_copied(loops):
    """Of a state that is a slice torch would multiply a copy of the head: a decode step took ten times as long, and only at R > 1."""
    model = tiny_model(plt_num_loops=3).requires_grad_(False)
    head = model.lm_head.weight.numel()
    cache = make_cache(model.config, loops)
    for ids in (random_ids(1, 9), random_ids(1, 1)):
        with Products() as products:
            model(ids, past_key_values=cache, num_loops=loops, logits_to_keep=1)
        assert head not in products.sizes
