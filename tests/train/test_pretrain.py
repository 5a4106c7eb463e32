"""Training runs: they learn, they resume exactly, and they stop when they are lost."""

import dataclasses
import io
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from huggingface_hub import ModelCard
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.llama.modeling_llama import LlamaMLP

from parloop.cli import main
from parloop.corpus import load_corpus
from parloop.errors import CheckpointError, OutputError, RecipeError, TrainingDivergedError
from parloop.model.modeling import PLTForCausalLM
from parloop.train import ChatRecipe, Recipe
from parloop.train.build import build_model
from parloop.train.checkpoint import last_whole_checkpoint, load_weights
from parloop.train.data import whole_batches
from parloop.train.export import export
from parloop.train.result import TrainingResult
from parloop.train.run import LEFT_OVER, TRAINED_ON, bytes_to_come
from parloop.train.trainer import drawn_loops
from parloop.train.training import train
from tests.helpers.sources import write_sources

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return Recipe(
        source=str(write_sources(tmp_path_factory.mktemp("source"))),
        vocab_size=300,
        length=32,
        validation_share=0.2,
        hidden_size=32,
        num_hidden_layers=2,
        intermediate_size=48,
        window_tokens=8,
        tokens=30 * 4 * 32,
        batch_size=4,
        log_every=1,
        eval_every=10,
        eval_rows=8,
        save_every=7,
        device="cpu",
    )


@pytest.fixture(scope="module")
def corpus(recipe, tmp_path_factory):
    return load_corpus(recipe.corpus_settings(), tmp_path_factory.mktemp("cache"), QUIET)


@pytest.fixture(scope="module")
def finished(recipe, corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return folder, train(recipe, folder, corpus=corpus, console=QUIET)


def changed(recipe, **changes):
    return Recipe(**(vars(recipe) | changes))


def test_a_run_learns_and_leaves_a_usable_model(recipe, finished):
    folder, result = finished
    losses = [loss for _, loss in result.loss_curve]
    assert len(losses) == recipe.steps == 30
    assert losses[-1] < losses[0] - 1.5
    assert [step for step, _ in result.validation_curve] == [10, 20, 30]
    assert result.validation_curve[-1][1] < result.validation_curve[0][1]
    assert result.tokens == recipe.tokens
    assert not list(folder.glob("checkpoint-*"))
    assert any(folder.rglob("events.out.tfevents*"))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    output = model.generate(**tokenizer("def ", return_tensors="pt"), max_new_tokens=5)
    assert output.shape[1] > 3
    assert model.config.eos_token_id == tokenizer.eos_token_id


def test_a_finished_run_is_left_alone(recipe, finished, monkeypatch):
    folder, result = finished
    monkeypatch.setattr("parloop.train.pretrain.build_model", None)
    assert train(recipe, folder, console=QUIET) == result


def test_the_result_is_what_the_file_holds(finished):
    folder, result = finished
    assert result.folder == folder
    assert TrainingResult.load(folder) == result == TrainingResult.from_json(result.to_json())
    content = json.loads((folder / "training.json").read_text())
    assert content.pop("format") == 1
    assert TrainingResult.from_json(json.dumps(content)) == result  # of versions that wrote no format
    with pytest.raises(ValueError, match="its format is 2"):
        TrainingResult.from_json(json.dumps(content | {"format": 2}))
    assert f"30 steps, 3,840 tokens, {result.seconds:.0f} s" in result.format()


def test_python_and_the_command_line_do_the_same(recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PARLOOP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.chdir(tmp_path)
    changed(recipe, tokens=2 * 4 * 32, eval_every=0).save("mine.yaml")
    result = train("mine.yaml", changes={"loops": [1, 2]}, console=QUIET)
    assert result.folder == Path("runs/train/mine-r1-2")
    monkeypatch.setattr(sys, "argv", ["parloop", "train", "mine.yaml", "--loops", "1", "2"])
    with pytest.raises(SystemExit, match="0"):
        main()  # finished already
    assert capsys.readouterr().out == result.format(400)
    assert "model: runs/train/mine-r1-2\nnext:  parloop generate runs/train/mine-r1-2 'def '" in result.format(400)
    with pytest.raises(RecipeError, match="a recipe object needs an output folder"):
        train(recipe, console=QUIET)


def test_the_model_card_says_how_the_model_is_loaded(recipe, finished, tmp_path, monkeypatch, capsys):
    folder, result = finished
    card = ModelCard.load(folder / "README.md")
    assert (card.data.library_name, card.data.pipeline_tag, card.data.license) == (
        "transformers",
        "text-generation",
        "unknown",
    )
    text = card.text
    assert f"with {result.parameters:,} parameters" in text
    assert "| trained at R | 2 |" in text
    assert f"| 30 | {result.loss_curve[-1][1]:.4f} | {result.validation_curve[-1][1]:.4f} |" in text
    assert "| `source0` | 1 |" in text
    assert str(Path(recipe.source).parent) not in text  # it is made to be published
    monkeypatch.chdir(folder.parent)
    exec(text.split("```python\n")[1].split("```")[0], {})
    assert "def " in capsys.readouterr().out


def test_a_model_card_of_others_stays(recipe, corpus, tmp_path):
    def card(step, loss):
        (tmp_path / "run" / "README.md").write_text("my model card")

    short = changed(recipe, tokens=2 * 4 * 32, eval_every=0)
    train(short, tmp_path / "run", corpus=corpus, console=QUIET, on_step=card)
    assert (tmp_path / "run" / "README.md").read_text() == "my model card"
    # Also in the folder of a version that left no claim, and wrote no card.
    for name in ("parloop.json", "training.json"):
        (tmp_path / "run" / name).unlink()
    train(short, tmp_path / "run", corpus=corpus, console=QUIET)
    assert (tmp_path / "run" / "README.md").read_text() == "my model card"


def test_another_objective_stands_beside_the_next_token(recipe, corpus, tmp_path, finished, monkeypatch):
    """It is what is trained; validation losses stay those of the next token."""

    def twice(model, **inputs):
        output = model(**inputs)
        assert model.training
        output.loss = 2 * output.loss
        return output

    monkeypatch.setattr("parloop.train.pretrain.PLTTrainer.objective", staticmethod(twice))
    short = changed(recipe, tokens=10 * 4 * 32)
    result = train(short, tmp_path / "run", corpus=corpus, console=QUIET)
    assert result.loss_curve[0][1] == pytest.approx(2 * finished[1].loss_curve[0][1], rel=1e-5)
    assert result.validation_curve[0][1] < result.loss_curve[-1][1] / 1.5


class StopError(Exception):
    pass


@pytest.mark.parametrize("stop_after", [3, 16])
def test_an_interrupted_run_continues_to_the_same_result(recipe, corpus, finished, tmp_path, stop_after):
    """Before the first checkpoint, and between two."""

    def stop(step, loss):
        if step == stop_after:
            raise StopError

    with pytest.raises(StopError):
        train(recipe, tmp_path / "run", corpus=corpus, console=QUIET, on_step=stop)
    saved = last_whole_checkpoint(tmp_path / "run")
    assert (saved is None) == (stop_after < recipe.save_every)
    result = train(recipe, tmp_path / "run", corpus=corpus, console=QUIET)
    assert_same_run(finished, (tmp_path / "run", result))


def assert_same_run(one, two):
    (folder, result), (other_folder, other) = one, two
    assert [step for step, _ in other.loss_curve] == [step for step, _ in result.loss_curve]
    for (_, a), (_, b) in zip(result.loss_curve, other.loss_curve):
        assert a == pytest.approx(b, abs=1e-5)
    weights, other_weights = load_file(folder / "model.safetensors"), load_file(other_folder / "model.safetensors")
    for name, tensor in weights.items():
        torch.testing.assert_close(other_weights[name], tensor, atol=1e-6, rtol=1e-5)


def test_a_run_killed_after_its_last_checkpoint_trains_no_further(recipe, corpus, finished, tmp_path, monkeypatch):
    """Between the last checkpoint and training.json; the time comes with the checkpoint."""

    def killed(*_, **__):
        raise StopError

    with monkeypatch.context() as patch:
        patch.setattr("parloop.train.training.close_run", killed)
        with pytest.raises(StopError):
            train(recipe, tmp_path / "run", corpus=corpus, console=QUIET)
    assert last_whole_checkpoint(tmp_path / "run").name == "checkpoint-30"
    steps = []
    result = train(recipe, tmp_path / "run", corpus=corpus, console=QUIET, on_step=lambda step, _: steps.append(step))
    assert steps == []
    assert result.tokens_per_second > 0
    assert result.seconds > 0
    assert_same_run(finished, (tmp_path / "run", result))


def test_time_is_summed_over_interruptions(recipe, corpus, tmp_path):
    def stop(step, loss):
        if step == 16:
            raise StopError

    with pytest.raises(StopError):
        train(recipe, tmp_path / "run", corpus=corpus, console=QUIET, on_step=stop)
    path = last_whole_checkpoint(tmp_path / "run") / "trainer_state.json"
    state = json.loads(path.read_text())
    state["stateful_callbacks"]["Clock"]["attributes"]["seconds"] += 1000
    path.write_text(json.dumps(state))
    assert 1000 < train(recipe, tmp_path / "run", corpus=corpus, console=QUIET).seconds < 1100


def test_fewer_steps_than_log_every(recipe, corpus, tmp_path):
    result = train(changed(recipe, tokens=3 * 4 * 32, log_every=10), tmp_path / "run", corpus=corpus, console=QUIET)
    assert [step for step, _ in result.loss_curve] == [3]


def test_every_step_has_all_its_rows(recipe, corpus, tmp_path):
    """Also the last one of an epoch, which would else be counted with tokens it does not have."""
    rows = len(corpus.train)
    odd = next(n for n in range(8, 100) if rows % n)
    uneven = changed(recipe, batch_size=2 * odd, gradient_accumulation=2)
    kept = len(whole_batches(corpus, uneven))
    assert kept % (2 * odd) == 0
    assert 0 < rows - kept < 2 * odd
    with pytest.raises(RecipeError, match=rf"has {rows} rows of length=32 .* takes 100000 .*lower batch_size"):
        whole_batches(corpus, changed(recipe, batch_size=100_000))


def test_a_changed_source_is_not_mixed_with_the_old_one(recipe, corpus, tmp_path):
    short = changed(recipe, tokens=2 * 4 * 32, eval_every=0)
    train(short, tmp_path / "run", corpus=corpus, console=QUIET)
    other = dataclasses.replace(corpus, summary=corpus.summary | {"digest": "another"})
    with pytest.raises(RecipeError, match=r"has changed since the run in .* --fresh, or choose another --output"):
        train(short, tmp_path / "run", corpus=other, console=QUIET)
    (tmp_path / "run" / "training.json").unlink()
    with pytest.raises(RecipeError, match="has changed"):
        train(short, tmp_path / "run", corpus=other, console=QUIET)
    (tmp_path / "run" / TRAINED_ON).unlink()  # a run that was made without it
    assert train(short, tmp_path / "run", corpus=other, console=QUIET).steps == 2


def test_fresh_deletes_runs_and_nothing_else(recipe, corpus, tmp_path):
    short = changed(recipe, tokens=2 * 4 * 32, eval_every=0)
    (tmp_path / "thesis.tex").write_text("")
    for output, message in ((tmp_path, r"holds no run \(thesis.tex\)"), (tmp_path / "thesis.tex", "is a file")):
        with pytest.raises(OutputError, match=message):
            train(short, output, corpus=corpus, console=QUIET, fresh=True)
    short.save(tmp_path / "recipe.yaml")  # a folder of recipes is no run either
    with pytest.raises(OutputError, match=r"holds no run \(recipe.yaml, thesis.tex\)"):
        train(short, tmp_path, corpus=corpus, console=QUIET, fresh=True)
    assert (tmp_path / "thesis.tex").exists()
    (tmp_path / "run").mkdir()
    train(short, tmp_path / "run", corpus=corpus, console=QUIET, fresh=True)
    (tmp_path / "run" / "checkpoint-99").mkdir()
    train(short, tmp_path / "run", corpus=corpus, console=QUIET, fresh=True)
    assert not (tmp_path / "run" / "checkpoint-99").exists()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"holds more than a run \(notes.txt\), so it is not deleted: move these away"):
        train(short, tmp_path / "run", corpus=corpus, console=QUIET, fresh=True)
    assert (tmp_path / "run" / "training.json").exists()


@pytest.mark.parametrize("fresh", [False, True])
def test_what_is_read_is_not_written_to_nor_deleted(recipe, finished, tmp_path, fresh):
    shutil.copytree(finished[0], tmp_path / "model")
    (tmp_path / "model" / "texts").mkdir()
    for changes, what in [
        ({"init_from": str(tmp_path / "model")}, "init_from"),
        ({"tokenizer": str(tmp_path / "model")}, "tokenizer"),
        ({"source": str(tmp_path / "model" / "texts" / "*.py")}, "source"),
    ]:
        with pytest.raises(RecipeError, match=rf"holds what is read \({what}"):
            train(changed(recipe, **changes), tmp_path / "model", console=QUIET, fresh=fresh)
    with pytest.raises(RecipeError, match=r"holds what is read \(model\)"):
        train(
            ChatRecipe(model=str(tmp_path / "model"), chat="x.jsonl", length=32),
            tmp_path / "model",
            console=QUIET,
            fresh=fresh,
        )
    assert (tmp_path / "model" / "model.safetensors").exists()


def test_a_file_in_the_place_of_the_folder(recipe, tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(OutputError, match="is a file: choose a folder"):
        train(recipe, tmp_path / "run", console=QUIET)


def test_the_cursor_comes_back_after_an_error(recipe, corpus, tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("parloop.train.pretrain.PLTTrainer.training_step", interrupted)
    terminal = Console(file=io.StringIO(), force_terminal=True, width=100)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, tmp_path / "run", corpus=corpus, console=terminal)
    shown = terminal.file.getvalue()
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")


def test_a_gpu_that_is_not_there(recipe, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(RecipeError, match="device='cuda', but torch finds no GPU here: use --device cpu"):
        train(changed(recipe, device="cuda"), tmp_path / "run", corpus=corpus, console=QUIET)


def test_kill_minus_nine(recipe, finished, tmp_path):
    """The command line, killed while it trains, run again."""
    slow = changed(recipe, save_every=2)
    slow.save(tmp_path / "recipe.yaml")
    command = [sys.executable, "-m", "parloop", "train", str(tmp_path / "recipe.yaml"), "--output", str(tmp_path / "run")]
    environment = os.environ | {"PARLOOP_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    deadline = time.time() + 120
    while not list((tmp_path / "run").glob("checkpoint-*")) and process.poll() is None and time.time() < deadline:
        time.sleep(0.02)
    with pytest.raises(OutputError, match=rf"another run works in .*run' \(parloop: process {process.pid}\): wait for it"):
        train(slow, tmp_path / "run", console=QUIET)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "run" / "training.json").exists()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "30 steps" in done.stdout
    assert_same_run(finished, (tmp_path / "run", TrainingResult.load(tmp_path / "run")))


def test_half_a_checkpoint_is_passed_over(recipe, tmp_path):
    whole, half, torn = (tmp_path / f"checkpoint-{n}" for n in (7, 14, 21))
    for folder in (whole, half, torn):
        folder.mkdir()
    (whole / "trainer_state.json").write_text("{}")
    (torn / "trainer_state.json").write_text('{"epoch": 0.')
    assert last_whole_checkpoint(tmp_path) == whole
    assert not half.exists()


def test_another_recipe_in_the_same_folder_is_refused(recipe, finished):
    folder, _ = finished
    with pytest.raises(
        RecipeError, match=r"another recipe \(learning_rate .* -> 0.5\): choose another output, or start over"
    ):
        train(changed(recipe, learning_rate=0.5), folder, console=QUIET)


def test_a_folder_with_other_files_is_refused(recipe, tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(OutputError, match="is not empty and holds no run"):
        train(recipe, tmp_path, console=QUIET)
    assert (tmp_path / "thesis.tex").exists()


def test_a_diverging_run_is_stopped(recipe, corpus, tmp_path):
    wild = changed(recipe, learning_rate=30.0, warmup_share=0.0, max_grad_norm=1e9, tokens=200 * 4 * 32)
    with pytest.raises(TrainingDivergedError, match="Lower learning_rate"):
        train(wild, tmp_path / "run", corpus=corpus, console=QUIET)


def test_nan_is_stopped_at_once(recipe, corpus, tmp_path, monkeypatch):
    from parloop.train import pretrain

    def broken(*arguments):
        model = build_model(*arguments)
        with torch.no_grad():
            model.lm_head.weight[3] = torch.nan
        return model

    monkeypatch.setattr(pretrain, "build_model", broken)
    with pytest.raises(TrainingDivergedError, match="the loss is nan at step 1"):
        train(recipe, tmp_path / "run", corpus=corpus, console=QUIET)


def test_gradient_accumulation_is_the_same_run(recipe, corpus, finished, tmp_path):
    result = train(changed(recipe, gradient_accumulation=2), tmp_path / "run", corpus=corpus, console=QUIET)
    for (_, a), (_, b) in zip(finished[1].loss_curve, result.loss_curve):
        assert a == pytest.approx(b, abs=1e-5)


def test_loop_counts_start_from_the_same_draws(recipe):
    one, three = (build_model(changed(recipe, loops=n)).state_dict() for n in (1, 3))
    for name, tensor in one.items():
        ratio = 3**-0.5 if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
        torch.testing.assert_close(three[name], tensor * ratio)
    assert [name for name in three if name not in one and three[name].any() and "norm" not in name] == []
    assert not torch.equal(build_model(changed(recipe, seed=1)).state_dict()["lm_head.weight"], one["lm_head.weight"])


@pytest.mark.parametrize("name", ["quick", "laptop", "gpu", "loopcoder-v2-7b"])
def test_shipped_recipes_run_at_tiny_size(name, recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("PARLOOP_CACHE", str(tmp_path / "cache"))
    tiny = {
        "vocab_size": 300,
        "length": 32,
        "max_bytes": 0,
        "validation_share": 0.2,
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "head_dim": None,
        "tokenizer": None,
    }
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64}
    source = None if name == "loopcoder-v2-7b" else recipe.source
    small = Recipe.load(name, source=source, window_tokens=8, device="cpu", eval_every=2, eval_rows=2)
    if small.mixture:
        texts = {}
        for part in small.mixture:
            path = tmp_path / part["source"].replace("*.parquet", "0.parquet")
            path.parent.mkdir(parents=True)
            texts[path] = [f"{path.parent.name} {i} " * (1 + i % 5) for i in range(300)]
            Dataset.from_dict({"text": texts[path]}).to_parquet(path)
        monkeypatch.chdir(tmp_path)
        small = changed(small, data_streams=2, batch_size=64, max_bytes=20_000, save_every=2)
    small = changed(small, **tiny, **heads)
    small = changed(small, tokens=3 * small.batch_size * 32, log_every=1)
    result = train(small, tmp_path / "run", console=QUIET)
    assert result.steps == 3
    assert result.loss_curve[-1][1] < result.loss_curve[0][1] + 0.1
    if small.mixture:
        read = {part["source"].split("/")[-2]: part["tokens"] for part in result.data}
        assert read["text"] == pytest.approx(sum(read.values()) / 2, rel=0.2)
        assert read["java"] == pytest.approx(sum(read.values()) / 2 * 0.103, rel=0.3)


def mixed(recipe, tmp_path, **changes):
    """A recipe on two sources, one of them in lines with a bad one."""
    rows = [json.dumps({"text": f"def f{i}(x):\n    return x + {i}\n"}) for i in range(400)]
    (tmp_path / "rows.jsonl").write_text("\n".join(["{", *rows]))
    mixture = [{"source": recipe.source, "weight": 1.0}, {"source": str(tmp_path / "rows.jsonl"), "weight": 3.0}]
    fields = {"source": "stdlib", "mixture": mixture, "data_streams": 2, "shuffle_documents": 6}
    return changed(recipe, **(fields | changes))


def test_an_interrupted_mixture_continues_to_the_same_result(recipe, tmp_path):
    small = mixed(recipe, tmp_path)
    whole = train(small, tmp_path / "whole", console=QUIET)

    def stop(step, loss):
        if step == 16:
            raise StopError

    with pytest.raises(StopError):
        train(small, tmp_path / "run", console=QUIET, on_step=stop)
    result = train(small, tmp_path / "run", console=QUIET)
    assert_same_run((tmp_path / "whole", whole), (tmp_path / "run", result))
    assert result.data == whole.data
    assert sum(part["tokens"] for part in result.data) >= recipe.tokens
    assert result.data[1]["left_out"] == {"not JSON": 1}
    assert not list((tmp_path / "run").glob("stream-*"))
    assert AutoTokenizer.from_pretrained(tmp_path / "run").vocab_size == 300


def test_a_changed_mixture_is_not_gone_on_with(recipe, tmp_path):
    small = mixed(recipe, tmp_path, eval_every=0)

    def stop(step, loss):
        if step == 8:
            raise StopError

    with pytest.raises(StopError):
        train(small, tmp_path / "run", console=QUIET, on_step=stop)
    with open(tmp_path / "rows.jsonl", "a") as file:
        file.write('\n{"text": "more"}')
    with pytest.raises(RecipeError, match="source 'mixture' has changed since the run"):
        train(small, tmp_path / "run", console=QUIET)


def test_a_mixture_without_held_out_text(recipe, tmp_path):
    with pytest.raises(RecipeError, match=r"fill no row of length=32: raise validation_share, .* or set eval_every: 0"):
        train(mixed(recipe, tmp_path, validation_share=1e-9), tmp_path / "run", console=QUIET)


def test_a_mixture_with_a_tokenizer_that_is_there(recipe, finished, tmp_path):
    small = mixed(recipe, tmp_path, tokenizer=str(finished[0]), tokens=4 * 4 * 32)
    train(small, tmp_path / "run", console=QUIET)
    one, other = (AutoTokenizer.from_pretrained(folder).get_vocab() for folder in (finished[0], tmp_path / "run"))
    assert one == other


def test_another_loop_count_at_every_step(recipe, corpus, tmp_path, recwarn, monkeypatch):
    both, forward, given = changed(recipe, loops=[1, 2]), PLTForCausalLM.forward, []

    def seen(self, *args, **kwargs):
        if self.training:
            given.append(kwargs.get("num_loops"))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(PLTForCausalLM, "forward", seen)
    result = train(both, tmp_path / "run", corpus=corpus, console=QUIET)
    monkeypatch.setattr(PLTForCausalLM, "forward", forward)
    drawn = [drawn_loops([1, 2], 0, step) for step in range(30)]
    assert given == drawn
    assert 8 < drawn.count(1) < 22
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    assert model.config.trained_loops == [1, 2]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    for loops in (1, 2):
        model.generate(**tokenizer("def ", return_tensors="pt"), max_new_tokens=2, num_loops=loops)
    assert not [w for w in recwarn if "num_loops" in str(w.message)]

    def stop(step, loss):
        if step == 16:
            raise StopError

    with pytest.raises(StopError):
        train(both, tmp_path / "again", corpus=corpus, console=QUIET, on_step=stop)
    again = train(both, tmp_path / "again", corpus=corpus, console=QUIET)
    assert_same_run((tmp_path / "run", result), (tmp_path / "again", again))


def test_a_converted_model_is_trained_on(recipe, corpus, tmp_path):
    """From a dense model to a PLT; c grows to its value, and the weights, tokenizer and generation settings are the checkpoint's."""
    from parloop.convert import convert

    dense = changed(recipe, loops=1, eval_every=0, length=32)
    train(dense, tmp_path / "dense", corpus=corpus, console=QUIET)
    (tmp_path / "dense" / "generation_config.json").write_text('{"temperature": 0.5, "do_sample": true, "eos_token_id": 2}')
    convert(tmp_path / "dense", tmp_path / "plt", loops=2, window=8, hidden_scale=0.25)
    # Fields of the model are the checkpoint's, whatever the recipe says.
    more = changed(recipe, init_from=str(tmp_path / "plt"), hidden_size=64, hidden_scale_warmup_share=0.5, eval_every=0)
    scales = []

    def seen(step, loss):
        if step == 16:
            scales.append(json.loads((tmp_path / "run/checkpoint-14/config.json").read_text())["plt_hidden_scale"])

    result = train(more, tmp_path / "run", corpus=corpus, console=QUIET, on_step=seen)
    assert scales[0] == pytest.approx(0.25 * 13 / 15)
    first = json.loads((tmp_path / "dense" / "training.json").read_text())["loss_curve"][-1][1]
    assert result.loss_curve[0][1] < first + 0.3
    assert result.loss_curve[-1][1] < first
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    assert (model.config.hidden_size, model.config.plt_hidden_scale, model.config.num_loops) == (32, 0.25, 2)
    assert model.generation_config.temperature == 0.5
    with pytest.raises(RecipeError, match="has 2 loops and the recipe 3: set loops: 2"):
        train(changed(more, loops=3), tmp_path / "other", corpus=corpus, console=QUIET)
    with pytest.raises(RecipeError, match="length=64 is more than the 32 tokens"):
        build_model(changed(more, length=64))
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        build_model(changed(more, init_from=str(tmp_path / "no")))


def test_checkpoints_are_models_already(recipe, corpus, tmp_path):
    def stop(step, loss):
        if step == 8:
            raise StopError

    with pytest.raises(StopError):
        train(recipe, tmp_path / "run", corpus=corpus, console=QUIET, on_step=stop)
    checkpoint = tmp_path / "run" / "checkpoint-7"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
    assert model.generate(**tokenizer("def ", return_tensors="pt"), max_new_tokens=3).shape[1] > 3
    exported = export(checkpoint, tmp_path / "exported")
    with pytest.raises(OutputError, match="exported' exists and is not empty: choose another folder"):
        export(checkpoint, tmp_path / "exported")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match="is a file: choose a folder"):
        export(checkpoint, tmp_path / "file" / "exported")
    other = AutoModelForCausalLM.from_pretrained(exported)
    for name, tensor in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor)
    assert AutoTokenizer.from_pretrained(exported).get_vocab() == tokenizer.get_vocab()


def test_a_checkpoint_of_another_model_is_refused(recipe, tmp_path):
    build_model(recipe).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"has no weight model.layers.2"):
        load_weights(build_model(changed(recipe, num_hidden_layers=3)), tmp_path)
    with pytest.raises(CheckpointError, match=r"has shape \(300, 32\), and the model \(299, 32\)"):
        load_weights(build_model(changed(recipe, vocab_size=299)), tmp_path)
    with pytest.raises(CheckpointError, match="no weights that can be read"):
        load_weights(build_model(recipe), tmp_path / "nothing")


def test_gates_of_either_name_are_read(recipe, tmp_path):
    model = build_model(recipe)
    torch.nn.init.normal_(model.model.layers[0].self_attn.plt_gate.weight)
    state = {name.replace("plt_gate", "loop_gate_proj"): tensor for name, tensor in model.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    other = build_model(changed(recipe, seed=5))
    load_weights(other, tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor)


@pytest.mark.parametrize("seed", range(3))
def test_a_checkpoint_of_steps_with_one_loop_only(recipe, corpus, tmp_path, seed):
    """Whose optimizer has no state for the gates yet."""
    both = changed(recipe, loops=[1, 2], save_every=1, tokens=8 * 4 * 32, eval_every=0, seed=seed)
    whole = train(both, tmp_path / "whole", corpus=corpus, console=QUIET)
    ones = [drawn_loops([1, 2], seed, step) for step in range(8)].index(2)

    def stop(step, loss):
        if step == max(ones, 1) + 1:
            raise StopError

    with pytest.raises(StopError):
        train(both, tmp_path / "run", corpus=corpus, console=QUIET, on_step=stop)
    result = train(both, tmp_path / "run", corpus=corpus, console=QUIET)
    assert_same_run((tmp_path / "whole", whole), (tmp_path / "run", result))


@pytest.mark.parametrize("mode", ["none", "layer", "loop", "both"])
def test_what_is_recomputed_is_run_twice(recipe, corpus, tmp_path, monkeypatch, mode):
    """By visits of layers: one forward pass, and what the backward pass runs again."""
    visits, forward = [], LlamaMLP.forward

    def seen(self, *args, **kwargs):
        if self.training:
            visits.append(1)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(LlamaMLP, "forward", seen)
    once = changed(recipe, tokens=4 * 32, gradient_checkpointing=mode, eval_every=0)
    train(once, tmp_path / "run", corpus=corpus, console=QUIET)
    # With both, a loop that is run again stops before its last layers, which are run again by themselves.
    assert len(visits) == {"none": 4, "layer": 8, "loop": 8, "both": 10}[mode]


def test_what_can_be_changed(recipe, corpus, finished, tmp_path):
    """In a run that has begun, settings that do not change the result; before that, all settings."""

    def stop_at(number):
        def stop(step, loss):
            if step == number:
                raise StopError

        return stop

    with pytest.raises(StopError):
        train(recipe, tmp_path / "run", corpus=corpus, console=QUIET, on_step=stop_at(8))
    result = train(changed(recipe, gradient_accumulation=2), tmp_path / "run", corpus=corpus, console=QUIET)
    for (_, a), (_, b) in zip(finished[1].loss_curve, result.loss_curve, strict=True):
        assert a == pytest.approx(b, abs=1e-4)

    small = mixed(recipe, tmp_path, tokens=2 * 4 * 32)
    with pytest.raises(RecipeError, match="fill no row of length=32"):
        train(changed(small, validation_share=1e-9), tmp_path / "mixed", console=QUIET)
    assert (tmp_path / "mixed" / "recipe.yaml").exists()
    assert train(changed(small, learning_rate=2e-3), tmp_path / "mixed", console=QUIET).steps == 2


def test_a_source_beside_a_mixture(recipe, tmp_path):
    with pytest.raises(RecipeError, match=r"source=.* beside a mixture: put it among the mixture's entries"):
        mixed(recipe, tmp_path, source=recipe.source)


def test_a_tokenizer_and_the_embedding(recipe, finished, corpus, tmp_path):
    """One that is given may have fewer tokens than the embedding rows, as the released one has, but not more."""
    padded = changed(recipe, tokenizer=str(finished[0]), vocab_size=320, tokens=2 * 4 * 32, eval_every=0)
    train(padded, tmp_path / "padded", corpus=corpus, console=QUIET)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "padded").config.vocab_size == 320
    tokenizer = AutoTokenizer.from_pretrained(finished[0])
    tokenizer.add_tokens([f"<more-{i}>" for i in range(100)])
    tokenizer.save_pretrained(tmp_path / "larger")
    more = changed(recipe, init_from=str(finished[0]), tokenizer=str(tmp_path / "larger"))
    with pytest.raises(RecipeError, match=r"has 400 tokens, and the embedding of .* 300 rows: leave tokenizer out"):
        build_model(more, tokenizer)


def test_fresh_keeps_the_folder_that_it_runs_in(recipe, corpus, tmp_path, monkeypatch):
    short = changed(recipe, tokens=2 * 4 * 32, eval_every=0)
    train(short, tmp_path / "run", corpus=corpus, console=QUIET)
    monkeypatch.chdir(tmp_path / "run")
    with pytest.raises(OutputError, match="holds the folder that this runs in"):
        train(short, tmp_path / "run", corpus=corpus, console=QUIET, fresh=True)


def test_a_run_that_was_killed_while_it_cleaned_up(recipe, finished, corpus, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run")
    (tmp_path / "run" / "checkpoint-7").mkdir()
    (tmp_path / "run" / "stream-0000.json").write_text("{}")
    (tmp_path / "run" / LEFT_OVER).write_text('["checkpoint-7", "stream-0000.json", "validation"]')
    result = train(recipe, tmp_path / "run", corpus=corpus, console=QUIET)
    assert result == TrainingResult.load(finished[0])
    assert not list((tmp_path / "run").glob("checkpoint-*")) + list((tmp_path / "run").glob("stream-*"))
    assert not (tmp_path / "run" / LEFT_OVER).exists()


@pytest.mark.parametrize(
    "name", [".git", ".env", ".cache", "README.md", "chat_template.jinja", "checkpoint-best", "checkpoint-7-copy"]
)
def test_fresh_deletes_nothing_of_others(recipe, finished, corpus, tmp_path, name):
    """Though the run has begun, and some of these names are a run's at times."""
    shutil.copytree(finished[0], tmp_path / "run")
    (tmp_path / "run" / name).unlink(missing_ok=True)  # of the model card
    (tmp_path / "run" / name).mkdir()
    (tmp_path / "run" / name / "mine").write_text("mine")
    with pytest.raises(
        OutputError,
        match=rf"holds more than a run \({name}(, changed since)?\), so it is not deleted: move these away",
    ):
        train(recipe, tmp_path / "run", corpus=corpus, console=QUIET, fresh=True)
    assert (tmp_path / "run" / name / "mine").exists()
    assert (tmp_path / "run" / "model.safetensors").exists()


def test_fresh_deletes_no_recipe_that_was_edited(recipe, finished, corpus, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run")
    path = tmp_path / "run" / "recipe.yaml"
    path.write_text(path.read_text() + "# a note\n")
    with pytest.raises(OutputError, match=r"\(recipe.yaml, changed since\)"):
        train(recipe, tmp_path / "run", corpus=corpus, console=QUIET, fresh=True)
    (tmp_path / "run" / "training.json").unlink()
    (tmp_path / "run" / "corpus.json").unlink()
    short = changed(recipe, tokens=2 * 4 * 32, eval_every=0, log_every=2)
    path.write_text(short.to_yaml() + "# a note\n")
    train(short, tmp_path / "run", corpus=corpus, console=QUIET)
    train(changed(short, log_every=1), tmp_path / "run", corpus=corpus, console=QUIET)
    assert path.read_text().endswith("# a note\n")


def test_a_hand_written_recipe_is_no_run(recipe, corpus, tmp_path):
    """A folder that holds the recipe alone, and the recipe's own folder as the output."""
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml() + "# a note\n")
    for fresh in (False, True):
        with pytest.raises(OutputError, match=r"is not empty and holds no run \(recipe.yaml\)"):
            train(recipe, tmp_path, corpus=corpus, console=QUIET, fresh=fresh)
    assert (tmp_path / "recipe.yaml").read_text().endswith("# a note\n")


def test_runs_of_before_there_were_claims_go_on(recipe, finished, corpus, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run")
    for name in ("parloop.json", "README.md"):  # which they did not write
        (tmp_path / "run" / name).unlink()
    recipe.save(tmp_path / "run" / "recipe.yaml")
    assert train(recipe, tmp_path / "run", corpus=corpus, console=QUIET) == finished[1]
    short = changed(recipe, tokens=2 * 4 * 32, eval_every=0)
    assert train(short, tmp_path / "run", corpus=corpus, console=QUIET, fresh=True).steps == 2


def test_checkpoints_of_others_are_neither_rotated_nor_resumed_from(recipe, corpus, tmp_path):
    short = changed(recipe, tokens=7 * 4 * 32, save_every=2, keep_checkpoints=1, eval_every=0)
    mine = [tmp_path / "run" / name for name in ("checkpoint-best", "checkpoint-2-copy", "stream-notes.json")]
    there = []

    def seen(step, loss):
        if step == 3 and not mine[0].exists():
            for path in mine:
                path.mkdir()
        there.append(sorted(path.name for path in (tmp_path / "run").glob("checkpoint-[0-9]*")))
        if step == 7 and len(there) < 20:
            raise StopError

    with pytest.raises(StopError):
        train(short, tmp_path / "run", corpus=corpus, console=QUIET, on_step=seen)
    assert there[-1] == ["checkpoint-2-copy", "checkpoint-6"]
    assert max(map(len, there)) <= 2
    assert last_whole_checkpoint(tmp_path / "run").name == "checkpoint-6"
    train(short, tmp_path / "run", corpus=corpus, console=QUIET)
    assert all(path.is_dir() for path in mine)
    assert {path.name for path in (tmp_path / "run").glob("checkpoint-*")} == {"checkpoint-best", "checkpoint-2-copy"}


def test_a_finished_run_needs_no_disk(recipe, finished, corpus, monkeypatch):
    """It may lie where nothing can be written."""
    before = {path: path.stat().st_mtime_ns for path in finished[0].rglob("*")}
    monkeypatch.setattr("parloop.train.run.claimed", None)
    assert train(changed(recipe, log_every=3), finished[0], corpus=corpus, console=QUIET) == finished[1]
    assert {path: path.stat().st_mtime_ns for path in finished[0].rglob("*")} == before


def test_what_a_finished_run_is_given_later_is_left_alone(recipe, finished, corpus, tmp_path):
    """Folders with a name that a run has while it trains."""
    shutil.copytree(finished[0], tmp_path / "run")
    for name in ("validation", "checkpoint-500", "conversations"):
        (tmp_path / "run" / name).mkdir()
    train(recipe, tmp_path / "run", corpus=corpus, console=QUIET)
    assert all((tmp_path / "run" / name).exists() for name in ("validation", "checkpoint-500", "conversations"))


def test_the_same_source_spelt_otherwise_is_the_same_run(recipe, finished, corpus, tmp_path, monkeypatch):
    shutil.copytree(finished[0], tmp_path / "run")
    source = Path(recipe.source)
    monkeypatch.chdir(source.parent)
    for spelt in (source.name, f"./{source.name}/", f"{source.name}/../{source.name}"):
        assert train(changed(recipe, source=spelt), tmp_path / "run", corpus=corpus, console=QUIET) == finished[1]
    with pytest.raises(RecipeError, match="another recipe"):
        train(changed(recipe, source=".."), tmp_path / "run", corpus=corpus, console=QUIET)


def test_a_mixture_goes_on_from_another_folder(recipe, tmp_path, monkeypatch):
    small = mixed(recipe, tmp_path, eval_every=0, tokens=4 * 4 * 32, save_every=1)
    relative = [entry | {"source": os.path.relpath(entry["source"], tmp_path)} for entry in small.mixture]

    def stop(step, loss):
        if step == 2:
            raise StopError

    monkeypatch.chdir(tmp_path)
    with pytest.raises(StopError):
        train(changed(small, mixture=relative), tmp_path / "run", console=QUIET, on_step=stop)
    (tmp_path / "deep").mkdir()
    monkeypatch.chdir(tmp_path / "deep")
    assert train(Recipe.load(tmp_path / "run" / "recipe.yaml"), tmp_path / "run", console=QUIET).steps == 4


@pytest.mark.parametrize(
    ("limit", "at"),
    [(100, "the claim"), (4_000, "the tokenizer"), (60_000, "the weights"), (220_000, "the optimizer's state")],
)
def test_a_disk_that_refuses_is_said_in_a_sentence(recipe, corpus, tmp_path, limit, at):
    """By what Python and the libraries make of files that may not grow. Nothing of the run before it is lost."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(
            OutputError, match=r"cannot be written \(.*\): choose another --output, or make this one writable"
        ):
            train(recipe, tmp_path / "run", corpus=corpus, console=QUIET)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (tmp_path / "run" / "corpus.json").exists() == (at in ("the weights", "the optimizer's state"))
    assert not list((tmp_path / "run").glob(".partial*"))


def test_room_for_checkpoints_is_looked_for_before_training(recipe, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10_000_000))
    monkeypatch.setattr("parloop.train.pretrain.PLTTrainer", None)
    parameters = sum(p.numel() for p in build_model(recipe).parameters())
    with pytest.raises(OutputError, match=r"training takes (0.\d+) GB, and the disk of .*run' has 0.01 GB free") as raised:
        train(recipe, tmp_path / "run", corpus=corpus, console=QUIET)
    said = float(re.search(r"takes (\S+) GB", str(raised.value))[1])
    assert said == pytest.approx(3 * (12 * parameters + 2**22) / 1e9, rel=0.01)  # two are kept, one is written
    few = changed(recipe, save_every=1000)
    assert bytes_to_come(build_model(few), few, few.steps, tmp_path) == 12 * parameters + 2**22 + 4 * parameters


def test_a_source_that_is_not_there_names_the_recipe(tmp_path, monkeypatch, capsys):
    from parloop import cli

    (tmp_path / "mine.yaml").write_text("source: nowhere/at/all\ndevice: cpu\n")
    monkeypatch.chdir(tmp_path)
    for command in (["train", "mine.yaml", "--output", "run"], ["study", "--preset", "mine.yaml", "--output", "study"]):
        monkeypatch.setattr(sys, "argv", ["parloop", *command])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert stop.value.code == 2
        said = " ".join(capsys.readouterr().err.split())
        assert "source 'nowhere/at/all': no such file or folder" in said
        assert "(recipe 'mine.yaml')" in said
    assert not (tmp_path / "study").exists()


def test_branch_scaling_is_a_factor_at_every_branch(recipe, corpus, tmp_path, monkeypatch):
    """Compare with a model that multiplies its additions to the stream, trained as usual: same losses, and no factor is left in the model."""
    settings = {"loops": 2, "tokens": 8 * 4 * 32, "max_grad_norm": 1e9}  # clipping goes by the gradients, which differ
    ours = train(changed(recipe, branch_scaling="loops", **settings), tmp_path / "ours", corpus=corpus, console=QUIET)

    def scaled(*arguments):
        model = build_model(*arguments)
        for name, module in model.named_modules():
            if name.endswith(("o_proj", "down_proj")):
                module.register_forward_hook(lambda _, inputs, output: output * 2**-0.5)
        return model

    plain = train(changed(recipe, **settings), tmp_path / "plain", corpus=corpus, console=QUIET)
    monkeypatch.setattr("parloop.train.pretrain.build_model", scaled)
    theirs = train(changed(recipe, **settings), tmp_path / "theirs", corpus=corpus, console=QUIET)
    np.testing.assert_allclose(ours.loss_curve, theirs.loss_curve, rtol=1e-4)
    assert abs(ours.loss_curve[-1][1] - plain.loss_curve[-1][1]) > 1e-3
    weights, others = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "theirs"))
    name = "model.layers.0.mlp.down_proj.weight"
    torch.testing.assert_close(weights[name], others[name] * 2**-0.5, rtol=1e-2, atol=1e-5)


def test_branch_scaling_of_one_loop_changes_nothing(recipe, corpus, tmp_path):
    settings = {"loops": 1, "tokens": 4 * 4 * 32}
    one, other = (
        train(changed(recipe, branch_scaling=scaling, **settings), tmp_path / scaling, corpus=corpus, console=QUIET)
        for scaling in ("none", "loops")
    )
    assert one.loss_curve == other.loss_curve
