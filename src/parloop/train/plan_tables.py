"""Tables that `parloop train --plan` prints."""

from typing import Any

from rich.table import Table

from .plan import GPU_BYTES, PEAK_FLOPS, ROOM, UTILISATION


def _count(number: float) -> str:
    """Format a number of parameters: 7.616B, 2.9M."""
    return f"{number / 1e9:.3f}B" if number >= 1e8 else f"{number / 1e6:.1f}M" if number >= 1e5 else f"{number:,.0f}"


def plan_tables(plan: dict[str, Any]) -> list[Any]:
    """Return what `rich` prints of a plan: parameters; FLOPs and days by loop count; memory of each GPU; notes."""
    recipe, config, counted = plan["recipe"], plan["config"], plan["parameters"]
    parts = f"{_count(counted['layers'])} in {config.num_hidden_layers} layers (gates {_count(counted['gates'])})"
    lines = [
        f"{_count(counted['total'])} parameters: {parts}, embedding {_count(counted['embedding'])}, head {_count(counted['head'])}"
    ]
    if plan["tokens"]:
        lines.append(
            f"{plan['tokens']:,} tokens in {plan['steps']:,} steps of {recipe.batch_size:,} rows of {recipe.length:,} tokens"
        )
    unit, flop = ("GFLOPs", 1e9) if plan["flops"][1] >= 1e9 else ("MFLOPs", 1e6)
    time, per_day = ("days", 1) if plan["days"][1][1] >= 1 else ("hours", 24)
    costs = Table(title="training, against the loop count", title_justify="left")
    costs.add_column("R", justify="right")
    costs.add_column(f"{unit}\nper token", justify="right")
    costs.add_column("over\nR = 1", justify="right")
    if plan["tokens"]:
        for gpus in plan["days"]:
            costs.add_column(f"{time} on\n{gpus} GPUs", justify="right")
    for n, flops in plan["flops"].items():
        spent = [by_loops[n] * per_day for by_loops in plan["days"].values()] if plan["tokens"] else []
        style = "bold" if n == plan["loops"] else ""
        shown = [f"{value:,.1f}" if value >= 0.1 else "< 0.1" for value in spent]
        costs.add_row(str(n), f"{flops / flop:,.1f}", f"{flops / plan['flops'][1]:.2f}", *shown, style=style)
    size, byte = ("GB", 1e9) if max(row["memory"].total for row in plan["gpus"]) >= 1e9 else ("MB", 1e6)
    memory = Table(
        title=f"{size} on each GPU, R = {plan['loops']}, recomputed: {recipe.gradient_checkpointing}", title_justify="left"
    )
    for name in ("GPUs", "accum.", "rows", "gather", "states", "weights", "activ.", "logits", "again", "grads", "peak"):
        memory.add_column(name, justify="right", no_wrap=True)
    for row in plan["gpus"]:
        m = row["memory"]
        held = (m.states, m.gathered + m.cast, m.activations, m.logits, m.recomputed, m.gradients)
        total = f"{m.total / byte:.1f}" + (" !" if m.total > GPU_BYTES * ROOM else "")
        how = (str(row["gpus"]), str(row["accumulation"]), str(row["rows"]), row["gather"] if row["gpus"] > 1 else "")
        memory.add_row(*how, *(f"{part / byte:.1f}" for part in held), total)
    notes = (
        f"{time.capitalize()} at {UTILISATION:.0%} of {PEAK_FLOPS / 1e12:.0f} TFLOP/s per GPU (an H100 in bfloat16); recomputation does not count as "
        f"work. Memory in bfloat16 with FSDP2, for the smallest gradient_accumulation (accum.) that leaves {1 - ROOM:.0%} of {GPU_BYTES / 1e9:.0f} GB to "
        f"kernels and the allocator; ! marks plans that do not. rows: at a time on a GPU. states: weights, gradients and Adam, sharded. weights: gathered, "
        f"or cast. again: a layer or loop that is recomputed. grads: sums over loops, before they are scattered. The peak is below the sum, "
        f"since not all of it is held at once. Numbers of GPUs that do not divide batch_size={recipe.batch_size} are left out."
    )
    return ["\n".join(lines), costs, memory, notes]
