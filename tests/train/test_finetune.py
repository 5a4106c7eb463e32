"""Fine-tuning on conversations: full and LoRA, resumed, merged, and only on the assistant's tokens."""

import dataclasses
import io
import json
import shutil

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.llama.modeling_llama import LlamaMLP

from parloop.errors import RecipeError, SourceError
from parloop.train import ChatRecipe, load_recipe
from parloop.train.conversations import Rows, order_of, packed
from parloop.train.export import export
from parloop.train.trainer import training_arguments
from parloop.train.training import train
from tests.helpers.chats import THINKING, chat_tokenizer, conversations, recipe_of, write
from tests.helpers.models import tiny_model

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A small checkpoint with a chat template, and conversations."""
    folder = tmp_path_factory.mktemp("made")
    tokenizer = chat_tokenizer()
    model = tiny_model(dtype=torch.float32, vocab_size=len(tokenizer), max_position_embeddings=256)
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    (folder / "base" / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [2, tokenizer.convert_tokens_to_ids("<|im_end|>")]})
    )
    write(folder / "chat.jsonl", conversations())
    return folder


def answer(folder, question, max_new_tokens=12):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    messages = [{"role": "user", "content": question}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    output = model.generate(ids, max_new_tokens=max_new_tokens, do_sample=False)
    return tokenizer.decode(output[0, ids.shape[1] :])


@pytest.fixture(scope="module")
def tuned(made, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "full"
    return folder, train(recipe_of(made), folder, console=QUIET)


def test_full_fine_tuning_learns_the_rule(tuned):
    folder, result = tuned
    assert result.conversations == 120
    first, last = result.loss_curve[0][1], result.loss_curve[-1][1]
    assert last < 0.3 < first
    assert result.validation_curve[-1][1] < 0.5
    assert result.parameters == result.trained_parameters > 30_000
    assert answer(folder, "7 green") == "green green<|im_end|>"  # it stops, too
    assert not list(folder.glob("checkpoint-*"))
    assert AutoTokenizer.from_pretrained(folder).chat_template


def test_the_same_loss_by_hand(made, tmp_path):
    """TRL's fused loss over packed rows, against each conversation by itself."""
    recipe = recipe_of(made)
    tokenizer = AutoTokenizer.from_pretrained(made / "base")
    from trl import SFTConfig

    from parloop.corpus.chat import load_chat
    from parloop.train.sft import PLTSFTTrainer

    chat = load_chat(recipe.chat, tokenizer, recipe.length, recipe.validation_share, set())
    rows = packed(chat.train, recipe)
    assert len(rows) < len(chat.train) / 2
    batch = Rows(recipe.length, 0)([rows[i] for i in range(4)])
    model = AutoModelForCausalLM.from_pretrained(made / "base").eval()
    arguments = SFTConfig(
        **training_arguments(recipe, tmp_path, 1, eval_strategy="no"), dataset_kwargs={"skip_prepare_dataset": True}
    )
    trainer = PLTSFTTrainer(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer)
    learnt = (batch["labels"][:, 1:] != -100).sum()
    with torch.no_grad():
        together = trainer.compute_loss(model, dict(batch), num_items_in_batch=learnt)
        assert together.item() == pytest.approx(model(**batch, use_cache=False).loss.item(), abs=1e-5)
        total, count = 0.0, 0
        texts = [tuple(row["input_ids"]) for row in chat.train]
        for i in range(4):
            start = 0
            for size in rows[i]["seq_lengths"]:
                ids, labels = (torch.tensor([rows[i][name][start : start + size]]) for name in ("input_ids", "labels"))
                assert tuple(ids[0].tolist()) in texts
                n = int((labels[:, 1:] != -100).sum())
                total += model(ids, labels=labels, use_cache=False).loss.item() * n
                count += n
                start += size
    assert together.item() == pytest.approx(total / count, abs=1e-5)


class StopError(Exception):
    pass


@pytest.mark.parametrize("lora", [False, True])
def test_an_interrupted_run_continues_to_the_same_result(made, tuned, tmp_path, lora):
    changes = {"lora_rank": 4, "learning_rate": 3e-2} if lora else {}
    recipe = recipe_of(made, **changes)

    def stop(step, loss):
        if step == 20:
            raise StopError

    with pytest.raises(StopError):
        train(recipe, tmp_path / "run", console=QUIET, on_step=stop)
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-15"]
    steps = []
    result = train(recipe, tmp_path / "run", console=QUIET, on_step=lambda step, _: steps.append(step))
    assert steps[0] == 15
    whole = tuned if not lora else (tmp_path / "whole", train(recipe, tmp_path / "whole", console=QUIET))
    for (_, a), (_, b) in zip(whole[1].loss_curve, result.loss_curve):
        assert a == pytest.approx(b, abs=1e-5)
    one, other = (load_file(folder / "model.safetensors") for folder in (whole[0], tmp_path / "run"))
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, atol=1e-5, rtol=1e-4)


def test_lora_leaves_an_adapter_and_the_merged_model(made, tmp_path):
    from peft import PeftModel

    folder = tmp_path / "lora"

    def card(step, loss):
        if step == 1:
            (folder / "README.md").write_text("my model card")

    result = train(recipe_of(made, lora_rank=8, learning_rate=3e-2), folder, console=QUIET, on_step=card)
    assert (folder / "README.md").read_text() == "my model card"  # neither TRL nor peft writes its own over it
    assert not (folder / "adapter" / "README.md").exists()
    assert result.trained_parameters < 20_000 < result.parameters
    assert result.loss_curve[-1][1] < result.loss_curve[0][1] - 1
    base = AutoModelForCausalLM.from_pretrained(made / "base")
    merged = AutoModelForCausalLM.from_pretrained(folder)
    frozen = load_file(made / "base" / "model.safetensors")
    assert torch.equal(merged.state_dict()["model.embed_tokens.weight"], frozen["model.embed_tokens.weight"])
    ids = torch.randint(3, 300, (1, 40))
    with torch.no_grad():
        adapted = PeftModel.from_pretrained(base, folder / "adapter").eval()(input_ids=ids).logits
        torch.testing.assert_close(merged(ids).logits, adapted, atol=1e-4, rtol=1e-4)


def test_two_loop_counts_at_once(made, tmp_path):
    folder = tmp_path / "both"
    train(recipe_of(made, loops=[1, 2]), folder, console=QUIET)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.trained_loops == [1, 2]


def test_without_packing(made, tmp_path):
    result = train(recipe_of(made, packing=False, epochs=1.0), tmp_path / "run", console=QUIET)
    assert result.rows > 90


@pytest.mark.parametrize("packing", [True, False])
def test_conversations_of_which_none_is_held_out(made, tmp_path, packing):
    """This happens with few conversations."""
    write(tmp_path / "few.jsonl", conversations(4))
    few = {"chat": str(tmp_path / "few.jsonl"), "validation_share": 1e-9, "batch_size": 1, "epochs": 1.0}
    result = train(recipe_of(made, packing=packing, **few), tmp_path / "run", console=QUIET)
    assert result.conversations == 4
    assert result.validation_curve == []


def test_what_is_told(made, tmp_path):
    told = Console(file=io.StringIO(), width=500)
    base = tmp_path / "base"
    base.mkdir()
    for path in (made / "base").iterdir():
        (base / path.name).write_bytes(path.read_bytes())
    (base / "generation_config.json").unlink()
    train(recipe_of(made, model=str(base), epochs=0.1), tmp_path / "run", console=told)
    shown = told.file.getvalue()
    assert "120 conversations: " in shown
    assert "does not end generation: the model may not learn to stop" in shown


def test_bad_recipes(made, tmp_path):
    for changes, message in [
        ({"loops": 3}, "loops=3, but .* has 2: leave loops out"),
        ({"length": 1000}, "length=1000 is more than the 256 tokens"),
        ({"batch_size": 1000}, "lower batch_size or length, set packing: false"),
    ]:
        with pytest.raises(RecipeError, match=message):
            train(recipe_of(made, **changes), tmp_path / "run", console=QUIET)
    with pytest.raises(SourceError, match="no such file"):
        train(recipe_of(made, chat=str(tmp_path / "no.jsonl")), tmp_path / "run", console=QUIET)
    with pytest.raises(RecipeError, match="model is missing: folder or Hub name"):
        ChatRecipe(chat="x")
    with pytest.raises(RecipeError, match=r"epochs=0.0 must be above 0"):
        ChatRecipe(model="x", chat="y", epochs=0)


def test_changed_conversations_are_not_mixed_with_the_old_ones(made, tmp_path):
    source = write(tmp_path / "chat.jsonl", conversations())
    recipe = recipe_of(made, chat=source)

    def stop(step, loss):
        if step == 20:
            raise StopError

    with pytest.raises(StopError):
        train(recipe, tmp_path / "run", console=QUIET, on_step=stop)
    write(tmp_path / "chat.jsonl", conversations(90))
    with pytest.raises(RecipeError, match="has changed since the run"):
        train(recipe, tmp_path / "run", console=QUIET)


def test_a_file_with_chat_is_a_recipe_for_conversations(made, tmp_path):
    (tmp_path / "r.yaml").write_text("model: a\nchat: b.jsonl\n")
    assert isinstance(load_recipe(tmp_path / "r.yaml", lora_rank=4), ChatRecipe)
    with pytest.raises(RecipeError, match=r"--hidden-size says nothing to recipe .* fine-tunes on conversations"):
        load_recipe(tmp_path / "r.yaml", hidden_size=4)
    with pytest.raises(RecipeError, match="--lora-rank says nothing to recipe 'quick', which trains on text"):
        load_recipe("quick", lora_rank=4)


def test_every_conversation_once_in_every_epoch():
    order = order_of(7, 18, 0)
    assert [sorted(order[i : i + 7]) for i in (0, 7)] == [list(range(7))] * 2
    assert len(set(order[14:])) == 4
    assert list(order[:7]) != list(order[7:14])
    assert list(order_of(7, 9, 0)) == list(order[:9])


def test_epochs_see_every_row(made, tmp_path, monkeypatch):
    seen, collate = [], Rows.__call__

    def remembered(self, rows):
        seen.extend(row["input_ids"][0:9] for row in rows)
        return collate(self, rows)

    monkeypatch.setattr(Rows, "__call__", remembered)
    result = train(recipe_of(made, packing=False, epochs=2.0, eval_every=0), tmp_path / "run", console=QUIET)
    counts = [seen.count(row) for row in seen]
    assert result.steps == -(-2 * result.rows // 4)
    assert min(counts) == 2


@pytest.mark.parametrize(("mode", "visits"), [("none", 4), ("layer", 8), ("loop", 8)])
def test_what_is_recomputed_is_run_twice(made, tmp_path, monkeypatch, mode, visits):
    run, forward = [], LlamaMLP.forward

    def seen(self, *args, **kwargs):
        run.append(1)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(LlamaMLP, "forward", seen)
    train(recipe_of(made, epochs=0.01, eval_every=0, gradient_checkpointing=mode), tmp_path / "run", console=QUIET)
    layers = AutoModelForCausalLM.from_pretrained(made / "base").config.num_hidden_layers
    assert len(run) == visits * layers / 2


def test_a_checkpoint_of_adapters_is_exported_merged(made, tmp_path):
    """With the loop counts that it was trained at."""
    recipe = recipe_of(made, lora_rank=4, learning_rate=3e-2, loops=[1, 2], save_every=4)

    def stop(step, loss):
        if step == 6:
            raise StopError

    with pytest.raises(StopError):
        train(recipe, tmp_path / "run", console=QUIET, on_step=stop)
    exported = AutoModelForCausalLM.from_pretrained(export(tmp_path / "run" / "checkpoint-4", tmp_path / "out"))
    assert exported.config.trained_loops == [1, 2]
    base = AutoModelForCausalLM.from_pretrained(made / "base").state_dict()
    changed = {name for name, tensor in exported.state_dict().items() if not torch.equal(tensor, base[name])}
    assert changed
    assert all("proj" in name for name in changed)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template
    train(recipe, tmp_path / "run", console=QUIET)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run").config.trained_loops == [1, 2]


def test_what_does_not_fit_the_model(made, tmp_path):
    with pytest.raises(RecipeError, match=r"lora_targets has 'qkv', which the model does not: choose among down_proj"):
        train(recipe_of(made, lora_rank=4, lora_targets=["qkv"]), tmp_path / "run", console=QUIET)
    base = tmp_path / "base"
    shutil.copytree(made / "base", base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["<more>"])
    tokenizer.save_pretrained(base)
    with pytest.raises(RecipeError, match=r"tokenizer of .* tokens were added without resizing the model"):
        train(recipe_of(made, model=str(base)), tmp_path / "other", console=QUIET)


def test_reasoning_is_learnt_and_merged(made, tmp_path):
    """From conversations with reasoning to a model that writes it before its answer; adapters are merged."""
    base = shutil.copytree(made / "base", tmp_path / "base")
    (base / "chat_template.jinja").write_text(THINKING)
    rows = conversations()
    for number, row in enumerate(rows):
        word = row["messages"][-1]["content"].split()[0]
        row["messages"][-1] |= {"reasoning": f"say {word} again" + (", and again, and again" if number % 40 == 5 else "")}
        row["tools"] = None
    chat = write(tmp_path / "chat.jsonl", rows)
    tokenizer = AutoTokenizer.from_pretrained(base)
    limit = len(tokenizer("say yellow again, and", add_special_tokens=False)["input_ids"])
    changes = {"lora_rank": 16, "learning_rate": 3e-2, "max_reasoning_tokens": limit, "long_reasoning": "cut"}
    recipe = recipe_of(made, model=str(base), chat=chat, **changes)
    result = train(recipe, tmp_path / "run", console=QUIET)
    assert result.reasoning_cut == 3
    assert not result.left_out
    written = answer(tmp_path / "run", "7 green", max_new_tokens=40)
    assert written.startswith("<think>\n")
    assert "</think>" in written
    result = train(dataclasses.replace(recipe, long_reasoning="drop", epochs=0.1), tmp_path / "dropped", console=QUIET)
    assert (result.conversations, result.reasoning_cut) == (117, 0)
    assert result.left_out == {f"reasoning over {limit} tokens": 3}
