"""Any split of any text into prefill, chunks and single steps gives the logits of the whole text at once."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from parloop import make_cache
from parloop.model.reference import reference_forward
from tests.helpers.decoding import EXACT, in_pieces, splits
from tests.helpers.models import random_ids, tiny_model


@settings(max_examples=120, deadline=None)
@given(
    pieces=splits(),
    R=st.integers(1, 4),
    w=st.sampled_from([0, 1, 3, 8, 40]),
    gate_hidden=st.booleans(),
    norm=st.booleans(),
    attn=st.sampled_from(["sdpa", "eager"]),
    one_pass=st.booleans(),
    seed=st.integers(0, 3),
)
def test_split_invariance(pieces, R, w, gate_hidden, norm, attn, one_pass, seed):
    changes = {"plt_num_loops": R, "plt_window_size": [w, 0], "plt_normalize_per_loop": norm}
    model = tiny_model(seed, attn=attn, plt_gate_use_hidden_states=gate_hidden, **changes)
    ids = random_ids(2, sum(pieces), seed=seed)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        split = in_pieces(model, ids, pieces, one_pass=one_pass)
        torch.testing.assert_close(split, whole, **EXACT)
        # and the whole text agrees with the equations
        _, reference = reference_forward(dict(model.state_dict()), model.config.to_diff_dict(), ids[0])
        torch.testing.assert_close(whole[0], reference[-1], **EXACT)


@settings(max_examples=60, deadline=None)
@given(pieces=splits(longest=40), lengths=st.lists(st.integers(1, 40), min_size=1, max_size=3), R=st.integers(1, 3))
def test_split_invariance_of_left_padded_batches(pieces, lengths, R):
    T = sum(pieces)
    model = tiny_model(plt_num_loops=R, plt_window_size=[5, 0])
    ids = random_ids(len(lengths), T)
    mask = torch.ones_like(ids)
    for row, n in enumerate(lengths):
        mask[row, : max(T - n, 0)] = 0
    ids = ids * mask
    with torch.no_grad():
        split = in_pieces(model, ids, pieces, attention_mask=mask)
        for row in range(len(lengths)):
            real = mask[row].bool()
            alone = model(ids[row, real][None], use_cache=False).logits[0]
            torch.testing.assert_close(split[row, real], alone, **EXACT)


@pytest.mark.parametrize("w", [0, 2, 7, 33, 70])
@pytest.mark.parametrize("T", [1, 31, 32, 33, 100])
def test_bands_equal_the_equations(T, w):
    """Windows shorter, equal to and longer than a block, and texts of one and many blocks."""
    model = tiny_model(plt_num_loops=3, plt_window_size=[w, 0])
    ids = random_ids(1, T)
    with torch.no_grad():
        logits = model(ids).logits[0]
    _, reference = reference_forward(dict(model.state_dict()), model.config.to_diff_dict(), ids[0])
    torch.testing.assert_close(logits, reference[-1], **EXACT)


@pytest.mark.parametrize(("w", "T", "pieces"), [(64, 400, [300, 1, 1, 37, 61]), (1, 90, [1, 40, 1, 1, 47])])
@pytest.mark.parametrize("R", [2, 3])
def test_the_released_window_and_the_shortest(w, T, pieces, R):
    """Texts of several windows, whole and in prefill, chunks and single steps, against the equations."""
    model = tiny_model(plt_num_loops=R, plt_window_size=[w, 0], max_position_embeddings=512)
    ids = random_ids(1, T)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits[0]
        split = in_pieces(model, ids, pieces)[0]
    _, reference = reference_forward(dict(model.state_dict()), model.config.to_diff_dict(), ids[0])
    torch.testing.assert_close(whole, reference[-1], **EXACT)
    torch.testing.assert_close(split, reference[-1], **EXACT)


def test_window_counts_the_token_itself():
    """w = 2: with one layer, loop 2 of token 5 depends on its own window at tokens 3, 4, 5, not on token 2's."""
    model = tiny_model(num_hidden_layers=1, plt_window_size=[2, 0], plt_num_loops=2)
    with torch.no_grad():
        model.model.layers[0].self_attn.plt_gate.weight.zero_()
        model.model.layers[0].self_attn.plt_gate.bias.fill_(-1e9)  # all local
    e = torch.randn(1, 6, 32, dtype=torch.float64, requires_grad=True)
    # Only loop 2's input is wanted: cut the path through the shift, which reaches one token further back.
    model.config.plt_hidden_scale = 0.0
    model(inputs_embeds=e, use_cache=False).logits[0, 5].sum().backward()
    reached = (e.grad[0].abs().sum(-1) > 0).tolist()
    assert reached == [False, False, False, True, True, True]


@pytest.mark.parametrize("norm", [True, False])
def test_loop_states_and_logits(norm):
    model = tiny_model(plt_num_loops=3, plt_normalize_per_loop=norm)
    ids = random_ids(1, 11)
    states, logits = reference_forward(dict(model.state_dict()), model.config.to_diff_dict(), ids[0])
    with torch.no_grad():
        output = model(ids, output_loop_logits=True)
        torch.testing.assert_close(model(ids).loop_states, output.loop_states)
        assert model(ids, output_loop_states=False).loop_states is None
        step = in_pieces_loop_logits(model, ids)
    assert len(output.loop_states) == len(output.loop_logits) == 3
    for r in range(3):
        torch.testing.assert_close(output.loop_states[r][0], states[r], **EXACT)
        torch.testing.assert_close(output.loop_logits[r][0], logits[r], **EXACT)
        torch.testing.assert_close(step[r], logits[r][-1], **EXACT)
    torch.testing.assert_close(output.loop_logits[-1], output.logits)


def in_pieces_loop_logits(model, ids):
    """The last token's logits of every loop, when that token is a decode step."""
    cache = make_cache(model.config)
    model(ids[:, :-1], past_key_values=cache)
    return [x[0, -1] for x in model(ids[:, -1:], past_key_values=cache, output_loop_logits=True).loop_logits]


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_loop_dial(n):
    model = tiny_model(plt_num_loops=3)
    ids = random_ids(1, 9)
    _, logits = reference_forward(dict(model.state_dict()), model.config.to_diff_dict(), ids[0], num_loops=n)
    with torch.no_grad():
        torch.testing.assert_close(model(ids, num_loops=n).logits[0], logits[-1], **EXACT)
        torch.testing.assert_close(in_pieces(model, ids, [4, 1, 1, 3], num_loops=n)[0], logits[-1], **EXACT)


def test_an_unusual_loop_count_warns_once():
    model = tiny_model(plt_num_loops=2)
    ids = random_ids(1, 4)
    with pytest.warns(UserWarning, match="num_loops=3, but this model was trained with 2") as caught:
        model(ids, num_loops=3)
        model(ids, num_loops=3)
        model.generate(ids, num_loops=3, max_new_tokens=2)
    assert len([w for w in caught if "num_loops" in str(w.message)]) == 1


@pytest.mark.parametrize("n", [0, -1, 1.5, "2"])
def test_impossible_loop_counts(n):
    with pytest.raises(ValueError, match="num_loops"):
        tiny_model()(random_ids(1, 4), num_loops=n)


def test_one_loop_model_runs_at_two():
    """A model without gates blends evenly, as gates do at birth."""
    plain = tiny_model(plt_num_loops=1)
    looped = tiny_model(plt_num_loops=2)
    looped.load_state_dict(plain.state_dict(), strict=False)
    for layer in looped.model.layers:
        torch.nn.init.zeros_(layer.self_attn.plt_gate.weight)
        torch.nn.init.zeros_(layer.self_attn.plt_gate.bias)
    ids = random_ids(1, 9)
    with torch.no_grad(), pytest.warns(UserWarning, match="trained with 1"):
        torch.testing.assert_close(plain(ids, num_loops=2).logits, looped(ids).logits, **EXACT)
