"""`parloop export --to mlx` where MLX is not installed: a folder for a Mac can be made anywhere. With MLX: tests/mlx."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest

from parloop import cli
from parloop.check.check import PROBE
from parloop.errors import CheckpointError, ExportError
from parloop.export import mlx
from parloop.export.export import export
from parloop.quantize.quantization import quantize
from tests.helpers.models import tiny_model


@pytest.fixture(autouse=True)
def _without_mlx(monkeypatch):
    monkeypatch.setattr(mlx, "mlx_lm_version", lambda: None)


def test_weights_tokenizer_and_model_file_are_copied_and_nothing_else(tmp_path):
    source = shutil.copytree(PROBE, tmp_path / "in")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    for name in ("training.log", "optimizer.pt", "results.json", "README.md"):
        (source / name).write_text("{}")
    cli.app(["export", str(source), "--to", "mlx", "--out", str(tmp_path / "out")], result_action="return_value")
    copied = ("model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*copied, "config.json", mlx.EXPORTED_AS}
    assert all((tmp_path / "out" / name).read_bytes() == (source / name).read_bytes() for name in copied)
    config = json.loads((source / "config.json").read_text())
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == config | {"model_file": mlx.EXPORTED_AS}


def test_a_checkpoint_of_a_run_is_made_a_model_first(tmp_path):
    """checkpoint-N of one process: its optimizer and state stay behind."""
    run = tmp_path / "run" / "checkpoint-3"
    tiny_model().save_pretrained(run)
    (run / "trainer_state.json").write_text("{}")
    (run / "scheduler.pt").write_text("")
    export(run, tmp_path / "out", to="mlx")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", mlx.EXPORTED_AS
    }  # fmt: skip
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_the_model_file_imports_nothing_of_ours():
    """It is copied into folders that run without parloop, and without torch."""
    source = mlx.MODEL_FILE.read_text()
    imported = [line.split()[1] for line in source.splitlines() if line.startswith(("import ", "from "))]
    assert {name.partition(".")[0] for name in imported} == {"copy", "dataclasses", "typing", "mlx", "mlx_lm"}
    assert "parloop" not in "".join(imported)


def test_the_registered_class_gives_way_to_one_of_mlx_lms_own(monkeypatch, tmp_path):
    """And registering twice, as two tools in one process do, is registering once."""
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    mlx.register()
    mlx.register()
    (finder,) = [finder for finder in sys.meta_path if isinstance(finder, mlx._ModelFinder)]
    assert Path(finder.find_spec(mlx.MLX_MODULE).origin) == mlx.MODEL_FILE
    assert finder.find_spec("mlx_lm.models.llama") is None
    package = tmp_path / "mlx_lm" / "models"
    package.mkdir(parents=True)
    (package / "iquestpltcoder.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    assert Path(importlib.util.find_spec(mlx.MLX_MODULE).origin) == package / "iquestpltcoder.py"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"to": "gguf2"}, "--to 'gguf2' is unknown"),
        ({"to": "transformers", "bits": 4}, "--bits 4 says nothing"),
        ({"to": "mlx", "bits": 4}, "mlx-lm quantises, and is not installed"),
        ({"to": "mlx", "bits": 5}, "bits=5 must be 4 or 8"),
    ],
)
def test_options_that_cannot_be(tmp_path, options, told):
    with pytest.raises(ExportError, match=told):
        export(PROBE, tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_folders_that_cannot_be(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    with pytest.raises(ExportError, match="exists and is not empty"):
        export(PROBE, tmp_path / "full", to="mlx")
    with pytest.raises(ExportError, match=r"no model\*\.safetensors"):
        export(tmp_path / "full", tmp_path / "out", to="mlx")
    with pytest.raises(CheckpointError, match="no such folder"):
        export(tmp_path / "nowhere", tmp_path / "out", to="mlx")
    with pytest.raises(CheckpointError, match="not a complete checkpoint of a run"):
        export(PROBE, tmp_path / "out")
    shutil.copyfile(PROBE / "model.safetensors", tmp_path / "full" / "model.safetensors")
    with pytest.raises(ExportError, match=r"no config\.json"):
        export(tmp_path / "full", tmp_path / "out", to="mlx")
    (tmp_path / "full" / "config.json").write_text('{"model_type": "llama"}')
    for form, error in (("mlx", ExportError), ("gguf", CheckpointError)):
        with pytest.raises(error, match=r"'llama'.* not a PLT"):
            export(tmp_path / "full", tmp_path / "out", to=form)


@pytest.mark.parametrize("form", ["mlx", "gguf"])
def test_what_is_packed_for_other_engines_is_refused(form, tmp_path):
    """Its matrices have names and shapes that neither reads."""
    if form == "gguf":
        pytest.importorskip("gguf")
    tiny_model(hidden_size=64, intermediate_size=128, head_dim=16).save_pretrained(tmp_path / "in")
    quantize(tmp_path / "in", tmp_path / "packed")
    with pytest.raises(ExportError, match=r"is quantised.*export what it was made from, with --bits"):
        export(tmp_path / "packed", tmp_path / "out", to=form)
    assert not (tmp_path / "out").exists()
