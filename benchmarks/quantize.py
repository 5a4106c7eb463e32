"""What int8 and int4 weights cost in loss and give in decoding time (torchao, weight-only; gates, norms and embeddings as they are).

python benchmarks/quantize.py loss runs/study-quick/r2-seed0     # bits per byte on held-out text
python benchmarks/quantize.py time --shape 600m                  # decode, interleaved with bfloat16
"""

import argparse
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig
from torchao.quantization.granularity import PerGroup
from transformers import AutoModelForCausalLM, AutoTokenizer, TorchAoConfig

from parloop import make_cache
from parloop.bench.models import config_of, random_model
from parloop.corpus import load_corpus
from parloop.model.shapes import SHAPES
from parloop.timing import Spread, interleaved, seconds_of
from parloop.train import Recipe
from parloop.train.evaluate import evaluate_documents

WAYS: dict[str, Any] = {
    "bfloat16": None,
    "int8": Int8WeightOnlyConfig(),
    # Note: torchao 0.18's Int4WeightOnlyConfig has no packing for CPUs. This one computes the same values, stored a byte each.
    "int4": IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)),
}


def load(checkpoint: str, way: str) -> Any:
    options = {} if WAYS[way] is None else {"quantization_config": TorchAoConfig(WAYS[way])}
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16, **options).eval()


def loss(checkpoint: str, console: Console) -> None:
    recipe = Recipe.load(Path(checkpoint, "recipe.yaml"))
    corpus = load_corpus(recipe.corpus_settings(), console=console)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    texts = list(corpus.validation["text"])
    base = None
    for way in WAYS:
        try:
            model = load(checkpoint, way)
            bits = evaluate_documents(model, tokenizer, texts, recipe.length, max_chars=3000).bits_per_byte[-1]
        except Exception as error:
            console.print(f"{way}: {type(error).__name__}: {str(error)[:300]}", markup=False)
            continue
        base = base or bits
        console.print(f"{way}: {bits:.4f} bits per byte ({bits - base:+.4f})", highlight=False)


@torch.no_grad()
def decode_ms(model: Any, loops: int, steps: int) -> float:
    ids = torch.full((1, 64), 5)
    cache = make_cache(model.config, loops)
    options = {"cache": cache, "num_loops": loops, "logits_to_keep": 1, "output_loop_states": False}
    model(ids, **options)
    model(ids[:, :1], **options)

    def decode() -> None:
        for _ in range(steps):
            model(ids[:, :1], **options)

    return 1e3 * seconds_of(decode) / steps


def times(shape: str, console: Console, rounds: int, steps: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        random_model(config_of(None, shape, 2), torch.bfloat16, torch.device("cpu")).save_pretrained(folder)
        models = {}
        for way in WAYS:
            try:
                models[way] = load(folder, way)
                decode_ms(models[way], 1, 1)
            except Exception as error:
                models.pop(way, None)
                console.print(f"{way}: {type(error).__name__}: {str(error)[:300]}", markup=False)
    measured = interleaved({(way, R): partial(decode_ms, models[way], R, steps) for way in models for R in (1, 2)}, rounds)
    for (way, R), values in measured.items():
        ratio = Spread.of_ratios(values, measured["bfloat16", R])
        console.print(
            f"R = {R}, {way}: {Spread.of(values).median:.1f} ms per token, {ratio.median:.2f} of bfloat16 "
            f"({ratio.low:.2f} .. {ratio.high:.2f}, quartiles)",
            highlight=False,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["loss", "time"])
    parser.add_argument("checkpoint", nargs="?")
    parser.add_argument("--shape", default="600m", choices=sorted(SHAPES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8)
    arguments = parser.parse_args()
    console = Console(width=100)
    if arguments.what == "loss":
        if arguments.checkpoint is None:
            parser.error("loss needs a checkpoint of parloop train or parloop study")
        loss(arguments.checkpoint, console)
    else:
        times(arguments.shape, console, arguments.rounds, arguments.steps)


if __name__ == "__main__":
    main()
