"""The folder that a verb writes into: it is writable, it belongs to the verb, and no other command works in it.

    with claimed("runs/study-quick", STUDY) as out:  # raises OutputError before there is any work to lose
        out.write("report.html", page)

A claimed folder holds parloop.json: its kind, and a hash of every file that was written into it. A file with another hash counts as somebody
else's, and is neither overwritten nor deleted.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from .errors import OutputError, ParloopError
from .record import write_json

try:
    import fcntl
except ImportError:  # Windows: two runs in one folder are not detected there
    fcntl = None  # type: ignore[assignment]

CLAIM = "parloop.json"
LOCK = ".parloop.lock"
SCRATCH = ".partial-"  # prefix of incomplete files and folders
REMEMBERED = 2  # hashes per file: a run killed between writing parloop.json and the file leaves the earlier file


@dataclass(frozen=True)
class Kind:
    """A kind of folder that a verb makes.

    Attributes:
        name: name with its article, for messages.
        files: pattern of names that are written through OutputFolder.
        later: pattern of those among them that versions without claims did not write.
        made: pattern of other names in such a folder, written by libraries or by another verb.
        known: returns whether a folder without a claim is of this kind, made by a version without claims.
        over: whether the verb overwrites all of its files when it runs again, so that no other file may have their names.
        shared: whether the folder may hold other files too, as long as none has one of its names.
    """

    name: str
    files: str
    made: str = ""
    later: str = ""
    known: Callable[[Path], bool] = lambda folder: False
    over: bool = True
    shared: bool = False


def _holds(file: str, *fields: str) -> Callable[[Path], bool]:
    """Return a function that checks whether a folder has a JSON file with these fields."""

    def known(folder: Path) -> bool:
        return set(fields) <= _read_json(folder / file).keys()

    return known


def _is_study(folder: Path) -> bool:
    """Return whether a folder holds a study's results, or runs of a study that was interrupted before there were any."""
    runs = all(re.fullmatch(STUDY.made, name) and (folder / name / "recipe.yaml").is_file() for name in _names(folder))
    return runs or _holds("results.json", "rows", "verdict")(folder)


STUDY = Kind(
    "a study",
    files=r"results\.json|report\.html|README\.md|(loss|curves|cost|answers|lenses-\w+)\.png",
    made=r"r\d+(-[\w.+]+)*-seed\d+",
    known=_is_study,
)
DIAGNOSIS = Kind(
    "a diagnosis",
    files=r"results\.json|lenses\.csv|report\.html|lenses-\w+\.png",
    known=_holds("results.json", "command", "checkpoints"),
)
BENCH = Kind("a bench", files=r"results\.json|bench\.png", known=_holds("results.json", "settings", "blocks"))
EVALUATION_REPORT = Kind(
    "a report of parloop eval",
    files=r"evaluation\.json|report\.html|evaluation\.png",
    known=_holds("evaluation.json", "benchmarks", "folders"),
    shared=True,
)


class OutputFolder:
    """A claimed folder.

    Attributes:
        path: the folder, spelt as it was given.
        kind: its kind.
        of: its subject, for kinds that have one.
        hashes: name -> SHA-256 hashes of the file as written, the newest at the end.
    """

    def __init__(self, path: Path, kind: Kind, of: str, hashes: dict[str, list[str]]):
        self.path, self.kind, self.of, self.hashes = path, kind, of, hashes

    @contextlib.contextmanager
    def file(self, name: str) -> Iterator[Path]:
        """Yield a path to write to. The file is renamed to `name` when the block has ended.

        Raises:
            OutputError: another file, which this folder's verb did not write, has that name.
        """
        if (self.path / name).exists() and not self.owns(name):
            raise OutputError(_in_the_way(self.path, [name]))
        scratch = self.path / f"{SCRATCH}{name}"
        try:
            yield scratch
            self._remember(name, scratch)
            os.replace(scratch, self.path / name)
        finally:
            scratch.unlink(missing_ok=True)

    def write(self, name: str, text: str) -> None:
        """Write a text file, in UTF-8."""
        with self.file(name) as path:
            path.write_text(text, encoding="utf-8")

    def write_json(self, name: str, content: Any) -> None:
        """Write a JSON file."""
        self.write(name, json.dumps(content, indent=1, allow_nan=False))

    def write_files(self, write: Callable[[Path], Any]) -> None:
        """Let a function fill a folder with files, and move them here."""
        with tempfile.TemporaryDirectory(prefix=SCRATCH, dir=self.path) as folder:
            write(Path(folder))
            for written in sorted(Path(folder).iterdir()):
                with self.file(written.name) as path:
                    written.replace(path)

    def offer(self, name: str, text: str) -> None:
        """Write a text file, unless another file, which this folder's verb did not write, has that name."""
        if self.owns(name) or not os.path.lexists(self.path / name):
            self.write(name, text)

    def owns(self, name: str) -> bool:
        """Return whether a file is unchanged since it was written here."""
        path = self.path / name
        return path.is_file() and not path.is_symlink() and _hash(path) in self.hashes.get(name, [])

    def strangers(self) -> list[str]:
        """Return the names of files and folders that this kind of verb did not write."""
        return strangers(self.path, self.kind.made, self.owns)

    def clear(self) -> None:
        """Delete everything but the claim.

        Raises:
            OutputError: the folder holds something that this kind of verb did not write.
        """
        if others := [f"{name}, changed since" if name in self.hashes else name for name in self.strangers()]:
            raise OutputError(
                f"output {str(self.path)!r} holds more than {self.kind.name} ({_some(others)}), so it is not deleted: move these "
                f"away, or choose another folder."
            )
        for path in self.path.iterdir():
            if path.name not in (CLAIM, LOCK):
                delete(path)
        self.hashes = {}
        self._save()

    def _remember(self, name: str, path: Path) -> None:
        now = _hash(path)
        before = [known for known in self.hashes.get(name, []) if known != now]
        self.hashes[name] = [*before, now][-REMEMBERED:]
        self._save()

    def _save(self) -> None:
        write_json(self.path / CLAIM, {"kind": self.kind.name, "of": self.of, "files": self.hashes})

    def _take(self) -> None:
        """Read the claim. In a folder of a version without claims, files that it wrote are recognised by their names.

        Raises:
            OutputError: the folder belongs to something else.
        """
        claim, there = read_claim(self.path), _names(self.path)
        what = f"output {str(self.path)!r} holds"
        if claim and claim["kind"] != self.kind.name:
            raise OutputError(f"{what} {claim['kind']}, and not {self.kind.name}: choose another folder.")
        if claim and claim["of"] != self.of:
            raise OutputError(f"{what} {self.kind.name} of {claim['of']}, and not of {self.of}: choose another folder.")
        if claim:
            self.hashes = {name: list(known) for name, known in claim["files"].items()}
        elif there and self.kind.known(self.path):
            own = [name for name in there if re.fullmatch(self.kind.files, name) and (self.path / name).is_file()]
            own = [name for name in own if not re.fullmatch(self.kind.later, name)]
            self.hashes = {name: [_hash(self.path / name)] for name in own}
        elif there and not self.kind.shared:
            kind = self.kind.name.split(" ", 1)[1]
            raise OutputError(
                f"output {str(self.path)!r} is not empty and holds no {kind} ({_some(there)}): choose another folder."
            )

    def _refuse_files_in_the_way(self) -> None:
        """Raise OutputError if other files have names that this kind writes."""
        names = re.compile(re.escape(CLAIM) + (f"|{self.kind.files}" if self.kind.over else ""))
        if others := [name for name in _names(self.path) if names.fullmatch(name) and not self.owns(name)]:
            raise OutputError(_in_the_way(self.path, others))


@contextlib.contextmanager
def claimed(
    folder: str | Path | OutputFolder, kind: Kind, *, of: str = "", going_on: str = "nothing is lost"
) -> Iterator[OutputFolder]:
    """Claim a folder for a verb to write into, for the duration of the block. An OutputFolder, which is claimed already, is passed through.

    Args:
        folder: the folder.
        kind: its kind.
        of: its subject; a folder with another subject is refused.
        going_on: clause for the message if the disk is full: what happens to the work.

    Raises:
        OutputError: the folder cannot be created or written, belongs to something else, or holds other files with names that this kind
            writes; another run works in it; or, later, the disk fails.
    """
    if isinstance(folder, OutputFolder):
        yield folder
        return
    path = Path(folder)
    with disk_errors(path, going_on):
        new = make_folder(path)
        try:
            out = OutputFolder(path, kind, of, {})
            out._take()  # checks before anything is written
            with locked(path):
                out._take()  # again, since a run that has just ended may have written
                out._refuse_files_in_the_way()
                began = not (path / CLAIM).exists()
                out._save()
                try:
                    yield out
                finally:
                    with contextlib.suppress(OSError):  # somebody deleted it
                        if began and not _names(path):  # nothing was written
                            (path / CLAIM).unlink()
        finally:
            if new:
                with contextlib.suppress(OSError):  # it is not empty
                    path.rmdir()


@contextlib.contextmanager
def new_folder(out: str | Path) -> Iterator[Path]:
    """Yield an empty folder to fill. It becomes `out` when the block succeeds, and is deleted if it fails.

    Raises:
        OutputError: `out` exists and is not empty, or cannot be created or written.
    """
    out = Path(out)
    with disk_errors(out, "it starts from the beginning", "--out"):
        if os.path.lexists(out) and not (out.is_dir() and not any(out.iterdir())):
            raise OutputError(f"--out {str(out)!r} exists and is not empty: choose another folder.")
        there = not make_folder(out)
        if not there:
            out.rmdir()  # created only to check that it can be
        # An existing folder is filled inside: it may be a mount point, onto which nothing outside it can be moved.
        where, prefix = (out, SCRATCH) if there else (out.parent, f".{out.name}.partial-")
        scratch = Path(tempfile.mkdtemp(prefix=prefix, dir=where))
        try:
            scratch.chmod(0o755)
            yield scratch
            if there:
                for path in list(scratch.iterdir()):
                    path.rename(out / path.name)
                scratch.rmdir()
            else:
                scratch.rename(out)
        except BaseException:
            shutil.rmtree(scratch, ignore_errors=True)
            raise


def read_claim(folder: Path) -> dict[str, Any]:
    """Return kind, of and files from a folder's parloop.json; empty if there is none, or it is not ours."""
    claim = _read_json(folder / CLAIM)
    return claim if claim.keys() == {"kind", "of", "files"} and isinstance(claim["files"], dict) else {}


def make_folder(folder: Path) -> bool:
    """Create a folder and its parents. Return whether it did not exist.

    Raises:
        OutputError: a file is in the way, or no folder can exist there.
        OSError: it cannot be created.
    """
    for path in (folder, *folder.parents):
        if path.exists() and not path.is_dir():
            where = "is a file" if path == folder else f"cannot be made, since {str(path)!r} is a file"
            raise OutputError(f"output {str(folder)!r} {where}: choose a folder.")
    new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileNotFoundError as error:  # the parent exists, but cannot hold folders, such as /proc
        raise OutputError(f"output {str(folder)!r} cannot be made: choose another folder.") from error
    return new


def check_room(folder: Path, needed: float, what: str) -> None:
    """Check that the disk of a folder, existing or not, has enough free bytes.

    Args:
        folder: the folder.
        needed: bytes.
        what: what needs them, for the message.

    Raises:
        OutputError: it has fewer.
    """
    if (free := _free_bytes(folder)) < needed:
        raise OutputError(
            f"{what} takes {needed / 1e9:.3g} GB, and the disk of {str(folder)!r} has {free / 1e9:.3g} GB free: make room, or choose a folder "
            f"on another disk."
        )


def strangers(folder: Path, made: str, owns: Callable[[str], bool] = lambda name: False) -> list[str]:
    """Return the sorted names in a folder that neither match a pattern nor are owned."""
    return [name for name in _names(folder) if not re.fullmatch(made, name) and not owns(name)]


# One run at a time


@contextlib.contextmanager
def locked(folder: Path, keep: bool = False) -> Iterator[TextIO]:
    """Keep other runs out of a folder. The lock ends when this process, and all processes that it passes the file to, have ended.

    Args:
        folder: the folder.
        keep: keep the file, for a child process that may outlive this one and hold the lock.

    Yields:
        the locked file, which names the processes that work; see `sign`.

    Raises:
        OutputError: another run works in it.
    """
    path = folder / LOCK
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            if not _lock(file):
                file.seek(0)
                raise OutputError(
                    f"another run works in {str(folder)!r} ({file.read()}): wait for it, or, if its parloop has ended, end the others."
                )
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                break
        except BaseException:
            file.close()
            raise
        file.close()  # a run that ended just now has deleted it
    _held.add(file)
    try:
        sign(file)
        yield file
    finally:
        if not keep:
            with contextlib.suppress(OSError):
                path.unlink()
        _held.discard(file)
        file.close()


def sign(lock: TextIO, **others: int) -> None:
    """Write the ids of the working processes into the lock file."""
    lock.truncate(0)
    lock.write(", ".join(f"{who}: process {number}" for who, number in {"parloop": os.getpid(), **others}.items()))
    lock.flush()


def _lock(file: TextIO) -> bool:
    """Try to take the lock. Return whether this process holds it now."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:  # some network file systems have no locks
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        warnings.warn(
            f"{file.name} cannot be locked ({error.strerror}): make sure that no other run works there.", stacklevel=4
        )
    return True


_held: set[TextIO] = set()


def _let_go() -> None:
    # A worker may outlive its killed parent for seconds, and must not hold the lock.
    for file in _held:
        file.close()
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


# Errors of disks

FULL = {errno.ENOSPC, errno.EDQUOT}
OF_WRITING = {errno.EROFS, errno.EFBIG}
OF_A_PATH = {  # reading raises these too, so the file decides
    errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY, errno.ENAMETOOLONG, errno.ELOOP, errno.EIO,
    errno.ESTALE,
}  # fmt: skip
# Error numbers in messages of libraries in Rust and C++, whose exceptions are not OSErrors.
CODE = re.compile(r"\((?:os )?error (\d+)\)|\[?[Ee]rrno (\d+)")


@contextlib.contextmanager
def disk_errors(folder: Path, going_on: str = "nothing is lost", option: str = "--output") -> Iterator[None]:
    """Turn errors of a disk into an OutputError that names the remedy.

    Args:
        folder: folder that is written into.
        going_on: clause for the message: what happens to the work when the command is run again.
        option: option of the command that names the folder.

    Raises:
        OutputError: the disk is full or read-only, something is in the way, or access is denied.
    """
    try:
        yield
    except (ParloopError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # one of torch's errors in saving is not an Exception
        number, path = _code_of(error)
        if number is None and "inline_container" in str(error):  # torch's zip writer, which gives no reason
            number, path = errno.ENOSPC if _free_bytes(folder) < 2**26 else errno.EIO, folder
        ours = path is None or path.name in (CLAIM, LOCK) or ".partial" in path.name
        where = repr(str(folder if ours else path))
        if number in FULL:
            raise OutputError(
                f"the disk of {folder} is full: make room, and run the same command again; {going_on}."
            ) from error
        if number in OF_WRITING or (number in OF_A_PATH and path is not None and _is_of(path, folder)):
            raise OutputError(
                f"{where} cannot be written ({os.strerror(number or 0)}): choose another {option}, or make this one writable."
            ) from error
        raise


def _code_of(error: BaseException) -> tuple[int | None, Path | None]:
    """Return the number of an operating system's error, and its file.

    For a full or read-only disk, the causes of the exception and the messages of libraries are searched too.
    """
    cause: BaseException | None = error
    seen: set[int] = set()
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        found = CODE.search(str(cause))
        numbers = [cause.errno] if isinstance(cause, OSError) else [int(found[1] or found[2])] if found else []
        numbers += [number for number in FULL | OF_WRITING if os.strerror(number) in str(cause)]
        for number in numbers:
            if number in FULL | OF_WRITING:
                return number, _path_of(cause)
        cause = cause.__cause__ or cause.__context__
    return (error.errno, _path_of(error)) if isinstance(error, OSError) else (None, None)


def _path_of(error: BaseException) -> Path | None:
    names = [getattr(error, field, None) for field in ("filename2", "filename")]
    named = [name for name in names if isinstance(name, (str, bytes, os.PathLike))]
    return Path(os.fsdecode(named[0])) if named else None


def _free_bytes(folder: Path) -> int:
    """Return the free bytes on the disk of a folder, existing or not."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free


def _is_of(path: Path, folder: Path) -> bool:
    """Return whether a path is in a folder, in the scratch folder beside it, or above it."""
    path, folder = Path(os.path.abspath(path)), Path(os.path.abspath(folder))
    beside = any(part.startswith(f".{folder.name}.partial-") for part in path.parts)
    return beside or path.is_relative_to(folder) or folder.is_relative_to(path)


def _names(folder: Path) -> list[str]:
    """Return the names in a folder, sorted, without this module's own files."""
    return sorted(
        path.name
        for path in folder.iterdir()
        if not (path.name in (LOCK, f"{CLAIM}.partial") or path.name.startswith(SCRATCH))
        and not (path.name == CLAIM and read_claim(folder))
    )


def _read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; empty if the file does not exist or holds none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def delete(path: Path) -> None:
    """Delete a file, a link, or a folder with its content, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _in_the_way(folder: Path, names: list[str]) -> str:
    return (
        f"output {str(folder)!r} holds {_some(names)}, which parloop did not write, or which was changed since, and would be overwritten: move "
        f"{'it' if len(names) == 1 else 'them'} away, or choose another folder."
    )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
