"""How fast a mixture is read, beside what a training step takes: tokens per second.

    python benchmarks/loader.py

Two sources (the standard library's source and that of installed packages), shuffled, tokenized, mixed and packed, in this process and in a
worker; and forward, backward and optimiser step of the quick recipe's model on all threads. Rounds are interleaved.
"""

import argparse
import dataclasses
import statistics
import time

import torch
from rich.console import Console

from parloop.corpus import StreamLoader, load_corpus
from parloop.train import Recipe
from parloop.train.build import build_model
from parloop.train.data import mixture_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=200, help="per round, of the loaders")
    arguments = parser.parse_args()
    console = Console()
    recipe = Recipe.load("quick")
    tokenizer = load_corpus(recipe.corpus_settings(), console=console).tokenizer
    mixed = dataclasses.replace(
        recipe, mixture=[{"source": "stdlib", "weight": 1}, {"source": "installed", "weight": 1}], shuffle_documents=200
    )
    step_tokens = recipe.batch_size * recipe.length
    loaders = {
        "loader, this process": iter(StreamLoader(mixture_of(mixed), tokenizer, recipe.batch_size, prefetch=0)),
        "loader, a worker": iter(StreamLoader(mixture_of(mixed), tokenizer, recipe.batch_size, prefetch=4)),
    }
    model = build_model(dataclasses.replace(recipe, loops=1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    rates: dict[str, list[float]] = {name: [] for name in (*loaders, "training step, R = 1")}
    for _ in range(arguments.rounds + 1):
        for name, loader in loaders.items():
            start = time.perf_counter()
            for _step in range(arguments.steps):
                batch = next(loader)
            rates[name].append(arguments.steps * step_tokens / (time.perf_counter() - start))
        start = time.perf_counter()
        for _ in range(20):
            model(**batch, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        rates["training step, R = 1"].append(20 * step_tokens / (time.perf_counter() - start))
    base = statistics.median(rates["training step, R = 1"][1:])
    for name, values in rates.items():
        low, middle, high = statistics.quantiles(values[1:], n=4)  # the first round opens files and warms up
        console.print(
            f"{name:22} {middle:12,.0f} tokens/s ({low:,.0f} .. {high:,.0f}), {middle / base:.1f} times a training step",
            highlight=False,
        )
    console.print(f"{torch.get_num_threads()} threads", highlight=False)


if __name__ == "__main__":
    main()
