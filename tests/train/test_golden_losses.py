"""A training step computes what it did: the losses of 30 steps at every loop count, against those written down in golden_losses.json.

    PYTHONPATH=src python tests/train/test_golden_losses.py     # writes golden_losses.json anew: say in the commit what changed them

Nothing here depends on an installation: the text is made up, and a vocabulary of bytes has no merges to learn.
"""

import json
import tempfile
from pathlib import Path

import pytest
import torch
from rich.console import Console

from parloop.train import Recipe
from parloop.train.training import train

GOLDEN = Path(__file__).with_name("golden_losses.json")
STEPS = 30
# Rounding alone (another attention backend, micro-batches instead of a batch, two threads) moves a loss by up to 4e-7 of its value.
# The weakest change that was tried, Adam's epsilon of 1e-8 instead of 1e-15, moves it by 7e-6; a decay of 0.09 instead of 0.1 by 8e-4.
TOLERANCE = 5e-6
RUNS = {f"R = {loops}": loops for loops in (1, 2, 3, 4)} | {"R = 1, 2 or 3 by step": [1, 2, 3]}


def recipe(source: Path, loops: int | list[int]) -> Recipe:
    """A small model, and everything that a step has: decay, clipping (of half of the steps), warm-up and micro-batches."""
    return Recipe(
        source=str(source),
        loops=loops,
        vocab_size=259,  # the bytes and three special tokens
        length=48,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        window_tokens=8,
        batch_size=8,
        gradient_accumulation=2,
        tokens=STEPS * 8 * 48,
        learning_rate=1e-2,
        warmup_share=0.1,
        weight_decay=0.1,
        max_grad_norm=1.0,
        seed=1,
        precision="float32",
        device="cpu",
        eval_every=0,
        log_every=1,
        save_every=1000,
    )


def write_text(folder: Path) -> Path:
    """A hundred files of two to five functions."""
    folder.mkdir(parents=True)
    for i in range(100):
        functions = [f"def f{i}_{j}(x):\n    return x * {i * j % 7} + {i + j}\n\n\n" for j in range(2 + i % 4)]
        (folder / f"module_{i:03}.py").write_text("".join(functions))
    return folder


def losses(source: Path, loops: int | list[int], output: Path) -> list[float]:
    """The loss of every step, in nats per token."""
    result = train(recipe(source, loops), output, console=Console(quiet=True))
    return [loss for _, loss in result.loss_curve]


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    return write_text(tmp_path_factory.mktemp("golden") / "source")


@pytest.mark.parametrize("run", RUNS)
def test_losses_of_thirty_steps_are_those_written_down(run, text, tmp_path):
    golden = json.loads(GOLDEN.read_text())[run]

    assert losses(text, RUNS[run], tmp_path / "run") == pytest.approx(golden, rel=TOLERANCE)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as made:
        source = write_text(Path(made) / "source")
        written = {run: [round(loss, 6) for loss in losses(source, loops, Path(made) / run)] for run, loops in RUNS.items()}
    GOLDEN.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {GOLDEN}")
