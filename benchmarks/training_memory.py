"""What `parloop train --plan` computes, held against measured runs: memory and FLOPs of a training step against the loop count.

    python benchmarks/training_memory.py                       # one process
    torchrun --nproc-per-node 2 benchmarks/training_memory.py  # sharded, with what is gathered

Memory is the peak of bytes of tensors alive in forward and backward (on a CPU counted operation by operation, on a GPU the
allocator's), FLOPs are those that torch counts, recomputation not included. What travels per step is in multiples of all weights.
"""

import argparse
import os
from collections import Counter

import torch
from rich.console import Console
from rich.table import Table
from torch.distributed.tensor import DTensor
from torch.utils.flop_counter import FlopCounterMode

from parloop.model.flops import training_flops_per_token
from parloop.model.window import band_block
from parloop.timing import LiveBytes
from parloop.train import Recipe
from parloop.train.build import build_model
from parloop.train.plan import training_memory
from parloop.train.sharding import free_gathered, start_processes

MODES = ("none", "layer", "loop", "both")


class Alive(LiveBytes):
    """The bytes that are alive, asked for after every operation (FSDP frees what it gathered by shrinking storages), and the traffic."""

    def __init__(self) -> None:
        super().__init__(resized=True)
        self.traffic: Counter[str] = Counter()  # bytes of whole tensors that are gathered, or scattered

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = super().__torch_dispatch__(function, types, args, kwargs)
        if function.namespace == "c10d":
            tensors = [x for x in args[:2] if isinstance(x, torch.Tensor)]
            self.traffic[function._schema.name] += max((x.nbytes for x in tensors), default=0)
        return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rows", type=int, default=2, help="per process")
    parser.add_argument("--loops", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--accumulation", type=int, default=1, help="micro-batches of a step")
    arguments = parser.parse_args()
    shape = {
        "vocab_size": 4096, "hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 4,
        "intermediate_size": 768, "window_tokens": 32, "length": arguments.length, "device": "cpu", "precision": arguments.precision,
    }  # fmt: skip
    processes = int(os.environ.get("WORLD_SIZE", 1))
    table = Table(
        title=f"{arguments.rows} rows of {arguments.length} tokens per process, {processes} process(es), MB at the peak"
    )
    for name in (
        "R",
        "recomputed",
        "gather",
        "formula",
        "measured",
        "formula / measured",
        "FLOPs, formula / counted",
        "gathered / weights",
        "scattered / weights",
    ):
        table.add_column(name, justify="right")
    for R in arguments.loops:
        for mode in MODES:
            for gather in ("step", "visit") if processes > 1 else ("step",):
                recipe = Recipe(
                    **shape, loops=R, gradient_checkpointing=mode, gather=gather, batch_size=arguments.rows * processes
                )
                state = start_processes(recipe)
                model = build_model(recipe, None, state)
                if mode in ("layer", "both"):
                    model.activation_checkpointing_enable({"use_reentrant": False})
                ids = torch.randint(3, 4096, (arguments.rows, arguments.length))
                places = torch.arange(arguments.length)[None].repeat(arguments.rows, 1) % (arguments.length // 2)
                call = {"input_ids": ids, "position_ids": places, "labels": ids.masked_fill(places == 0, -100)}
                autocast = torch.autocast("cpu", torch.bfloat16, enabled=arguments.precision == "bfloat16")
                if processes > 1:  # the first step sets FSDP up
                    with autocast:
                        model(**call).loss.backward()
                    free_gathered(model)
                for p in model.parameters():
                    p.grad = torch.zeros_like(p)  # as in a step's second micro-batch
                with Alive() as alive:
                    for p in model.parameters():
                        for tensor in (p, p.grad):
                            alive.watch(tensor.to_local() if isinstance(tensor, DTensor) else tensor)
                    for _ in range(arguments.accumulation):
                        with autocast:
                            loss = model(**call).loss
                        loss.backward()
                        del loss
                    free_gathered(model)
                measured = alive.peak / 1e6
                whole = sum(p.numel() for p in model.parameters()) * 4
                travelled = [
                    alive.traffic[name] / whole for name in ("c10d::_allgather_base_", "c10d::_reduce_scatter_base_")
                ]
                shown = [f"{x:.2f}" for x in travelled] if processes > 1 else ["", ""]
                formula = training_memory(
                    model.config, arguments.rows, arguments.length, checkpointing=mode, shards=processes, gather=gather,
                    element=2 if arguments.precision == "bfloat16" else 4, fused=False,
                )  # fmt: skip
                computed = (formula.total - formula.states / 2) / 1e6  # there is no optimizer here
                counted = "" if mode != "none" or processes > 1 else f"{flops(model, call, recipe):.3f}"
                table.add_row(
                    str(R),
                    mode,
                    gather if processes > 1 else "",
                    f"{computed:.0f}",
                    f"{measured:.0f}",
                    f"{computed / measured:.2f}",
                    counted,
                    *shown,
                )
    if state.is_main_process:
        Console(width=150).print(table)


def flops(model, call, recipe: Recipe) -> float:
    """The formula over what is counted. Counted with eager attention, which torch's counter sees, less what it computes of keys
    that are out of sight."""
    c, T = model.config, recipe.length
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        model(**call).loss.backward()
    block = band_block(c.window_tokens)
    out_of_sight = c.plt_num_loops * (T - (T + 1) / 2) + (c.plt_num_loops - 1) * (block - 1)
    unseen = 3 * c.num_hidden_layers * 4 * c.num_attention_heads * c.head_dim * out_of_sight
    return training_flops_per_token(c, T) / (counter.get_total_flops() / call["input_ids"].numel() - unseen)


if __name__ == "__main__":
    main()
