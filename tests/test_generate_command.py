"""`parloop generate`: what it says to wrong options and incomplete folders."""

import pytest
import torch

from parloop.checkpoints import load_model
from parloop.corpus import train_tokenizer
from parloop.errors import CheckpointError
from parloop.generate import stream
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
        ({"dtype": "foo"}, "dtype='foo' is unknown: use one of auto, float32"),
        ({"device": "foo"}, "device='foo' is not there .*: use cpu or auto"),
        ({"device": "cuda:99"}, "device='cuda:99' is not there .*: use cpu or auto"),
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
