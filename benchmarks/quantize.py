"""What quantised weights cost in loss, and what a linear layer takes with them for few rows and many.

python benchmarks/quantize.py loss runs/study-quick/r2-seed0  # bits per byte on held-out text after every loop
python benchmarks/quantize.py rows                            # one layer of 2048 inputs and 8192 outputs, interleaved with bfloat16
python benchmarks/quantize.py memory                          # most memory that quantising 618M parameters in several files takes

Whole models: parloop bench --weights int8 int4.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import nn
from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from transformers import AutoTokenizer

from parloop.bench.models import config_of, random_model
from parloop.checkpoints import load_model
from parloop.corpus import load_corpus
from parloop.quantize.linear import PackedLinear
from parloop.quantize.quantization import quantize
from parloop.timing import Spread, interleaved, seconds_of
from parloop.train import Recipe
from parloop.train.evaluate import evaluate_documents

WAYS: dict[str, dict[str, Any]] = {
    "8 bits": {"bits": 8},
    "8 bits, head too": {"bits": 8, "head": True},
    "4 bits, groups of 32": {"bits": 4, "group": 32},
    "4 bits, groups of 64": {"bits": 4, "group": 64},
    "4 bits, groups of 32, head too": {"bits": 4, "group": 32, "head": True},
}
INPUTS, OUTPUTS = 2048, 8192
COPIES = 6  # of a layer, so that none is in the processor's cache when its turn comes


def loss(checkpoint: str, console: Console) -> None:
    recipe = Recipe.load(Path(checkpoint, "recipe.yaml"))
    corpus = load_corpus(recipe.corpus_settings(), console=console)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    texts = list(corpus.validation["text"])

    def measure(folder: str | Path) -> Any:
        return evaluate_documents(load_model(folder, "cpu", "bfloat16"), tokenizer, texts, recipe.length, max_chars=3000)

    base = measure(checkpoint).bits_per_byte
    console.print(f"bfloat16: {', '.join(f'{bits:.4f}' for bits in base)} bits per byte after each loop", highlight=False)
    for name, options in WAYS.items():
        with tempfile.TemporaryDirectory() as scratch:
            quantize(checkpoint, Path(scratch, "out"), **options, console=console)
            bits = measure(Path(scratch, "out")).bits_per_byte
        console.print(f"{name}: {', '.join(f'{b - a:+.4f}' for a, b in zip(base, bits))}", highlight=False)


def layers() -> dict[str, Callable[[torch.Tensor, int], torch.Tensor]]:
    """Name -> a call with rows and the number of a copy."""
    weight = torch.randn(OUTPUTS, INPUTS).bfloat16() * 0.02

    def linear() -> nn.Sequential:
        layer = nn.Linear(INPUTS, OUTPUTS, bias=False, dtype=torch.bfloat16)
        layer.weight = nn.Parameter(weight.clone(), requires_grad=False)
        return nn.Sequential(layer)

    def torchao(config: Any) -> list[nn.Module]:
        made = [linear() for _ in range(COPIES)]
        for layer in made:
            quantize_(layer, config)
        return list(made)

    plain = [linear() for _ in range(COPIES)]
    int8 = torchao(Int8WeightOnlyConfig())
    compiled = [torch.compile(layer, dynamic=False) for layer in int8]
    int4 = torchao(PrototypeInt4WeightOnlyConfig(group_size=64))
    calls: dict[str, Any] = {
        "bfloat16": lambda x, i: plain[i](x),
        "torchao int8, eager": lambda x, i: int8[i](x),
        "torchao int8, compiled": lambda x, i: compiled[i](x),
        "torchao prototype int4, eager": lambda x, i: int4[i](x),
    }
    for bits, group in ((8, INPUTS), (4, 64)):
        packed = [PackedLinear.of(weight, None, bits, group) for _ in range(COPIES)]
        calls[f"{bits} bits, kernel"] = lambda x, i, packed=packed: packed[i]._few(x)
        calls[f"{bits} bits, turned back"] = lambda x, i, packed=packed: packed[i]._many(x)
    x = torch.randn(2, INPUTS).bfloat16()
    exact = F.linear(x.float(), weight.float())
    for name, call in calls.items():
        error = (call(x, 0).float() - exact).norm() / exact.norm()
        assert error < 0.2, (name, error)
    return calls


@torch.no_grad()
def rows(console: Console, counts: list[int], rounds: int) -> None:
    calls = layers()
    for count in counts:
        x = torch.randn(count, INPUTS).bfloat16()

        def once(call: Any, x: torch.Tensor = x) -> float:
            return seconds_of(lambda: [call(x, i) for i in range(COPIES)]) / COPIES

        used = {name: call for name, call in calls.items() if count <= 4 or "torchao" not in name}
        measured = interleaved({name: partial(once, call) for name, call in used.items()}, rounds)
        for name, values in measured.items():
            ratio = Spread.of_ratios(values, measured["bfloat16"])
            console.print(
                f"{count} rows, {name}: {1e3 * Spread.of(values).median:.2f} ms, {ratio.median:.2f} of bfloat16 "
                f"({ratio.low:.2f} .. {ratio.high:.2f}, quartiles)",
                highlight=False,
            )


def memory(console: Console) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch, "source")
        random_model(config_of(None, "600m", 2), torch.bfloat16, torch.device("cpu")).save_pretrained(
            source, max_shard_size="300MB"
        )
        largest = max(path.stat().st_size for path in source.glob("*.safetensors"))
        code = (
            "import resource, sys; from parloop.quantize.quantization import quantize; import parloop.model.modeling\n"
            "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
            "before = peak(); quantize(sys.argv[1], sys.argv[2]); print(before, peak())"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, source, Path(scratch, "out")], capture_output=True, text=True, check=True
        )
        before, peak = (int(number) / 1e9 for number in done.stdout.split())
    console.print(
        f"largest file {largest / 1e9:.2f} GB; resident at most {peak:.2f} GB, of which Python and the libraries {before:.2f} GB",
        highlight=False,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["loss", "rows", "memory"])
    parser.add_argument("checkpoint", nargs="?")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 48, 64, 96, 256])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    console = Console(width=140)
    if arguments.what == "loss":
        if arguments.checkpoint is None:
            parser.error("loss needs a checkpoint of parloop train or parloop study")
        loss(arguments.checkpoint, console)
    elif arguments.what == "rows":
        rows(console, arguments.rows, arguments.rounds)
    else:
        memory(console)


if __name__ == "__main__":
    main()
