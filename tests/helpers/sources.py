"""Folders of Python files to train on."""

import random

from rich.console import Console

from parloop.corpus import CorpusSettings

QUIET = Console(quiet=True)


def write_sources(folder, n=60, seed=0):
    """A folder of n distinct Python files of about 3 kB."""
    rng = random.Random(seed)
    names = ["alpha", "beta", "gamma", "delta", "epsilon"]
    for i in range(n):
        lines = [f"def {rng.choice(names)}_{i}_{j}(x):\n    return x + {rng.randrange(1000)}\n" for j in range(70)]
        path = folder / f"package_{i % 3}" / f"module_{i}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(lines))
    return folder


def settings(source, **changes):
    fields = {"source": str(source), "vocab_size": 300, "length": 32, "validation_share": 0.2}
    return CorpusSettings(**(fields | changes))
