"""The environment and command line that every measurement records, and safe writing of files."""

import json
import os
import platform
import shlex
import sys
from pathlib import Path
from typing import Any


def environment() -> dict[str, Any]:
    """Return the machine and the versions of Python and the main packages."""
    import torch
    import transformers

    from . import __version__

    cpu = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    except OSError:
        pass
    return {
        "parloop": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "processor": cpu,
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def command_line() -> str:
    """Return this process's command, ready to be typed again."""
    return printable(shlex.join(["parloop", *sys.argv[1:]]))


def printable(name: object) -> str:
    """Return a name that can be printed and stored anywhere: bytes that are not UTF-8, as in names of files, become
    question marks.

    (Python keeps such bytes as halves of surrogate pairs, which most writers of text refuse.)
    """
    return str(name).encode("utf-8", "replace").decode()


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file, complete or not at all, whenever the process is interrupted. Parent folders are created."""
    write_text(path, json.dumps(content, indent=1, allow_nan=False))


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, complete or not at all. Parent folders are created."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(path.name + ".partial")
    try:
        scratch.write_text(text, encoding="utf-8")
        os.replace(scratch, path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise
