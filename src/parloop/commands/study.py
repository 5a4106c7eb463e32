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
        What to train on: stdlib (the default), installed (packages too), a folder, a glob, a .jsonl or .parquet file, hub:OWNER/NAME, or a task
        that takes depth: task:parity, task:s5, task:hops, task:run (docs/tasks.md).
    loops
        The loop counts to compare. Default: 1 2 3 4.
    preset
        Default: quick, or task for a task. quick (six minutes on two cores), task (minutes on two cores), laptop (planned for an hour), gpu (planned for half an hour on one large GPU), or a recipe file.
    seeds
        Trainings per loop count. Several make the intervals cover the luck of training.
    match
        tokens: the same training tokens for all. compute: the same training FLOPs.
    control
        Models of one loop beside every loop count above 1. deep: as many times the layers, each with its own weights. compute: as many more
        training tokens as the loops' compute buys.
    sweep
        Fields of the recipe that models differ in beside the loop count, with their values: --sweep learning_rate=1e-3,3e-3 branch_scaling=none,loops
        trains every combination.
    output
        Folder of the study. Default: runs/study-PRESET, with the match and the source if they are not the default, and the fields of a sweep.
    fresh
        Delete the runs in the folder and start over.
    """
    from ..study import run_study

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
        changes=changes,
        console=console,
        fresh=fresh,
    )
    console.print(result)
    name_files(console, "report", result.folder, "report.html")
