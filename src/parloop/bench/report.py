"""The files of a bench: its results and its figure."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ..folder import BENCH, OutputFolder, claimed
from ..report.drawing import COLORS, MARKERS, legend_below, look, panels, save_png, styled
from .results import BenchResult, BlockResult, Row
from .variants import PLAIN, Variant


def write_report(result: BenchResult, folder: str | Path | OutputFolder) -> Path:
    """Write results.json and bench.png. Return the path of the figure.

    Raises:
        OutputError: the folder holds something other than a bench, or cannot be written.
    """
    with claimed(folder, BENCH) as out:
        out.write(result.FILE, result.to_json())
        with out.file("bench.png") as path:
            save_png(draw(result), path)
    return out.path / "bench.png"


@styled()
def draw(result: BenchResult) -> Figure:
    """Draw time over that of one loop against the loop count, for every block, and decode time against the context."""
    prefills = [block for block in result.blocks if block.phase == "prefill"]
    decodes = [block for block in result.blocks if block.phase == "decode"]
    drawn: list[tuple[Callable, list[BlockResult]]] = [
        (_decode_ratios, decodes), (_decode_times, decodes), (_prefill_ratios, prefills)
    ]  # fmt: skip
    drawn = [(panel, blocks) for panel, blocks in drawn if blocks]
    figure, grid = panels(1, max(1, len(drawn)), (4.6 * max(1, len(drawn)), 4.8))
    for axes, (panel, blocks) in zip(np.atleast_1d(grid).flat, drawn):
        panel(axes, blocks)
    return figure


def _rows(block: BlockResult, way: Callable[[Variant], bool], compiled: bool = False) -> list[Row]:
    """Return the rows whose variant `way` accepts."""
    return [row for row in block.rows if way(row.variant) and row.variant.compiled == compiled]


def _plain(variant: Variant) -> bool:
    return not variant.llama and variant.one_pass and variant.tail and variant.weights == PLAIN


def _ratio_line(axes: Any, rows: list[Row], i: int, label: str | None, **look: Any) -> None:
    spreads = [row.over_one_loop for row in rows if row.over_one_loop is not None]
    if not spreads:
        return
    low, middle, high = np.array([[s.low, s.median, s.high] for s in spreads]).T
    look |= {"color": COLORS[i % len(COLORS)], "marker": MARKERS[i % len(MARKERS)], "capsize": 3, "label": label}
    axes.errorbar([row.variant.loops for row in rows], middle, yerr=[middle - low, high - middle], **look)


def _ratio_axes(axes: Any, blocks: list[BlockResult], title: str) -> None:
    axes.set_title(title)
    axes.set_xticks(sorted({row.variant.loops for block in blocks for row in block.rows}))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("loop count R")
    axes.set_ylabel("time over that of R = 1 (median, quartiles)")
    legend_below(axes)


def _name(block: BlockResult) -> str:
    batch = f", batch {block.batch_size}" if block.batch_size > 1 else ""
    return f"{block.tokens:,} tokens{batch}"


def _decode_ratios(axes: Any, blocks: list[BlockResult]) -> None:
    for i, block in enumerate(blocks):
        _ratio_line(axes, _rows(block, _plain), i, _name(block))
    for i, block in enumerate(blocks):
        rows = _rows(block, _plain)[:1] + _rows(block, lambda variant: not variant.one_pass)  # one loop is one pass
        _ratio_line(axes, rows, i, None if i else "a pass per loop (dotted)", linestyle=":", alpha=0.6)
    for i, block in enumerate(blocks):
        _ratio_line(axes, _rows(block, _plain, True), i, None if i else "compiled (dashed)", linestyle="--", alpha=0.6)
    _ratio_axes(axes, blocks, "decode")


def _prefill_ratios(axes: Any, blocks: list[BlockResult]) -> None:
    for i, block in enumerate(blocks):
        _ratio_line(axes, _rows(block, _plain), i, _name(block))
    for i, block in enumerate(blocks):
        rows = _rows(block, _plain)[:1] + _rows(block, lambda variant: not variant.tail)
        _ratio_line(axes, rows, i, None if i else "every loop on every token (dotted)", linestyle=":", alpha=0.6)
    _ratio_axes(axes, blocks, "prefill")


def _decode_times(axes: Any, blocks: list[BlockResult]) -> None:
    """Draw the decode times of the smallest batch."""
    batch = min(block.batch_size for block in blocks)
    blocks = sorted((block for block in blocks if block.batch_size == batch), key=lambda block: block.tokens)
    plain = (row for row in blocks[0].rows if row.variant.weights == PLAIN)
    for shown in (row for row in plain if row.variant.one_pass and not row.variant.compiled):
        points = [(b.tokens, row.ms.median) for b in blocks for row in b.rows if row.variant == shown.variant]
        llama = {"color": "black", "marker": "x", "linestyle": ":"}
        axes.plot(*zip(*points), label=shown.label, **(llama if shown.variant.llama else look(shown.variant.loops)))
    axes.set_xscale("log", base=2)
    axes.set_xticks([b.tokens for b in blocks], [f"{b.tokens:,}" for b in blocks])
    axes.set_ylim(bottom=0)
    axes.set_title(f"decode, batch {batch}")
    axes.set_xlabel("tokens cached")
    axes.set_ylabel("time per token (ms)")
    legend_below(axes)
