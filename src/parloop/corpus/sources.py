"""Sources of text: Python's own source and installed packages, folders and globs, jsonl and parquet, the Hub.

Every source yields (name, text or None, reason): a document, or the reason why there is none. A bad file is never fatal; files that are left
out are counted by reason and named in the corpus's summary.
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

Item = tuple[str, str | None, str]  # name, text or None, reason why there is no text

STDLIB = "stdlib"  # the standard library of the running interpreter
INSTALLED = "installed"  # the standard library and every installed package
HUB = "hub:"
TABLES = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}  # extension -> loader of `datasets`
JSON = ".json"  # read as a table only if the source names it; in a folder it is a text file
SHARD_FILES = 8  # files of tables per shard that make shards about equally large
COLUMN_WITHIN = 1000  # rows within which the column must appear
BOM = "\ufeff"  # byte order mark: at the beginning of a file, inside concatenated ones; no part of the text
NOT_TEXT = ("site-packages", "dist-packages", "__pycache__", ".git", ".hg", "node_modules", ".venv")


def files_of(source: str) -> list[Path]:
    """Return the files of a folder or glob, in an order that does not depend on the machine.

    Raises:
        SourceError: there are none.
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
    """Return a document's name without the folder in which the interpreter is installed."""
    for folder in dict.fromkeys(sysconfig.get_paths()[kind] for kind in ("purelib", "platlib", "stdlib")):
        if name.startswith(folder + os.sep):
            return name.removeprefix(folder + os.sep)
    return name


def _walk(top: Path) -> list[Path]:
    """Return the files below a folder, following links: each folder once, so that circular links end, and under its own
    name rather than a link's."""
    found: list[Path] = []
    seen: set[tuple[int, int]] = set()
    tops = [str(top)]
    for current in tops:  # links are appended during the loop
        for folder, subfolders, names in os.walk(current, onerror=stop_for):
            stat = os.stat(folder)
            if (stat.st_dev, stat.st_ino) in seen:
                subfolders.clear()
                continue
            seen.add((stat.st_dev, stat.st_ino))
            inside = sorted(name for name in subfolders if name not in NOT_TEXT)
            subfolders[:] = [name for name in inside if not os.path.islink(os.path.join(folder, name))]
            tops += [os.path.join(folder, name) for name in inside if name not in subfolders]
            found += [Path(folder, name) for name in sorted(names)]
    return found


def _glob(pattern: Path) -> Iterator[Path]:
    """Yield the paths that match a pattern, by glob's rules. (glob itself follows circular links until names become too
    long.)"""
    first = pattern.parts.index("**") if "**" in pattern.parts else len(pattern.parts)
    wanted = pattern.parts[first:]
    if not wanted or ".." in wanted:
        yield from map(Path, glob.glob(str(pattern), recursive=True))
        return
    for top in glob.glob(str(Path(*pattern.parts[:first]))):
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
    """Return whether the parts of a path match those of a pattern; ** matches any number of them. Only a pattern part
    with a dot matches a hidden one."""
    if not pattern or not parts:
        return not parts and set(pattern) <= {"**"}
    hidden = parts[0].startswith(".")
    if pattern[0] == "**":
        return _fits(parts, pattern[1:]) or (not hidden and _fits(parts[1:], pattern))
    fits = fnmatch.fnmatchcase(parts[0], pattern[0]) and (not hidden or pattern[0].startswith("."))
    return fits and _fits(parts[1:], pattern[1:])


def _each_once(paths: list[Path]) -> list[Path]:
    """Return the paths sorted, each file once: under its own name rather than a link's, or else under the first link's."""
    real: dict[str, Path] = {}
    for path in sorted(paths, key=lambda path: (os.path.realpath(path) != os.path.abspath(path), path)):
        real.setdefault(os.path.realpath(path), path)
    return sorted(real.values())


def stop_for(error: OSError, path: Any = None) -> None:
    """Raise if the machine fails, rather than one file: otherwise all later files would be left out silently.

    Raises:
        SourceError: the error is the machine's.
    """
    if error.errno in (errno.EMFILE, errno.ENFILE):
        raise SourceError(
            f"too many files are open at {path or error.filename}: raise the limit (ulimit -n), or lower data_streams."
        ) from error
    if error.errno in (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOMEM, errno.ECONNRESET, errno.ENOTCONN):
        raise SourceError(
            f"{path or error.filename} cannot be read ({error}). Once it is readable again, the same command continues."
        ) from error


def table_endings(source: str) -> set[str]:
    """Return the extensions of a source's files that are read as tables: none in a folder; .json, which may be text, only
    if the source ends in it."""
    if source in (STDLIB, INSTALLED) or Path(os.path.expanduser(source)).is_dir():
        return set()
    return set(TABLES) - ({JSON} - {Path(source.rstrip("*")).suffix})


def files_read(settings: Any) -> list[Path]:
    """Return the files of a source that are read, judged by their extensions. Empty for the Hub."""
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
    stats = [(path, path.stat() if path.exists() else path.lstat()) for path in files_of(source)]  # of a link's target
    return [(str(path), stat.st_size, stat.st_mtime_ns) for path, stat in stats]


def read_all(settings: Any) -> Iterator[Item]:
    """Yield all documents that a CorpusSettings names."""
    return read(settings.source, settings.extensions, settings.text_column, settings.max_file_bytes)


def read(source: str, extensions: tuple[str, ...], text_column: str, max_file_bytes: int) -> Iterator[Item]:
    """Yield all documents of a source, in an order that does not depend on the machine."""
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
    settings: Any, files: list[Path], shard: int, shards: int, order: np.random.Generator, cursor: Any = None
) -> Iterator[tuple[Item, Callable[[], Any]]]:
    """Yield the documents of one shard of a source, each with a function that returns the cursor behind it.

    Text files are sharded by their number. So are tables, if shards become about equally large: if there are many per shard, or equally many.
    Otherwise rows are sharded, and every shard reads all tables.

    Args:
        settings: a CorpusSettings.
        files: the source's files.
        shard: number of the shard, from 0.
        shards: number of shards.
        order: generator of the order of files. To resume from a cursor it must be in the same state as then. (Hub data sets keep their order.)
        cursor: where to resume; None: at the beginning.
    """
    source, column, limit = settings.source, settings.text_column, settings.max_file_bytes
    if source.startswith(HUB):
        yield from _shard_hub(source, column, limit, shard, shards, cursor)
        return
    endings = table_endings(source)
    tables = [path for path in files if path.suffix in endings]
    if not tables:
        if settings.extensions and not _is_single(source):
            files = [path for path in files if path.suffix in settings.extensions]
        files = files[shard::shards]
        files = [files[i] for i in order.permutation(len(files))]
        for number in range(cursor or 0, len(files)):
            yield _read_file(files[number], limit), partial(int, number + 1)
        return
    if len(tables) < len(files):
        other = next(path for path in files if path.suffix not in endings)
        raise SourceError(
            f"source {source!r} has tables and other files ({tables[0].name}, {other.name}): name them separately."
        )
    of_rows = (shard, shards)
    if len(tables) >= SHARD_FILES * shards or len(tables) % shards == 0:
        tables, of_rows = tables[shard::shards], (0, 1)
    tables = [tables[i] for i in order.permutation(len(tables))]
    first, start, row = cursor or (0, None, 0)
    for number in range(first, len(tables)):
        read_rows = _shard_lines if tables[number].suffix == ".jsonl" else _shard_table
        if number > first:
            start, row = None, 0
        try:
            for item, after, count in read_rows(tables[number], column, limit, start, row, *of_rows):
                yield item, partial(_table_cursor, number, after, count)
        except SourceError:
            raise
        except Exception as error:
            if isinstance(error, OSError):
                stop_for(error, tables[number])
            reason = f"unreadable as {TABLES[tables[number].suffix]} from some row on"
            yield (printable(tables[number]), None, reason), partial(_table_cursor, number + 1, lambda: None, 0)


def _table_cursor(number: int, after: Callable[[], Any], row: int) -> list:
    return [number, after(), row]


def _shard_lines(path: Path, column: str, limit: int, start: int | None, row: int, shard: int, shards: int):
    """Yield every `shards`-th row of a .jsonl file from byte `start` on: the item, a function that returns the next byte, the next row."""
    found, others = start is not None, set()
    with open(path, "rb") as lines:
        lines.seek(start or 0)
        while line := lines.readline():
            row += 1
            if line.strip() and (row - 1) % shards == shard:
                item, columns = _read_line(line, f"{printable(path)}, line {row}", column, limit)
                found |= column in columns
                others |= columns
                if columns and column not in columns:
                    item = (item[0], None, f"no column {column!r}")
                yield item, partial(int, lines.tell()), row
            if row == COLUMN_WITHIN * shards and others and not found:
                raise _no_column(column, others, path)


def _shard_table(path: Path, column: str, limit: int, start: Any, row: int, shard: int, shards: int):
    """Yield rows as _shard_lines does, for parquet and JSON read by `datasets`; the cursor is the data set's state_dict."""
    from datasets import load_dataset

    rows = load_dataset(TABLES[path.suffix], data_files=[str(path)], split="train", streaming=True)
    if start is not None:
        rows.load_state_dict(start)
    for values in rows:
        if column not in values:
            raise _no_column(column, values, path)
        row += 1
        if (row - 1) % shards == shard:
            yield _read_text(values[column], f"{printable(path)}, row {row - 1}", limit), rows.state_dict, row


def _shard_hub(source: str, column: str, limit: int, shard: int, shards: int, cursor: Any):
    from datasets.distributed import split_dataset_by_node

    rows = split_dataset_by_node(open_hub(source.removeprefix(HUB)), rank=shard, world_size=shards)
    row, start = cursor or (0, None)
    if start is not None:
        rows.load_state_dict(start)
    for values in rows:
        if column not in values:
            raise _no_column(column, values, None)
        row += 1
        item = _read_text(values[column], f"share {shard} of {shards}, row {row - 1}", limit)
        yield item, lambda row=row: [row, rows.state_dict()]


def _is_single(source: str) -> bool:
    """Return whether a source names single files, whatever their extensions."""
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
    """Yield the documents of a .jsonl file. (The loader of `datasets` drops a whole file for one bad line.)"""
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
    """Return the document in a line of JSON, and the names of its columns."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):  # not JSON, not UTF-8, or nested too deeply
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
    """Open a streamed data set: NAME or NAME:CONFIG, optionally followed by @SPLIT (default train).

    Raises:
        SourceError: it cannot be opened.
    """
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
