"""Peak memory of converting a sharded checkpoint, over the largest shard.

    python benchmarks/convert_memory.py --layers 8 --shard 250MB

Makes a random Llama in bfloat16 (the default: 1.0 GB), converts it to two loops and back in processes of their own, and prints their
resident high-water marks.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

CONVERT = """
import sys, torch
from parloop.timing import peak_bytes
from parloop.convert import convert
before = peak_bytes(torch.device("cpu"))
convert(sys.argv[1], sys.argv[2], to=sys.argv[3], start=sys.argv[4], samples=0)
print(before, peak_bytes(torch.device("cpu")))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--shard", default="250MB")
    arguments = parser.parse_args()
    config = LlamaConfig(
        hidden_size=2048, intermediate_size=5632, num_hidden_layers=arguments.layers, num_attention_heads=16
    )
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "source")
        with torch.device("meta"):
            model = LlamaForCausalLM(config)
        model = model.to(torch.bfloat16).to_empty(device="cpu")
        for parameter in model.parameters():
            torch.nn.init.constant_(parameter, 0.01)
        model.save_pretrained(source, max_shard_size=arguments.shard)
        del model
        sizes = [shard.stat().st_size for shard in source.glob("*.safetensors")]
        print(f"{len(sizes)} shards, {sum(sizes) / 1e9:.2f} GB, the largest {max(sizes) / 1e9:.2f} GB")
        for start, end, *what in (
            ("source", "exact", "plt", "exact"),
            ("source", "open", "plt", "open"),
            ("exact", "back", "dense", ""),
        ):
            options = [str(Path(folder, start)), str(Path(folder, end)), what[0], what[1] or "exact"]
            done = subprocess.run([sys.executable, "-c", CONVERT, *options], capture_output=True, text=True, check=True)
            before, peak = map(int, done.stdout.split())
            print(
                f"to {end}: peak {peak / 1e9:.2f} GB, {(peak - before) / 1e9:.2f} GB over Python and torch; over the largest shard: "
                f"{(peak - max(sizes)) / 1e9:+.2f} GB"
            )


if __name__ == "__main__":
    main()
