"""Tasks on which depth shows: sources made on the fly, named `task:NAME` with options behind commas, as in `task:s5,form=all,length=8`."""

from ...errors import SourceError
from .encode import Encoded, Encoder, TaskRows, digest_of
from .hops import Hops
from .programs import Run
from .state import S5, Parity
from .task import HELD_OUT, PREFIX, TRAIN, Document, Task, parse_options

TASKS: dict[str, type[Task]] = {kind.name: kind for kind in (Parity, S5, Hops, Run)}

__all__ = [
    "HELD_OUT",
    "PREFIX",
    "TASKS",
    "TRAIN",
    "Document",
    "Encoded",
    "Encoder",
    "Task",
    "TaskRows",
    "digest_of",
    "is_task",
    "task_of",
]


def is_task(source: str) -> bool:
    """Whether a source is a task."""
    return source.startswith(PREFIX)


def task_of(source: str) -> Task:
    """The task that a source names.

    Raises:
        SourceError: no such task, an unknown option, or a value that does not fit.
    """
    name, *options = source.removeprefix(PREFIX).split(",")
    if name not in TASKS:
        raise SourceError(
            f"source {source!r}: there is no task {name!r}; known are {', '.join(PREFIX + known for known in TASKS)}."
        )
    return parse_options(TASKS[name], options, source)
