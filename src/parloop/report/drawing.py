"""The style of figures: colours that colour-blind readers can distinguish, a unit on every axis.

Figures are made without pyplot, so that no state of a notebook or window is changed.
"""

import io
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

# Okabe and Ito's palette; markers and dashes repeat the colour's information.
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
MARKERS = ["o", "s", "^", "D", "v", "P", "X"]
DASHES = ["-", "--", "-.", ":"]

STYLE: Any = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.constrained_layout.use": True,
    "font.size": 10,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "svg.hashsalt": "parloop",
}


def styled(**changes: Any) -> Any:
    """Return a decorator that lets a function draw in this style, with changes."""
    return matplotlib.rc_context(STYLE | changes)


def panels(rows: int = 1, columns: int = 1, size: tuple[float, float] = (6.4, 4.0), **options: Any) -> tuple[Figure, Any]:
    """Return a figure and its axes: an array [rows, columns], or a single Axes if there is only one.

    Args:
        rows: rows of axes.
        columns: columns of axes.
        size: width and height in inches.
        **options: keyword arguments of `Figure.subplots`.
    """
    figure = Figure(figsize=size)
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    return figure, axes[0, 0] if axes.size == 1 else axes


def legend_of(figure: Figure, axes: Any, **options: Any) -> None:
    """Put a legend of the axes' lines above the figure, where it covers no data.

    Args:
        figure: the figure.
        axes: the axes.
        **options: keyword arguments of `Figure.legend`.
    """
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", **({"ncols": min(4, len(labels))} | options))


def legend_below(axes: Any) -> None:
    """Put a legend of the axes' lines below them and their label, where it covers no data."""
    height = axes.figure.get_size_inches()[1] / axes.get_subplotspec().get_gridspec().nrows
    anchor = (0.5, -0.7 / height)
    axes.legend(loc="upper center", bbox_to_anchor=anchor, borderaxespad=0, ncols=2, fontsize="small")


def svg(figure: Figure) -> str:
    """Return the figure as an <svg> element for a page."""
    buffer = io.StringIO()
    with styled():  # its hash salt makes the names of parts reproducible
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def save_png(figure: Figure, path: Path) -> None:
    """Write the figure as PNG, with 150 dots per inch."""
    figure.savefig(path, dpi=150, format="png")


def look(n: int) -> dict[str, Any]:
    """Return colour, marker and dashes of loop count n."""
    return {
        "color": COLORS[(n - 1) % len(COLORS)],
        "marker": MARKERS[(n - 1) % len(MARKERS)],
        "linestyle": DASHES[(n - 1) % 4],
    }
