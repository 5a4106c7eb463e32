"""The console that commands print on."""

import os
from pathlib import Path

from rich.console import Console


class _Terminal(Console):
    def on_broken_pipe(self) -> None:
        raise BrokenPipeError  # main handles it; rich would exit with 1


def terminal() -> Console:
    """Return the console: the terminal, or 100 columns if the output goes into a file."""
    console = _Terminal()
    return console if console.is_terminal or "COLUMNS" in os.environ else _Terminal(width=100)


def name_files(console: Console, what: str, folder: Path | None, *names: str) -> None:
    """Print the paths of a verb's files."""
    paths = ", ".join(str(Path(folder or "", name)) for name in names)
    console.print(f"{what}: {paths}", highlight=False, markup=False, soft_wrap=True)
