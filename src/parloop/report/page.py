"""Reports as one HTML file each: everything inside, readable offline, on a phone and on paper."""

import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, select_autoescape
from markupsafe import Markup

from ..diagnosis import Diagnosis
from ..diagnosis.lenses import LENSES
from ..statistics import bootstrap_mean
from . import figures, lens_figures

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
    records = labelled(results["diagnoses"])
    headline, _, evidence = results["verdict"].partition(". ")
    page = PAGES.get_template("study.html").render(
        results=results,
        folder=folder,
        headline=headline,
        evidence=evidence,
        figures={name: (title, Markup(figures.svg(figure))) for name, (title, figure) in drawn.items()},
        settings=json.dumps(results["recipe"], indent=1),
        lens_figures=_lens_drawings(records, folder),
        records=records,
        lenses=LENSES,
    )
    path = folder / "report.html"
    path.write_text(page)
    (folder / "README.md").write_text(PAGES.get_template("study_readme.md").render(results=results, folder=folder))
    return path


def write_evaluation_report(summary: dict[str, Any], folder: Path, command: str) -> Path:
    """report.html and evaluation.png. Returns the path of the page."""
    figure = figures.scores_against_loops(summary)
    figures.save_png(figure, folder / "evaluation.png")
    drawn = Markup(figures.svg(figure))
    page = PAGES.get_template("evaluation.html").render(summary=summary, figure=drawn, command=command)
    path = folder / "report.html"
    path.write_text(page)
    return path


def write_diagnosis_report(records: list[dict[str, Any]], folder: Path, command: str) -> Path:
    """report.html and the figures as PNG, of one checkpoint or several side by side. Returns the path of the page."""
    records = labelled(records)
    page = PAGES.get_template("diagnosis.html").render(
        records=records,
        lenses=LENSES,
        command=command,
        figures=_lens_drawings(records, folder),
        comparison=_compared(records),
    )
    path = folder / "report.html"
    path.write_text(page)
    return path


def labelled(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Records with a `label`: the loop count, and the checkpoint's name where several have the same."""
    counts = [record["diagnosis"]["loops"] for record in records]
    names = [
        f"R = {n}" if counts.count(n) == 1 else f"{Path(r['checkpoint']).name} (R = {n})" for n, r in zip(counts, records)
    ]
    if len(set(names)) < len(names):
        names = [f"{name} [{i}]" for i, name in enumerate(names, 1)]
    return [record | {"label": name} for record, name in zip(records, names)]


def _lens_drawings(records: list[dict[str, Any]], folder: Path) -> dict[str, tuple[str, Markup]]:
    diagnoses = {record["label"]: Diagnosis.from_dict(record["diagnosis"]) for record in records}
    drawings = {}
    for name, figure in lens_figures.lens_figures(diagnoses).items():
        figures.save_png(figure, folder / f"lenses-{name}.png")
        drawings[name] = (lens_figures.CAPTIONS[name], Markup(figures.svg(figure)))
    return drawings


def _compared(records: list[dict[str, Any]]) -> str:
    """The losses of several checkpoints on the same samples; empty if there is one, or they saw different tokens."""
    if len(records) < 2:
        return ""
    if len({json.dumps([r["settings"]["data"], r["settings"]["length"], r["sample_hash"]]) for r in records}) > 1:
        return "these checkpoints saw different samples or tokens, so their losses cannot be compared here."
    diagnoses = {record["label"]: Diagnosis.from_dict(record["diagnosis"]) for record in records}
    final = {label: d.values["loss"][:, -1] for label, d in diagnoses.items()}
    best = min(final, key=lambda label: final[label].mean())
    parts = [f"{best} has the lowest loss on these samples, {final[best].mean():.3f} nats per token"]
    for label, loss in final.items():
        if label != best:
            gap = bootstrap_mean(loss - final[best])
            parts.append(f"{label} {gap.value:+.3f} ({gap.low:+.3f} to {gap.high:+.3f}, paired)")
    return "; ".join(parts) + ". Were they trained alike, take the smallest loop count whose interval reaches zero."
