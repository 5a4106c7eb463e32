"""Reports as one HTML file each: everything inside, readable offline, on a phone and on paper."""

import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, select_autoescape
from markupsafe import Markup
from matplotlib.figure import Figure

from ..diagnosis import Diagnosis
from ..diagnosis.checkpoint import diagnosis_folder
from ..diagnosis.lenses import LENSES
from ..folder import BENCH, EVALUATION_REPORT, STUDY, OutputFolder, claimed
from ..statistics import bootstrap_mean
from . import figures, lens_figures

PAGES = Environment(
    loader=PackageLoader("parloop.report", "templates"), autoescape=select_autoescape(), trim_blocks=True, lstrip_blocks=True
)


def write_study_report(results: dict[str, Any], folder: str | Path | OutputFolder) -> Path:
    """report.html, the figures as PNG, and a README that says how to go on. Returns the path of the page.

    Raises:
        OutputError: the folder holds something else than a study, or cannot be written.
    """
    records = labelled(results["diagnoses"])
    headline, _, evidence = results["verdict"].partition(". ")
    with claimed(folder, STUDY) as out:
        drawn = {
            "loss": ("Held-out loss against the loop count", figures.loss_against_loops(results)),
            "curves": ("Loss while training", figures.loss_curves(results)),
            "cost": ("Cost against the loop count", figures.cost_against_loops(results)),
        }
        for name, (_, figure) in drawn.items():
            _write_png(figure, f"{name}.png", out)
        page = PAGES.get_template("study.html").render(
            results=results,
            folder=out.path,
            headline=headline,
            evidence=evidence,
            figures={name: (title, Markup(figures.svg(figure))) for name, (title, figure) in drawn.items()},
            settings=json.dumps(results["recipe"], indent=1),
            lens_figures=_lens_drawings(records, out),
            records=records,
            lenses=LENSES,
        )
        out.write("report.html", page)
        out.write("README.md", PAGES.get_template("study_readme.md").render(results=results, folder=out.path))
    return out.path / "report.html"


def write_evaluation_report(summary: dict[str, Any], folder: str | Path | OutputFolder, command: str) -> Path:
    """report.html and evaluation.png. Returns the path of the page.

    Raises:
        OutputError: others' files have these names, or the folder cannot be written.
    """
    with claimed(folder, EVALUATION_REPORT) as out:
        figure = figures.scores_against_loops(summary)
        _write_png(figure, "evaluation.png", out)
        drawn = Markup(figures.svg(figure))
        out.write(
            "report.html", PAGES.get_template("evaluation.html").render(summary=summary, figure=drawn, command=command)
        )
    return out.path / "report.html"


def write_diagnosis_report(records: list[dict[str, Any]], folder: str | Path | OutputFolder, command: str) -> Path:
    """report.html and the figures as PNG, of one checkpoint or several side by side. Returns the path of the page.

    Raises:
        OutputError: the folder is not a diagnosis of these checkpoints, or cannot be written.
    """
    records = labelled(records)
    with diagnosis_folder(folder, [record["checkpoint"] for record in records]) as out:
        page = PAGES.get_template("diagnosis.html").render(
            records=records,
            lenses=LENSES,
            command=command,
            figures=_lens_drawings(records, out),
            comparison=_compared(records),
        )
        out.write("report.html", page)
    return out.path / "report.html"


def write_bench_figure(results: dict[str, Any], folder: str | Path | OutputFolder) -> Path:
    """bench.png. Returns its path.

    Raises:
        OutputError: the folder holds something else than a bench, or cannot be written.
    """
    with claimed(folder, BENCH) as out:
        _write_png(figures.bench_figure(results), "bench.png", out)
    return out.path / "bench.png"


def _write_png(figure: Figure, name: str, out: OutputFolder) -> None:
    with out.file(name) as path:
        figures.save_png(figure, path)


def labelled(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Records with a `label`: the loop count, and the checkpoint's name where several have the same."""
    counts = [record["diagnosis"]["loops"] for record in records]
    names = [
        f"R = {n}" if counts.count(n) == 1 else f"{Path(r['checkpoint']).name} (R = {n})" for n, r in zip(counts, records)
    ]
    if len(set(names)) < len(names):
        names = [f"{name} [{i}]" for i, name in enumerate(names, 1)]
    return [record | {"label": name} for record, name in zip(records, names)]


def _lens_drawings(records: list[dict[str, Any]], out: OutputFolder) -> dict[str, tuple[str, Markup]]:
    diagnoses = {record["label"]: Diagnosis.from_dict(record["diagnosis"]) for record in records}
    drawings = {}
    for name, figure in lens_figures.lens_figures(diagnoses).items():
        _write_png(figure, f"lenses-{name}.png", out)
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
