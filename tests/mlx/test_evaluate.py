"""`mlx_lm evaluate`: what lm-evaluation-harness is told of a text's probability, and what it is answered."""

import json
from types import SimpleNamespace

import pytest
from conftest import Checkpoint
from mlx_lm.evaluate import MLXLM

from parloop.check.check import PROBE

ANSWERS = json.loads((PROBE / "answers.json").read_text())


@pytest.fixture(scope="module")
def lm():
    return MLXLM(str(PROBE), batch_size=2)


def request(*arguments):
    return SimpleNamespace(args=arguments)


def test_loglikelihoods_are_those_of_the_equations(lm):
    """Continuations that share a long context, whose caches are gone on from; one of them is the greedy one."""
    checkpoint = Checkpoint(PROBE)
    long, greedy = ANSWERS["again"][0]["prompt"], ANSWERS["again"][0]["right"]["text"]
    asked = [(long, greedy), (long, "abc"), (long, "Z"), (long[:20], long[20:60])]
    answers = lm.loglikelihood([request(*pair) for pair in asked])
    for (context, continuation), (found, is_greedy) in zip(asked, answers):
        ids = lm.tokenizer.encode(context + continuation)
        rows = checkpoint.reference(ids)[len(context) - 1 : -1]
        assert found == pytest.approx(sum(row[i] for row, i in zip(rows, ids[len(context) :])), abs=1e-3)
        assert is_greedy is (continuation == greedy)


def test_generation_in_batches(lm):
    options = {"max_gen_toks": ANSWERS["tokens"], "until": ["\n"]}
    answers = lm.generate_until([request(prompt, options) for prompt in ANSWERS["prompts"]])
    assert answers == [answer["text"] for answer in ANSWERS["variants"][0]["answers"]]
