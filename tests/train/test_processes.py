"""Two processes (gloo, FSDP2) train what one trains; killed, resumed on another number of processes, exported."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

import psutil
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from parloop.errors import CheckpointError, OutputError, RecipeError
from parloop.train import Recipe
from parloop.train.export import export
from parloop.train.sharding import start_processes
from parloop.train.training import train
from tests.helpers.chats import conversations, recipe_of, write
from tests.helpers.sources import write_sources

QUIET = Console(quiet=True)
HERE = Path(__file__).parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]  # fmt: skip
NOISE = {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Sources, conversations, a base to fine-tune, and a cache."""
    from tests.helpers.chats import chat_tokenizer
    from tests.helpers.models import tiny_model

    folder = tmp_path_factory.mktemp("place")
    write_sources(folder / "sources")
    lines = [json.dumps({"text": f"def f{i}(x):\n    return x + {i}\n" * (1 + i % 3)}) for i in range(200)]
    (folder / "texts.jsonl").write_text("\n".join(["{", *lines]))
    (folder / "more.jsonl").write_text("\n".join(line.replace("def", "class") for line in lines))
    tokenizer = chat_tokenizer()
    tiny_model(dtype=torch.float32, vocab_size=len(tokenizer), max_position_embeddings=256).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    write(folder / "chat.jsonl", conversations(60))
    return folder


def recipe(place, **changes):
    fields = {
        "source": str(place / "sources"), "vocab_size": 300, "length": 32, "validation_share": 0.2, "hidden_size": 32,
        "num_hidden_layers": 2, "intermediate_size": 48, "window_tokens": 8, "tokens": 20 * 8 * 32, "batch_size": 8, "log_every": 1,
        "eval_every": 0, "save_every": 8, "device": "cpu",
    }  # fmt: skip
    return Recipe(**(fields | changes))


MIXED = {"length": 32, "data_streams": 4, "shuffle_documents": 5, "eval_every": 10, "eval_rows": 8}
VARIANTS = {
    "step": {"eval_every": 10, "eval_rows": 8},
    "visit": {"gather": "visit", "gradient_checkpointing": "layer"},
    "two loop counts, accumulated": {"loops": [1, 3], "gradient_accumulation": 2, "gradient_checkpointing": "both"},
    "tied, query gate": {"tie_word_embeddings": True, "gate": "query", "normalize_per_loop": False},
    "one loop": {"loops": 1},
    "replicas": {"replicas": 2},
    "mixture": MIXED,
    "bfloat16": {"precision": "bfloat16"},
}


def variant(place, name):
    changes = dict(VARIANTS[name])
    if name == "mixture":
        parts = [(place / "more.jsonl", 1.0), (place / "texts.jsonl", 2.0)]
        changes["mixture"] = [{"source": str(source), "weight": weight} for source, weight in parts]
        changes["source"] = "stdlib"  # not read
    return recipe(place, **changes)


@pytest.fixture(scope="module")
def together(place, tmp_path_factory):
    """Everything that two processes do, in one start of them."""
    folder = tmp_path_factory.mktemp("two")
    os.environ["PARLOOP_CACHE"] = str(place / "cache")
    jobs = [
        {"kind": "train", "output": str(folder / name), "recipe": dataclasses.asdict(variant(place, name))}
        for name in VARIANTS
    ]
    for loops, gather, accumulation in [*product((1, 2, 4), ("step", "visit"), (1,)), (2, "step", 2)]:
        fields = dataclasses.asdict(recipe(place, loops=loops, gather=gather, gradient_accumulation=accumulation))
        jobs.append(
            {"kind": "traffic", "output": str(folder / f"traffic-{gather}-{loops}-{accumulation}"), "recipe": fields}
        )
    jobs += [
        {"kind": "finetune", "output": str(folder / name), "recipe": dataclasses.asdict(chat_recipe(place, name))}
        for name in ("full", "lora")
    ]
    (folder / "jobs.json").write_text(json.dumps(jobs))
    done = subprocess.run(
        [*TORCHRUN, str(HERE / "in_processes.py"), str(folder / "jobs.json")],
        env=os.environ | NOISE,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    yield folder
    del os.environ["PARLOOP_CACHE"]


def chat_recipe(place, name):
    lora = {"lora_rank": 4, "learning_rate": 5e-3} if name == "lora" else {}
    return recipe_of(place, epochs=4.0, eval_every=0, validation_share=0.02, **lora)


def weights_of(folder):
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def assert_same(folder, other, rounding=1.0):
    """To 1e-4, or `rounding` times that."""
    one, two = (json.loads((f / "training.json").read_text()) for f in (folder, other))
    assert [step for step, _ in one["loss_curve"]] == [step for step, _ in two["loss_curve"]]
    for (_, a), (_, b) in zip(one["loss_curve"], two["loss_curve"]):
        assert a == pytest.approx(b, abs=1e-4 * rounding)
    first, second = weights_of(folder), weights_of(other)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, atol=1e-4 * rounding, rtol=1e-3)
    return one, two


@pytest.mark.parametrize("name", VARIANTS)
def test_two_processes_train_what_one_trains(place, together, tmp_path, name):
    train(dataclasses.replace(variant(place, name), replicas=1), tmp_path / "one", console=QUIET)
    # In bfloat16, one process casts where it multiplies, and FSDP2 casts whole layers.
    one, two = assert_same(tmp_path / "one", together / name, rounding=100 if name == "bfloat16" else 1)
    assert (one["processes"], two["processes"]) == (1, 2)
    assert one["tokens"] == two["tokens"]
    assert one["loss_curve"][-1][1] < one["loss_curve"][0][1] - 0.5
    for (_, a), (_, b) in zip(one["validation_curve"], two["validation_curve"], strict=True):
        assert a == pytest.approx(b, abs=2e-2)  # means of batches, which are others
    if name == "mixture":
        assert one["data"] == two["data"]
        assert one["data"][1]["left_out"] == {"not JSON": one["data"][1]["epochs"]}
        assert one["data"][1]["tokens"] > 1.7 * one["data"][0]["tokens"]
    model = AutoModelForCausalLM.from_pretrained(together / name)
    tokenizer = AutoTokenizer.from_pretrained(together / name)
    assert model.generate(**tokenizer("def ", return_tensors="pt"), max_new_tokens=3).shape[1] > 3
    assert not hasattr(model.config, "distributed_config")


def test_weights_travel_once_per_step_whatever_the_loop_count(together):
    def of(gather, loops, accumulation=1):
        content = json.loads((together / f"traffic-{gather}-{loops}-{accumulation}").read_text())
        elements = content["elements"]
        return elements["_allgather_base_"] / content["parameters"], elements["_reduce_scatter_base_"] / content[
            "parameters"
        ]

    for loops in (1, 2, 4):
        gathered, scattered = of("step", loops)
        assert gathered == pytest.approx(1, abs=0.02)  # odd sizes are padded
        assert scattered == pytest.approx(1, abs=0.02)
        gathered, scattered = of("visit", loops)
        assert scattered == pytest.approx(1, abs=0.02)
        # The layers are about half of this small model; the rest is gathered once or twice.
        assert gathered > 1 + 0.4 * (2 * loops - 1)
    # Gradients are scattered once per micro-batch, so that no process holds a whole gradient.
    assert of("step", 2, accumulation=2) == pytest.approx((1, 2), abs=0.04)


@pytest.mark.parametrize("name", ["full", "lora"])
def test_two_processes_fine_tune_what_one_does(place, together, tmp_path, name):
    train(chat_recipe(place, name), tmp_path / "one", console=QUIET)
    assert_same(tmp_path / "one", together / name)
    if name == "lora":
        one, two = (load_file(f / "adapter" / "adapter_model.safetensors") for f in (tmp_path / "one", together / "lora"))
        for key, tensor in one.items():
            torch.testing.assert_close(two[key], tensor, atol=1e-4, rtol=1e-3)


def test_killed_and_continued_by_one_by_two_and_by_one(place, tmp_path):
    """The command line; killed with SIGKILL each time, of two processes one only."""
    slow = recipe(place, tokens=80 * 8 * 32, save_every=4, keep_checkpoints=3)
    slow.save(tmp_path / "recipe.yaml")
    run, whole = tmp_path / "run", tmp_path / "whole"
    environment = os.environ | NOISE | {"PARLOOP_CACHE": str(place / "cache")}
    alone = [sys.executable]
    command = ["-m", "parloop", "train", str(tmp_path / "recipe.yaml"), "--output"]

    def killed(launcher, after):
        log = open(tmp_path / "log", "w+")  # noqa: SIM115
        process = subprocess.Popen([*launcher, *command, str(run)], env=environment, stderr=log)
        deadline = time.time() + 120
        while process.poll() is None and time.time() < deadline:
            if [p for p in run.glob("checkpoint-*/trainer_state.json") if int(p.parent.name.split("-")[1]) > after]:
                break
            time.sleep(0.01)
        victim = process.pid
        if launcher is not alone:
            (victim,) = (child.pid for child in psutil.Process(process.pid).children() if child.environ()["RANK"] == "1")
        os.kill(victim, signal.SIGKILL)
        code = process.wait(timeout=60)
        log.seek(0)
        return code, log.read()

    assert killed(alone, 0)[0] == -9
    assert not (run / "training.json").exists()
    first = max(int(p.name.split("-")[1]) for p in run.glob("checkpoint-*"))
    code, said = killed(TORCHRUN, first)
    assert code not in (0, None)
    assert "Signal 9 (SIGKILL)" in said  # the launcher says which process
    assert f"continuing {run} from checkpoint-" in " ".join(said.split())
    assert not (run / "training.json").exists()
    sharded = sorted(run.glob("checkpoint-*/shard-*.safetensors"))
    assert len({path.name for path in sharded}) == 2

    last = max((p.parent for p in run.glob("checkpoint-*/trainer_state.json")), key=lambda p: int(p.name.split("-")[1]))
    exported = export(last, tmp_path / "exported")
    assert (exported / "model.safetensors").is_file()
    model = AutoModelForCausalLM.from_pretrained(exported)
    tokenizer = AutoTokenizer.from_pretrained(exported)
    assert model.generate(**tokenizer("def ", return_tensors="pt"), max_new_tokens=3).shape[1] > 3
    with pytest.raises(OutputError, match="exists and is not empty"):
        export(last, tmp_path / "exported")
    with pytest.raises(CheckpointError, match="is not a complete checkpoint"):
        export(run, tmp_path / "other")

    done = subprocess.run([*alone, *command, str(run)], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    done = subprocess.run([*alone, *command, str(whole)], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert_same(whole, run)


def test_what_cannot_be_divided(place, monkeypatch):
    class Three:
        num_processes, device = 3, torch.device("cpu")

    monkeypatch.setattr("parloop.train.sharding.PartialState", lambda **_: Three())
    with pytest.raises(
        RecipeError, match=r"batch_size=8 cannot be divided by 3 processes and gradient_accumulation=1: .* multiple of 3"
    ):
        start_processes(recipe(place))
    with pytest.raises(RecipeError, match="replicas=2 must divide the number of processes, 3"):
        start_processes(recipe(place, batch_size=9, replicas=2))
