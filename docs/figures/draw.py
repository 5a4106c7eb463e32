"""Draws the figures of architecture.md:  python docs/figures/draw.py"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

HERE = Path(__file__).parent
BLUE, ORANGE, GREEN, GREY, INK = "#0072B2", "#D55E00", "#009E73", "#9a9a9a", "#222222"
LOOP = [BLUE, ORANGE, GREEN]
plt.rcParams.update({"font.size": 10, "svg.hashsalt": "parloop"})


def box(axes, x, y, width, height, text, color, fill=0.12, size=9.5):
    axes.add_patch(
        FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0.02,rounding_size=0.06", linewidth=1.4, edgecolor=color,
                       facecolor=matplotlib.colors.to_rgba(color, fill))
    )  # fmt: skip
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=size, color=INK)


def arrow(axes, start, end, color, style="-", bend=0.0, width=1.4):
    axes.add_patch(
        FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=12, color=color, linestyle=style, linewidth=width,
                        connectionstyle=f"arc3,rad={bend}", shrinkA=2, shrinkB=2)
    )  # fmt: skip


def decode_step():
    """One decode step at R = 3: rows, caches, carries."""
    figure, axes = plt.subplots(figsize=(11.4, 6.4))
    rows = [4.4, 2.7, 1.0]
    axes.text(
        -0.7, 6.75, "One decode step at R = 3: the loops of token t are three rows of one pass over the weights", fontsize=12
    )
    inputs = ["E(t)", "a·E(t) + c·h₁(t−1)", "a·E(t) + c·h₂(t−1)"]
    axes.add_patch(Rectangle((3.0, 0.7), 1.7, 5.3, facecolor="#f3f3f3", edgecolor=GREY, linewidth=1.2))
    axes.text(3.85, 5.55, "layer ℓ: weights\nread once", ha="center", va="center", fontsize=9)
    for r, y in enumerate(rows):
        axes.text(-0.05, y + 0.3, f"loop {r + 1}", ha="right", va="center", color=LOOP[r], fontweight="bold")
        box(axes, 0.1, y, 2.3, 0.6, inputs[r], LOOP[r])
        arrow(axes, (2.4, y + 0.3), (3.15, y + 0.3), LOOP[r])
        box(axes, 3.15, y, 1.4, 0.6, f"q, k, v: row {r + 1}", LOOP[r], 0.25, 9)
        box(axes, 9.2, y, 1.2, 0.6, f"h{'₁₂₃'[r]}(t)", LOOP[r])
        arrow(axes, (4.55, y + 0.3), (9.2, y + 0.3), LOOP[r])
    box(axes, 5.6, 5.5, 3.1, 0.75, "loop 1's cache of layer ℓ: K₁, V₁\nof every token up to t itself", BLUE, 0.10, 9)
    arrow(axes, (4.3, 5.0), (5.6, 5.75), BLUE)
    axes.text(5.12, 5.78, "1 write", fontsize=9, color=BLUE, ha="center")
    for r, y in enumerate(rows):
        arrow(axes, (7.3 + 0.35 * r, 5.5), (7.3 + 0.35 * r, y + 0.34), BLUE, "--", width=1.1)
    axes.text(8.12, 3.95, "2 global: every row\n   reads it", fontsize=9, color=BLUE, ha="left", va="center")
    for r, y in enumerate(rows[1:], 1):
        box(axes, 4.9, y - 0.78, 2.1, 0.5, f"loop {r + 1}'s own window", LOOP[r], 0.10, 9)
        arrow(axes, (5.95, y - 0.28), (5.95, y + 0.28), LOOP[r], "--", width=1.1)
        axes.text(8.12, y - 0.53, "3 local: w + 1 keys,\n   gated with global", fontsize=9, color=LOOP[r], va="center")
    for r in (0, 1):
        box(axes, 10.9, rows[r] - 0.75, 1.5, 0.5, f"carry h{'₁₂'[r]}(t)", LOOP[r], 0.10, 9)
        arrow(axes, (10.4, rows[r] + 0.2), (11.65, rows[r] - 0.25), LOOP[r], bend=-0.3)
        axes.text(11.65, rows[r] - 0.98, f"for row {r + 2} of token t + 1", fontsize=9, color=LOOP[r], ha="center")
    arrow(axes, (10.4, rows[2] + 0.3), (11.0, rows[2] + 0.3), GREEN)
    axes.text(11.05, rows[2] + 0.3, "head → logits", va="center")
    axes.set_xlim(-0.8, 13.0)
    axes.set_ylim(0.0, 7.0)
    axes.axis("off")
    figure.savefig(HERE / "decode_step.svg", bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)


def window():
    """w = 2: who sees whom."""
    figure, axes = plt.subplots(1, 2, figsize=(8.6, 3.6))
    T, w = 7, 2
    for panel, title, visible in (
        (axes[0], "global: loop 1's keys, in every loop", lambda i, j: j <= i),
        (axes[1], f"local, w = {w}: itself and {w} before, {w + 1} keys", lambda i, j: i - w <= j <= i),
    ):
        for i in range(T):
            for j in range(T):
                color = BLUE if visible(i, j) else "#f2f2f2"
                if visible(i, j) and panel is axes[1]:
                    color = ORANGE
                panel.add_patch(Rectangle((j, T - 1 - i), 0.92, 0.92, facecolor=color, alpha=0.85))
        panel.set_xlim(-0.1, T)
        panel.set_ylim(-0.1, T)
        panel.set_xticks([j + 0.46 for j in range(T)], range(T))
        panel.set_yticks([T - 1 - i + 0.46 for i in range(T)], range(T))
        panel.set_xlabel("key (token)")
        panel.set_ylabel("query (token)")
        panel.set_title(title, fontsize=10)
        panel.set_aspect("equal")
        for side in panel.spines.values():
            side.set_visible(False)
        panel.tick_params(length=0)
    figure.tight_layout()
    figure.savefig(HERE / "window.svg", bbox_inches="tight", metadata={"Date": None})


if __name__ == "__main__":
    decode_step()
    window()
