"""Rows do not see each other, their padding, or the documents packed beside them."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

from parloop import make_cache
from tests.helpers.models import left_padded, random_ids, tiny_model

EXACT = {"atol": 1e-10, "rtol": 0}


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("R", [1, 2, 3])
@pytest.mark.parametrize("positions", ["absent", "given"])
def test_left_padding(R, attn, positions):
    model = tiny_model(plt_num_loops=R, attn=attn)
    rows = [random_ids(n, seed=n) for n in (1, 5, 12, 40)]
    ids, mask = left_padded(rows)
    position_ids = (mask.cumsum(-1) - 1).clamp(min=0) if positions == "given" else None
    with torch.no_grad():
        together = model(ids, attention_mask=mask, position_ids=position_ids).logits
        for row, logits in zip(rows, together):
            torch.testing.assert_close(logits[-len(row) :], model(row[None]).logits[0], **EXACT)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("w", [0, 3, 40])
@pytest.mark.parametrize("R", [1, 3])
def test_padding_is_finite_and_teaches_nothing(R, w, side, attn):
    """A token that sees nothing would be NaN, and so would every gradient; and gradients are those of the texts alone."""
    model = tiny_model(plt_num_loops=R, plt_window_size=[w, 0], attn=attn)
    rows = [random_ids(n, seed=n) for n in (1, 5, 40)]
    ids, mask = left_padded(rows)
    if side == "right":
        ids, mask = ids.flip(1), mask.flip(1)
    output = model(ids, attention_mask=mask)
    assert all(state.isfinite().all() for state in (output.logits, *output.loop_states))
    output.logits[mask.bool()].square().sum().backward()
    padded = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    for row in rows:
        model(row[None] if side == "left" else row.flip(0)[None]).logits.square().sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(padded[name], p.grad, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("static", [False, True])
def test_a_row_of_padding_alone_is_finite(static, attn):
    """As a batch is filled up with; the other rows do not see it, in prompts and in steps."""
    model = tiny_model(plt_num_loops=3, attn=attn)
    ids = random_ids(2, 8)
    mask = torch.tensor([[0] * 8, [1] * 8])
    cache = make_cache(model.config, max_cache_len=8 if static else None)
    with torch.no_grad():
        logits = [model(ids[:, :6], attention_mask=mask[:, :6], past_key_values=cache).logits]
        logits += [model(ids[:, t : t + 1], attention_mask=mask[:, : t + 1], past_key_values=cache).logits for t in (6, 7)]
        logits = torch.cat(logits, dim=1)
        assert logits.isfinite().all()
        torch.testing.assert_close(logits[1], model(ids[1:]).logits[0], **EXACT)


@pytest.mark.parametrize("kind", [torch.bool, torch.int32, torch.float32])
def test_masks_of_any_type(kind):
    model = tiny_model()
    ids, mask = left_padded([random_ids(n, seed=n) for n in (4, 12)])
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits
        assert torch.equal(model(ids, attention_mask=mask.to(kind)).logits, expected)
        assert torch.equal(model(ids, attention_mask=(2 * mask).to(kind)).logits, expected)


def test_one_row_of_positions_serves_all_rows():
    model = tiny_model(plt_num_loops=3)
    ids = random_ids(3, 12)
    positions = torch.cat((torch.arange(7), torch.arange(5)))[None]
    with torch.no_grad():
        for call in ({}, {"attention_mask": torch.ones_like(ids)}):
            one, each = (model(ids, position_ids=p, **call).logits for p in (positions, positions.expand(3, -1)))
            assert torch.equal(one, each)
        starts_at_nine = model(ids, position_ids=torch.arange(9, 21)[None]).logits
        torch.testing.assert_close(starts_at_nine, model(ids).logits, atol=1e-9, rtol=0)  # RoPE tells distances only


def test_documents_whose_positions_go_on():
    """A document starts wherever positions do not go up by one, also where they do not start at 0: three documents here."""
    model = tiny_model(plt_num_loops=2)
    documents = [random_ids(n, seed=n) for n in (4, 5, 6)]
    positions = torch.cat((torch.arange(4), torch.arange(7, 12), torch.arange(12, 18) + 5))[None]
    with torch.no_grad():
        together = model(torch.cat(documents)[None], position_ids=positions).logits[0]
        alone = torch.cat([model(document[None]).logits[0] for document in documents])
    torch.testing.assert_close(together, alone, atol=1e-9, rtol=0)


def test_positions_may_do_as_they_like_in_padding():
    model = tiny_model(plt_num_loops=2)
    ids, mask = left_padded([random_ids(n, seed=n) for n in (4, 12)])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    wild = positions.masked_fill(mask == 0, 0) + (1 - mask) * torch.tensor([5, 3, 9, 0, 7, 1, 4, 4, 0, 0, 0, 0])
    with torch.no_grad():
        for cache in (None, make_cache(model.config)):
            got = model(ids, attention_mask=mask, position_ids=wild, past_key_values=cache).logits
            torch.testing.assert_close(got[mask.bool()], model(ids, attention_mask=mask).logits[mask.bool()], **EXACT)


def test_a_chunk_may_start_anywhere():
    """Given positions of a later chunk go up by one and do not start at 0: no other document."""
    model = tiny_model(plt_num_loops=2)
    ids, cache = random_ids(2, 12), make_cache(tiny_model().config)
    positions = torch.arange(12).expand(2, -1)
    with torch.no_grad():
        first = model(ids[:, :5], position_ids=positions[:, :5], past_key_values=cache).logits
        second = model(ids[:, 5:], position_ids=positions[:, 5:], past_key_values=cache).logits
        torch.testing.assert_close(torch.cat((first, second), dim=1), model(ids).logits, **EXACT)


def test_right_padding():
    model = tiny_model(plt_num_loops=3)
    rows = [random_ids(n, seed=n) for n in (3, 12)]
    ids = torch.stack([torch.nn.functional.pad(row, (0, 12 - len(row))) for row in rows])
    mask = torch.stack([torch.nn.functional.pad(torch.ones_like(row), (0, 12 - len(row))) for row in rows])
    with torch.no_grad():
        logits = model(ids, attention_mask=mask).logits
        for row, got in zip(rows, logits):
            torch.testing.assert_close(got[: len(row)], model(row[None]).logits[0], **EXACT)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("w", [0, 3, 40])
@pytest.mark.parametrize("R", [1, 2, 3])
@pytest.mark.parametrize("mask_of_ones", [False, True])
def test_packed_documents(R, w, attn, mask_of_ones):
    model = tiny_model(plt_num_loops=R, plt_window_size=[w, 0], attn=attn)
    documents = [[random_ids(n, seed=n) for n in lengths] for lengths in ((7, 1, 34, 3), (20, 25))]
    ids = torch.stack([torch.cat(row) for row in documents])
    position_ids = torch.stack([torch.cat([torch.arange(len(d)) for d in row]) for row in documents])
    weight = torch.randn(*ids.shape, model.config.vocab_size, dtype=torch.float64)

    together = model(ids, position_ids=position_ids, attention_mask=torch.ones_like(ids) if mask_of_ones else None)
    (together.logits * weight).sum().backward()
    packed_gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    for row, row_weight, row_logits in zip(documents, weight, together.logits):
        start = 0
        for document in row:
            alone = model(document[None]).logits[0]
            stop = start + len(document)
            torch.testing.assert_close(row_logits[start:stop], alone, **EXACT)
            (alone * row_weight[start:stop]).sum().backward()
            start = stop
    for name, p in model.named_parameters():
        torch.testing.assert_close(packed_gradients[name], p.grad, atol=1e-9, rtol=1e-9)


def test_packed_documents_need_no_cache_and_say_so():
    model = tiny_model()
    ids = random_ids(1, 6)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]])
    assert model(ids, position_ids=positions, use_cache=True).past_key_values is None
    with pytest.raises(ValueError, match="use_cache=False"):
        model(ids, position_ids=positions, past_key_values=make_cache(model.config))
    mask = torch.tensor([[1, 1, 1, 1, 1, 0]])
    with pytest.raises(ValueError, match="leave attention_mask out"):
        model(ids, position_ids=positions, attention_mask=mask)


@pytest.mark.parametrize("shape", [(1, 5), (1, 7)])
def test_attention_mask_of_a_wrong_length(shape):
    with pytest.raises(ValueError, match="it must cover all of them"):
        tiny_model()(random_ids(1, 6), attention_mask=torch.ones(shape))


def test_four_dimensional_mask():
    with pytest.raises(ValueError, match="tokens so far"):
        tiny_model()(random_ids(1, 6), attention_mask=torch.ones(1, 1, 6, 6))


@pytest.mark.parametrize("max_cache_len", [None, 16])
def test_a_reset_cache_is_a_fresh_cache(max_cache_len):
    """A slot that is used again must not leak the last text's states into the first token."""
    model = tiny_model(plt_num_loops=3)
    cache = make_cache(model.config, max_cache_len=max_cache_len)
    with torch.no_grad():
        model(random_ids(1, 9, seed=1), past_key_values=cache)
        cache.reset()
        ids = random_ids(1, 8, seed=2)
        first = model(ids[:, :1], past_key_values=cache).logits
        rest = model(ids[:, 1:], past_key_values=cache).logits
        torch.testing.assert_close(torch.cat((first, rest), dim=1), model(ids).logits, **EXACT)


def test_a_cache_of_another_loop_count_is_refused():
    model = tiny_model(plt_num_loops=2)
    cache = make_cache(model.config)
    model(random_ids(1, 4), past_key_values=cache)
    with pytest.raises(ValueError, match="filled with num_loops=2"):
        model(random_ids(1, 1), past_key_values=cache, num_loops=3)
    with pytest.raises(ValueError, match="filled with num_loops=2"):
        model(random_ids(1, 1), past_key_values=cache, num_loops=1)


@pytest.mark.parametrize("kind", ["bare", "config", "static"])
def test_an_empty_stock_cache_is_extended(kind):
    from transformers import DynamicCache, StaticCache

    model = tiny_model(plt_num_loops=3)
    cache = {
        "bare": lambda: DynamicCache(),
        "config": lambda: DynamicCache(config=model.config),
        "static": lambda: StaticCache(model.config, max_cache_len=12),
    }[kind]()
    ids = random_ids(2, 10)
    with torch.no_grad():
        logits = [model(ids[:, :6], past_key_values=cache).logits]
        logits += [model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(6, 10)]
        torch.testing.assert_close(torch.cat(logits, dim=1), model(ids).logits, **EXACT)


def test_a_foreign_cache_with_tokens_is_refused():
    from transformers import DynamicCache

    model = tiny_model()
    cache = DynamicCache(config=model.config)
    for layer in range(2):
        cache.update(torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 3, 8), layer)
    with pytest.raises(ValueError, match="start from an empty cache"):
        model(random_ids(1, 1), past_key_values=cache)


@pytest.mark.parametrize("max_cache_len", [None, 64])
def test_padding_inside_a_text_is_refused(max_cache_len):
    """A right-padded prompt that is continued: its padding would sit in windows and carries."""
    model = tiny_model()
    ids = random_ids(2, 6)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
    cache = make_cache(model.config, max_cache_len=max_cache_len)
    with torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=cache)
        with pytest.raises(ValueError, match="padding between tokens of one text"):
            model(ids[:, :1], attention_mask=torch.cat([mask, torch.ones(2, 1)], dim=1), past_key_values=cache)
        with pytest.raises(ValueError, match="padding between tokens of one text"):
            model(ids, attention_mask=torch.tensor([[1, 0, 1, 1, 1, 1]] * 2))
        one = tiny_model(plt_num_loops=1)
        hole = torch.tensor([[1, 1, 0, 0, 1, 1]])
        positions = torch.tensor([[0, 1, 1, 1, 2, 3]])
        kept = one(ids[:1, [0, 1, 4, 5]]).logits[:, -1]
        torch.testing.assert_close(one(ids[:1], attention_mask=hole, position_ids=positions).logits[:, -1], kept, **EXACT)


def test_a_reset_cache_serves_another_batch_size():
    model = tiny_model(plt_num_loops=3)
    cache = make_cache(model.config)
    with torch.no_grad():
        model(random_ids(1, 9), past_key_values=cache)
        cache.reset()
        ids = random_ids(3, 7, seed=1)
        torch.testing.assert_close(model(ids, past_key_values=cache).logits, model(ids).logits, **EXACT)
        step = model(ids[:, :1], past_key_values=cache).logits[:, -1]
        torch.testing.assert_close(step, model(torch.cat([ids, ids[:, :1]], dim=1)).logits[:, -1], **EXACT)


def test_packed_rows_are_refused_where_flash_attention_would_mix_them():
    model = tiny_model()
    model.config._attn_implementation = "flash_attention_2"
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]] * 2)
    with pytest.raises(ValueError, match=r"batches of one row only.*flex_attention"):
        model(random_ids(2, 6), position_ids=positions)


@pytest.mark.parametrize("R", [1, 2, 3])
@pytest.mark.parametrize("kind", ["dynamic", "static", "extended"])
def test_rows_of_a_cache_are_repeated_and_selected(R, kind):
    """Contrastive search and best-of-n with a shared prompt: one prompt's cache for several rows, then some of them."""
    model = tiny_model(plt_num_loops=R)
    ids, more = random_ids(2, 9), random_ids(6, 4, seed=1)
    if kind == "extended":
        cache = DynamicCache()
    else:
        cache = make_cache(model.config, max_cache_len=32 if kind == "static" else None)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        cache.batch_repeat_interleave(3)
        rows = ids.repeat_interleave(3, dim=0)
        whole = model(torch.cat((rows, more), dim=1), use_cache=False).logits
        for t in range(2):
            step = model(more[:, t : t + 1], past_key_values=cache).logits
            torch.testing.assert_close(step, whole[:, 9 + t : 10 + t], **EXACT)
        kept = torch.tensor([5, 0])
        cache.batch_select_indices(kept)
        step = model(more[kept, 2:4], past_key_values=cache).logits
        torch.testing.assert_close(step, whole[kept, 11:13], **EXACT)


class Reads(TorchDispatchMode):
    """Values that Python asks of tensors: on a GPU each makes the host wait."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            self.count += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("w", [0, 4])
@pytest.mark.parametrize("R", [1, 2, 3])
def test_a_step_of_a_left_padded_batch_reads_nothing_from_the_device(R, w, attn):
    model = tiny_model(plt_num_loops=R, plt_window_size=[w, 0], attn=attn)
    rows = [random_ids(n, seed=n) for n in (2, 7)]
    ids, mask = left_padded(rows)
    new = random_ids(2, 6)
    cache = make_cache(model.config)
    with torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=cache)
        for t in range(6):
            mask = torch.cat((mask, torch.ones_like(mask[:, :1])), dim=1)
            with Reads() as reads:
                logits = model(new[:, t : t + 1], attention_mask=mask, past_key_values=cache).logits
            assert reads.count == 0
            for row, text in enumerate(rows):
                alone = model(torch.cat((text, new[row, : t + 1]))[None], use_cache=False).logits
                torch.testing.assert_close(logits[row, -1], alone[0, -1], **EXACT)
