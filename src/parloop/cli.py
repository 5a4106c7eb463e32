"""The `parloop` command: its verbs, loaded when they are used, and its error messages."""

import ast
import errno
import importlib.resources
import io
import os
import re
import select
import sys
import time

from cyclopts import App
from rich.console import Console
from rich.markup import escape

from . import __version__
from .commands.terminal import terminal
from .errors import ParloopError
from .record import printable
from .registration import too_old, when_imported

VERBS = {  # verb -> name of the module in commands/ and of its function
    "study": "study", "train": "train", "diagnose": "diagnose", "generate": "generate", "convert": "convert", "export": "export",
    "quantize": "quantize", "bench": "bench", "serve": "serve", "check": "check", "eval": "evaluate", "run": "run",
}  # fmt: skip
MODEL_VERBS = {
    "bench",
    "convert",
    "diagnose",
    "export",
    "generate",
    "quantize",
    "study",
    "train",
}  # they need the model in transformers
EXTRAS = {
    "bench": "study",
    "diagnose": "study",
    "eval": "eval",
    "serve": "serve",
    "study": "study",
    "train": "train",
}  # verb -> the extra of parloop that it needs


def _docstring(module: str) -> str:
    """Read a verb's docstring without importing the verb's dependencies."""
    text = (importlib.resources.files("parloop.commands") / f"{module}.py").read_text(encoding="utf-8")
    functions = [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef) and node.name == module]
    return ast.get_docstring(functions[0]) or ""


app = App(
    name="parloop",
    help="Run, train and diagnose Parallel Loop Transformers, and choose their loop count.",
    version=__version__,
    suppress_keyboard_interrupt=False,  # main handles it
)
for verb, module in VERBS.items():
    app.command(f"parloop.commands.{module}:{module}", name=verb, help=_docstring(module))


def passed_through(tokens: list[str]) -> list[str]:
    """Return the arguments with -- after `parloop run -m MODULE`, so that the module's options are not parsed as ours."""
    if tokens[:1] != ["run"] or len(tokens) < 2:
        return tokens
    end = 3 if tokens[1] in ("-m", "--module") else 2
    return tokens if tokens[1] in app.help_flags else [*tokens[:end], "--", *tokens[end:]]


def main() -> None:
    """Run the command line.

    Exit codes are a shell's: 2 for errors that the user can correct, 130 after Ctrl-C, and 141 if nobody reads the
    output.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(
                errors="replace"
            )  # replace characters that cannot be printed, such as in a file's name that is not UTF-8
    console = Console(stderr=True)
    runs_a_module = sys.argv[1:2] == ["run"]  # the module's errors are left to it
    try:
        try:
            _run()
        finally:
            if sys.stdout is not None and not sys.stdout.closed:
                sys.stdout.flush()  # so that a failure to write is raised here
    except ParloopError as error:
        rank = os.environ.get("RANK", "0")
        if rank != "0":
            # Usually the first process prints the same error, and the launcher then ends the others. If not, this process prints it.
            time.sleep(3)
        who = "" if rank == "0" else f" (process {rank})"
        _print_error(console, f"error{who}:", str(error))
        sys.exit(2)
    except BrokenPipeError:
        if not _nobody_reads():
            raise
        _discard_output()
        sys.exit(141)
    except OSError as error:
        output_is_full = error.errno == errno.ENOSPC and error.filename is None
        if not output_is_full and (runs_a_module or error.filename is None):
            raise
        if output_is_full:
            _discard_output()
        named = "" if error.filename is None else f"{_short(printable(error.filename))!r}: "
        _print_error(console, "error:", f"{named}{error.strerror}.")
        sys.exit(2)
    except ImportError as error:
        cause = error if isinstance(error, ModuleNotFoundError) else error.__cause__  # cyclopts imports a verb's module
        missing = (getattr(cause, "name", None) or "").partition(".")[0]
        verb = sys.argv[1] if len(sys.argv) > 1 else ""
        if missing in ("", "parloop") or verb not in EXTRAS:
            raise
        _print_error(
            console,
            "error:",
            f'parloop {verb} needs {missing}, which is not installed: pip install "parloop[{EXTRAS[verb]}]".',
        )
        sys.exit(2)
    except KeyboardInterrupt:
        console.print("interrupted. Run the same command again to continue.")
        sys.exit(130)


def _run() -> None:
    when_imported("transformers.utils.logging", _without_progress_bars)
    app.console = terminal()
    if too_old() and set(sys.argv[1:2]) & MODEL_VERBS:
        raise ParloopError(too_old())
    app(passed_through(sys.argv[1:]))


def _without_progress_bars() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()  # we show our own


def _print_error(console: Console, what: str, message: str) -> None:
    message = re.sub(r"\\udc[89a-f][0-9a-f]", "?", message)  # repr() of bytes of a name that are not UTF-8
    console.print(f"[bold red]{what}[/] {escape(message)}", highlight=False)


def _nobody_reads() -> bool:
    """Return whether the other end of the standard output is closed."""
    poll = select.poll()
    poll.register(sys.stdout, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def _discard_output() -> None:
    """Redirect the standard output to nowhere, since Python flushes it at exit and would fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _short(name: str, longest: int = 120) -> str:
    return name if len(name) <= longest else f"{name[:longest]}..."
