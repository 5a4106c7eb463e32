"""Does one model serve several loop counts? Trained at one count, or at another count drawn for every step; read at each.

    python benchmarks/random_loops.py --seeds 3 --output runs/random-loops

The quick recipe, the same tokens for all. Held-out bits per byte of every model run with every loop count, and, per count, the difference to
the model that was trained at that count alone, paired over documents and seeds. What is finished is kept.
"""

import argparse
import dataclasses
import warnings
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM

from parloop.corpus import load_corpus
from parloop.statistics import bits_per_byte, paired_difference, resample_weights
from parloop.train import Recipe
from parloop.train.evaluate import evaluate_documents
from parloop.train.training import train

TRAINED: list[int | list[int]] = [1, 2, 3, [1, 2], [1, 2, 3]]
READ = (1, 2, 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/random-loops"))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--documents", type=int, default=60, help="held out, at most 3000 characters of each")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    settings = parser.parse_args()
    torch.set_num_threads(settings.threads)
    warnings.filterwarnings("ignore", message="num_loops=")
    console = Console(width=120)
    recipe = Recipe.load("quick", eval_every=0, save_every=10**6)
    corpus = load_corpus(recipe.corpus_settings(), console=console)
    texts = list(corpus.validation["text"][: settings.documents])
    nll: dict[tuple[str, int], list[np.ndarray]] = {}
    seconds: dict[str, list[float]] = {}
    byte_counts = None
    for seed in range(settings.seeds):
        for loops in TRAINED:
            name = "-".join(map(str, loops)) if isinstance(loops, list) else str(loops)
            folder = settings.output / f"r{name}-seed{seed}"
            done = train(dataclasses.replace(recipe, loops=loops, seed=seed), folder, corpus=corpus, console=console)
            seconds.setdefault(name, []).append(done.seconds)
            model = AutoModelForCausalLM.from_pretrained(folder)
            for n in READ:
                kept = folder / f"read-{n}.npz"
                if not kept.exists():
                    result = evaluate_documents(model, corpus.tokenizer, texts, recipe.length, max_chars=3000, num_loops=n)
                    np.savez(kept, nll=result.nll[:, -1], bytes=result.bytes)
                loaded = np.load(kept)
                byte_counts = loaded["bytes"]
                nll.setdefault((name, n), []).append(loaded["nll"])
            console.print(f"seed {seed}, trained at {loops}: {done.seconds:.0f} s", highlight=False)

    assert byte_counts is not None
    weights = resample_weights(len(byte_counts), settings.seeds, np.random.default_rng(0))
    table = Table(
        title=f"bits per byte, {settings.seeds} seed(s), {len(byte_counts)} held-out documents, {recipe.tokens:,} tokens each"
    )
    table.add_column("trained at")
    for n in READ:
        table.add_column(f"read with R = {n}", justify="right")
        table.add_column(f"minus trained at {n}", justify="right")
    table.add_column("s", justify="right")
    for loops in TRAINED:
        name = "-".join(map(str, loops)) if isinstance(loops, list) else str(loops)
        cells = []
        for n in READ:
            values = np.array(nll[name, n])
            change = paired_difference(values, np.array(nll[str(n), n]), byte_counts, weights)
            cells.append(f"{bits_per_byte(values, byte_counts, weights).value:.4f}")
            cells.append("" if name == str(n) else f"{change.value:+.4f} ({change.low:+.4f} .. {change.high:+.4f})")
        table.add_row(name.replace("-", " or "), *cells, f"{np.mean(seconds[name]):.0f}")
    console.print(table)


if __name__ == "__main__":
    main()
