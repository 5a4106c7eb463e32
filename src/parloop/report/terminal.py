"""Progress bars and tables for the terminal, in one style, within 100 columns."""

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from ..diagnosis.lenses import LENSES


def training_progress(console: Console) -> Progress:
    """Bars with the loss and the time left; tasks have a field `loss`."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TaskProgressColumn(),
        TextColumn("{task.fields[loss]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
    )


study_progress = training_progress


def _interval(values: list[float], sign: str = "") -> str:
    middle, low, high = values
    return f"{middle:{sign}.3f} ±{max(high - middle, middle - low):.3f}"


def study_tables(results: dict[str, Any]) -> list[Table]:
    """What each loop count gives, and what it costs."""
    base = results["base"]
    gives = Table(
        title="what each loop count gives: held-out loss in bits per byte, with 95% intervals", title_justify="left"
    )
    for name in ("R", "loss", f"difference\nto R = {base}", "read out after each loop", "next\ntoken"):
        gives.add_column(name, justify="right", no_wrap=True)
    costs = Table(title="what it costs", title_justify="left")
    for name in (
        "R",
        "params",
        "train\ntok/s",
        "train\ns",
        "prefill\nms",
        "decode\nms/tok",
        "a pass per\nloop",
        "cache\nB/tok",
        "train\nMB",
    ):
        costs.add_column(name, justify="right", no_wrap=True)
    for row in results["rows"]:
        n = row["loops"]
        style = "bold" if n == results["chosen"] else ""
        difference = "" if n == base else _interval(row["difference_to_base"], "+")
        gives.add_row(
            str(n),
            _interval(row["bits_per_byte"]),
            difference,
            ", ".join(f"{value:.2f}" for value in row["bits_per_byte_after_loop"]),
            f"{100 * row['next_token_accuracy']:.1f}%",
            style=style,
        )
        costs.add_row(
            str(n),
            f"{row['parameters'] / 1e6:.2f}M",
            f"{row['training_tokens_per_second']:,.0f}",
            f"{row['training_seconds']:,.0f}",
            f"{row['prefill_ms']:.1f}",
            f"{row['decode_ms']:.2f}",
            f"{row['decode_pass_per_loop_ms']:.2f}",
            f"{row['cache_bytes']['per_token']:,.0f}",
            f"{row['peak_training_bytes'] / 1e6:,.0f}",
            style=style,
        )
    return [gives, costs]


def diagnosis_table(record: dict[str, Any]) -> Table:
    """One checkpoint's lenses, a column per loop, with 95% intervals."""
    loops = record["diagnosis"]["loops"]
    table = Table(title=f"{record['checkpoint']}: what each loop adds and costs", title_justify="left")
    table.add_column("lens (unit)")
    for loop in range(1, loops + 1):
        table.add_column(f"loop {loop}", justify="right", no_wrap=True)
    for name, lens in LENSES.items():
        values = record["diagnosis"]["summary"][name]
        if any(value is not None for value in values):
            table.add_row(f"{lens.title} ({lens.unit})", *[_short(value) for value in values])
    return table


def _short(value: list[float] | None) -> str:
    if value is None:
        return ""
    mean, low, high = value
    return f"{mean:.3g}" if low is None else f"{mean:.3g} ±{max(high - mean, mean - low):.1g}"
