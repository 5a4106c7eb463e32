"""Try values of one field of a recipe, at several loop counts: how the settings of the shipped recipes were found.

    python benchmarks/sweep.py learning_rate 1.5e-3 3e-3 5e-3 --loops 1 2 4
    python benchmarks/sweep.py hidden_scale 0.012 0.0354 0.1 0.3 --loops 2 --recipe quick --output runs/sweep

Prints held-out bits per byte of every loop's read-out. Runs are kept in the output folder; a sweep can be continued.
"""

import argparse
from pathlib import Path

from rich.console import Console

from parloop.checkpoints import load_model
from parloop.corpus import load_corpus
from parloop.train import Recipe
from parloop.train.evaluate import evaluate_documents
from parloop.train.training import train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("field")
    parser.add_argument("values", nargs="+")
    parser.add_argument("--loops", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--recipe", default="quick")
    parser.add_argument("--output", type=Path, default=Path("runs/sweep"))
    arguments = parser.parse_args()
    console = Console()
    for value in arguments.values:
        for loops in arguments.loops:
            recipe = Recipe.load(arguments.recipe, loops=loops, **{arguments.field: number(value)})
            folder = arguments.output / f"{arguments.field}-{value}-r{loops}"
            corpus = load_corpus(recipe.corpus_settings(), console=console)
            result = train(recipe, folder, corpus=corpus, console=console)
            model = load_model(folder, recipe.device)
            bits = evaluate_documents(
                model, corpus.tokenizer, list(corpus.validation["text"]), recipe.length, max_chars=3000
            ).bits_per_byte
            readouts = ", ".join(f"{b:.3f}" for b in bits)
            console.print(
                f"{arguments.field}={value} R={loops}: {readouts} bits per byte, {result.seconds:.0f} s", highlight=False
            )


def number(text: str):
    try:
        value = float(text)
    except ValueError:
        return text
    return int(value) if value == int(value) and "." not in text and "e" not in text else value


if __name__ == "__main__":
    main()
