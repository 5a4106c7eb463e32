"""Training on a task, and looking at what was trained on it."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from parloop.corpus import CorpusSettings, load_corpus, train_tokenizer
from parloop.corpus.samples import padded_batches, samples_of
from parloop.corpus.tasks import HELD_OUT, Encoder, task_of
from parloop.diagnosis.checkpoint import diagnose_checkpoint
from parloop.diagnosis.diagnosis import diagnose
from parloop.errors import DiagnosisError, RecipeError, SourceError
from parloop.train import Recipe
from parloop.train.task_accuracy import task_accuracy
from parloop.train.training import train
from tests.helpers.models import tiny_model

QUIET = Console(quiet=True)


def recipe_of(source="task:parity,length=16", **changes):
    settings = {
        "source": source, "length": 40, "loops": 2, "hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 48,
        "window_tokens": 4, "tokens": 40 * 4 * 40, "batch_size": 4, "learning_rate": 1e-2, "log_every": 1, "eval_every": 20,
        "eval_rows": 4, "save_every": 7, "device": "cpu",
    }  # fmt: skip
    return Recipe(**(settings | changes))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "parity"
    return folder, train(recipe_of(), folder, console=QUIET)


def test_a_run_on_a_task_learns_its_answers(finished):
    folder, result = finished
    losses = [loss for _, loss in result.loss_curve]
    assert len(losses) == 40
    assert np.mean(losses[-5:]) < 0.72 < losses[0]  # ln 2 is a guess; there are five symbols
    assert [step for step, _ in result.validation_curve] == [20, 40]
    answers = json.loads((folder / "training.json").read_text())["answers"]
    assert answers == result.answers
    assert [row["group"] for row in answers["groups"]] == [4, 8, 12, 16, 32, 64, 128]
    for row in answers["groups"]:
        value, low, high = row["correct"]
        assert low < value < high
        assert row["chance"] == 0.5
        assert row["nll"][0] < 0.8


def test_its_model_is_asked_with_its_own_tokenizer(finished):
    folder, result = finished
    task = task_of("task:parity,length=16")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert Encoder(task, tokenizer).is_own
    assert model.config.vocab_size == 5
    assert model.config.max_position_embeddings == 8 * 40  # held-out texts are eight times as long
    again = task_accuracy(model, task, tokenizer=tokenizer)
    assert again.summary() == result.answers


def test_an_interrupted_run_goes_on_to_the_same_end(finished, tmp_path):
    class StopError(Exception):
        pass

    def stop(step, loss):
        if step == 17:
            raise StopError

    with pytest.raises(StopError):
        train(recipe_of(), tmp_path / "run", console=QUIET, on_step=stop)
    result = train(recipe_of(), tmp_path / "run", console=QUIET)
    assert result.loss_curve == finished[1].loss_curve


def test_seeds_train_on_other_documents(tmp_path):
    first = [
        train(recipe_of(seed=seed, tokens=160, eval_every=0), tmp_path / str(seed), console=QUIET).loss_curve
        for seed in (0, 1)
    ]
    assert first[0] != first[1]


@pytest.mark.parametrize(
    ("changes", "kind", "named"),
    [
        ({"source": "task:sudoku"}, SourceError, "no task 'sudoku'; known are task:parity"),
        ({"source": "task:parity,size=3"}, SourceError, "unknown option 'size'"),
        ({"length": 17}, SourceError, "has 18 tokens, and a row length=17: raise length"),
        (
            {"source": "stdlib", "mixture": [{"source": "task:parity", "weight": 1}], "data_streams": 4},
            RecipeError,
            "'task:parity' is a task, which cannot be part of a mixture",
        ),
    ],
)
def test_what_does_not_fit_is_named_before_training(changes, kind, named, tmp_path):
    with pytest.raises(kind, match=named):
        train(recipe_of(**changes), tmp_path / "run", console=QUIET)
    assert not list(tmp_path.glob("run/checkpoint-*"))


def test_a_tokenizer_that_cannot_spell_the_task_is_named(tmp_path):
    train_tokenizer(["some words of a text"] * 3, 259).save_pretrained(tmp_path / "tokenizer")
    recipe = recipe_of("task:s5,length=8", tokenizer=str(tmp_path / "tokenizer"), vocab_size=259)
    with pytest.raises(SourceError, match=r"takes 5 tokens for the answer .*leave the tokenizer out"):
        train(recipe, tmp_path / "run", console=QUIET)


def test_a_given_tokenizer_is_trained_with(tmp_path):
    train_tokenizer(["0 1 1 0"] * 3, 270).save_pretrained(tmp_path / "tokenizer")
    recipe = recipe_of(tokenizer=str(tmp_path / "tokenizer"), vocab_size=270, tokens=160, eval_every=0)
    result = train(recipe, tmp_path / "run", console=QUIET)
    assert 5.0 < result.loss_curve[0][1] < 6.2  # of 270 tokens
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run").config.vocab_size == 270


def test_a_task_is_read_as_text_by_nobody(tmp_path):
    with pytest.raises(SourceError, match="'task:hops' is a task, whose documents are made and not read"):
        load_corpus(recipe_of("task:hops").corpus_settings(), tmp_path, QUIET)


# Diagnosis


def test_a_diagnosis_measures_the_answers_of_held_out_documents(finished):
    folder, _ = finished
    record = diagnose_checkpoint(folder, samples=6, length=17, batch_size=3, console=QUIET)
    assert record.settings["data"] == "task:parity,length=16"
    assert record.settings["trained_on_this_text"].startswith("no: no training on a task uses its held-out documents")
    task, model = task_of("task:parity,length=16"), AutoModelForCausalLM.from_pretrained(folder)
    encode = Encoder(task, task.tokenizer())
    expected = []
    for i in range(6):
        document = encode(task.document(i, HELD_OUT))
        with torch.no_grad():
            logits = model(torch.tensor(document.input_ids[None, :17]).long()).logits[0, 1:-1]
        expected.append(F.cross_entropy(logits, torch.tensor(document.labels[2:17]).long()).item())
    found = [values[-1] for values in record.diagnosis.values["loss"]]
    assert sorted(found) == pytest.approx(sorted(expected), abs=1e-5)


def test_a_diagnosis_says_when_the_task_was_trained_on_with_other_options(finished):
    record = diagnose_checkpoint(finished[0], data="task:parity,length=20", samples=2, length=20, console=QUIET)
    assert record.settings["trained_on_this_text"].startswith("may be: ")
    assert "task:parity,length=16" in record.settings["trained_on_this_text"]


def test_a_diagnosis_of_too_short_samples_says_how_long_they_must_be(finished):
    with pytest.raises(SourceError, match=r"asks nothing in the first length=2 tokens .* at least 3"):
        diagnose_checkpoint(finished[0], samples=2, length=2, console=QUIET)


def test_a_diagnosis_with_a_tokenizer_that_does_not_know_the_task_is_refused(finished):
    with pytest.raises(SourceError, match="cannot spell 'task:hops'"):
        diagnose_checkpoint(finished[0], data="task:hops", samples=2, console=QUIET)


def test_padded_samples_of_a_task_count_their_labels_alone(finished):
    task = task_of("task:run,levels=2")
    rows = samples_of(CorpusSettings(source=task.source), task.tokenizer(), 64, 4, held_out=True)
    assert len({len(row.ids) for row in rows}) > 1
    (batch,) = padded_batches(rows, 4)
    assert (batch["labels"] >= 0).sum(1).tolist() == [1] * 4
    model = tiny_model(vocab_size=3 + len(task.symbols), dtype=torch.float32)
    diagnosis = diagnose(model, [batch])
    with torch.no_grad():
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    loss = F.cross_entropy(logits.transpose(1, 2), batch["labels"][:, 1:], reduction="none").sum(1)
    assert diagnosis.values["loss"][:, -1] == pytest.approx(loss.numpy(), abs=1e-5)
    batch["labels"][0] = -100
    with pytest.raises(DiagnosisError, match="has labels, but none"):
        diagnose(model, [batch])
