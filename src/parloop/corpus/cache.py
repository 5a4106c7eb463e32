"""The cache folder of corpora and benchmark tools: in the user's cache or, if that is not writable, in a temporary folder."""

import os
import tempfile
from pathlib import Path

from rich.console import Console

from ..errors import OutputError


def default_cache() -> Path:
    """Return `PARLOOP_CACHE`, or the `parloop` folder in the user's cache folder."""
    base = os.environ.get("PARLOOP_CACHE") or os.path.join(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "parloop")
    return Path(os.path.expanduser(base))


def cache_folder(name: str, console: Console, cache: Path | None = None) -> Path:
    """Return a folder of the cache, created if needed. If the cache is not writable, as in many containers, use a
    temporary folder and print a warning.

    Args:
        name: name of the folder in the cache.
        console: where the warning is printed.
        cache: the cache; default: `default_cache()`.

    Raises:
        OutputError: neither folder is writable.
    """
    wanted = (cache or default_cache()) / name
    try:
        return _made(wanted)
    except (OSError, RuntimeError) as error:  # RuntimeError: ~ of a user without a home
        reason = error
    try:
        temporary = _made(_temporary_cache() / name)
    except OSError as error:
        raise OutputError(
            f"the cache {str(wanted)!r} cannot be written ({_reason(reason)}), nor can a temporary folder ({_reason(error)}): set PARLOOP_CACHE "
            f"to a folder that can."
        ) from error
    console.print(
        f"the cache {str(wanted)!r} cannot be written ({_reason(reason)}): using {str(temporary)!r}. To keep what is made, set PARLOOP_CACHE.",
        style="yellow", markup=False, highlight=False, soft_wrap=True,
    )  # fmt: skip
    return temporary


def _made(folder: Path) -> Path:
    """Create a folder and write into it, as a test. Raises OSError if that fails."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as probe:
        probe.write(b"can this be written?")
        probe.flush()
    return folder


def _temporary_cache() -> Path:
    """Return the user's temporary cache, created if needed, which all processes of this user share and no other user."""
    folder = Path(tempfile.gettempdir(), f"parloop-{os.getuid() if hasattr(os, 'getuid') else ''}")
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if hasattr(os, "getuid") and (status.st_uid != os.getuid() or status.st_mode & 0o022 or folder.is_symlink()):
        return Path(tempfile.mkdtemp(prefix="parloop-"))
    return folder


def _reason(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error)
