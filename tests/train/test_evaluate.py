"""Held-out loss: every token predicted once, for every loop, whatever the batches."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from parloop.corpus import train_tokenizer
from parloop.train.evaluate import evaluate_documents
from tests.helpers.models import tiny_model
from tests.helpers.sources import write_sources


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return [path.read_text()[:1500] for path in sorted(write_sources(tmp_path_factory.mktemp("s"), 5).rglob("*.py"))] + ["x"]


def test_against_a_plain_reimplementation(texts):
    tokenizer = train_tokenizer(texts, 300)
    model = tiny_model(vocab_size=300, plt_num_loops=3)
    T = 16
    result = evaluate_documents(model, tokenizer, texts, T, batch_size=3)
    for i, text in enumerate(texts):
        ids = [1, *tokenizer(text, add_special_tokens=False)["input_ids"], 2]
        nll, correct = np.zeros(3), 0
        for start in range(0, len(ids) - 1, T):
            window = torch.tensor(ids[start : start + T + 1])
            with torch.no_grad():
                output = model(window[None, :-1], output_loop_logits=True)
            for r in range(3):
                nll[r] += F.cross_entropy(output.loop_logits[r][0].float(), window[1:], reduction="sum").item()
            correct += (output.logits[0].argmax(-1) == window[1:]).sum().item()
        np.testing.assert_allclose(result.nll[i], nll, rtol=1e-5)
        assert result.correct[i] == correct
        assert result.tokens[i] == len(ids) - 1
        assert result.bytes[i] == len(text.encode())
    assert result.bits_per_byte[-1] == pytest.approx(result.nll[:, -1].sum() / math.log(2) / sum(map(len, texts)))
    assert result.loss == pytest.approx(result.nll[:, -1].sum() / result.tokens.sum())


def test_cut_texts_count_the_bytes_they_use(texts):
    tokenizer = train_tokenizer(texts, 300)
    result = evaluate_documents(tiny_model(vocab_size=300), tokenizer, texts, 16, max_chars=100)
    assert result.bytes.tolist() == [100] * 5 + [1]
    ids = tokenizer(texts[0][:100], add_special_tokens=False)["input_ids"]
    assert result.tokens[0] == len(ids)  # <bos> is given and no <eos> is due


def test_another_loop_count(texts):
    tokenizer = train_tokenizer(texts, 300)
    model = tiny_model(vocab_size=300, plt_num_loops=2)
    with pytest.warns(UserWarning, match="num_loops=1"):
        assert evaluate_documents(model, tokenizer, texts, 16, num_loops=1).nll.shape == (6, 1)


@pytest.mark.parametrize(
    "numbers", [{"length": 0}, {"batch_size": 0}, {"max_chars": -5}, {"num_loops": 0}, {"num_loops": -1}]
)
def test_numbers_out_of_their_bounds(texts, numbers):
    """A negative number of characters would cut a text's end off; zero loops would mean as trained."""
    tokenizer = train_tokenizer(texts, 300)
    with pytest.raises(ValueError, match="must be at least 1, max_chars"):
        evaluate_documents(tiny_model(vocab_size=300), tokenizer, texts, **({"length": 16} | numbers))
