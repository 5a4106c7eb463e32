"""mlx-lm's own tools on PLT checkpoints: `parloop run -m mlx_lm ...`, `parloop export --to mlx`, training and fusing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch
from conftest import Checkpoint, close, load, log_probabilities, random_checkpoint
from mlx.utils import tree_flatten
from mlx_lm.tuner.trainer import default_loss, grad_checkpoint
from mlx_lm.tuner.utils import load_adapters
from mlx_lm.utils import load_model
from transformers import AutoModelForCausalLM

from parloop import cli
from parloop.check.check import PROBE
from parloop.errors import ExportError
from parloop.export.export import export
from parloop.export.mlx import EXPORTED_AS, MODEL_FILE

ANSWERS = json.loads((PROBE / "answers.json").read_text())
PROMPT, RIGHT = ANSWERS["prompts"][0], ANSWERS["variants"][0]["answers"][0]["text"]
SHORT = ["--max-tokens", str(ANSWERS["tokens"]), "--verbose", "False"]


def run(*arguments) -> None:
    """The command line, in this process."""
    cli.app(cli.passed_through([str(argument) for argument in arguments]), result_action="return_value")


def mlx_lm(*arguments) -> None:
    run("run", "-m", "mlx_lm", *arguments)


def test_generate_needs_no_trust_and_no_other_configuration(capsys):
    mlx_lm("generate", "--model", PROBE, "--prompt", PROMPT, *SHORT)
    assert capsys.readouterr().out.strip() == RIGHT


def test_chat_in_a_process_of_its_own(probe):
    command = [sys.executable, "-m", "parloop", "run", "-m", "mlx_lm", "chat", "--model", probe, "--max-tokens", "12"]
    done = subprocess.run(command, input=f"{PROMPT}\nq\n", capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert RIGHT in done.stdout


def test_convert_quantises_all_but_gates_and_norms_and_back(tmp_path, capsys):
    mlx_lm("convert", "--hf-path", PROBE, "--mlx-path", tmp_path / "q8", "-q", "--q-bits", 8)
    weights = mx.load(str(tmp_path / "q8" / "model.safetensors"))
    packed = {name.removesuffix(".scales") for name in weights if name.endswith(".scales")}
    layers = {f"model.layers.{i}.{name}" for i in range(2) for name in (
        *(f"self_attn.{p}_proj" for p in "qkvo"), *(f"mlp.{p}_proj" for p in ("gate", "up", "down"))
    )}  # fmt: skip
    assert packed == layers | {"model.embed_tokens", "lm_head"}
    original = mx.load(str(PROBE / "model.safetensors"))
    untouched = [name for name in original if "plt_gate" in name or "norm" in name]
    assert len(untouched) == 2 * 5 + 1
    assert all(mx.array_equal(weights[name], original[name]) for name in untouched)
    mlx_lm("generate", "--model", tmp_path / "q8", "--prompt", PROMPT, *SHORT)
    assert capsys.readouterr().out.strip().endswith(RIGHT)  # 8 bits are enough for the probe, see tests/check

    mlx_lm("convert", "--hf-path", tmp_path / "q8", "--mlx-path", tmp_path / "back", "-d")
    ids = mx.array([[5, 9, 33, 21, 60] * 9])
    close(*(log_probabilities(load(tmp_path / name)(ids)) for name in ("q8", "back")))
    assert "quantization" not in json.loads((tmp_path / "back" / "config.json").read_text())


ALONE = """
import sys
for name in ("parloop", "torch"):
    sys.modules[name] = None  # importing them fails
sys.argv = ["mlx_lm.generate", *sys.argv[1:]]
from mlx_lm.generate import main
main()
"""


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_an_export_runs_without_parloop_and_without_torch(tmp_path, bits):
    run("export", PROBE, "--to", "mlx", "--out", tmp_path / "out", *(["--bits", bits] if bits else []))
    folder = tmp_path / "out"
    names = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", EXPORTED_AS}
    assert {path.name for path in folder.iterdir()} - {"model.safetensors.index.json"} == names
    assert (folder / EXPORTED_AS).read_bytes() == MODEL_FILE.read_bytes()
    command = [sys.executable, "-c", ALONE, "--model", folder, "--trust-remote-code", "--prompt", PROMPT, *SHORT]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=300, cwd=tmp_path, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    if bits != 4:
        assert done.stdout.strip() == RIGHT
    model, config = load_model(folder, trust_remote_code=True)
    assert config.get("quantization", {}).get("bits") == bits
    assert model.layers[0].self_attn.plt_gate.weight.dtype == mx.float32


def test_an_export_asks_for_trust_by_mlx_lms_own_error(tmp_path):
    with pytest.raises(ValueError, match="trust_remote_code"):
        load(export(PROBE, tmp_path / "out", to="mlx"))


def test_exported_shards_and_transformers_read_the_same(tmp_path):
    folder = export(random_checkpoint(tmp_path / "in", plt_num_loops=3), tmp_path / "out", to="mlx")
    checkpoint = Checkpoint(tmp_path / "in")
    ids = checkpoint.prompt(40)
    model, _ = load_model(folder, trust_remote_code=True)
    close(log_probabilities(model(mx.array(ids)[None]))[0], checkpoint.reference(ids))
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(torch.tensor(ids)[None]).logits[0]
    close(theirs.log_softmax(-1).numpy(), checkpoint.reference(ids))


@pytest.mark.parametrize(
    ("changes", "options", "told"),
    [
        ({}, {"bits": 3}, "bits=3 must be 4 or 8"),
        ({"quantization": {"bits": 8, "group_size": 64}}, {"bits": 4}, "quantised already"),
        ({"intermediate_size": 48}, {"bits": 4}, "multiples of 32"),
        ({"hidden_act": "gelu"}, {}, "hidden_act='gelu'"),
        ({"model_type": "llama"}, {}, "'llama': not a PLT"),
    ],
)
def test_what_cannot_be_exported_is_said_and_leaves_nothing(tmp_path, changes, options, told):
    shape = {name: value for name, value in changes.items() if name == "intermediate_size"}  # of the weights, too
    folder = random_checkpoint(tmp_path / "in", **shape)
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ExportError, match=told):
        export(folder, tmp_path / "out", to="mlx", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


# Training


@pytest.fixture
def talks(tmp_path) -> Path:
    rng = np.random.default_rng(0)
    for name in ("train", "valid"):
        texts = ["".join(rng.choice(list("abcdef0123456789"), size=30)) for _ in range(4)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return tmp_path


@pytest.fixture
def interpreted():
    """On a CPU, the kernels of a training step are compiled by the C++ compiler, for minutes."""
    mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.mark.usefixtures("interpreted")
def test_one_lora_step_and_fuse(tmp_path, talks, monkeypatch):
    """The fused model computes what the base with its adapter does, and not what the base does."""
    kind = type(load(PROBE).layers[0])
    monkeypatch.setattr(kind, "__call__", kind.__call__)  # --grad-checkpoint wraps it for good
    mlx_lm(
        "lora", "--train", "--model", PROBE, "--data", talks, "--iters", 2, "--batch-size", 2, "--num-layers", -1, "--learning-rate", 1e-3,
        "--grad-checkpoint", "--adapter-path", tmp_path / "adapter", "--save-every", 100,
    )  # fmt: skip
    trained = mx.load(str(tmp_path / "adapter" / "adapters.safetensors"))
    adapted = {name.rpartition(".")[0] for name in trained}
    assert len(adapted) == 2 * 7  # every linear layer; never a gate
    assert not any("plt_gate" in name for name in adapted)
    mlx_lm("fuse", "--model", PROBE, "--adapter-path", tmp_path / "adapter", "--save-path", tmp_path / "fused")
    ids = mx.array([[5, 9, 33, 21, 60] * 9])
    base = log_probabilities(load(PROBE)(ids))
    adapter = log_probabilities(load_adapters(load(PROBE), str(tmp_path / "adapter"))(ids))
    close(log_probabilities(load(tmp_path / "fused")(ids)), adapter)
    assert np.abs(adapter - base).max() > 0.05


@pytest.mark.parametrize("checkpointed", [False, True], ids=["", "grad-checkpoint"])
@pytest.mark.parametrize(
    "changes", [{"plt_num_loops": 3}, {"plt_gate_use_hidden_states": False}], ids=["three-loops", "query-gate"]
)
def test_gradients_of_every_weight_are_torchs(tmp_path, monkeypatch, changes, checkpointed):
    checkpoint = Checkpoint(random_checkpoint(tmp_path, **changes))
    model, ids = checkpoint.model, [checkpoint.prompt(24), checkpoint.prompt(25)[:24]]
    if checkpointed:
        kind = type(model.layers[0])
        monkeypatch.setattr(kind, "__call__", kind.__call__)
        grad_checkpoint(model.layers[0])
    lengths = mx.array([[0, 24], [0, 24]])
    (loss, _), gradients = mx.value_and_grad(
        lambda parameters: (model.update(parameters), default_loss(model, mx.array(ids), lengths))[1]
    )(model.trainable_parameters())
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    expected = theirs(torch.tensor(ids), labels=torch.tensor(ids)).loss
    expected.backward()
    close(np.array(loss), expected.item(), 1e-5)
    found = dict(tree_flatten(gradients))
    wanted = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        close(np.array(found[name]), gradient.numpy(), 2e-5)
