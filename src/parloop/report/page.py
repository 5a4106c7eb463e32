"""Reports as one HTML file each: everything inside, readable offline, on a phone and on paper."""

import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, select_autoescape
from markupsafe import Markup

from . import figures

PAGES = Environment(
    loader=PackageLoader("parloop.report", "templates"), autoescape=select_autoescape(), trim_blocks=True, lstrip_blocks=True
)


def write_study_report(results: dict[str, Any], folder: Path) -> Path:
    """report.html, the figures as PNG, and a README that says how to go on. Returns the path of the page."""
    drawn = {
        "loss": ("Held-out loss against the loop count", figures.loss_against_loops(results)),
        "curves": ("Loss while training", figures.loss_curves(results)),
        "cost": ("Cost against the loop count", figures.cost_against_loops(results)),
    }
    for name, (_, figure) in drawn.items():
        figures.save_png(figure, folder / f"{name}.png")
    page = PAGES.get_template("study.html").render(
        results=results,
        figures={name: (title, Markup(figures.svg(figure))) for name, (title, figure) in drawn.items()},
        settings=json.dumps(results["recipe"], indent=1),
        chosen=next(row for row in results["rows"] if row["loops"] == results["chosen"]),
    )
    path = folder / "report.html"
    path.write_text(page)
    (folder / "README.md").write_text(PAGES.get_template("study_readme.md").render(results=results, folder=folder))
    return path
