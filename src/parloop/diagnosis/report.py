"""The report of a diagnosis: one page, and its figures."""

import csv
import json
from pathlib import Path
from typing import Any

from markupsafe import Markup

from ..folder import OutputFolder
from ..report.page import put, render
from ..statistics import bootstrap_mean
from .figures import CAPTIONS, lens_figures
from .folders import diagnosis_folder
from .lenses import LENSES
from .results import CheckpointDiagnosis, DiagnosisResult


def write_report(result: DiagnosisResult, folder: str | Path | OutputFolder) -> Path:
    """Write results.json, lenses.csv, report.html and the figures as PNG. Return the path of report.html.

    Raises:
        OutputError: the folder holds something other than a diagnosis of these checkpoints, or cannot be written.
    """
    shown = views(result.checkpoints, result.labels())
    with diagnosis_folder(folder, [one.checkpoint for one in result.checkpoints]) as out:
        out.write(result.FILE, result.to_json())
        with out.file("lenses.csv") as path, path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(result.rows())
        page = render(
            "diagnosis/report.html", records=shown, lenses=LENSES, command=result.command, figures=drawings(shown, out),
            comparison=_compared(shown),
        )  # fmt: skip
        out.write("report.html", page)
    return out.path / "report.html"


def views(checkpoints: list[CheckpointDiagnosis], labels: list[str]) -> list[dict[str, Any]]:
    """Return the checkpoints as dictionaries for templates, each with its `label` and its `summary`."""
    return [
        vars(one) | {"label": label, "summary": one.diagnosis.summary()}
        for one, label in zip(checkpoints, labels, strict=True)
    ]


def drawings(shown: list[dict[str, Any]], out: OutputFolder) -> dict[str, tuple[str, Markup]]:
    """Write the figures as lenses-NAME.png. Return name -> (caption, <svg> element)."""
    figures = lens_figures({one["label"]: one["diagnosis"] for one in shown})
    return put({name: (CAPTIONS[name], figure) for name, figure in figures.items()}, out, "lenses-")


def _compared(shown: list[dict[str, Any]]) -> str:
    """Return a sentence that compares several checkpoints on the same samples; empty if there is only one."""
    if len(shown) < 2:
        return ""
    if len({json.dumps([one["settings"]["data"], one["settings"]["length"], one["sample_hash"]]) for one in shown}) > 1:
        return "these checkpoints saw different samples or tokens, so their losses cannot be compared here."
    final = {one["label"]: one["diagnosis"].values["loss"][:, -1] for one in shown}
    best = min(final, key=lambda label: final[label].mean())
    parts = [f"{best} has the lowest loss on these samples, {final[best].mean():.3f} nats per token"]
    for label, loss in final.items():
        if label != best:
            gap = bootstrap_mean(loss - final[best])
            parts.append(f"{label} {gap.value:+.3f} ({gap.low:+.3f} to {gap.high:+.3f}, paired)")
    return "; ".join(parts) + ". Were they trained alike, take the smallest loop count whose interval reaches zero."
