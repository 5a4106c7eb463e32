"""The vendor's outputs through stock mlx-lm: whole prompts, chunks, one-pass steps, 48 greedy tokens."""

import itertools

import mlx.core as mx
import numpy as np
import pytest
from conftest import LENGTHS, close, log_probabilities
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache


def test_there_are_cases(case):
    assert case.folder.name.startswith("r")


@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("cached", [False, True], ids=["no-cache", "cache"])
def test_whole_prompts(case, T, cached):
    cache = make_prompt_cache(case.model) if cached else None
    close(log_probabilities(case.model(mx.array(case.prompt(T))[None], cache=cache))[0], case.expected(T))


@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("chunk", [1, 7, 90])
def test_chunks_and_one_pass_steps(case, T, chunk):
    cache, ids = make_prompt_cache(case.model), mx.array(case.prompt(T))[None]
    logits = [case.model(ids[:, t : t + chunk], cache=cache) for t in range(0, T, chunk)]
    close(log_probabilities(mx.concatenate(logits, axis=1))[0], case.expected(T))


@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("step", [2048, 48])
def test_greedy_generation(case, T, step):
    """Generate like mlx-lm: only the caches of a prompt's chunks are evaluated, so later loops run on their tails."""
    steps = generate_step(mx.array(case.prompt(T)), case.model, max_tokens=48, prefill_step_size=step)
    tokens, logprobs = zip(*steps)
    case.check(T, tokens, logprobs)


def test_chunks_of_any_length_leave_caches_to_go_on_from(case):
    """Tails that start inside a chunk, at its first token, and before it."""
    rng, ids = np.random.default_rng(0), mx.array(case.prompt(200))[None]
    for _ in range(4):
        cuts = sorted({0, 199, *rng.integers(1, 199, size=3).tolist()})
        cache = make_prompt_cache(case.model)
        for start, end in itertools.pairwise(cuts):
            case.model(ids[:, start:end], cache=cache)
            mx.eval([c.state for c in cache])
        close(log_probabilities(case.model(ids[:, 199:], cache=cache))[0], case.expected(200)[199:])
