"""Peak memory of loading a sharded checkpoint, over the checkpoint's size.

    python benchmarks/load_memory.py --shape 600m

Saves random weights in bfloat16 as shards, loads them and reads a text with them in a process of their own, and prints that process's
resident high-water mark.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from parloop.bench.models import config_of, random_model
from parloop.model.shapes import SHAPES

LOAD = """
import sys, torch, parloop
from transformers import AutoModelForCausalLM
from parloop.timing import peak_bytes
before = peak_bytes(torch.device("cpu"))
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert model.dtype is torch.bfloat16
model(torch.arange(8)[None])  # weights are mapped, and read only when they are used
print(before, peak_bytes(torch.device("cpu")))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="600m", choices=sorted(SHAPES))
    parser.add_argument("--shard", default="200MB")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = random_model(config_of(None, arguments.shape, 2), torch.bfloat16, torch.device("cpu"))
        model.save_pretrained(folder, max_shard_size=arguments.shard)
        del model
        shards = sorted(Path(folder).glob("*.safetensors"))
        size = sum(shard.stat().st_size for shard in shards)
        done = subprocess.run([sys.executable, "-c", LOAD, folder], capture_output=True, text=True, check=True)
        before, peak = map(int, done.stdout.split())
    print(
        f"{len(shards)} shards, {size / 1e9:.2f} GB; peak {peak / 1e9:.2f} GB, of which Python and torch {before / 1e9:.2f} GB"
    )
    print(f"peak over the checkpoint's size: {(peak - size) / 1e9:+.2f} GB")


if __name__ == "__main__":
    main()
