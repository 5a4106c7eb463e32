"""The report of a study: one page, its figures, and a README with the next commands."""

import json
from pathlib import Path

from ..corpus.tasks import HELD_OUT, task_of
from ..diagnosis.lenses import LENSES
from ..diagnosis.report import drawings, views
from ..diagnosis.results import CheckpointDiagnosis
from ..folder import STUDY, OutputFolder, claimed
from ..report.page import put, render
from .arms import columns
from .figures import answers_by_group, cost_against_loops, loss_against_loops, loss_curves
from .results import StudyResult


def write_report(result: StudyResult, folder: str | Path | OutputFolder) -> Path:
    """Write results.json, report.html, the figures as PNG, and README.md. Return the path of report.html.

    Args:
        result: the study's result.
        folder: the study's folder, with its runs.

    Raises:
        OutputError: the folder holds something other than a study, or cannot be written.
    """
    with claimed(folder, STUDY) as out:
        diagnoses = [
            CheckpointDiagnosis.from_json((out.path / row.diagnosis).read_text(encoding="utf-8")) for row in result.rows
        ]
        shown = views(diagnoses, [row.arm.label for row in result.rows])
        figures = {
            "loss": ("Held-out loss against the loop count", loss_against_loops(result)),
            "curves": ("Loss while training", loss_curves(result)),
            "cost": ("Cost against the loop count", cost_against_loops(result)),
        }
        if result.rows[0].answers:
            title = f"Right answers, by {result.group_unit}"
            figures = {"answers": (title, answers_by_group(result))} | figures
        out.write(result.FILE, result.to_json())
        page = render(
            "study/report.html",
            result=result,
            base=result.row(result.base),
            arms=columns([row.arm for row in result.rows]),
            controls=any(row.arm.is_control for row in result.rows),
            prompt=_prompt(result),
            folder=out.path,
            figures=put(figures, out),
            settings=json.dumps(result.recipe, indent=1),
            lens_figures=drawings(shown, out),
            records=shown,
            lenses=LENSES,
        )
        out.write("report.html", page)
        out.write("README.md", render("study/readme.md", result=result, folder=out.path, prompt=_prompt(result)))
    return out.path / "report.html"


def _prompt(result: StudyResult) -> str:
    """Return a prompt for a model of the study."""
    if not result.rows[0].answers:
        return "def "
    task = task_of(result.recipe["source"])
    document = task.document(0, HELD_OUT)
    return task.join(task.symbols_of(document)[: document.prompt if task.is_written else 12])[0].split("\n")[0]
