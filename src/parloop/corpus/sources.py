"""Sources of text: Python's own source and installed packages, folders and globs, jsonl and parquet, the Hub.

Every source yields (name, text or None, reason): one document, or why something is not one. Nothing is fatal for one bad
file; what was left out is counted by reason and named in the corpus's summary.
"""

import errno
import fnmatch
import glob
import json
import os
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import SourceError
from ..record import printable
from .tasks import PREFIX

Item = tuple[str, str | None, str]  # name, text or None, why there is no text

STDLIB = "stdlib"  # the standard library of the running interpreter
INSTALLED = "installed"  # that and every installed package
HUB = "hub:"
TABLES = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}  # extension -> loader of `datasets`
TEXT_TOO = ".json"  # is a table if it is asked for, and a text file among others
DEAL_FILES = 8  # files of tables for each share, so that shares come out about as large
COLUMN_WITHIN = 1000  # rows in which a column must show up
BOM = "\ufeff"  # editors leave it at the beginning of a file, and files put together have it inside; it is no part of a text
NOT_TEXT = ("site-packages", "dist-packages", "__pycache__", ".git", ".hg", "node_modules", ".venv")


def files_of(source: str) -> list[Path]:
    """The files of a folder or glob, in an order that does not depend on the machine.

    Raises:
        SourceError: nothing is there.
    """
    if source in (STDLIB, INSTALLED):
        paths = sysconfig.get_paths()
        folders = [paths["stdlib"]] if source == STDLIB else [paths["stdlib"], paths["purelib"], paths["platlib"]]
        return [path for folder in dict.fromkeys(folders) for path in _walk(Path(folder))]
    if source.startswith(PREFIX):
        raise SourceError(
            f"source {source!r} is a task, whose documents are made and not read: train, study, diagnose and eval held_out take it, alone."
        )
    path = Path(os.path.expanduser(source))
    if path.is_dir():
        return _walk(path)
    if path.is_file():
        return [path]
    matches = _each_once([path for path in _glob(path) if path.is_file()])
    if not matches:
        what = "no file matches this glob" if glob.has_magic(source) else "no such file or folder"
        raise SourceError(
            f"source {source!r}: {what}. Use 'stdlib', 'installed', a folder, a glob such as 'src/**/*.py' (quoted), a .jsonl "
            f"or .parquet file, or 'hub:OWNER/NAME' for a data set of the Hugging Face Hub."
        )
    return matches


def short_name(name: str) -> str:
    """A document's name without where the interpreter is installed."""
    for folder in dict.fromkeys(sysconfig.get_paths()[kind] for kind in ("purelib", "platlib", "stdlib")):
        if name.startswith(folder + os.sep):
            return name.removeprefix(folder + os.sep)
    return name


def _walk(top: Path) -> list[Path]:
    """The files below a folder, and below those that links in it lead to: each folder once, so that links in a circle end, and
    under its own name if it has one here."""
    found: list[Path] = []
    seen: set[tuple[int, int]] = set()
    places = [str(top)]
    for place in places:  # links are added on the way
        for folder, subfolders, names in os.walk(place, onerror=stop_for):
            stat = os.stat(folder)
            if (stat.st_dev, stat.st_ino) in seen:
                subfolders.clear()
                continue
            seen.add((stat.st_dev, stat.st_ino))
            inside = sorted(name for name in subfolders if name not in NOT_TEXT)
            subfolders[:] = [name for name in inside if not os.path.islink(os.path.join(folder, name))]
            places += [os.path.join(folder, name) for name in inside if name not in subfolders]
            found += [Path(folder, name) for name in sorted(names)]
    return found


def _glob(pattern: Path) -> Iterator[Path]:
    """What a pattern matches, by glob's rules. (glob itself goes round links in a circle until names become too long.)"""
    place = pattern.parts.index("**") if "**" in pattern.parts else len(pattern.parts)
    wanted = pattern.parts[place:]
    if not wanted or ".." in wanted:
        yield from map(Path, glob.glob(str(pattern), recursive=True))
        return
    for top in glob.glob(str(Path(*pattern.parts[:place]))):
        for folder, subfolders, names in os.walk(top, onerror=stop_for, followlinks=True):
            inside = Path(folder).relative_to(top).parts
            if not any(part.startswith(".") for part in wanted):
                subfolders[:] = [name for name in subfolders if not name.startswith(".")]
            if links := [name for name in subfolders if os.path.islink(os.path.join(folder, name))]:
                above = [os.stat(Path(top, *inside[:depth])) for depth in range(len(inside) + 1)]
                back = {name for name in links if any(os.path.samestat(os.stat(Path(folder, name)), stat) for stat in above)}
                subfolders[:] = [name for name in subfolders if name not in back]
            yield from (Path(folder, name) for name in names if _fits((*inside, name), wanted))


def _fits(parts: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    """Whether the parts of a path are those of a pattern; ** stands for any number of them. Hidden ones must be asked for."""
    if not pattern or not parts:
        return not parts and set(pattern) <= {"**"}
    hidden = parts[0].startswith(".")
    if pattern[0] == "**":
        return _fits(parts, pattern[1:]) or (not hidden and _fits(parts[1:], pattern))
    fits = fnmatch.fnmatchcase(parts[0], pattern[0]) and (not hidden or pattern[0].startswith("."))
    return fits and _fits(parts[1:], pattern[1:])


def _each_once(paths: list[Path]) -> list[Path]:
    """Sorted, and of the names of one file its own, or the first one."""
    real: dict[str, Path] = {}
    for path in sorted(paths, key=lambda path: (os.path.realpath(path) != os.path.abspath(path), path)):
        real.setdefault(os.path.realpath(path), path)
    return sorted(real.values())


def stop_for(error: OSError, path: Any = None) -> None:
    """Raise if it is the machine that fails, and not the file: what comes later would be missed without a word.

    Raises:
        SourceError: then.
    """
    if error.errno in (errno.EMFILE, errno.ENFILE):
        raise SourceError(
            f"too many files are open at {path or error.filename}: raise the limit (ulimit -n), or lower data_streams."
        ) from error
    if error.errno in (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOMEM, errno.ECONNRESET, errno.ENOTCONN):
        raise SourceError(
            f"{path or error.filename} cannot be read ({error}). When it can be again, the same command goes on."
        ) from error


def table_endings(source: str) -> set[str]:
    """Endings of those of a source's files that are tables: none in a folder; .json, which may be text, only if the source ends so."""
    if source in (STDLIB, INSTALLED) or Path(os.path.expanduser(source)).is_dir():
        return set()
    return set(TABLES) - ({TEXT_TOO} - {Path(source.rstrip("*")).suffix})


def files_read(settings: Any) -> list[Path]:
    """The files of a source whose text is read, by their endings. Empty for the Hub."""
    if settings.source.startswith(HUB):
        return []
    tables, every = table_endings(settings.source), not settings.extensions or _is_single(settings.source)
    return [
        path for path in files_of(settings.source) if every or path.suffix in tables or path.suffix in settings.extensions
    ]


def fingerprint(source: str) -> list:
    """Identify the content of a source by names, sizes and times of its files. Empty for the Hub."""
    if source.startswith(HUB):
        return []
    stats = [(path, path.stat() if path.exists() else path.lstat()) for path in files_of(source)]  # of what a link leads to
    return [(str(path), stat.st_size, stat.st_mtime_ns) for path, stat in stats]


def read_all(settings: Any) -> Iterator[Item]:
    """All documents that a CorpusSettings names."""
    return read(settings.source, settings.extensions, settings.text_column, settings.max_file_bytes)


def read(source: str, extensions: tuple[str, ...], text_column: str, max_file_bytes: int) -> Iterator[Item]:
    """All documents of a source, in an order that does not depend on the machine."""
    if source.startswith(HUB):
        yield from _read_table(open_hub(source.removeprefix(HUB)), text_column, max_file_bytes)
    else:
        single, tables = _is_single(source), table_endings(source)
        for path in files_of(source):
            if path.suffix in tables:
                yield from _read_table_file(path, text_column, max_file_bytes)
            elif extensions and not single and path.suffix not in extensions:
                yield printable(path), None, f"not {' or '.join(extensions)}"
            else:
                yield _read_file(path, max_file_bytes)


def read_dealt(
    settings: Any, files: list[Path], share: int, shares: int, order: np.random.Generator, place: Any = None
) -> Iterator[tuple[Item, Callable[[], Any]]]:
    """The documents of one share of a source, each with a function that tells the place after it.

    Text files are dealt by their number. So are tables if shares come out about as large: if there are many for each share, or as many for
    each. If not, their rows are dealt, and every share reads all of them.

    Args:
        settings: a CorpusSettings.
        files: of the source.
        share, shares: which share, from 0, of how many.
        order: files are read in an order drawn from it. It must be as it was when the place was taken. (Data sets of the Hub keep theirs.)
        place: where to go on. None: at the beginning.
    """
    source, column, limit = settings.source, settings.text_column, settings.max_file_bytes
    if source.startswith(HUB):
        yield from _deal_hub(source, column, limit, share, shares, place)
        return
    endings = table_endings(source)
    tables = [path for path in files if path.suffix in endings]
    if not tables:
        if settings.extensions and not _is_single(source):
            files = [path for path in files if path.suffix in settings.extensions]
        files = files[share::shares]
        files = [files[i] for i in order.permutation(len(files))]
        for number in range(place or 0, len(files)):
            yield _read_file(files[number], limit), partial(int, number + 1)
        return
    if len(tables) < len(files):
        other = next(path for path in files if path.suffix not in endings)
        raise SourceError(f"source {source!r} has tables and other files ({tables[0].name}, {other.name}): name them apart.")
    dealt = (share, shares)
    if len(tables) >= DEAL_FILES * shares or len(tables) % shares == 0:
        tables, dealt = tables[share::shares], (0, 1)
    tables = [tables[i] for i in order.permutation(len(tables))]
    first, start, row = place or (0, None, 0)
    for number in range(first, len(tables)):
        read_rows = _deal_lines if tables[number].suffix == ".jsonl" else _deal_table
        if number > first:
            start, row = None, 0
        try:
            for item, after, count in read_rows(tables[number], column, limit, start, row, *dealt):
                yield item, partial(_table_place, number, after, count)
        except SourceError:
            raise
        except Exception as error:
            if isinstance(error, OSError):
                stop_for(error, tables[number])
            reason = f"unreadable as {TABLES[tables[number].suffix]} from some row on"
            yield (printable(tables[number]), None, reason), partial(_table_place, number + 1, lambda: None, 0)


def _table_place(number: int, after: Callable[[], Any], row: int) -> list:
    return [number, after(), row]


def _deal_lines(path: Path, column: str, limit: int, start: int | None, row: int, share: int, shares: int):
    """Every `shares`-th row of a .jsonl file from a byte on: the item, a function that tells the next byte, and the next row's number."""
    found, others = start is not None, set()
    with open(path, "rb") as lines:
        lines.seek(start or 0)
        while line := lines.readline():
            row += 1
            if line.strip() and (row - 1) % shares == share:
                item, columns = _read_line(line, f"{printable(path)}, line {row}", column, limit)
                found |= column in columns
                others |= columns
                if columns and column not in columns:
                    item = (item[0], None, f"no column {column!r}")
                yield item, partial(int, lines.tell()), row
            if row == COLUMN_WITHIN * shares and others and not found:
                raise _no_column(column, others, path)


def _deal_table(path: Path, column: str, limit: int, start: Any, row: int, share: int, shares: int):
    """As _deal_lines, for parquet and JSON read by `datasets`; the cursor is the data set's state_dict."""
    from datasets import load_dataset

    rows = load_dataset(TABLES[path.suffix], data_files=[str(path)], split="train", streaming=True)
    if start is not None:
        rows.load_state_dict(start)
    for values in rows:
        if column not in values:
            raise _no_column(column, values, path)
        row += 1
        if (row - 1) % shares == share:
            yield _read_text(values[column], f"{printable(path)}, row {row - 1}", limit), rows.state_dict, row


def _deal_hub(source: str, column: str, limit: int, share: int, shares: int, place: Any):
    from datasets.distributed import split_dataset_by_node

    rows = split_dataset_by_node(open_hub(source.removeprefix(HUB)), rank=share, world_size=shares)
    row, start = place or (0, None)
    if start is not None:
        rows.load_state_dict(start)
    for values in rows:
        if column not in values:
            raise _no_column(column, values, None)
        row += 1
        item = _read_text(values[column], f"share {share} of {shares}, row {row - 1}", limit)
        yield item, lambda row=row: [row, rows.state_dict()]


def _is_single(source: str) -> bool:
    """Check whether a source names single files, whatever their endings."""
    return Path(os.path.expanduser(source)).is_file() or (glob.has_magic(source) and not Path(source).is_dir())


def _read_file(path: Path, max_file_bytes: int) -> Item:
    name = printable(path)
    try:
        size = path.stat().st_size
        if size == 0:
            return name, None, "empty"
        if size > max_file_bytes:
            return name, None, f"over {max_file_bytes:,} bytes"
        data = path.read_bytes()
    except OSError as error:
        stop_for(error, path)
        return name, None, "unreadable"
    if b"\0" in data:
        return name, None, "binary"
    try:
        text = data.decode("utf-8").replace(BOM, "")
    except UnicodeDecodeError:
        return name, None, "not UTF-8"
    return (name, text, "") if text.strip() else (name, None, "empty")


def _read_table_file(path: Path, text_column: str, max_file_bytes: int) -> Iterator[Item]:
    from datasets import load_dataset

    try:
        if not path.stat().st_size:
            yield printable(path), None, "empty"
        elif path.suffix == ".jsonl":
            yield from _read_lines(path, text_column, max_file_bytes)
        else:
            rows = load_dataset(TABLES[path.suffix], data_files=[str(path)], split="train", streaming=True)
            yield from _read_table(rows, text_column, max_file_bytes, path)
    except SourceError:
        raise
    except Exception as error:
        if isinstance(error, OSError):
            stop_for(error, path)
        yield printable(path), None, f"unreadable as {TABLES[path.suffix]}"


def _read_lines(path: Path, text_column: str, max_file_bytes: int) -> Iterator[Item]:
    """A .jsonl file. (The loader of `datasets` gives up a whole file for one line.)"""
    found = False
    others: set[str] = set()
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            item, columns = _read_line(line, f"{printable(path)}, line {number}", text_column, max_file_bytes)
            found |= text_column in columns
            others |= columns
            yield item
    if others and not found:
        raise _no_column(text_column, others, path)


def _read_line(line: bytes, name: str, text_column: str, max_file_bytes: int) -> tuple[Item, set[str]]:
    """The document in a line of JSON, and the columns that are there."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):  # not JSON, not UTF-8, or nested without end
        return (name, None, "not JSON"), set()
    if not isinstance(row, dict):
        return (name, None, "not a row with columns"), set()
    return _read_text(row.get(text_column), name, max_file_bytes), set(row)


def _no_column(text_column: str, columns: Iterable[str], file: Path | None) -> SourceError:
    where = "" if file is None else f"{file}: "
    return SourceError(f"{where}there is no column {text_column!r}: choose text_column among {sorted(columns)}.")


def _read_table(rows, text_column: str, max_file_bytes: int, file: Path | None = None) -> Iterator[Item]:
    for number, row in enumerate(rows):
        if text_column not in row:
            raise _no_column(text_column, row, file)
        name = f"row {number}" if file is None else f"{printable(file)}, row {number}"
        yield _read_text(row[text_column], name, max_file_bytes)


def _read_text(text: object, name: str, max_file_bytes: int) -> Item:
    if not isinstance(text, str):
        return name, None, "not text"
    text = text.replace(BOM, "")
    if not text.strip():
        return name, None, "empty"
    try:
        size = len(text.encode())
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can spell
        return name, None, "not UTF-8"
    return (name, text, "") if size <= max_file_bytes else (name, None, f"over {max_file_bytes:,} bytes")


def open_hub(name: str):
    """A streamed data set: NAME, NAME:CONFIG, each optionally followed by @SPLIT (default train)."""
    from datasets import load_dataset

    name, _, split = name.partition("@")
    name, _, config = name.partition(":")
    try:
        return load_dataset(name, config or None, split=split or "train", streaming=True)
    except Exception as error:
        raise SourceError(
            f"data set {name!r} of the Hub cannot be opened ({type(error).__name__}: {error}). Check its name and split "
            f"(hub:OWNER/NAME:CONFIG@SPLIT), your connection, and HF_TOKEN if it is private."
        ) from error
