"""What a decode step is made of, each part alone: matrix products by rows, attention by how its rows are laid out, int8 kernels.

    python benchmarks/decode_parts.py [--repeats N]

Rounds of all variants are interleaved; printed are medians over rounds, and ratios taken within a round with their quartiles.
"""

import argparse
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from parloop.bench.models import config_of, random_model
from parloop.model.cache import make_cache
from parloop.model.shapes import SHAPES
from parloop.timing import Spread, interleaved, seconds_of

SHAPE = SHAPES["600m"]
D, K, FFN, L = SHAPE["hidden_size"], SHAPE["head_dim"], SHAPE["intermediate_size"], SHAPE["num_hidden_layers"]
H, G = SHAPE["num_attention_heads"], SHAPE["num_key_value_heads"]


def rounds(variants: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Return the seconds of every variant in every round but the first."""
    return interleaved({name: partial(seconds_of, run) for name, run in variants.items()}, repeats)


def show(title: str, times: dict[str, list[float]], base: dict[str, str] | str) -> None:
    table = Table("", "ms", "ratio", "to", title=title)
    for name, own in times.items():
        other = base if isinstance(base, str) else base[name]
        ratio = Spread.of_ratios(own, times[other])
        table.add_row(
            name, f"{1000 * Spread.of(own).median:.3g}", f"{ratio.median:.2f} ({ratio.low:.2f}..{ratio.high:.2f})", other
        )
    Console(width=110).print(table)


def matrices(repeats: int) -> None:
    weights = [torch.randn(o, i).bfloat16() for _ in range(L) for i, o in ((D, 2 * FFN), (FFN, D))]

    def run(rows: int) -> Callable[[], object]:
        x = {i: torch.randn(rows, i).bfloat16() for i in (D, FFN)}
        return lambda: [F.linear(x[w.shape[1]], w) for w in weights]

    times = rounds({f"{rows} rows": run(rows) for rows in (1, 2, 3, 4, 8, 16)}, repeats)
    read = sum(w.nbytes for w in weights) / Spread.of(times["1 rows"]).median / 1e9
    show(f"feed-forward products of {L} layers, bfloat16; one row reads {read:.1f} GB/s", times, "1 rows")


def attention(repeats: int) -> None:
    for S in (256, 16384):
        k, v = (torch.randn(1, G, S, K).bfloat16() for _ in range(2))
        variants, base = {}, {}
        for loops in (1, 2, 4):
            heads = torch.randn(1, H * loops, 1, K).bfloat16()  # every head of every loop reads the keys of its group
            rows = heads.view(1, G, -1, K)  # the rows of a group, read together
            for name, q, gqa in ((f"R = {loops}, as heads", heads, True), (f"R = {loops}, as rows", rows, False)):
                variants[name] = lambda q=q, gqa=gqa, k=k, v=v: F.scaled_dot_product_attention(q, k, v, enable_gqa=gqa)
                base[name] = f"R = {loops}, as heads"
        show(
            f"attention of one token over {S} keys, {H} heads, {G} key heads, bfloat16", rounds(variants, 5 * repeats), base
        )


def int8(repeats: int) -> None:
    x, w = torch.randn(1, D).bfloat16(), [torch.randn(FFN, D).bfloat16() for _ in range(2 * L)]
    small = [torch.randint(-127, 127, (FFN, D), dtype=torch.int8) for _ in w]
    scale = torch.rand(FFN).bfloat16()
    variants = {
        "bfloat16": lambda: [F.linear(x, weight) for weight in w],
        "int8, torch's _weight_int8pack_mm": lambda: [torch._weight_int8pack_mm(x, weight, scale) for weight in small],
    }
    show(f"one row times {2 * L} matrices of {D} x {FFN}", rounds(variants, repeats), "bfloat16")


def whole_step() -> None:
    """Where the time of a step goes at 256 tokens, by torch's profiler."""
    model = random_model(config_of(None, "600m", 2), torch.bfloat16, torch.device("cpu"))
    table = Table(
        "operation", "R = 1, ms", "R = 2, ms", title="seven decode steps at 256 tokens, time of each operation itself"
    )
    spent: list[dict[str, float]] = []
    with torch.no_grad():
        for R in (1, 2):
            cache = make_cache(model.config, R)
            ids = torch.arange(256)[None]
            model(ids, cache=cache, num_loops=R, logits_to_keep=1)
            model(ids[:, :1], cache=cache, num_loops=R)
            with profile(activities=[ProfilerActivity.CPU]) as profiler:
                for _ in range(7):
                    model(ids[:, :1], cache=cache, num_loops=R)
            spent.append({event.key: event.self_cpu_time_total / 1000 for event in profiler.key_averages()})
    for name in sorted(spent[1], key=lambda name: -spent[1][name])[:12]:
        table.add_row(name, f"{spent[0].get(name, 0):.1f}", f"{spent[1][name]:.1f}")
    table.add_row("all", *(f"{sum(one.values()):.0f}" for one in spent))
    Console(width=110).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    for part in (matrices, attention, int8):
        part(arguments.repeats)
    whole_step()


if __name__ == "__main__":
    main()
