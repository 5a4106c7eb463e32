"""How fast a mixture is read, beside what a training step takes: tokens per second.

    python benchmarks/loader.py

Two sources (the standard library's source and that of installed packages), shuffled, tokenized, mixed and packed, in this process and in a
worker; and forward, backward and optimiser step of the quick recipe's model on all threads. Rounds are interleaved.
"""

import argparse
import dataclasses
from functools import partial

import torch
from rich.console import Console

from parloop.corpus import StreamLoader, load_corpus
from parloop.timing import Spread, interleaved, seconds_of
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
    batch = next(loaders["loader, this process"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def read(loader: StreamLoader) -> None:
        for _ in range(arguments.steps):
            next(loader)

    def train(steps: int = 20) -> None:
        for _ in range(steps):
            model(**batch, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    tokens = dict.fromkeys(loaders, arguments.steps * step_tokens) | {"training step, R = 1": 20 * step_tokens}
    variants = {name: partial(seconds_of, partial(read, loader)) for name, loader in loaders.items()}
    variants["training step, R = 1"] = partial(seconds_of, train)
    seconds = interleaved(variants, arguments.rounds)  # the first round opens files and warms up
    rates = {name: Spread.of([tokens[name] / value for value in values]) for name, values in seconds.items()}
    base = rates["training step, R = 1"].median
    for name, rate in rates.items():
        console.print(
            f"{name:22} {rate.median:12,.0f} tokens/s ({rate.low:,.0f} .. {rate.high:,.0f}), {rate.median / base:.1f} times a training step",
            highlight=False,
        )
    console.print(f"{torch.get_num_threads()} threads", highlight=False)


if __name__ == "__main__":
    main()
