"""Checkpoints whose weights are not those that config.json asks for: nobody runs, trains or serves what they are not."""

import json
import shutil
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from parloop import cli
from parloop.checkpoints import check_weights, load_config, load_model
from parloop.corpus import train_tokenizer
from parloop.errors import CheckpointError
from parloop.train import Recipe
from parloop.train.checkpoint import STATE, load_base, load_weights
from parloop.train.export import export
from parloop.train.sharding import empty_model, start_processes
from tests.helpers.models import tiny_model

QUERY_GATES = {"plt_gate_use_hidden_states": False}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint") / "whole"
    tiny_model(vocab_size=300, dtype=torch.float32).save_pretrained(folder)
    train_tokenizer(["def f(x):\n    return x\n"] * 5, 300).save_pretrained(folder)
    return folder


def changed(checkpoint, folder, change=lambda weights: None, config=()):
    """A copy with other weights or another config.json."""
    shutil.copytree(checkpoint, folder)
    weights = load_file(folder / "model.safetensors")
    save_file(change(weights) or weights, folder / "model.safetensors", metadata={"format": "pt"})
    fields = json.loads((folder / "config.json").read_text()) | dict(config)
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


def without(*parts):
    return lambda weights: {name: value for name, value in weights.items() if not any(part in name for part in parts)}


def with_(**more):
    return lambda weights: weights | {name.replace("__", "."): value for name, value in more.items()}


WRONG = {
    "one is missing": (without("layers.1.mlp.up_proj"), {}, r"up_proj"),
    "the head is missing": (without("lm_head"), {}, r"lm_head"),
    "all gates are missing": (without("plt_gate"), {}, r"plt_gate"),
    "a bias is asked for": (lambda weights: None, {"attention_bias": True}, r"\.bias"),
    "more layers are asked for": (lambda weights: None, {"num_hidden_layers": 3}, r"layers\.2\."),
    "fewer layers are asked for": (
        lambda weights: None,
        {"num_hidden_layers": 1},
        r"hold 2 layers, and num_hidden_layers=1",
    ),
    "all have other names": (lambda weights: {f"foo.{n}": w for n, w in weights.items()}, {}, r"weight"),
    "one is of another shape": (with_(model__norm__weight=torch.ones(31)), {}, r"model\.norm\.weight has shape \(31,\)"),
    "gates of another kind": (lambda weights: None, QUERY_GATES, r"plt_gate\.weight has shape \(4, 32\)"),
    "one is left over": (with_(model__layers__0__self_attn__q_norm__weight=torch.ones(8)), {}, r"q_norm"),
}


def base_of(folder):
    """Load the base as training loads it."""
    recipe = Recipe(device="cpu")
    model = empty_model(load_config(folder), recipe, start_processes(recipe))
    load_base(model, folder)
    return model


@pytest.mark.parametrize("load", [load_model, check_weights, base_of])
@pytest.mark.parametrize("wrong", WRONG)
def test_what_config_json_does_not_ask_for_is_refused(checkpoint, tmp_path, wrong, load):
    change, config, told = WRONG[wrong]
    with pytest.raises(CheckpointError, match=told):
        load(changed(checkpoint, tmp_path / "copy", change, config))


FINE = {
    "as it was saved": (lambda weights: None, {}),
    "gates of a checkpoint that is read with one loop": (lambda weights: None, {"plt_num_loops": 1}),
    "gates by their other name": (
        lambda weights: {name.replace("plt_gate", "loop_gate_proj"): value for name, value in weights.items()},
        {},
    ),
    "the same with one loop": (
        lambda weights: {name.replace("plt_gate", "loop_gate_proj"): value for name, value in weights.items()},
        {"plt_num_loops": 1},
    ),
    "what old Llama files keep": (with_(model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(4)), {}),
    "no head where it is the embedding": (without("lm_head"), {"tie_word_embeddings": True}),
    "a head that is the embedding": (
        lambda weights: weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()},
        {"tie_word_embeddings": True},
    ),
}


@pytest.mark.parametrize("load", [load_model, check_weights, base_of])
@pytest.mark.parametrize("fine", FINE)
def test_known_extras_are_fine(checkpoint, tmp_path, fine, load):
    change, config = FINE[fine]
    model = load(changed(checkpoint, tmp_path / "copy", change, config))
    if model is not None:
        held = load_file(checkpoint / "model.safetensors")["model.layers.1.mlp.up_proj.weight"]
        assert torch.equal(model.model.layers[1].mlp.up_proj.weight, held)


@pytest.mark.parametrize("load", [load_model, base_of])
def test_a_head_of_its_own_where_config_json_ties_it_is_refused(checkpoint, tmp_path, load):
    folder = changed(checkpoint, tmp_path / "copy", config={"tie_word_embeddings": True})
    with pytest.raises(CheckpointError, match=r"tie_word_embeddings is true, but lm_head.weight and .* differ"):
        load(folder)


def test_without_accelerate_weights_are_checked_on_the_cpu(checkpoint, tmp_path, monkeypatch):
    asked = []
    load = AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr("parloop.checkpoints.is_accelerate_available", lambda: False)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *args, **kw: asked.append(kw) or load(*args, **kw))
    check_weights(checkpoint)
    with pytest.raises(CheckpointError, match="up_proj"):
        check_weights(changed(checkpoint, tmp_path / "copy", without("up_proj")))
    assert len(asked) == 2
    assert all("device_map" not in options for options in asked)  # with it, the library asks for accelerate


def test_the_weights_of_a_quantised_checkpoint_are_another_tools_business(checkpoint, tmp_path):
    config = {"quantization_config": {"quant_method": "compressed-tensors"}}
    check_weights(changed(checkpoint, tmp_path / "copy", without("up_proj"), config))


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "CK", "def"],
        ["diagnose", "CK", "--samples", "2"],
        ["bench", "CK", "--loops", "1", "--contexts", "4", "--prefill-lengths", "4"],
        ["serve", "CK", "--engine", "transformers", "--port", "0"],
        ["eval", "held_out", "CK"],
        ["eval", "held_out", "CK", "--plan"],
        ["convert", "CK", "--to", "dense", "--out", "dense"],
        ["export", "CK", "--to", "mlx", "--out", "mlx"],
        ["export", "CK", "--to", "gguf", "--out", "gguf"],
        ["train", "quick", "--init-from", "CK", "--output", "run"],
        ["train", "chat", "--model", "CK", "--chat", "talks.jsonl", "--length", "64", "--output", "run"],
    ],
    ids=" ".join,
)
def test_every_verb_refuses_them(checkpoint, tmp_path, monkeypatch, capsys, arguments):
    folder = changed(checkpoint, tmp_path / "copy", without("layers.1.mlp.up_proj"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setattr(sys, "argv", ["parloop", *(str(folder) if word == "CK" else word for word in arguments)])
    with pytest.raises(SystemExit) as done:
        cli.main()
    said = capsys.readouterr()
    assert done.value.code == 2
    assert "model.layers.1.mlp.up_proj.weight" in said.err
    assert "LOAD REPORT" not in said.err
    assert {path.parent for path in tmp_path.rglob("*") if path.is_file()} == {folder}


def test_a_checkpoint_of_a_run_that_lacks_weights_is_not_exported(checkpoint, tmp_path):
    folder = changed(checkpoint, tmp_path / "checkpoint-4", without("layers.1.mlp.up_proj"))
    (folder / STATE).write_text("{}")
    with pytest.raises(CheckpointError, match=r"lack model\.layers\.1\.mlp\.up_proj"):
        export(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (without("layers.1.self_attn.q_proj.lora_A"), r"layers\.1\.self_attn\.q_proj\.lora_A\.weight, of shape \(4, 32\)"),
        (with_(base_model__foo__lora_A__weight=torch.ones(1)), r"base_model\.foo\.lora_A\.weight, of shape \(1,\)"),
    ],
)
def test_adapters_of_a_run_that_are_not_its_own(tmp_path, change, told):
    adapters = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"])
    model = get_peft_model(tiny_model(dtype=torch.float32), adapters)
    model.save_pretrained(tmp_path)
    load_weights(model, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)
    with pytest.raises(CheckpointError, match=rf"its adapters do not match the run's: see .*{told}"):
        load_weights(model, tmp_path)


def test_the_library_alone_reports_and_loads(checkpoint, tmp_path, caplog):
    folder = changed(checkpoint, tmp_path / "copy", without("layers.1.mlp.up_proj"))
    with pytest.raises(CheckpointError):
        load_model(folder)
    with caplog.at_level("WARNING", logger="transformers"):
        import transformers

        transformers.utils.logging.enable_propagation()
        try:
            AutoModelForCausalLM.from_pretrained(folder)
        finally:
            transformers.utils.logging.disable_propagation()
    assert "LOAD REPORT" in caplog.text
    assert "up_proj" in caplog.text
