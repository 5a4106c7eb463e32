"""`parloop generate`: what it says to wrong options and incomplete folders."""

import functools

import pytest
import torch

from parloop.checkpoints import load_model
from parloop.corpus import train_tokenizer
from parloop.errors import CheckpointError
from parloop.generate import closing_reasoning, stream
from tests.helpers.chats import byte_tokenizer
from tests.helpers.models import tiny_model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_model(vocab_size=300, dtype=torch.float32).save_pretrained(folder)
    train_tokenizer(["def f(x):\n    return x\n"] * 5, 300).save_pretrained(folder)
    return folder


def test_a_continuation_is_streamed(checkpoint, capsys):
    stream(str(checkpoint), "def f", max_new_tokens=3, temperature=0.8, top_p=0.9)
    assert capsys.readouterr().out.startswith("def f")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loops": 0}, "loops=0 must be at least 1"),
        ({"loops": -1}, "loops=-1 must be at least 1"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
        ({"temperature": -1.0}, "temperature=-1.0 must be a number from 0"),
        ({"temperature": float("nan")}, "temperature=nan must be a number from 0"),
        ({"top_p": 5.0}, "top_p=5.0 must be above 0 and at most 1"),
        ({"think_budget": -1}, "think_budget=-1 must be at least 0, in tokens"),
        ({"dtype": "foo"}, "dtype='foo' is unknown: use one of auto, float32"),
        ({"device": "foo"}, "device='foo' is not available .*: use cpu or auto"),
        ({"device": "cuda:99"}, "device='cuda:99' is not available .*: use cpu or auto"),
    ],
)
def test_options_out_of_bounds(checkpoint, options, message):
    with pytest.raises(CheckpointError, match=message):
        stream(str(checkpoint), "def", **options)


@pytest.mark.parametrize(
    ("missing", "part"), [("tokenizer*", "tokenizer"), ("model*", "weights"), ("config.json", "config")]
)
def test_incomplete_folders(checkpoint, tmp_path, missing, part):
    import shutil

    folder = shutil.copytree(checkpoint, tmp_path / "copy")
    for path in folder.glob(missing):
        path.unlink()
    with pytest.raises(CheckpointError, match=f"the folder has no usable {part}.*folder of a finished run"):
        stream(str(folder), "def")


def test_broken_weights(checkpoint, tmp_path):
    import shutil

    folder = shutil.copytree(checkpoint, tmp_path / "copy")
    (folder / "model.safetensors").write_bytes(b"half of")
    with pytest.raises(CheckpointError, match="the folder has no usable weights"):
        load_model(folder)


@pytest.mark.parametrize("name", ["no/such/checkpoint", "/no/such", "./nothing", "../no"])
def test_a_missing_folder_is_no_name_of_the_hub(name):
    with pytest.raises(CheckpointError, match="there is no such folder; give the folder") as caught:
        load_model(name)
    assert "repo" not in str(caught.value)


# Reasoning that is closed after a budget


@pytest.fixture(scope="module")
def reasoning():
    """Tokenizers that have a token for each tag, and that have none."""
    one = byte_tokenizer()
    one.add_tokens(["<think>", "</think>"])
    return {"a token": one, "several tokens": byte_tokenizer()}


def wanting(model, tokenizer, wish, monkeypatch):
    """Let the model's likeliest next token be that of the text it wishes to write."""
    ids = tokenizer(wish, add_special_tokens=False)["input_ids"]
    forward = type(model).forward

    @functools.wraps(forward)
    def scripted(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        place = scripted.written
        scripted.written += 1
        output.logits[:, -1] = -5.0
        output.logits[:, -1, ids[place % len(ids)]] = 5.0
        return output

    scripted.written = 0
    monkeypatch.setattr(type(model), "forward", scripted)


@pytest.mark.parametrize("kind", ["a token", "several tokens"])
@pytest.mark.parametrize(
    ("prompt", "wish", "budget", "written"),
    [
        ("2+2?<think>", "abcdefghijklmnop", 4, "abcd\n</think>\n\n"),  # opened by the prompt
        ("2+2?", "<think>abcdefghijklmnop", 4, "<think>abcd\n</think>\n\n"),
        ("2+2?<think>", "abcdefghijklmnop", 0, "\n</think>\n\n"),
        ("2+2?<think>", "ab</think>4 and so on", 20, "ab</think>4 and so on"),  # closed in time
        ("2+2?", "it is 4, for sure", 2, "it is 4, for sure"),  # no reasoning
        ("<think>x</think>4. 3+3?<think>", "abcdefghijklmnop", 3, "abc\n</think>\n\n"),  # an earlier turn's is over
        ("<think>x</think>4. 3+3?", "it is 6, for sure", 0, "it is 6, for sure"),
    ],
)
def test_reasoning_is_closed_after_its_budget(reasoning, monkeypatch, kind, prompt, wish, budget, written):
    tokenizer = reasoning[kind]
    model = tiny_model(vocab_size=len(tokenizer) + 3, dtype=torch.float32, max_position_embeddings=256)
    wanting(model, tokenizer, wish, monkeypatch)
    ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
    forced = len(tokenizer(written, add_special_tokens=False)["input_ids"])
    output = model.generate(
        ids,
        max_new_tokens=forced + 3,
        do_sample=False,
        prefix_allowed_tokens_fn=closing_reasoning(budget, tokenizer, model.config.vocab_size),
    )
    text = tokenizer.decode(output[0, ids.shape[1] :])
    assert text.startswith(written)
    # What follows is the model's own, whatever it was kept from.
    wished = tokenizer(wish, add_special_tokens=False)["input_ids"]
    assert output[0, -1].item() == wished[(forced + 2) % len(wished)]


def test_the_command_closes_reasoning(reasoning, monkeypatch, tmp_path, capsys):
    tokenizer = reasoning["several tokens"]
    model = tiny_model(vocab_size=len(tokenizer), dtype=torch.float32, max_position_embeddings=256)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    wanting(model, tokenizer, "abcdefgh", monkeypatch)
    stream(str(tmp_path), "2+2?<think>", max_new_tokens=17, think_budget=3)
    assert capsys.readouterr().out.startswith("2+2?<think>abc\n</think>\n\n")
