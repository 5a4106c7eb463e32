"""The study: train one model per loop count under a matched protocol, measure the gain and cost of every loop, recommend a count.

    corpus -> for every seed and arm: train, evaluate, diagnose -> time the models side by side -> statistics -> report

All arms share the initial draws, the data order, the optimizer, and the number of training tokens, or with `match="compute"` the
training FLOPs (each arm then gets the mean of the arms' costs at equal tokens). A study can be run again in its folder: finished runs
are kept, an interrupted one continues.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from ..corpus import Corpus, load_corpus
from ..corpus.tasks import is_task
from ..errors import RecipeError, SourceError
from ..folder import STUDY, claimed
from ..record import command_line
from ..train.recipe import Recipe
from .arms import Arm, combinations
from .measure import measure
from .report import write_report
from .results import StudyResult
from .runs import plan, train_all
from .summary import summarize
from .task import TaskCorpus

MATCHES = ("tokens", "compute")
CONTROLS = ("deep", "compute")


def run_study(
    recipe: Recipe | str = "quick",
    output: str | Path | None = None,
    *,
    loops: list[int] | None = None,
    seeds: int = 1,
    match: str = "tokens",
    controls: list[str] | None = None,
    sweep: list[str] | None = None,
    changes: dict[str, Any] | None = None,
    document_chars: int = 3000,
    jobs: int = 1,
    console: Console | None = None,
    command: str | None = None,
    fresh: bool = False,
) -> StudyResult:
    """Run a study into a folder, or continue it there, and write its report.

    Args:
        recipe: the protocol: a recipe, the name of a shipped one, or a file. Its loops, tokens and seed are set by the study.
        output: the folder. Default: runs/study-RECIPE, followed by the match and the source if they are not the default.
        loops: the loop counts to compare; default 1, 2, 3, 4.
        seeds: trainings per loop count.
        match: "tokens" or "compute".
        controls: adds models of one loop for every loop count R above 1: "deep" has R times the layers, each with weights of its own;
            "compute" trains on as many tokens as the training compute of R loops buys.
        sweep: fields of the recipe in which models differ besides the loop count, each as learning_rate=1e-3,3e-3; every combination is
            trained.
        changes: new values for fields of a recipe that is given by name or file.
        document_chars: characters of each validation document that are evaluated; 0: all.
        jobs: number of concurrent runs, one process each. More than one needs a script that can be imported (`if __name__ == "__main__":`).
        console: where progress is printed; default: the standard output.
        command: the command that the report names; default: this process's own.
        fresh: train finished runs again too.

    Returns:
        the result. results.json in the folder holds the same.

    Raises:
        RecipeError: the settings are impossible, or a run in the folder is of another recipe.
        SourceError: there is no text to train on.
        OutputError: the folder cannot be written, holds something other than a study, or another command works in it.
    """
    console, changes = console or Console(), changes or {}
    name = recipe if isinstance(recipe, str) else None
    recipe = Recipe.load(recipe, **changes) if isinstance(recipe, str) else recipe
    counts = sorted(set(loops or [1, 2, 3, 4]))
    if counts[0] < 1 or seeds < 1:
        raise RecipeError(f"loops {counts} and seeds {seeds} must be at least 1.")
    if match not in MATCHES:
        raise RecipeError(f"match={match!r} is unknown: use one of {', '.join(MATCHES)}.")
    for control in controls or []:
        if control not in CONTROLS:
            raise RecipeError(f"control={control!r} is unknown: use {' or '.join(CONTROLS)}, or both.")
    if jobs < 1:
        raise RecipeError(f"jobs={jobs} must be at least 1.")
    if document_chars < 0:
        raise RecipeError(f"document_chars={document_chars} must be at least 0; 0 takes documents whole.")
    arms = []
    for combination in combinations(sweep or [], recipe):
        arms += [Arm(loops=n, changes=combination) for n in counts]
        if "deep" in (controls or []):
            arms += [Arm(loops=1, layers=n, changes=combination) for n in counts if n > 1]
        if "compute" in (controls or []):
            arms += [Arm(loops=1, compute_of=n, changes=combination) for n in counts if n > 1]
    swept = [text.partition("=")[0] for text in sweep or []]
    folder = output or default_folder(name, match, recipe.source if name is None else changes.get("source"), swept)
    with claimed(folder, STUDY, going_on="finished runs are kept, and an interrupted one continues") as out:
        try:
            corpus: Corpus | TaskCorpus
            if is_task(recipe.source):
                corpus = TaskCorpus.of(recipe)
            else:
                corpus = load_corpus(recipe.corpus_settings(), console=console)
        except SourceError as error:
            if name is None or "source" in changes:
                raise
            raise SourceError(f"{error} (recipe {name!r})") from error
        corpus.print_summary(console)
        runs = plan(recipe, corpus, arms, seeds, match)
        train_all(runs, out.path, corpus, document_chars, console, fresh, min(jobs, len(runs)))
        with console.status("measuring prefill, decode, cache and memory, loop counts interleaved"):
            costs = measure({run.arm: out.path / run.name for run in runs if run.first}, recipe)
        result = summarize(recipe, corpus, runs, costs, match, command or command_line(), out.path)
        write_report(result, out)
    return result


def default_folder(preset: str | None, match: str, source: str | None, swept: Sequence[str] = ()) -> Path:
    """Return runs/study-PRESET, followed by the match and the source if they are not the default, and by the fields of a sweep."""
    parts = ["study", *([Path(preset).stem] if preset else []), *([match] if match != "tokens" else []), *swept]
    if source is not None and source != "stdlib":
        parts.append("".join(c if c.isalnum() else "-" for c in source).strip("-")[-40:])
    return Path("runs", "-".join(parts))
