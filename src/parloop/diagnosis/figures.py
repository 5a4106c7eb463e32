"""Figures of a diagnosis, for one checkpoint or several side by side."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from ..report.drawing import COLORS, MARKERS, legend_of, look, panels, styled
from .diagnosis import Diagnosis
from .lenses import LENSES

Named = dict[str, Diagnosis]  # label -> diagnosis

HIDDEN = ("step_size", "angular_change", "effective_rank", "fixed_point_gap")
ATTENTION = ("attention_entropy", "attention_kl", "head_diversity", "head_similarity")
OUTPUT = ("loss", "token_rank", "output_shift", "output_entropy")
NO_GRID = {"axes.grid": False}
SHARES = ("share_output_shift", "share_attention_kl", "share_tokens")
CAPTIONS = {
    "scissors": "Gain against cost: the output shift of each loop (log axis) and the distortion by its offset",
    "hidden": "Hidden states",
    "attention": "Attention",
    "output": "Predictions",
    "shares": "Where refinement happens: each loop's share",
    "gates": "Gate by layer and head: 1 reads loop 1's cache, 0 the loop's own window",
    "layers": "Attention by layer",
    "heads": "Similarity between heads, by loop",
}


@styled()
def lens_figures(diagnoses: Named) -> dict[str, Figure]:
    """Draw every figure that these diagnoses have data for, by its name in CAPTIONS."""
    loops = max(d.loops for d in diagnoses.values())
    figures = {}
    if loops > 1:
        figures["scissors"] = scissors(diagnoses)
    figures["hidden"] = panel(diagnoses, HIDDEN)
    figures["output"] = panel(diagnoses, OUTPUT)
    figures["attention"] = panel(diagnoses, ATTENTION)
    if loops > 1:
        figures["shares"] = refinement_shares(diagnoses)
        figures["gates"] = gates(diagnoses)
    figures["layers"] = by_layer(diagnoses)
    figures["heads"] = head_similarity(diagnoses)
    return figures


def styles(diagnoses: Named) -> dict[str, dict[str, Any]]:
    """Return one style per diagnosis: that of its loop count, or if two have the same count, of its index."""
    if len(diagnoses) == 1:
        return {label: look(1) for label in diagnoses}
    counts = [d.loops for d in diagnoses.values()]
    numbers = counts if len(set(counts)) == len(counts) else range(1, len(counts) + 1)
    return {label: look(n) for label, n in zip(diagnoses, numbers)}


def _draw(axes, diagnoses: Named, lens: str, **changes) -> None:
    """Draw means with 95% intervals against the loop."""
    for label, style in styles(diagnoses).items():
        d = diagnoses[label]
        first = LENSES[lens].first_loop
        loops = np.arange(first, d.loops + 1)
        if not len(loops):
            continue
        means = np.array([d.mean(lens, int(loop)).as_list() for loop in loops])
        bars = np.nan_to_num(np.stack([means[:, 0] - means[:, 1], means[:, 2] - means[:, 0]])).clip(min=0)
        axes.errorbar(loops, means[:, 0], yerr=bars, label=label, capsize=3, markersize=5, **(style | changes))


def _axis(axes, diagnoses: Named, lens: str) -> None:
    axes.set_title(LENSES[lens].title, fontsize=10)
    axes.set_ylabel(LENSES[lens].unit)
    axes.set_xticks(range(1, max(d.loops for d in diagnoses.values()) + 1))
    axes.set_xlim(0.7, max(d.loops for d in diagnoses.values()) + 0.3)


def panel(diagnoses: Named, lenses: tuple[str, ...]) -> Figure:
    """Draw four lenses against the loop."""
    figure, grid = panels(2, 2, (6.8, 5.0), sharex=True)
    for axes, lens in zip(grid.flat, lenses):
        _draw(axes, diagnoses, lens)
        _axis(axes, diagnoses, lens)
        if lens == "angular_change":
            axes.axhline(0, color="black", linewidth=0.8)
    for axes in grid[1]:
        axes.set_xlabel("loop")
    if len(diagnoses) > 1:
        legend_of(figure, grid[0, 0])
    return figure


def scissors(diagnoses: Named) -> Figure:
    """Draw output shift on a log axis against offset cost, loops 2 to R."""
    figure, axes = panels()
    cost = axes.twinx()
    cost.grid(False)
    cost.spines["right"].set_visible(True)
    many = len(diagnoses) > 1
    gain_color, cost_color = COLORS[0], COLORS[1]
    _draw(axes, diagnoses, "output_shift", linestyle="-", **({} if many else {"color": gain_color}))
    _draw(cost, diagnoses, "offset_cost", linestyle=":", **({} if many else {"color": cost_color, "marker": "s"}))
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    subs = (1, 1.5, 2, 3, 4, 5, 7) if high < 10 * low else (1, 2, 5) if high < 100 * low else (1,)
    axes.yaxis.set_major_locator(LogLocator(subs=subs))
    axes.yaxis.set_major_formatter("{x:g}")  # 0.3, not 3 * 10^-1
    axes.yaxis.set_minor_formatter("")
    axes.set_ylabel("gain: output shift Δp (nats, log)" + (", full" if many else ""), color="black" if many else gain_color)
    cost.set_ylabel("cost: offset cost Ω (length)" + (", dotted" if many else ""), color="black" if many else cost_color)
    cost.set_ylim(bottom=0)
    axes.set_xlabel("loop")
    top = max(d.loops for d in diagnoses.values())
    axes.set_xticks(range(2, top + 1))
    axes.set_xlim(1.7, top + 0.3)
    if many:
        legend_of(figure, axes)
    return figure


def refinement_shares(diagnoses: Named) -> Figure:
    """Draw bars of the loops' shares of output shift, of attention KL, and of tokens."""
    looped = {label: d for label, d in diagnoses.items() if d.loops > 1}
    figure, grid = panels(1, len(looped), (max(9.6 if len(looped) > 1 else 6.4, 3.2 * len(looped)), 3.6), sharey=True)
    for axes, (label, d) in zip(np.atleast_1d(grid).flat, looped.items()):
        loops = np.arange(2, d.loops + 1)
        for i, lens in enumerate(SHARES):
            means = np.array([d.mean(lens, int(loop)).as_list() for loop in loops])
            bars = np.nan_to_num(np.stack([means[:, 0] - means[:, 1], means[:, 2] - means[:, 0]])).clip(min=0)
            title = LENSES[lens].title.removeprefix("share of ")
            options = {"color": COLORS[i], "label": title, "hatch": ("", "//", "..")[i], "edgecolor": "white"}
            axes.bar(loops + 0.27 * (i - 1), 100 * means[:, 0], 0.25, yerr=100 * bars, capsize=2, **options)
        axes.set_xticks(loops)
        axes.set_xlabel("loop")
        if len(looped) > 1:
            axes.set_title(label, fontsize=10)
    first = np.atleast_1d(grid).flat[0]
    first.set_ylabel("share (%)")
    legend_of(figure, first)
    return figure


@styled(**NO_GRID)
def gates(diagnoses: Named) -> Figure:
    """Draw a map of layers and heads for every loop from 2 on."""
    maps = [(label, loop, d.gate_by_head[loop - 1]) for label, d in diagnoses.items() for loop in range(2, d.loops + 1)]
    return _maps(maps, len(diagnoses) > 1, "head", "layer", "gate (share of global)", vmin=0.0, vmax=1.0, cmap="cividis")


@styled(**NO_GRID)
def head_similarity(diagnoses: Named) -> Figure:
    """Draw the cosines between heads for every loop."""
    maps = [(label, loop, d.head_cosines[loop - 1]) for label, d in diagnoses.items() for loop in range(1, d.loops + 1)]
    return _maps(maps, len(diagnoses) > 1, "head", "head", "cosine", vmin=0.0, vmax=1.0, cmap="viridis")


def _maps(maps, many: bool, x: str, y: str, unit: str, **options) -> Figure:
    columns = min(4, len(maps))
    rows = -(-len(maps) // columns)
    figure, grid = panels(rows, columns, (max(3.2, 2.2 * columns) + 0.8, 2.5 * rows))
    grid = np.atleast_1d(grid)
    for axes in grid.flat[len(maps) :]:
        axes.set_visible(False)
    for axes, (label, loop, values) in zip(grid.flat, maps):
        image = axes.imshow(values, aspect="auto", interpolation="nearest", **options)
        axes.set_title((f"{label}, " if many else "") + f"loop {loop}", fontsize=9)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        for axis, n in ((axes.xaxis, values.shape[1]), (axes.yaxis, values.shape[0])):
            ticks = np.unique(np.linspace(0, n - 1, min(n, 5)).round().astype(int))
            axis.set_ticks(ticks, [str(t + 1) for t in ticks])
    figure.colorbar(image, ax=grid, label=unit, shrink=0.9)
    return figure


def by_layer(diagnoses: Named) -> Figure:
    """Draw attention entropy and inter-loop KL of every layer, one line per loop."""
    many = len(diagnoses) > 1
    figure, grid = panels(len(diagnoses), 2, (6.8, 1.2 + 2.2 * len(diagnoses)), sharex="row")
    for row, (label, d) in zip(grid, diagnoses.items()):
        for axes, lens in zip(row, ("attention_entropy", "attention_kl")):
            layers = np.arange(1, d.by_layer[lens].shape[1] + 1)
            for loop in range(LENSES[lens].first_loop, d.loops + 1):
                color, marker = COLORS[(loop - 1) % len(COLORS)], MARKERS[(loop - 1) % len(MARKERS)]
                axes.plot(layers, d.by_layer[lens][loop - 1], color=color, marker=marker, markersize=4, label=f"loop {loop}")
            axes.set_title((f"{label}: " if many else "") + LENSES[lens].title, fontsize=9)
            axes.set_ylabel(LENSES[lens].unit)
            axes.set_xlabel("layer")
            axes.set_xticks(layers if len(layers) <= 8 else np.unique(np.linspace(1, len(layers), 6).round()))
        if d.loops == 1:
            row[1].set_visible(False)
    legend_of(figure, grid[[d.loops for d in diagnoses.values()].index(max(d.loops for d in diagnoses.values())), 0])
    return figure
