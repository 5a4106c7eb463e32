"""The share of right answers to a task: one outcome per instance and group, the same in batches as alone."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from parloop.corpus import train_tokenizer
from parloop.corpus.tasks import HELD_OUT, Encoder, task_of
from parloop.errors import SourceError
from parloop.train.task_accuracy import task_accuracy
from tests.helpers.models import tiny_model


def model_of(task, **changes):
    return tiny_model(vocab_size=3 + len(task.symbols), dtype=torch.float32, **changes)


@pytest.mark.parametrize("source", ["task:parity,length=16", "task:hops", "task:hops,trace", "task:run"])
@pytest.mark.parametrize("loops", [None, 1])
def test_outcomes_are_those_of_each_document_alone(source, loops):
    task = task_of(source)
    model = model_of(task)
    encode = Encoder(task, task.tokenizer())
    result = task_accuracy(model, task, loops=loops, instances=5, seed=3)
    assert result.groups == list(task.groups)
    assert result.chance == [task.chance(g) for g in task.groups]
    for i in range(5):
        for column, group in enumerate(task.groups):
            document = encode(task.document(i, HELD_OUT, 3, None if task.asks_every_group else group))
            with torch.no_grad():
                logits = model(torch.tensor(document.input_ids[None]).long(), num_loops=loops).logits[0, :-1]
            at = document.groups[1:] == group
            targets = torch.tensor(document.labels[1:][at]).long()
            assert result.nll[i, column] == pytest.approx(F.cross_entropy(logits[at], targets).item(), abs=1e-4)
            if not task.is_written:
                right = (logits[at].argmax(-1) == targets).float().mean().item()
                assert result.correct[i, column] == pytest.approx(right)
                assert result.exact[i, column] == (right == 1)
    assert result.written.any() == task.is_written
    assert not model.training


def test_few_instances_are_the_first_of_many():
    task = task_of("task:hops")
    model = model_of(task)
    few, many = (task_accuracy(model, task, instances=n) for n in (3, 6))
    assert np.allclose(few.nll, many.nll[:3], atol=1e-5)
    assert np.array_equal(few.correct, many.correct[:3])
    other = task_accuracy(model, task, instances=3, seed=1)
    assert not np.allclose(few.nll, other.nll, atol=1e-3)
    some = task_accuracy(model, task, instances=3, groups=[5, 2])
    assert some.groups == [5, 2]
    assert np.allclose(some.nll, few.nll[:, [4, 1]], atol=1e-5)


@pytest.mark.parametrize("source", ["task:hops,trace", "task:run,trace,levels=3"])
def test_a_model_writes_the_same_in_a_batch_as_alone(source, monkeypatch):
    task = task_of(source)
    model = model_of(task)
    together = {}
    generate = model.generate

    def recorded(ids, attention_mask, **options):
        output = generate(ids, attention_mask=attention_mask, **options)
        for prompt, mask, row in zip(ids, attention_mask, output):
            together[tuple(prompt[mask.bool()].tolist())] = row[len(prompt) :].tolist()
        return output

    monkeypatch.setattr(model, "generate", recorded)
    task_accuracy(model, task, instances=3)
    assert len(together) == 3 * len(task.groups)
    assert len({len(prompt) for prompt in together}) > 1 or task.name == "hops"  # so some were padded
    for prompt, written in together.items():
        alone = generate(
            torch.tensor([prompt]), max_new_tokens=len(written), do_sample=False, eos_token_id=2, pad_token_id=0
        )
        alone = alone[0, len(prompt) :].tolist()
        assert written[: len(alone)] == alone
        assert set(written[len(alone) :]) <= {0}


@pytest.mark.parametrize("source", ["task:hops,trace", "task:run,trace,levels=3"])
def test_a_written_answer_counts_if_the_text_ends_with_it(source, monkeypatch):
    task = task_of(source)
    model = model_of(task)
    encode = Encoder(task, task.tokenizer())
    true = {}
    for i in range(6):
        for group in task.groups:
            document = encode(task.document(i, HELD_OUT, 0, group))
            true[tuple(document.input_ids[: document.prompt])] = (i, group, document.input_ids[document.prompt :].tolist())

    def generate(ids, attention_mask, max_new_tokens, **options):
        rows = []
        for prompt, mask in zip(ids, attention_mask):
            i, _, written = true[tuple(prompt[mask.bool()].tolist())]
            answer, eos = written[-2:]
            wrong = 3 + (answer - 2) % len(task.symbols)
            written = {
                0: written,  # right
                1: [answer, eos],  # right, without its steps
                2: [*written[:-2], wrong, eos],  # wrong
                3: [*written[:-1], wrong, eos],  # goes on after the answer
                4: written[:-1],  # does not end
                5: [eos],  # says nothing
            }[i]
            rows.append(written + [answer if i == 4 else 0] * (max_new_tokens - len(written)))
        return torch.cat((ids, torch.tensor(rows)), 1)

    monkeypatch.setattr(model, "generate", generate)
    result = task_accuracy(model, task, instances=6)
    assert result.exact.tolist() == [[right] * len(task.groups) for right in (True, True, False, False, False, False)]
    assert np.array_equal(result.correct, result.exact)
    lengths = {(i, group): len(written) - 1 for i, group, written in true.values()}
    assert result.written[0].tolist() == [lengths[0, group] for group in task.groups]
    assert result.written[1].tolist() == [1] * len(task.groups)
    assert result.written[5].tolist() == [0] * len(task.groups)


def test_what_cannot_be_asked_is_named():
    task = task_of("task:hops")
    with pytest.raises(SourceError, match="no hops 7: it has 1, 2, 3"):
        task_accuracy(model_of(task), task, groups=[7], instances=1)
    with pytest.raises(SourceError, match="instances=0"):
        task_accuracy(model_of(task), task, instances=0)
    with pytest.raises(SourceError, match="embedding 5 rows"):
        task_accuracy(model_of(task_of("task:parity")), task, instances=1)


def test_a_given_tokenizer_is_used():
    task = task_of("task:hops")
    tokenizer = train_tokenizer(["a b c"], 300)
    result = task_accuracy(tiny_model(vocab_size=300, dtype=torch.float32), task, instances=2, tokenizer=tokenizer)
    assert result.nll.shape == (2, 6)
    assert (result.nll > 0).all()
