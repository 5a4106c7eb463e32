"""The folder of a diagnosis: its default name, and the checkpoints that it belongs to."""

import hashlib
import os
from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path

from ..folder import DIAGNOSIS, OutputFolder, claimed, read_claim


def subjects(checkpoints: Iterable[str | Path]) -> str:
    """Return the identity of a diagnosis's checkpoints: absolute paths of folders, names of the Hub."""
    return ", ".join(os.path.realpath(name) if Path(name).is_dir() else str(name) for name in checkpoints)


def default_folder(checkpoints: Iterable[str | Path]) -> Path:
    """Return runs/diagnose-NAMES, followed by a hash if that folder is about other checkpoints of these names."""
    checkpoints = list(checkpoints)
    names = "-".join(Path(os.path.realpath(name)).name for name in checkpoints)[:80]
    folder, about = Path("runs", f"diagnose-{names}"), subjects(checkpoints)
    if os.path.lexists(folder) and read_claim(folder).get("of") != about:
        return folder.with_name(f"{folder.name}-{hashlib.sha256(about.encode('utf-8', 'surrogateescape')).hexdigest()[:8]}")
    return folder


def diagnosis_folder(
    folder: str | Path | OutputFolder, checkpoints: Iterable[str | Path]
) -> AbstractContextManager[OutputFolder]:
    """Claim a folder for a diagnosis of these checkpoints.

    Raises:
        OutputError: it cannot be written, or holds something other than a diagnosis of these checkpoints.
    """
    return claimed(folder, DIAGNOSIS, of=subjects(checkpoints), going_on="the diagnosis begins again")
