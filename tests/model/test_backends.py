"""Backends and precisions: eager, sdpa, flex, what FlashAttention would be told, bfloat16, torch.compile."""

import pytest
import torch

from parloop import make_cache
from parloop.model.backends import attend_rows, eager_attention
from tests.helpers.flash import flash_contract  # noqa: F401  (registers "contract")
from tests.helpers.models import left_padded, random_ids, tiny_model


@pytest.mark.parametrize("R", [1, 2, 4])
def test_eager_equals_sdpa(R):
    rows = [random_ids(n, seed=n) for n in (3, 40)]
    ids, mask = left_padded(rows)
    with torch.no_grad():
        eager = tiny_model(plt_num_loops=R, attn="eager")(ids, attention_mask=mask).logits
        sdpa = tiny_model(plt_num_loops=R, attn="sdpa")(ids, attention_mask=mask).logits
    for row, a, b in zip(rows, eager, sdpa):
        torch.testing.assert_close(a[-len(row) :], b[-len(row) :], atol=1e-10, rtol=0)


@pytest.mark.parametrize("w", [0, 3, 50])
@pytest.mark.parametrize("R", [1, 2, 3])
def test_flash_attention_is_told_the_right_thing(R, w):
    """FlashAttention needs a GPU; this checks its arguments (window, padding, causality) against its documented contract,
    over prefill, chunk and decode steps."""
    rows = [random_ids(n, seed=n) for n in (3, 20)]
    ids, mask = left_padded(rows)
    model = tiny_model(plt_num_loops=R, plt_window_size=[w, 0], attn="contract")
    cache, logits, done = make_cache(model.config), [], 0
    with torch.no_grad():
        for n in (6, 9, 1, 1, 3):
            done += n
            logits.append(model(ids[:, done - n : done], attention_mask=mask[:, :done], past_key_values=cache).logits)
        logits = torch.cat(logits, dim=1)
        model.set_attn_implementation("sdpa")
        for row, got in zip(rows, logits):
            torch.testing.assert_close(got[-len(row) :], model(row[None]).logits[0], atol=1e-10, rtol=0)


def test_keys_that_sdpa_reads(monkeypatch):
    """Of a prompt, windows as bands: w before a block of 32. Of a step, every key head once for all loops and heads."""
    asked = []

    def sdpa(query, key, *arguments, **options):
        asked.append((*query.shape[:2], key.shape[2]))
        return original(query, key, *arguments, **options)

    original = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", sdpa)
    model, ids = tiny_model(num_hidden_layers=1, num_key_value_heads=1), random_ids(1, 101)
    cache = make_cache(model.config)
    with torch.no_grad():
        model(ids[:, :100], past_key_values=cache)
        assert asked == [(1, 4, 100), (1, 4, 100), (4, 4, 36)]  # loop 1, loop 2's global and its 4 blocks
        asked.clear()
        model(ids[:, 100:], past_key_values=cache)
    assert asked == [(1, 1, 101), (1, 1, 5)]


@pytest.mark.parametrize("n", [1, 3])
def test_rows_of_loops_are_heads_to_other_backends(n):
    q, k, v = (torch.randn(2, 2, T, 8, dtype=torch.float64) for T in (n, 9, 9))
    rows = []
    for attn in ("eager", "contract"):
        attention = tiny_model(attn=attn).model.layers[0].self_attn
        rows.append(attend_rows(attention, q, k, v, None, position_ids=torch.zeros(2, 1)))
    torch.testing.assert_close(*rows, atol=1e-12, rtol=0)


def test_eager_weights_of_half_precision_are_rounded_once():
    """Computed in float32; sums in float16 would be off over many keys."""
    q, k = torch.randn(1, 1, 4, 8).half(), torch.randn(1, 1, 5000, 8).half()
    attention = tiny_model(num_attention_heads=1, num_key_value_heads=1).model.layers[0].self_attn
    out, weights = eager_attention(attention, q, k, k, None, scaling=1.0, dropout=0.0)
    assert out.dtype == weights.dtype == torch.float16
    assert torch.equal(weights, (q @ k.transpose(2, 3)).float().softmax(-1).half())


@pytest.mark.slow
def test_flex_attention():
    # hidden size 64: flex wants heads of at least 16
    model = tiny_model(plt_num_loops=2, head_dim=16, dtype=torch.float32)
    ids = random_ids(1, 40)
    with torch.no_grad():
        expected = model(ids).logits
        model.set_attn_implementation("flex_attention")
        cache = make_cache(model.config)
        prefill = model(ids[:, :39], past_key_values=cache).logits
        step = model(ids[:, 39:], past_key_values=cache).logits
    torch.testing.assert_close(torch.cat((prefill, step), dim=1), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("R", [1, 2, 4])
def test_bfloat16_is_close_to_float32(R):
    """At positions up to 250, where frequencies rounded to bfloat16 would be off by more than a radian."""
    ids = random_ids(2, 250)
    exact = tiny_model(plt_num_loops=R, dtype=torch.float32)
    half = tiny_model(plt_num_loops=R, dtype=torch.float32).to(torch.bfloat16)
    assert half.model.rotary_emb.inv_freq.dtype == torch.float32
    with torch.no_grad():
        a, b = exact(ids).logits, half(ids).logits.float()
        cache = make_cache(half.config)
        steps = [half(ids[:, :200], past_key_values=cache).logits]
        steps += [half(ids[:, t : t + 1], past_key_values=cache).logits for t in range(200, 250)]
    scale = a.std()
    assert ((a - b).std() / scale) < 0.05
    assert ((a - torch.cat(steps, dim=1).float()).std() / scale) < 0.05


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize(("R", "gate_reads_hidden"), [(1, True), (3, True), (3, False)])
def test_autocast_is_close_to_float32(R, gate_reads_hidden, attn):
    """Weights in float32, products in bfloat16: masks and gates have to be of the queries' type. Prompt and step of a padded batch."""
    changes = {"plt_num_loops": R, "plt_gate_use_hidden_states": gate_reads_hidden}
    model = tiny_model(dtype=torch.float32, attn=attn, **changes)
    ids, mask = left_padded([random_ids(n, seed=n) for n in (3, 40)])

    def logits():
        cache = make_cache(model.config)
        with torch.no_grad():
            prompt = model(ids[:, :39], attention_mask=mask[:, :39], past_key_values=cache).logits
            step = model(ids[:, 39:], attention_mask=mask, past_key_values=cache).logits
        return torch.cat((prompt, step), dim=1)[mask.bool()].float()

    exact = logits()
    with torch.autocast("cpu", torch.bfloat16):
        half = logits()
    assert 1e-4 < (exact - half).std() / exact.std() < 0.05


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("R", [1, 3])
def test_far_positions_are_as_exact_as_near_ones(R, dtype):
    """Angles are computed in float32: bfloat16 tells no position beyond 256 from its neighbours, float16 none beyond 2048."""
    ids = random_ids(2, 60)
    exact, half = (tiny_model(plt_num_loops=R, dtype=torch.float32).to(to) for to in (torch.float32, dtype))
    errors = []
    for start in (0, 300, 5000):
        call = {"position_ids": torch.arange(start, start + 60)[None], "use_cache": False}
        with torch.no_grad():
            a, b = exact(ids, **call).logits, half(ids, **call).logits.float()
        errors.append(((a - b).std() / a.std()).item())
    assert max(errors) < 1.5 * errors[0]


@pytest.mark.slow
def test_compiled_training_step_equals_eager():
    model = tiny_model(plt_num_loops=2, dtype=torch.float32).train()
    ids = random_ids(2, 40)
    positions = torch.cat((torch.arange(25), torch.arange(15)))[None].expand(2, -1)

    def step(call):
        model.zero_grad()
        loss = call(input_ids=ids, labels=ids, position_ids=positions, use_cache=False).loss
        loss.backward()
        return loss.item(), [p.grad.clone() for p in model.parameters()]

    loss, gradients = step(model)
    compiled_loss, compiled_gradients = step(torch.compile(model))
    assert compiled_loss == pytest.approx(loss, abs=1e-5)
    for a, b in zip(gradients, compiled_gradients):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_compiled_decode_steps_equal_eager_with_one_graph():
    from torch._dynamo.testing import CompileCounterWithBackend

    model = tiny_model(plt_num_loops=3, dtype=torch.float32)
    ids = random_ids(2, 14)
    counter = CompileCounterWithBackend("inductor")
    cache = make_cache(model.config, max_cache_len=32)
    with torch.no_grad():
        expected = model(ids).logits[:, 8:]
        model(ids[:, :8], past_key_values=cache)
        compiled = torch.compile(model.forward, backend=counter, fullgraph=True)
        got = []
        for t in range(8, 14):
            inputs = model.prepare_inputs_for_generation(
                ids[:, : t + 1],
                next_sequence_length=1,
                past_key_values=cache,
                position_ids=torch.full((2, 1), t),
                use_cache=True,
            )
            got.append(compiled(**inputs).logits)
    torch.testing.assert_close(torch.cat(got, dim=1), expected, atol=1e-4, rtol=1e-4)
    assert counter.frame_count <= 2  # one while the windows fill, one from then on
