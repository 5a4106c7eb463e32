"""`parloop study`."""

from typing import Annotated, Any

from cyclopts import Parameter

from ..train.recipe import Recipe
from .options import Many, Output, given, overrides_of
from .terminal import name_files, terminal

Overrides: Any = overrides_of(Recipe, without=("mixture", "loops", "init_from"))


def study(
    source: str | None = None,
    /,
    *,
    loops: Annotated[list[int] | None, Many] = None,
    preset: str | None = None,
    seeds: int = 1,
    match: str = "tokens",
    control: Annotated[list[str] | None, Many] = None,
    sweep: Annotated[list[str] | None, Many] = None,
    jobs: int | None = None,
    output: Output | None = None,
    fresh: bool = False,
    overrides: Annotated[Overrides, Parameter(name="*")] = Overrides(),  # noqa: B008
) -> None:
    """Train one model per loop count under a matched protocol, and recommend a loop count.

    Prints tables and the path of a report. Run it again to continue after an interruption.

    Example: parloop study src/ --loops 1 2 3 --preset quick --seeds 3

    Parameters
    ----------
    source
        Training text: stdlib (the default), installed (packages too), a folder, a glob, a .jsonl or .parquet file, hub:OWNER/NAME, or a task
        that needs depth: task:parity, task:s5, task:hops, task:run (docs/tasks.md).
    loops
        The loop counts to compare. Default: 1 2 3 4.
    preset
        Default: quick, or task for a task. quick (six minutes on two cores), task (minutes on two cores), laptop (planned for an hour), gpu (planned for half an hour on one large GPU), or a recipe file.
    seeds
        Trainings per loop count. Several make the intervals cover the luck of training.
    match
        tokens: the same training tokens for all. compute: the same training FLOPs.
    control
        Add models of one loop for every loop count R above 1. deep: R times the layers, each with its own weights. compute: as many
        training tokens as the training compute of R loops buys.
    sweep
        Fields of the recipe in which models differ besides the loop count, with their values: --sweep learning_rate=1e-3,3e-3
        branch_scaling=none,loops trains every combination.
    jobs
        Number of concurrent runs. Default: one on a GPU, otherwise one per thread that torch may use, at most 4.
    output
        Folder of the study. Default: runs/study-PRESET, followed by the match and the source if they are not the default, and by the fields of a
        sweep.
    fresh
        Delete the runs in the folder and start over.
    """
    from ..study import run_study
    from ..study.jobs import default_jobs

    changes = given(overrides) | ({} if source is None else {"source": source})
    console = terminal()
    preset = preset or ("task" if str(changes.get("source", "")).startswith("task:") else "quick")
    result = run_study(
        preset,
        output,
        loops=loops,
        seeds=seeds,
        match=match,
        controls=control,
        sweep=sweep,
        jobs=default_jobs(str(changes.get("device"))) if jobs is None else jobs,
        changes=changes,
        console=console,
        fresh=fresh,
    )
    console.print(result)
    name_files(console, "report", result.folder, "report.html")
