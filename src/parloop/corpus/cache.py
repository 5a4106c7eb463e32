"""The cache folder of corpora and of the benchmarks' tools: the user's cache or, if that cannot be written, a temporary folder."""

import os
import tempfile
from pathlib import Path

from rich.console import Console

from ..errors import OutputError


def default_cache() -> Path:
    """`PARLOOP_CACHE`, or the `parloop` folder in the user's cache folder."""
    base = os.environ.get("PARLOOP_CACHE") or os.path.join(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "parloop")
    return Path(os.path.expanduser(base))


def cache_folder(name: str, console: Console, cache: Path | None = None) -> Path:
    """A folder of the cache, made if it is not there; of a temporary cache, if this one cannot be written, as in many containers.

    Args:
        cache: instead of the default.

    Raises:
        OutputError: neither can be written.
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
    """Raises OSError: it cannot be written."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as probe:
        probe.write(b"can this be written?")
        probe.flush()
    return folder


def _temporary_cache() -> Path:
    """Make or find the user's temporary cache, which all of the user's processes share and nobody else."""
    folder = Path(tempfile.gettempdir(), f"parloop-{os.getuid() if hasattr(os, 'getuid') else ''}")
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if hasattr(os, "getuid") and (status.st_uid != os.getuid() or status.st_mode & 0o022 or folder.is_symlink()):
        return Path(tempfile.mkdtemp(prefix="parloop-"))
    return folder


def _reason(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error)
