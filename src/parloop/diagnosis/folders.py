"""Which folder a diagnosis goes into, and whose it is."""

import hashlib
import os
from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path

from ..folder import DIAGNOSIS, OutputFolder, claimed, read_claim


def subjects(checkpoints: Iterable[str | Path]) -> str:
    """What a folder with a diagnosis is about: folders by their whole paths, and names of the Hub."""
    return ", ".join(os.path.realpath(place) if Path(place).is_dir() else str(place) for place in checkpoints)


def default_folder(checkpoints: Iterable[str | Path]) -> Path:
    """runs/diagnose-NAMES; if that is about other checkpoints of these names, a hash is appended."""
    checkpoints = list(checkpoints)
    names = "-".join(Path(os.path.realpath(place)).name for place in checkpoints)[:80]
    folder, about = Path("runs", f"diagnose-{names}"), subjects(checkpoints)
    if os.path.lexists(folder) and read_claim(folder).get("of") != about:
        return folder.with_name(f"{folder.name}-{hashlib.sha256(about.encode('utf-8', 'surrogateescape')).hexdigest()[:8]}")
    return folder


def diagnosis_folder(
    folder: str | Path | OutputFolder, checkpoints: Iterable[str | Path]
) -> AbstractContextManager[OutputFolder]:
    """A folder, claimed for a diagnosis of these checkpoints.

    Raises:
        OutputError: it cannot be written, or holds something else or a diagnosis of others.
    """
    return claimed(folder, DIAGNOSIS, of=subjects(checkpoints), going_on="the diagnosis begins again")
