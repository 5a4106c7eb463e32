"""Exact tail prefill: loops 2..R on the end of a prompt only, and yet the same logits, the same cache, the same text."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from parloop import make_cache
from tests.helpers.decoding import GREEDY, recomputed, reference, steps
from tests.helpers.flash import flash_contract  # noqa: F401  (registers "contract", FlashAttention as documented)
from tests.helpers.models import left_padded, random_ids, shape, tiny_model

EXACT = {"atol": 1e-10, "rtol": 0}


def rows_by_dependency(R, w, L, T, n=1):
    """For loops 2..R: on how many of T tokens each layer must run. Follows every arrow back from what is needed: loop R's last
    n states, and for the next token each layer's last w keys and each loop's last state."""
    last, rows, outputs = T - 1, [], set(range(max(0, T - n), T))
    for r in range(R, 1, -1):
        if r < R:
            outputs.add(last)  # the carry
        for _ in range(L):
            outputs = {s for t in outputs for s in range(t - w, t + 1)} | set(range(T - w, T))
            outputs = {t for t in outputs if t >= 0}
            rows.append(len(outputs))
        outputs = {t - 1 for t in outputs if t > 0}  # the shift
    return rows[::-1]


class Rows:
    """Tokens that went through each linear layer, summed over the layers of the stack: loop 1's, and all others'."""

    def __init__(self, model):
        self.model, self.calls = model, []
        for module in model.model.modules():
            if isinstance(module, torch.nn.Linear):
                module.register_forward_hook(lambda m, inputs, _: self.calls.append(inputs[0].shape[1]))

    def take(self, T):
        total, one_loop = sum(self.calls), 7 * self.model.config.num_hidden_layers * T
        self.calls.clear()
        return total - one_loop


@pytest.mark.parametrize("L", [1, 2, 3])
@pytest.mark.parametrize("w", [0, 1, 3, 8])
@pytest.mark.parametrize("R", [1, 2, 3, 4])
def test_the_tail_is_exact(R, w, L):
    """Prompts shorter than the tail, one token longer, and much longer; the last n logits and ten further steps."""
    model = tiny_model(**shape(R, w, L))
    longest = 1 + (R - 1) * (L * w + 1)
    for T, n, room in ((2, 1, None), (longest, 2, longest + 40), (longest + 1, 1, None), (longest + 20, 5, longest + 40)):
        ids = random_ids(1, T + 10, seed=T)
        expected = reference(model, ids[0])
        with torch.no_grad():
            cache = make_cache(model.config, max_cache_len=room)
            logits = model(ids[:, :T], past_key_values=cache, logits_to_keep=n).logits
            torch.testing.assert_close(logits[0], expected[max(0, T - n) : T], **EXACT)
            torch.testing.assert_close(steps(model, ids, cache, T)[0], expected[T:], **EXACT)
            whole = model(ids[:, :T], logits_to_keep=n, exact_tail=False).logits
            torch.testing.assert_close(logits, whole, **EXACT)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize(("R", "w", "L"), [(2, 3, 2), (3, 4, 3), (4, 1, 1), (3, 0, 2)])
def test_the_cache_is_the_same(R, w, L, static):
    """Not only its consequences: every window, every carry, every length."""
    model, ids = tiny_model(**shape(R, w, L)), random_ids(2, 50)
    caches = [make_cache(model.config, max_cache_len=64 if static else None) for _ in range(2)]
    with torch.no_grad():
        model(ids, past_key_values=caches[0], logits_to_keep=1)
        model(ids, past_key_values=caches[1])
    for got, expected in zip(caches[0].layers, caches[1].layers):
        if hasattr(expected, "conv_states"):
            torch.testing.assert_close(got.conv_states[0], expected.conv_states[0], **EXACT)
        elif expected.keys is not None:
            assert got.get_seq_length() == expected.get_seq_length() == 50
            torch.testing.assert_close(got.keys, expected.keys, **EXACT)
            torch.testing.assert_close(got.values, expected.values, **EXACT)


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize(("R", "w", "L"), [(1, 3, 2), (2, 3, 2), (3, 4, 3), (4, 1, 2), (4, 0, 3), (2, 8, 1)])
def test_only_what_is_needed_is_computed(R, w, L, n):
    model = tiny_model(**shape(R, w, L))
    rows = Rows(model)
    for T in (2, 9, 30, 100):
        with torch.no_grad():
            model(random_ids(1, T), logits_to_keep=n)
            assert rows.take(T) == 7 * sum(rows_by_dependency(R, w, L, T, n))
            model(random_ids(1, T), logits_to_keep=n, exact_tail=False)
            assert rows.take(T) == 7 * L * (R - 1) * T
    # long prompts: w tokens less from layer to layer, L * w + 1 more from loop to loop
    formula = [n + (R - r) * (L * w + 1) + (L - i) * w for r in range(2, R + 1) for i in range(L)]
    assert rows_by_dependency(R, w, L, 100, n) == formula


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("size", [1, 4, 7, 100])
@pytest.mark.parametrize(("R", "w", "L"), [(2, 3, 2), (3, 2, 2), (2, 8, 2), (3, 0, 2)])
def test_prefill_in_chunks(R, w, L, size, cache):
    model = tiny_model(**shape(R, w, L))
    ids = random_ids(2, 33)
    options = {**GREEDY, "cache_implementation": cache, "prefill_chunk_size": size}
    assert model.generate(ids, **options).tolist() == recomputed(model, ids).tolist()


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_early_chunks_run_loop_1_only(cache):
    R, w, L, T = 3, 2, 2, 40
    model, ids = tiny_model(**shape(R, w, L)), random_ids(1, T)
    needed = 7 * sum(rows_by_dependency(R, w, L, T))
    rows, extra = Rows(model), []

    def count(module, args, kwargs, output):
        extra.append(rows.take(kwargs["input_ids"].shape[1]))

    model.register_forward_hook(count, with_kwargs=True)
    options = {**GREEDY, "max_new_tokens": 1, "cache_implementation": cache}
    model.generate(ids, prefill_chunk_size=6, **options)
    assert extra[:4] == [0] * 4  # the tail is 11 tokens
    assert extra[-2] > 0
    assert sum(extra) == needed  # nothing twice
    extra.clear()
    model.generate(ids, prefill_chunk_size=6, exact_tail=False, **options)
    assert extra == [7 * L * (R - 1) * n for n in (6, 6, 6, 6, 6, 6, 4)]
    extra.clear()
    model.generate(ids, **options)
    assert extra == [needed]


@st.composite
def splits(draw):
    return draw(st.lists(st.integers(1, 14), min_size=1, max_size=8))


@settings(max_examples=120, deadline=None)
@given(
    pieces=splits(),
    R=st.integers(1, 4),
    w=st.sampled_from([0, 1, 3, 8]),
    L=st.integers(1, 3),
    announced=st.booleans(),
    static=st.booleans(),
    one_pass=st.booleans(),
    norm=st.booleans(),
    attn=st.sampled_from(["sdpa", "eager", "contract"]),
)
def test_random_splits(pieces, R, w, L, announced, static, one_pass, norm, attn):
    """Every chunk with its own tail: every chunk's last logits. Every chunk told how long the prompt is: the prompt's."""
    if attn == "contract":
        static = False  # the contract knows no empty slots
    model = tiny_model(attn=attn, plt_normalize_per_loop=norm, **shape(R, w, L))
    T = sum(pieces)
    ids = random_ids(1, T + 4, seed=T)
    expected = reference(model, ids[0])
    cache = make_cache(model.config, max_cache_len=T + 4 if static else None)
    call = {"past_key_values": cache, "logits_to_keep": 1, "one_pass": one_pass}
    with torch.no_grad():
        done = 0
        for n in pieces:
            output = model(ids[:, done : done + n], prompt_tokens=T if announced else 0, **call)
            done += n
            if done == T or not announced:
                torch.testing.assert_close(output.logits[0, 0], expected[done - 1], **EXACT)
            else:
                assert output.logits.shape[1] == 0
        torch.testing.assert_close(steps(model, ids, cache, T)[0], expected[T:], **EXACT)


@settings(max_examples=80, deadline=None)
@given(
    pieces=splits(),
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=3),
    R=st.integers(2, 3),
    announced=st.booleans(),
    static=st.booleans(),
    attn=st.sampled_from(["sdpa", "eager", "contract"]),
)
def test_random_splits_of_left_padded_batches(pieces, lengths, R, announced, static, attn):
    if attn == "contract":
        static = False
    T = sum(pieces)
    rows = [random_ids(min(n, T), seed=n) for n in (*lengths, T)]
    ids, mask = left_padded(rows)
    model = tiny_model(attn=attn, **shape(R, 3, 2))
    cache, done = make_cache(model.config, max_cache_len=T + 3 if static else None), 0
    following = random_ids(len(rows), 3)
    mask = torch.nn.functional.pad(mask, (0, 3), value=1)
    with torch.no_grad():
        for n in pieces:
            call = {"past_key_values": cache, "logits_to_keep": 1, "prompt_tokens": T if announced else 0}
            logits = model(ids[:, done : done + n], attention_mask=mask[:, : done + n], **call).logits
            done += n
        logits = [logits]
        for t in range(3):
            step = model(following[:, t : t + 1], attention_mask=mask[:, : T + t + 1], past_key_values=cache)
            logits.append(step.logits)
    logits = torch.cat(logits, dim=1)
    for row, after, got in zip(rows, following, logits):
        torch.testing.assert_close(got, reference(model, torch.cat((row, after)))[len(row) - 1 :], **EXACT)


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}])
@pytest.mark.parametrize("size", [None, 1, 6])
def test_generate_left_padded(options, size):
    model = tiny_model(**shape(3, 2, 2))
    rows = [random_ids(n, seed=n) for n in (1, 5, 40)]
    ids, mask = left_padded(rows)
    output = model.generate(ids, attention_mask=mask, prefill_chunk_size=size, **GREEDY, **options)
    for row, tokens in zip(rows, output):
        assert tokens[40:].tolist() == recomputed(model, row[None])[0, len(row) :].tolist()


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("w", [0, 2, 8])
@pytest.mark.parametrize(("first", "second"), [(40, 3), (40, 12), (40, 60), (2, 12), (1, 30)])
def test_a_second_prompt_on_a_used_cache(first, second, w, static):
    """The windows of the first prompt are read where the tail reaches them, and forgotten where it does not."""
    model = tiny_model(**shape(3, w, 2))
    ids = random_ids(1, first + second + 10)
    expected = reference(model, ids[0])
    for pieces in ([second], [second // 3] * 3):
        cache = make_cache(model.config, max_cache_len=120 if static else None)
        done = first
        with torch.no_grad():
            model(ids[:, :first], past_key_values=cache, logits_to_keep=1)
            for n in pieces:
                call = {"past_key_values": cache, "logits_to_keep": 1, "prompt_tokens": first + second}
                logits = model(ids[:, done : done + n], **call).logits
                done += n
            torch.testing.assert_close(logits[0, 0], expected[done - 1], **EXACT)
            torch.testing.assert_close(steps(model, ids, cache, done)[0], expected[done:], **EXACT)


@pytest.mark.parametrize("size", [None, 5])
@pytest.mark.parametrize("left", [0, 3])
def test_continuing_a_conversation(size, left):
    model = tiny_model(**shape(3, 2, 2))
    texts, mask = [random_ids(1, 20), random_ids(1, 45, seed=5)], None
    if left:
        texts[0][:, :left] = 0
        mask = torch.cat((torch.zeros(1, left), torch.ones(1, 20 + 12 + 45 - left)), dim=1).long()
    options = {**GREEDY, "prefill_chunk_size": size, "return_dict_in_generate": True}
    first = model.generate(texts[0], attention_mask=None if mask is None else mask[:, :20], **options)
    longer = torch.cat((first.sequences, texts[1]), dim=1)
    alone = recomputed(model, longer[:, left:], 12)
    rows = Rows(model)
    full = torch.ones_like(longer) if mask is None else mask
    for ids in (longer, longer[:, 31:]):  # the whole text, or the tokens that are not cached
        past = copy.deepcopy(first.past_key_values)
        second = model.generate(ids, attention_mask=full, past_key_values=past, **options)
        assert second.sequences[0, -12:].tolist() == alone[0, -12:].tolist()
        assert rows.take(46 + 11) == 7 * (sum(rows_by_dependency(3, 2, 2, 46)) + 11 * 2 * 2)


@pytest.mark.parametrize("R", [2, 3])
def test_assisted_and_beam_decoding(R):
    model = tiny_model(**shape(R, 2, 2))
    ids = random_ids(1, 5).repeat(1, 8)
    looked_up = model.generate(ids, prompt_lookup_num_tokens=4, **{**GREEDY, "max_new_tokens": 30})
    assert looked_up.tolist() == recomputed(model, ids, 30).tolist()
    ids = random_ids(2, 40)
    beams = {**GREEDY, "num_beams": 3, "num_return_sequences": 2, "return_dict_in_generate": True, "output_scores": True}
    expected = model.generate(ids, exact_tail=False, **beams)
    for size in (None, 6):
        got = model.generate(ids, prefill_chunk_size=size, **beams)
        assert got.sequences.tolist() == expected.sequences.tolist()
        torch.testing.assert_close(got.sequences_scores, expected.sequences_scores)


def test_a_cache_that_will_be_cropped_is_complete():
    """Rejected tokens are cropped from windows and carries, which must hold more than the tail's."""
    model = tiny_model(**shape(3, 2, 2))
    ids = random_ids(1, 40)
    cache = make_cache(model.config)
    cache.activate_past_recording()
    with torch.no_grad():
        model(ids, past_key_values=cache, logits_to_keep=1)
        cache.crop(-30)
        got = model(ids[:, 10:], past_key_values=cache).logits[0]
    torch.testing.assert_close(got, reference(model, ids[0])[10:], **EXACT)


WHOLE = {
    "switched off": {"exact_tail": False},
    "loop states": {"output_loop_states": True},
    "loop logits": {"output_loop_logits": True},
    "hidden states": {"output_hidden_states": True},
    "attentions": {"output_attentions": True},
    "no cache": {"use_cache": False},
    "positions by index": {"logits_to_keep": torch.tensor([3, 29])},
    "all logits": {"logits_to_keep": 0},
    "labels": {"labels": random_ids(1, 1)},
}


@pytest.mark.parametrize("why", WHOLE)
def test_what_asks_for_more_gets_everything(why):
    model = tiny_model(attn="eager", **shape(3, 1, 2))
    rows, ids = Rows(model), random_ids(1, 30)
    with torch.no_grad():
        output = model(ids, **({"logits_to_keep": 1} | WHOLE[why]))
    assert rows.take(30) == 7 * 2 * 2 * 30
    for states in (output.loop_states, output.hidden_states):
        assert states is None or all(state.shape[1] == 30 for state in states)
    assert output.attentions is None or all(weights.shape[2:] == (30, 30) for weights in output.attentions)


@pytest.mark.parametrize("flag", ["output_hidden_states", "output_attentions"])
def test_what_the_configuration_asks_for(flag):
    model = tiny_model(attn="eager", **shape(2, 1, 2))
    setattr(model.config, flag, True)
    with torch.no_grad():
        recorded = model(random_ids(1, 30), logits_to_keep=1)[flag.removeprefix("output_")]
    assert [x.shape[-2] for x in recorded] == [30] * len(recorded)


def test_gradients_of_the_last_logits_are_whole():
    model = tiny_model(**shape(3, 1, 2))
    rows, ids = Rows(model), random_ids(1, 30)
    gradients = []
    for exact_tail in (True, False):
        model.zero_grad()
        model(ids, logits_to_keep=1, exact_tail=exact_tail).logits.square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
        assert rows.take(30) == 7 * 2 * 2 * 30
    assert all(torch.equal(a, b) for a, b in zip(*gradients))
    with torch.no_grad():
        model.train()(ids, logits_to_keep=1, past_key_values=make_cache(model.config))
    assert rows.take(30) == 7 * 2 * 2 * 30


def test_loop_states_by_default():
    """All of them, unless only the last logits are asked for; whatever the length of the prompt."""
    model = tiny_model(**shape(3, 1, 2))
    with torch.no_grad():
        for T in (2, 30):
            ids = random_ids(1, T)
            assert [state.shape for state in model(ids).loop_states] == [(1, T, 32)] * 3
            assert model(ids, logits_to_keep=1).loop_states is None
            assert len(model(ids, logits_to_keep=1, output_loop_states=True).loop_states) == 3
            assert len(model(ids, logits_to_keep=1, exact_tail=False).loop_states) == 3
            assert model.model(ids, states_to_keep=2).last_hidden_state.shape == (1, 2, 32)


def test_a_prompt_cache_needs_no_states():
    """states_to_keep=0: only the cache, to go on from."""
    model = tiny_model(**shape(3, 2, 2))
    ids = random_ids(1, 50)
    rows, cache = Rows(model), make_cache(model.config)
    with torch.no_grad():
        assert model.model(ids[:, :40], past_key_values=cache, states_to_keep=0).last_hidden_state.shape == (1, 0, 32)
        assert rows.take(40) == 7 * sum(rows_by_dependency(3, 2, 2, 40, 0))
        got = model(ids[:, 40:], past_key_values=copy.deepcopy(cache)).logits[0]
    torch.testing.assert_close(got, reference(model, ids[0])[40:], **EXACT)


@pytest.mark.slow
def test_flex_attention_runs_on_everything():
    """It compiles a kernel for every shape, and a tail has another one in every layer."""
    model, ids = tiny_model(dtype=torch.float32, head_dim=16, **shape(2, 4, 2)), random_ids(1, 40)
    rows = Rows(model)
    with torch.no_grad():
        expected = model(ids, logits_to_keep=1).logits
        assert rows.take(40) == 7 * sum(rows_by_dependency(2, 4, 2, 40))
        model.set_attn_implementation("flex_attention")
        torch.testing.assert_close(model(ids, logits_to_keep=1).logits, expected, atol=1e-4, rtol=1e-4)
    assert rows.take(40) == 7 * 2 * 40


def test_masks_of_a_compiled_step_do_not_grow():
    """The masks of a prompt hold its padding, for the tail's; those of a step have the same shapes in every step."""
    model = tiny_model(**shape(2, 3, 2))
    ids, mask = left_padded([random_ids(n, seed=n) for n in (4, 12)])
    cache, shapes = make_cache(model.config, max_cache_len=16), []
    with torch.no_grad():
        model(ids[:, :10], attention_mask=mask[:, :10], past_key_values=cache, logits_to_keep=1)
        for t in (10, 11):
            call = {"next_sequence_length": 1, "attention_mask": mask[:, : t + 1], "past_key_values": cache}
            inputs = model.prepare_inputs_for_generation(ids[:, : t + 1], use_cache=True, **call)
            shapes.append({name: None if m is None else m.shape for name, m in inputs["attention_mask"].items()})
            model(**inputs)
    assert shapes[0] == shapes[1]
