"""The offset: shift by one token (the paper's), none, and two. What holds for the paper's holds for the others."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from parloop import PLTConfig, PLTForCausalLM, make_cache
from parloop.model.reference import reference_forward
from tests.helpers.decoding import EXACT, GREEDY, in_pieces, recomputed, reference, splits, steps
from tests.helpers.models import left_padded, random_ids, shape, tiny_config, tiny_model

OFFSETS = [0, 1, 2, 3]


@settings(max_examples=80, deadline=None)
@given(
    pieces=splits(),
    s=st.sampled_from([0, 2, 3]),
    R=st.integers(1, 4),
    w=st.sampled_from([0, 3, 40]),
    norm=st.booleans(),
    static=st.booleans(),
    exact_tail=st.booleans(),
)
def test_any_split_gives_the_equations(pieces, s, R, w, norm, static, exact_tail):
    model = tiny_model(plt_num_loops=R, plt_window_size=[w, 0], plt_normalize_per_loop=norm, plt_offset=s)
    ids = random_ids(1, sum(pieces))
    expected = reference(model, ids[0])
    options = {"logits_to_keep": 1, "exact_tail": exact_tail} if max(pieces) == 1 else {}
    with torch.no_grad():
        cache = make_cache(model.config, max_cache_len=32 if static else None)
        torch.testing.assert_close(in_pieces(model, ids, pieces, cache=cache, **options)[0], expected, **EXACT)


def test_offsets_differ():
    """Else the tests above compare the paper's scheme with itself."""
    ids = random_ids(1, 12)
    logits = [tiny_model(plt_offset=s, plt_num_loops=3)(ids).logits for s in OFFSETS]
    for s in (1, 2, 3):
        assert not torch.allclose(logits[s], logits[s - 1], atol=1e-3)


def test_without_offset_a_loop_reads_the_tokens_own_state():
    """The last token's own embedding reaches the second loop through its state: by hand, a E + c h_1."""
    model = tiny_model(plt_offset=0)
    ids = random_ids(1, 6)
    seen = []
    model.model.layers[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    states = model(ids, use_cache=False).loop_states
    a, c = model.config.plt_emb_scale, model.config.plt_hidden_scale
    torch.testing.assert_close(seen[1], a * model.model.embed_tokens(ids) + c * states[0], **EXACT)


@pytest.mark.parametrize("s", [0, 2])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_left_padded_batches(s, cache):
    model = tiny_model(plt_num_loops=3, plt_offset=s)
    rows = [random_ids(n, seed=n) for n in (1, 5, 20)]
    ids, mask = left_padded(rows)
    output = model.generate(ids, attention_mask=mask, cache_implementation=cache, **GREEDY)
    for row, tokens in zip(rows, output):
        assert tokens[20:].tolist() == recomputed(model, row[None])[0, len(row) :].tolist()


@pytest.mark.parametrize("s", [1, 2])
def test_a_text_that_begins_in_a_step_reads_no_padding(s):
    model = tiny_model(plt_num_loops=3, plt_offset=s)
    rows = [random_ids(2, seed=1), random_ids(6)]
    ids, mask = left_padded(rows)
    for row, logits in zip(rows, in_pieces(model, ids, [4, 1, 1], attention_mask=mask)):
        torch.testing.assert_close(logits[-len(row) :], reference(model, row), **EXACT)


@pytest.mark.parametrize("s", [0, 2])
def test_packed_documents(s):
    model = tiny_model(plt_num_loops=3, plt_offset=s)
    documents = [random_ids(n, seed=n) for n in (1, 9, 2, 5)]
    positions = torch.cat([torch.arange(len(d)) for d in documents])[None]
    packed = model(torch.cat(documents)[None], position_ids=positions, use_cache=False).logits[0]
    alone = torch.cat([model(d[None], use_cache=False).logits[0] for d in documents])
    torch.testing.assert_close(packed, alone, **EXACT)


@pytest.mark.parametrize("s", [0, 2])
@pytest.mark.parametrize(("R", "w", "L"), [(2, 3, 2), (3, 4, 3), (4, 0, 2)])
def test_the_tail_is_exact(s, R, w, L):
    model = tiny_model(**shape(R, w, L), plt_offset=s)
    longest = 1 + (R - 1) * (L * w + max(s, 1))
    for T in (longest - 1, longest, longest + 25):
        ids = random_ids(1, T + 6, seed=T)
        expected = reference(model, ids[0])
        with torch.no_grad():
            cache = make_cache(model.config)
            logits = model(ids[:, :T], past_key_values=cache, logits_to_keep=1).logits
            torch.testing.assert_close(logits[0], expected[T - 1 : T], **EXACT)
            torch.testing.assert_close(steps(model, ids, cache, T)[0], expected[T:], **EXACT)


@pytest.mark.parametrize("s", [0, 2])
@pytest.mark.parametrize("options", [{}, {"prompt_lookup_num_tokens": 4}, {"num_beams": 3}, {"prefill_chunk_size": 4}])
def test_generate(s, options):
    model = tiny_model(plt_num_loops=3, plt_offset=s)
    ids = random_ids(1, 4).repeat(1, 4)
    plain = {name: value for name, value in options.items() if name == "num_beams"}
    expected = model.generate(ids, use_cache=False, **plain, **GREEDY)
    assert model.generate(ids, **options, **GREEDY).tolist() == expected.tolist()


@pytest.mark.parametrize(("s", "passes"), [(0, 3), (1, 1), (2, 1)])
def test_passes_over_the_weights_per_token(s, passes):
    """With an offset, all loops of a token are one pass; without, a loop waits for the one before it."""
    model = tiny_model(plt_num_loops=3, plt_offset=s)
    cache = make_cache(model.config)
    calls = []
    with torch.no_grad():
        model(random_ids(1, 5), past_key_values=cache)
        model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: calls.append(1))
        model(random_ids(1, 1), past_key_values=cache)
    assert len(calls) == passes


def test_no_carry_without_offset():
    config = tiny_config(plt_num_loops=3, plt_offset=0)
    assert len(make_cache(config).layers) == 3 * config.num_hidden_layers


def test_saved_and_loaded(tmp_path):
    model = tiny_model(plt_offset=0, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    loaded = PLTForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.plt_offset == 0
    ids = random_ids(1, 7)
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, atol=0, rtol=0)
    paper = tiny_model(dtype=torch.float32)
    paper.save_pretrained(tmp_path / "paper")
    assert "plt_offset" not in (tmp_path / "paper" / "config.json").read_text()


@pytest.mark.parametrize("n", [1, 3])
def test_loops_of_any_count(n):
    model = tiny_model(plt_num_loops=2, plt_offset=0)
    ids = random_ids(1, 8)
    logits = model(ids, num_loops=n, use_cache=False).logits[0]
    torch.testing.assert_close(
        logits, reference_forward(dict(model.state_dict()), model.config.to_diff_dict(), ids[0], n)[1][-1], **EXACT
    )


@pytest.mark.parametrize("s", [-1, 1.0, True, None, "1"])
def test_impossible_offsets(s):
    with pytest.raises(ValueError, match=r"plt_offset=.* must be an integer of at least 0"):
        PLTConfig(plt_offset=s)
