"""The plan: its parameters are the model's, its memory is within a tenth of what is measured."""

import sys

import pytest
import torch

from parloop import cli
from parloop.model.flops import training_flops_per_token
from parloop.timing import LiveBytes
from parloop.train import ChatRecipe, Recipe
from parloop.train.build import build_model
from parloop.train.plan import PEAK_FLOPS, UTILISATION, parameters, plan_of, training_memory
from parloop.train.plan_tables import plan_tables


@pytest.mark.parametrize("tied", [False, True])
def test_parameters(tied):
    recipe = Recipe(tie_word_embeddings=tied)
    model = build_model(recipe)
    counted = parameters(recipe.plt_config())
    assert counted["total"] == sum(p.numel() for p in model.parameters())
    assert counted["gates"] == sum(p.numel() for name, p in model.named_parameters() if "gate" in name and "mlp" not in name)
    assert counted["layers"] == sum(p.numel() for p in model.model.layers.parameters())


@pytest.mark.parametrize("mode", ["none", "layer", "loop", "both"])
@pytest.mark.parametrize("loops", [1, 2, 3])
@pytest.mark.parametrize(
    "shape",
    [
        {},
        {
            "hidden_size": 192,
            "num_attention_heads": 6,
            "intermediate_size": 256,
            "num_hidden_layers": 6,
            "window_tokens": 64,
        },
    ],
)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_memory_against_a_measured_step(mode, loops, shape, precision):
    """One process, packed rows; bfloat16 as Trainer computes it, with autocast. (Sharded: benchmarks/training_memory.py.)"""
    recipe = Recipe(**shape, loops=loops, gradient_checkpointing=mode)
    model = build_model(recipe)
    if mode in ("layer", "both"):
        model.activation_checkpointing_enable({"use_reentrant": False})
    for p in model.parameters():
        p.grad = torch.zeros_like(p)  # as in a step's second micro-batch
    rows, length = 4, 256
    ids, places = torch.full((rows, length), 3), torch.arange(length).remainder(100).repeat(rows, 1)
    with LiveBytes(ignored=[t for p in model.parameters() for t in (p, p.grad)]) as live:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            loss = model(ids, position_ids=places, labels=ids).loss
        loss.backward()
    element = 2 if precision == "bfloat16" else 4
    planned = training_memory(model.config, rows, length, checkpointing=mode, element=element, fused=False)
    assert planned.total - planned.states == pytest.approx(live.peak, rel=0.1)


def test_the_released_shape():
    """Numbers that can be checked by hand."""
    plan = plan_of(Recipe.load("loopcoder-v2-7b"))
    P = plan["parameters"]["total"]
    assert pytest.approx(7.616e9, rel=1e-3) == P
    config = Recipe.load("loopcoder-v2-7b").plt_config()
    assert plan["flops"][2] == training_flops_per_token(config, 4096, 2)
    assert plan["flops"][2] / plan["flops"][1] == pytest.approx(1.95, abs=0.01)
    assert plan["flops"][1] == pytest.approx(
        6 * (P - plan["parameters"]["embedding"]), rel=0.05
    )  # six per parameter, and attention
    assert plan["days"][512][2] == pytest.approx(18e12 * plan["flops"][2] / (512 * PEAK_FLOPS * UTILISATION) / 86400)
    by = {(row["gpus"], row["gather"]): row for row in plan["gpus"]}
    assert {gpus for gpus, _ in by} == {1, 8, 64, 512}
    for (gpus, gather), row in by.items():
        memory = row["memory"]
        assert row["rows"] * row["accumulation"] * gpus == 1024
        assert memory.states == pytest.approx(16 * P / gpus)
        assert memory.gathered == pytest.approx(2 * P if gather == "step" and gpus > 1 else memory.gathered)
        if gpus > 1:
            assert memory.gradients == pytest.approx(2 * plan["parameters"]["layers"])
    assert by[8, "visit"]["memory"].gathered < by[8, "step"]["memory"].gathered / 3
    assert plan_of(Recipe.load("loopcoder-v2-7b", replicas=8))["gpus"][-1]["memory"].states == pytest.approx(16 * P / 64)


def test_checkpointing_pays_in_the_order_it_should():
    config = Recipe.load("loopcoder-v2-7b").plt_config()
    held = {m: training_memory(config, 1, 4096, checkpointing=m).activations for m in ("none", "layer", "loop", "both")}
    assert held["none"] > 5 * held["layer"] > 5 * held["loop"] >= 5 * held["both"]


def test_adapters_need_no_optimizer_for_the_rest(tmp_path):
    build_model(Recipe()).save_pretrained(tmp_path)
    full, lora = (
        plan_of(ChatRecipe(model=str(tmp_path), chat="x", length=64, lora_rank=rank))["gpus"][0]["memory"] for rank in (0, 8)
    )
    P = sum(p.numel() for p in build_model(Recipe()).parameters())
    adapters = (
        8 * 3 * sum(a + b for a, b in [(128, 128), (128, 64), (128, 64), (128, 128), (128, 384), (128, 384), (384, 128)])
    )
    assert full.states == 16 * P
    assert lora.states == 2 * P + 16 * adapters  # frozen in bfloat16
    assert training_memory(Recipe().plt_config(), 1, 64, shards=2, adapters=1).states == 4 * P / 2 + 16


def test_the_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["parloop", "train", "loopcoder-v2-7b", "--plan", "--length", "2048"])
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as done:
        cli.main()
    assert done.value.code == 0
    shown = capsys.readouterr().out
    for text in ("7.616B parameters", "rows of 2,048 tokens", "days on", "512", "at 40% of 989 TFLOP/s"):
        assert text in shown
    assert len(plan_tables(plan_of(Recipe()))) == 4
    # Small models in units that show something.
    monkeypatch.setattr(sys, "argv", ["parloop", "train", "quick", "--plan"])
    with pytest.raises(SystemExit):
        cli.main()
    shown = capsys.readouterr().out
    for text in ("0.7M parameters", "MFLOPs", "hours on", "MB on each GPU"):
        assert text in shown
    assert torch.get_default_device().type == "cpu"
