"""Figures of the reports: matplotlib, colours that colour-blind readers can tell apart, a unit on every axis."""

import io
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

# Okabe and Ito's palette; markers and dashes repeat what the colour says.
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
MARKERS = ["o", "s", "^", "D", "v", "P", "X"]
DASHES = ["-", "--", "-.", ":"]

STYLE: Any = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.constrained_layout.use": True,
    "font.size": 10,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "parloop",
}


def svg(figure: Figure) -> str:
    """The figure as an <svg> element to put into a page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    plt.close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def save_png(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=150)


def look(n: int) -> dict[str, Any]:
    """Colour, marker and dash of loop count n."""
    return {
        "color": COLORS[(n - 1) % len(COLORS)],
        "marker": MARKERS[(n - 1) % len(MARKERS)],
        "linestyle": DASHES[(n - 1) % 4],
    }


def loss_curves(results: dict[str, Any]) -> Figure:
    """Training loss (smoothed, thin) and validation loss (marked) against training tokens."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(6.4, 4.0))
        per_step = results["recipe"]["batch_size"] * results["recipe"]["length"]
        for row in results["rows"]:
            style = look(row["loops"])
            for i, (curve, validation) in enumerate(zip(row["loss_curves"], row["validation_curves"])):
                steps, losses = np.array(curve).T
                width = max(1, len(losses) // 40)
                smooth = np.convolve(np.pad(losses, (width - 1, 0), mode="edge"), np.ones(width) / width, mode="valid")
                label = f"R = {row['loops']}" if i == 0 else None
                thin = {"color": style["color"], "alpha": 0.45, "linewidth": 1, "label": None if validation else label}
                axes.plot(steps * per_step / 1e6, smooth, **thin)
                if validation:
                    steps, losses = np.array(validation).T
                    axes.plot(steps * per_step / 1e6, losses, label=label, markersize=4, **style)
        axes.set_xlabel("training tokens (millions)")
        axes.set_ylabel("loss (nats per token)")
        final = [curve[-1][1] for row in results["rows"] for curve in row["validation_curves"] if curve]
        if final:
            axes.set_ylim(min(final) - 0.1, max(final) + 2.0)
        axes.legend(title="validation; thin: training" if final else "training")
    return figure


def loss_against_loops(results: dict[str, Any]) -> Figure:
    """Held-out loss with intervals and the read-outs of intermediate loops; below, the paired difference."""
    rows, base = results["rows"], results["base"]
    counts = [row["loops"] for row in rows]
    with plt.rc_context(STYLE):
        figure, (top, bottom) = plt.subplots(2, 1, figsize=(6.4, 5.2), height_ratios=[3, 2], sharex=True)
        middle, low, high = np.array([row["bits_per_byte"] for row in rows]).T
        bars = [middle - low, high - middle]
        top.errorbar(counts, middle, yerr=bars, color="black", marker="o", capsize=4, label="last loop, 95% interval")
        shown = set()
        for row in rows:
            for r, value in enumerate(row["bits_per_byte_after_loop"][:-1], 1):
                label = None if r in shown else f"read out after loop {r}"
                shown.add(r)
                top.plot(
                    row["loops"], value, color=look(r)["color"], marker=look(r + 1)["marker"], linestyle="", label=label
                )
        top.set_ylabel("held-out loss (bits per byte)")
        top.legend()
        middle, low, high = np.array([row["difference_to_base"] for row in rows]).T
        bars = [middle - low, high - middle]
        bottom.axhline(0, color="black", linewidth=0.8)
        bottom.errorbar(counts, middle, yerr=bars, color=COLORS[0], marker="s", capsize=4, linestyle="--")
        bottom.set_ylabel(f"paired difference\nto R = {base} (bits per byte)")
        bottom.set_xlabel("loop count R")
        bottom.set_xticks(counts)
    return figure


def cost_against_loops(results: dict[str, Any]) -> Figure:
    """Costs relative to the smallest loop count."""
    rows = results["rows"]
    counts = [row["loops"] for row in rows]
    lines = [
        ("training FLOPs per token", [row["training_flops"] / row["training_tokens"] for row in rows]),
        ("training time per token", [1 / row["training_tokens_per_second"] for row in rows]),
        ("prefill time", [row["prefill_ms"] for row in rows]),
        ("decode, a pass per loop", [row["decode_pass_per_loop_ms"] for row in rows]),
        ("decode, one pass", [row["decode_ms"] for row in rows]),
        ("memory of a training step", [row["peak_training_bytes"] for row in rows]),
    ]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(6.4, 4.0))
        for i, (label, values) in enumerate(lines):
            relative = np.array(values) / values[0]
            axes.plot(counts, relative, label=label, color=COLORS[i], marker=MARKERS[i], linestyle=DASHES[i % 4])
        axes.set_xticks(counts)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("loop count R")
        axes.set_ylabel(f"cost over that of R = {counts[0]} (ratio)")
        axes.legend()
    return figure


def bench_figure(results: dict[str, Any]) -> Figure:
    """Time over that of one loop against the loop count, for every block; and decode time against the context."""
    prefills = [block for block in results["blocks"] if block["phase"] == "prefill"]
    decodes = [block for block in results["blocks"] if block["phase"] == "decode"]
    drawn = [
        draw for draw, blocks in ((_decode_ratios, decodes), (_decode_times, decodes), (_prefill_ratios, prefills)) if blocks
    ]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, max(1, len(drawn)), figsize=(4.6 * max(1, len(drawn)), 4.2), squeeze=False)
        for axis, draw in zip(axes[0], drawn):
            draw(axis, prefills if draw is _prefill_ratios else decodes)
    return figure


def _rows(block: dict[str, Any], kind: str, compiled: bool = False) -> list[dict[str, Any]]:
    """Of a block, what ran in this way, see `Variant.kind`."""
    return [row for row in block["rows"] if row["kind"].startswith(kind) and row["compiled"] == compiled]


def _ratio_line(axis, rows: list[dict[str, Any]], i: int, label: str | None, **look: Any) -> None:
    if not rows:
        return
    low, middle, high = np.array([[row["over_one_loop"][name] for name in ("low", "median", "high")] for row in rows]).T
    look |= {"color": COLORS[i % len(COLORS)], "marker": MARKERS[i % len(MARKERS)], "capsize": 3, "label": label}
    axis.errorbar([row["loops"] for row in rows], middle, yerr=[middle - low, high - middle], **look)


def _ratio_axis(axis, blocks: list[dict[str, Any]], title: str) -> None:
    counts = sorted({row["loops"] for block in blocks for row in block["rows"]})
    axis.set_title(title)
    axis.set_xticks(counts)
    axis.set_ylim(bottom=0)
    axis.set_xlabel("loop count R")
    axis.set_ylabel("time over that of R = 1 (median, quartiles)")
    axis.legend(fontsize="small")


def _name(block: dict[str, Any]) -> str:
    batch = f", batch {block['batch_size']}" if block["batch_size"] > 1 else ""
    return f"{block['tokens']:,} tokens{batch}"


def _decode_ratios(axis, blocks: list[dict[str, Any]]) -> None:
    for i, block in enumerate(blocks):
        _ratio_line(axis, _rows(block, "one pass"), i, _name(block))
    for i, block in enumerate(blocks):
        rows = _rows(block, "one pass")[:1] + _rows(block, "a pass per loop")  # one loop is one pass
        _ratio_line(axis, rows, i, None if i else "a pass per loop (dotted)", linestyle=":", alpha=0.6)
    for i, block in enumerate(blocks):
        _ratio_line(axis, _rows(block, "one pass", True), i, None if i else "compiled (dashed)", linestyle="--", alpha=0.6)
    _ratio_axis(axis, blocks, "decode")


def _prefill_ratios(axis, blocks: list[dict[str, Any]]) -> None:
    for i, block in enumerate(blocks):
        _ratio_line(axis, _rows(block, "one pass"), i, _name(block))
    for i, block in enumerate(blocks):
        rows = _rows(block, "one pass")[:1] + _rows(block, "a prefill with every loop")
        _ratio_line(axis, rows, i, None if i else "every loop on every token (dotted)", linestyle=":", alpha=0.6)
    _ratio_axis(axis, blocks, "prefill")


def _decode_times(axis, blocks: list[dict[str, Any]]) -> None:
    """Of the smallest batch."""
    batch = min(block["batch_size"] for block in blocks)
    blocks = sorted((block for block in blocks if block["batch_size"] == batch), key=lambda block: block["tokens"])
    lines = {row["label"]: row for row in blocks[0]["rows"] if not row["compiled"] and not row["kind"].startswith("a pass")}
    for label, row in lines.items():
        points = [(b["tokens"], other["ms"]["median"]) for b in blocks for other in b["rows"] if other["label"] == label]
        style = {"color": "black", "marker": "x", "linestyle": ":"} if label == "Llama" else look(row["loops"])
        axis.plot(*zip(*points), label=label, **style)
    axis.set_xscale("log", base=2)
    axis.set_xticks([b["tokens"] for b in blocks], [f"{b['tokens']:,}" for b in blocks])
    axis.set_ylim(bottom=0)
    axis.set_title(f"decode, batch {batch}")
    axis.set_xlabel("tokens cached")
    axis.set_ylabel("time per token (ms)")
    axis.legend(fontsize="small")


def scores_against_loops(summary: dict[str, Any]) -> Figure:
    """A panel per benchmark that was run: our values with intervals and the paper's, against the loop count."""
    shown = [
        entry for entry in summary["benchmarks"] if any(row["source"] == "ours" and row["loops"] for row in entry["rows"])
    ]
    columns = min(3, max(1, len(shown)))
    lines = -(-len(shown) // columns) or 1
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(lines, columns, figsize=(4.2 * columns, 3.2 * lines), squeeze=False)
        for axes in grid.flat[len(shown) :]:
            axes.set_visible(False)
        for axes, entry in zip(grid.flat, shown):
            ours = [row for row in entry["rows"] if row["source"] == "ours" and row["loops"]]
            for number, settings in enumerate(sorted({row["settings"] for row in ours})):
                rows = [row for row in ours if row["settings"] == settings]
                x = [row["loops"] + 0.05 * number for row in rows]
                y = [row["value"] for row in rows]
                spread = [
                    [v - row["interval"][0] if row["interval"] else 0 for v, row in zip(y, rows)],
                    [row["interval"][1] - v if row["interval"] else 0 for v, row in zip(y, rows)],
                ]
                label = "ours" + (f" [{settings[:6]}]" if settings else "")
                style = look(number + 1) | {"linestyle": "none"}
                axes.errorbar(x, y, yerr=spread, capsize=3, label=label, **style)
            paper = [row for row in entry["rows"] if row["source"] == "paper"]
            if paper:
                x, y = [row["loops"] for row in paper], [row["value"] for row in paper]
                axes.plot(x, y, color=COLORS[-1], marker="x", linestyle=":", label="paper, 7B")
            axes.set_title(entry["title"])
            axes.set_xlabel("loop count R")
            axes.set_ylabel(f"{entry['metric'].split(',')[0]}, {entry['unit']}" if entry["unit"] == "%" else entry["unit"])
            axes.set_xticks(sorted({row["loops"] for row in [*ours, *paper]}))
            axes.legend()
    return figure
