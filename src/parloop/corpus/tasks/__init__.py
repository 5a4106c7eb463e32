"""Tasks that need depth: sources generated on the fly, named `task:NAME`, with options after commas, as in `task:s5,form=all,length=8`."""

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
    """Return whether a source is a task."""
    return source.startswith(PREFIX)


def task_of(source: str) -> Task:
    """Return the task that a source names.

    Raises:
        SourceError: there is no such task, an option is unknown, or its value is out of bounds.
    """
    name, *options = source.removeprefix(PREFIX).split(",")
    if name not in TASKS:
        raise SourceError(
            f"source {source!r}: there is no task {name!r}; known are {', '.join(PREFIX + known for known in TASKS)}."
        )
    return parse_options(TASKS[name], options, source)
