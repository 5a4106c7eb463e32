"""Caches in mlx-lm: tails by lazy evaluation, batches that rows join and leave, padding, files, quantised keys and values, shared prefixes."""

import copy
import re

import mlx.core as mx
import numpy as np
import pytest
from conftest import Checkpoint, close, load, log_probabilities, random_checkpoint
from mlx.utils import tree_flatten
from mlx_lm.generate import BatchGenerator, generate_step, speculative_generate_step
from mlx_lm.models.cache import (
    ArraysCache,
    BatchKVCache,
    BatchRotatingKVCache,
    CacheList,
    LRUPromptCache,
    load_prompt_cache,
    make_prompt_cache,
    save_prompt_cache,
)


def prefill(model, ids: list[int], cache: list) -> None:
    model(mx.array(ids)[None], cache=cache)
    mx.eval([c.state for c in cache])


def arrays(cache: list) -> list[mx.array]:
    return [value for c in cache for _, value in tree_flatten(c.state) if isinstance(value, mx.array)]


def test_the_caches_of_a_prompt_need_later_loops_on_its_tail_only(case, tmp_path, monkeypatch):
    """By the rows that each layer is called on, and by the operations that evaluating the caches would run."""
    L, R, w = case.config["num_hidden_layers"], case.config["plt_num_loops"], case.config["plt_window_size"][0]
    rows, kind = [], type(case.model.layers[0])
    call = kind.__call__
    monkeypatch.setattr(kind, "__call__", lambda layer, x, *rest: rows.append(x.shape[1]) or call(layer, x, *rest))
    T = 199
    cache = make_prompt_cache(case.model)
    case.model(mx.array(case.prompt(200)[:T])[None], cache=cache)
    tails = [(R - r) * (L * w + 1) + (L - i) * w for r in range(2, R + 1) for i in range(L)]
    later = [T] * L * (R - 1)
    if tails[0] < T:
        assert rows == [T] * L + tails + later  # loop 1, what the caches need, what the logits would need
    else:
        assert rows == [T] * L + later
    mx.export_to_dot(str(tmp_path / "graph"), *arrays(cache))
    attentions = len(re.findall(r'label ?= ?"Softmax"', (tmp_path / "graph").read_text()))
    if attentions:  # a GPU has a kernel for all of it
        assert attentions == L + 2 * L * (R - 1) - 2  # nobody reads the last layer's output


def run_batches(model, prompts: list[list[int]], **options):
    """Tokens and log-probabilities of every prompt, by mlx-lm's scheduler."""
    generator = BatchGenerator(model, max_tokens=48, **options)
    answers: dict[int, tuple[list, list]] = {uid: ([], []) for uid in generator.insert(prompts)}
    finished = 0
    while finished < len(prompts):
        for response in generator.next()[1]:
            answers[response.uid][0].append(response.token)
            answers[response.uid][1].append(response.logprobs)
            finished += response.finish_reason is not None
    generator.close()
    return list(answers.values())


@pytest.mark.parametrize(
    ("prefill_step_size", "completion_batch_size", "prefill_batch_size"), [(2048, 32, 8), (16, 32, 8), (40, 2, 2), (7, 4, 4)]
)
def test_batches_with_rows_that_join_and_leave(case, prefill_step_size, completion_batch_size, prefill_batch_size):
    order = [5, 200, 1, 40, 200, 5]
    options = {
        "prefill_step_size": prefill_step_size, "completion_batch_size": completion_batch_size, "prefill_batch_size": prefill_batch_size
    }  # fmt: skip
    for T, answer in zip(order, run_batches(case.model, [case.prompt(T) for T in order], **options)):
        case.check(T, *answer)


def test_rows_of_long_prompts_that_are_padded_on_the_right_have_tails(case):
    """Prompts of nearly equal lengths: the tail of a batch ends before each row's padding."""
    ids = case.prompt(200)
    for answer, T in zip(run_batches(case.model, [ids[:190], ids, ids[:197]]), (190, 200, 197)):
        close(np.array(answer[1][0]), case.expected(200)[T - 1])
        if T == 200:
            case.check(T, *answer)


@pytest.mark.parametrize("loops", [2, 3])
@pytest.mark.parametrize("chunk", [12, 60])
def test_left_padding(tmp_path, loops, chunk):
    """A first token must read neither the padding's keys nor its state, in chunks that hold padding only, some or none."""
    checkpoint = Checkpoint(random_checkpoint(tmp_path, plt_num_loops=loops))
    rows = [checkpoint.prompt(T) for T in (60, 31, 9)]
    padding = [60 - len(row) for row in rows]
    windows = [BatchRotatingKVCache(5, padding) for _ in range(2 * (loops - 1))]
    cache = [*(BatchKVCache(padding) for _ in range(2)), CacheList(*windows, ArraysCache(loops - 1, padding))]
    ids = mx.array([[0] * (60 - len(row)) + row for row in rows])
    logits = []
    for t in range(0, 60, chunk):
        logits.append(checkpoint.model(ids[:, t : t + chunk], cache=cache))
        mx.eval([c.state for c in cache])
    logits.append(checkpoint.model(mx.array([[1], [2], [3]]), cache=cache))
    found = log_probabilities(mx.concatenate(logits, axis=1))
    for row, pad, last, got in zip(rows, padding, (1, 2, 3), found):
        close(got[pad:], checkpoint.reference([*row, last]))


def test_saved_and_loaded_caches(case, tmp_path):
    cache, ids = make_prompt_cache(case.model), case.prompt(200)
    prefill(case.model, ids[:150], cache)
    save_prompt_cache(str(tmp_path / "cache.safetensors"), cache)
    loaded = load_prompt_cache(str(tmp_path / "cache.safetensors"))
    close(log_probabilities(case.model(mx.array(ids[150:])[None], cache=loaded))[0], case.expected(200)[150:])
    steps = [case.model(mx.array([[token]]), cache=cache) for token in ids[150:160]]
    close(log_probabilities(mx.concatenate(steps, axis=1))[0], case.expected(200)[150:160])


def test_a_cache_serves_many_continuations(case):
    """The server's prompt cache: the longest known beginning of a prompt is copied and gone on from; a longer one cannot be trimmed."""
    store, ids = LRUPromptCache(), case.prompt(200)
    cache = make_prompt_cache(case.model)
    for end in (64, 128):
        prefill(case.model, ids[end - 64 : end], cache)
        store.insert_cache("model", ids[:end], copy.deepcopy(cache))
    for shared, known in ((200, 128), (100, 64), (50, 0)):
        found, rest = store.fetch_nearest_cache("model", ids[:shared])
        assert len(rest) == shared - known
        found = found or make_prompt_cache(case.model)
        close(log_probabilities(case.model(mx.array(rest)[None], cache=found))[0], case.expected(200)[known:shared])


def test_drafts_are_refused_since_carries_cannot_be_trimmed(case):
    with pytest.raises(ValueError, match="trimmable"):
        next(speculative_generate_step(mx.array(case.prompt(5)), case.model, case.model))


def test_one_loop_is_trimmable_as_any_dense_model(case):
    plain = load(case.folder, plt_num_loops=1)
    steps = speculative_generate_step(mx.array(case.prompt(40)), plain, plain, max_tokens=8)
    expected = generate_step(mx.array(case.prompt(40)), plain, max_tokens=8)
    assert [token for token, *_ in steps] == [token for token, _ in expected]


@pytest.mark.parametrize("hidden", [True, False], ids=["hidden-gate", "query-gate"])
@pytest.mark.parametrize("start", [0, 150, 220], ids=["from-the-start", "within-the-prompt", "while-decoding"])
def test_quantised_keys_and_values_of_loop_1(tmp_path, hidden, start):
    """`--kv-bits`: against keys and values of loop 1 that are rounded as often, whatever mlx-lm's kernel for it does."""
    checkpoint = Checkpoint(random_checkpoint(tmp_path, plt_gate_use_hidden_states=hidden, plt_num_loops=3))
    prompt = mx.array(checkpoint.prompt(200))
    options = {"max_tokens": 40, "prefill_step_size": 60}

    def run(**quantised):
        return zip(*generate_step(prompt, checkpoint.model, **options, **quantised))

    tokens, exact = run()
    rounded = {}
    for bits in (4, 8):
        found, logprobs = run(kv_bits=bits, kv_group_size=32, quantized_kv_start=start)
        same = next((i for i, (a, b) in enumerate(zip(tokens, found)) if a != b), len(tokens))
        rounded[bits] = max(float(mx.abs(a - b).max()) for a, b in zip(exact[: same + 1], logprobs))
        assert start == 220 or rounded[bits] > 0
    assert rounded[8] < 0.06
    assert rounded[4] > 4 * rounded[8] or start == 220


def test_quantised_keys_and_values_save_and_load(tmp_path):
    checkpoint = Checkpoint(random_checkpoint(tmp_path))
    ids, cache = checkpoint.prompt(100), make_prompt_cache(checkpoint.model)
    prefill(checkpoint.model, ids[:80], cache)
    cache[:2] = [c.to_quantized(group_size=32, bits=8) for c in cache[:2]]
    save_prompt_cache(str(tmp_path / "cache.safetensors"), cache)
    loaded = load_prompt_cache(str(tmp_path / "cache.safetensors"))
    kept, found = (log_probabilities(checkpoint.model(mx.array(ids[80:])[None], cache=c)) for c in (cache, loaded))
    close(found, kept, 1e-6)
    close(found[0], checkpoint.reference(ids)[80:], 0.06)
