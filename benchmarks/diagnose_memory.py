"""Memory of a diagnosis beside the model's own, at two lengths.

    python benchmarks/diagnose_memory.py --shape 600m --lengths 512 1024
    python benchmarks/diagnose_memory.py --shape loopcoder-v2 --lengths 1024 --loops 2   # 15.2 GB of weights

Random weights in bfloat16 and random tokens. Printed is the process's resident high-water mark during the diagnosis over what it
held before it (weights and Python), or on a GPU the allocator's.
"""

import argparse
import time

import torch
from rich.console import Console

import parloop
from parloop.bench.models import config_of, random_model
from parloop.model.shapes import SHAPES
from parloop.timing import peak_bytes, reset_peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="600m", choices=sorted(SHAPES))
    parser.add_argument("--lengths", nargs="+", type=int, default=[512, 1024])
    parser.add_argument("--loops", nargs="+", type=int, default=[2, 4])
    arguments = parser.parse_args()
    console = Console(width=100)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = random_model(config_of(None, arguments.shape, max(arguments.loops)), torch.bfloat16, device)
    weights = sum(p.nbytes for p in model.parameters())
    console.print(f"{arguments.shape}: weights {weights / 1e9:.2f} GB in {model.dtype}, {device}", highlight=False)
    for loops in arguments.loops:
        for length in arguments.lengths:
            ids = torch.randint(3, model.config.vocab_size, (1, length), device=device)
            reset_peak(device)
            before, start = peak_bytes(device), time.perf_counter()
            parloop.diagnose(model, [{"input_ids": ids}], num_loops=loops)
            extra = peak_bytes(device) - before
            console.print(
                f"R = {loops}, {length} tokens: {extra / 1e9:.2f} GB more at the peak, {time.perf_counter() - start:.0f} s",
                highlight=False,
            )


if __name__ == "__main__":
    main()
