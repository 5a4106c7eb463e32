"""Figures of a study. Arms that differ only in their loop count share a line."""

import numpy as np
from matplotlib.figure import Figure

from ..report.drawing import COLORS, DASHES, MARKERS, legend_of, look, panels, styled
from .arms import lines
from .results import Row, StudyResult


def _lines(result: StudyResult) -> dict[str, list[Row]]:
    """Return the lines of a figure: name -> rows by loop count."""
    found = lines([row.arm for row in result.rows])
    return {name: [result.rows[index] for index in indices] for name, indices in found.items()}


def _counts(rows: list[Row]) -> list[int]:
    return [row.arm.place for row in rows]


@styled()
def loss_curves(result: StudyResult) -> Figure:
    """Draw training loss (smoothed, thin) and validation loss (marked) against training tokens."""
    figure, axes = panels()
    per_step = result.recipe["batch_size"] * result.recipe["length"]
    several = len(_lines(result)) > 1
    for number, row in enumerate(result.rows, 1):
        style = look(number if several else row.arm.loops)
        for i, (curve, validation) in enumerate(zip(row.loss_curves, row.validation_curves)):
            steps, losses = np.array(curve).T
            width = max(1, len(losses) // 40)
            smooth = np.convolve(np.pad(losses, (width - 1, 0), mode="edge"), np.ones(width) / width, mode="valid")
            label = row.arm.label if i == 0 else None
            thin = {"color": style["color"], "alpha": 0.45, "linewidth": 1, "label": None if validation else label}
            axes.plot(steps * per_step / 1e6, smooth, **thin)
            if validation:
                steps, losses = np.array(validation).T
                axes.plot(steps * per_step / 1e6, losses, label=label, markersize=4, **style)
    axes.set_xlabel("training tokens (millions)")
    axes.set_ylabel("loss (nats per token)")
    final = [curve[-1][1] for row in result.rows for curve in row.validation_curves if curve]
    if final:
        axes.set_ylim(min(final) - 0.1, max(final) + 2.0)
    columns = {"ncols": 2} if several else {}  # longer labels
    legend_of(figure, axes, title="validation; thin: training" if final else "training", **columns)
    return figure


@styled()
def loss_against_loops(result: StudyResult) -> Figure:
    """Draw held-out loss with intervals and the read-outs of intermediate loops; below, the paired difference."""
    figure, grid = panels(2, 1, (6.4, 5.4), height_ratios=[3, 2], sharex=True)
    top, bottom = grid[:, 0]
    several, shown = len(_lines(result)) > 1, set()
    bottom.axhline(0, color="black", linewidth=0.8)
    for number, (name, rows) in enumerate(_lines(result).items()):
        style = {"color": COLORS[number % len(COLORS)], "capsize": 4}
        losses = style | ({} if several else {"color": "black"}) | {"label": f"{name or 'last loop'}, 95% interval"}
        _errorbar(top, rows, [row.bits_per_byte for row in rows], marker="o", **losses)
        differences = [row.difference_to_base for row in rows]
        _errorbar(bottom, rows, differences, marker="s", linestyle="--", **style)
        for row in rows:
            for r, value in enumerate(row.bits_per_byte_after_loop[:-1], 1):
                label = None if r in shown else f"read out after loop {r}"
                shown.add(r)
                point = {"color": look(r)["color"], "marker": look(r + 1)["marker"], "linestyle": "", "label": label}
                top.plot(row.arm.place, value, **point)
    top.set_ylabel(f"held-out loss ({result.unit})")
    legend_of(figure, top, ncols=2)
    bottom.set_ylabel(f"paired difference\nto {result.row(result.base).arm.label} ({result.unit})")
    bottom.set_xlabel("loop count R")
    bottom.set_xticks(sorted(set(_counts(result.rows))))
    return figure


def _errorbar(axes, rows: list[Row], intervals: list, **style) -> None:
    middle, low, high = np.array(intervals).T
    axes.errorbar(_counts(rows), middle, yerr=[middle - low, high - middle], **style)


COSTS = {
    "training FLOPs per token": lambda row: row.training_flops_per_token,
    "training time per token": lambda row: 1 / row.training_tokens_per_second,
    "prefill time": lambda row: row.costs.prefill_ms.median,
    "decode, a pass per loop": lambda row: row.costs.decode_pass_per_loop_ms.median,
    "decode, one pass": lambda row: row.costs.decode_ms.median,
    "memory of a training step": lambda row: row.costs.peak_training_bytes,
}


@styled()
def cost_against_loops(result: StudyResult) -> Figure:
    """Draw costs relative to the base's, a panel for each line of arms."""
    base = result.row(result.base)
    by_line = {name: rows for name, rows in _lines(result).items() if not rows[0].arm.is_control}
    figure, grid = panels(1, len(by_line), (max(6.4, 4.0 * len(by_line)), 4.4), sharey=True)
    for axes, (name, rows) in zip(np.atleast_1d(grid).flat, by_line.items()):
        for i, (label, cost) in enumerate(COSTS.items()):
            style = {"color": COLORS[i], "marker": MARKERS[i], "linestyle": DASHES[i % 4]}
            axes.plot(_counts(rows), [cost(row) / cost(base) for row in rows], label=label, **style)
        axes.set_xticks(_counts(rows))
        axes.set_ylim(bottom=0)
        axes.set_xlabel("loop count R")
        axes.set_title(name, fontsize=10)
    first = np.atleast_1d(grid).flat[0]
    first.set_ylabel(f"cost over that of {base.arm.label} (ratio)")
    legend_of(figure, first, ncols=2)
    return figure


@styled()
def answers_by_group(result: StudyResult) -> Figure:
    """Draw the share of right answers by length, hops or level, with intervals and chance; a panel for each line of arms."""
    by_line = _lines(result)
    figure, grid = panels(len(by_line), 1, (6.4, 4.4 if len(by_line) == 1 else 3.2 * len(by_line)), sharex=True)
    for axes, (name, rows) in zip(np.atleast_1d(grid).flat, by_line.items()):
        groups = [group.group for group in rows[0].answers]
        for row in rows:
            middle, low, high = np.array([group.correct for group in row.answers]).T
            style = look(row.arm.place)
            axes.plot(range(len(groups)), middle, label=row.arm.label, markersize=4, **style)
            axes.fill_between(range(len(groups)), low, high, color=style["color"], alpha=0.15, linewidth=0)
        chance = [group.chance for group in rows[0].answers]
        axes.plot(range(len(groups)), chance, color="black", linestyle=":", linewidth=1, label="chance")
        axes.set_xticks(range(len(groups)), groups)
        axes.set_ylim(0, 1.02)
        axes.set_title(name or ("loops" if len(by_line) > 1 else ""), fontsize=10)
        if len(by_line) > 1:
            axes.legend(fontsize=8)
        axes.set_ylabel("right answers (share)")
    axes.set_xlabel(result.group_unit)
    if len(by_line) == 1:
        legend_of(figure, axes)
    return figure
