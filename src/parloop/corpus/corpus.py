"""The corpus: read a source, drop duplicates, split by content, train a tokenizer, pack, and store the result on disk.

    source -> documents -> (exact duplicates dropped) -> train | validation by the hash of the content
           -> byte-level BPE from the train split -> rows of T tokens

The split depends only on each document's text, so nothing leaks from one half into the other, and it is the same in every run and on every
machine. The cache key is made of the settings, of the files' names, sizes and times, and of the content of a tokenizer given as a folder.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, disable_progress_bars, enable_progress_bars, load_from_disk
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..errors import first_line
from ..folder import disk_errors
from ..record import printable
from . import sources
from .cache import cache_folder, default_cache
from .packing import pack
from .tokenizer import text_ids, train_tokenizer

FORMAT = 3  # increase when the stored files change
MIN_TRAIN_ROWS, MIN_VALIDATION_DOCUMENTS = 32, 4
NAMED = 20  # how many left-out files the summary names per reason


def _extension(given: str) -> str:
    """Return the extension with one dot: py, .py and *.py all give .py. An empty one stands for files without an
    extension."""
    return given and "." + given.lstrip("*.")


@dataclass(frozen=True)
class CorpusSettings:
    """Settings that determine a corpus."""

    source: str = sources.STDLIB
    extensions: tuple[str, ...] = (".py",)
    text_column: str = "text"
    tokenizer: str | None = None  # folder or Hub name of an existing tokenizer; None: train one
    vocab_size: int = 2048
    length: int = 256  # T, tokens per row
    validation_share: float = 0.05
    max_bytes: int = 0  # stop after this many bytes of text; 0: everything
    max_file_bytes: int = 1_000_000

    def __post_init__(self) -> None:
        object.__setattr__(self, "extensions", tuple(_extension(given) for given in self.extensions))

    def key(self) -> str:
        """Return the cache key: a hash of the settings, the files and the tokenizer."""
        content = [FORMAT, asdict(self), sources.fingerprint(self.source)]
        if self.tokenizer is not None and (file := Path(self.tokenizer, "tokenizer.json")).is_file():
            content.append(hashlib.sha256(file.read_bytes()).hexdigest())
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


@dataclass
class Corpus:
    """A prepared corpus.

    Attributes:
        train: rows with input_ids and position_ids, each [T].
        validation: documents with name, text and size in bytes.
        tokenizer: the fast tokenizer.
        summary: counts of what was read and left out, as in `summary.json`.
        folder: folder of the stored corpus.
    """

    train: Dataset
    validation: Dataset
    tokenizer: PreTrainedTokenizerBase
    summary: dict[str, Any]
    folder: Path

    def print_summary(self, console: Console) -> None:
        """Print sizes of both splits, and what was left out."""
        s = self.summary
        table = Table(title=f"corpus: {escape(s['source'])}", title_justify="left", show_header=True)
        for column in ("", "documents", "MB", "tokens", "bytes per token"):
            table.add_column(column, justify="left" if not column else "right")
        for split in ("train", "validation"):
            part = s[split]
            ratio = part["bytes"] / max(part["tokens"], 1)
            mb = f"{part['bytes'] / 1e6:.1f}"
            table.add_row(split, f"{part['documents']:,}", mb, f"{part['tokens']:,}", f"{ratio:.2f}")
        console.print(table)
        left_out = ", ".join(f"{n:,} {reason}" for reason, n in s["left_out"].items()) or "nothing"
        console.print(f"left out: {left_out}. Names: {self.folder / 'summary.json'}", markup=False)


def load_corpus(settings: CorpusSettings, cache: Path | None = None, console: Console | None = None) -> Corpus:
    """Return the corpus for these settings, from the cache or made now. If the cache is not writable, it is made in a
    temporary folder.

    Raises:
        sources.SourceError: the source cannot be read, or holds too little text.
        OutputError: neither the cache nor a temporary folder is writable.
    """
    console = console or Console(stderr=True)
    folder = (cache or default_cache()) / "corpus" / settings.key()
    if not (folder / "summary.json").exists():
        folder = cache_folder("corpus", console, cache) / settings.key()
    if not (folder / "summary.json").exists():
        with disk_errors(folder.parent, "it begins again", "folder, PARLOOP_CACHE=FOLDER"):
            _make_in(folder, settings, console)
    return Corpus(
        train=load_from_disk(str(folder / "train")).with_format("numpy"),
        validation=load_from_disk(str(folder / "validation")),
        tokenizer=AutoTokenizer.from_pretrained(folder / "tokenizer"),
        summary=json.loads((folder / "summary.json").read_text(encoding="utf-8")),
        folder=folder,
    )


def is_validation(digest: bytes, share: float) -> bool:
    """Decide from a document's hash whether it is kept for validation.

    The first bytes of the hash order the documents; this reads later ones, so that a limit on bytes takes the same
    share of both splits.
    """
    return int.from_bytes(digest[8:16], "big") < share * 2**64


def _make_in(folder: Path, settings: CorpusSettings, console: Console) -> None:
    """Make the corpus beside its folder, and move it there when it is complete."""
    scratch = Path(tempfile.mkdtemp(prefix=f"{folder.name}-", dir=folder.parent))
    try:
        _make(settings, scratch, console)
        try:
            os.replace(scratch, folder)
        except OSError:  # another process was faster, or an unfinished folder is in the way
            if not (folder / "summary.json").exists():
                shutil.rmtree(folder)
                os.replace(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _make(settings: CorpusSettings, folder: Path, console: Console) -> None:
    columns = (SpinnerColumn(), TextColumn("{task.description:<12}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    disable_progress_bars()
    try:
        with Progress(*columns, console=console, transient=True) as progress:
            documents, summary = _read(settings, progress)
            tokenizer = _tokenizer(settings, documents, progress)
            summary |= _store(settings, documents, tokenizer, folder, progress)
    finally:
        enable_progress_bars()
    tokenizer.save_pretrained(folder / "tokenizer")
    (folder / "summary.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")


def _read(settings: CorpusSettings, progress: Progress) -> tuple[dict[str, list[dict]], dict[str, Any]]:
    """Return the documents of each split, in the order of their hashes, and the first part of the summary."""
    task = progress.add_task("reading", total=None)
    found: list[tuple[bytes, str, str]] = []
    seen: set[bytes] = set()
    left_out: Counter[str] = Counter()
    names: dict[str, list[str]] = {}
    read_bytes = 0
    items = sources.read(settings.source, settings.extensions, settings.text_column, settings.max_file_bytes)
    for name, text, reason in items:
        progress.advance(task)
        if text is not None:
            data = text.encode("utf-8", "replace")
            digest = hashlib.sha256(data).digest()
            if digest in seen:
                reason = "duplicate"
            else:
                seen.add(digest)
                found.append((digest, name, text))
                read_bytes += len(data)
                if settings.source.startswith(sources.HUB) and settings.max_bytes and read_bytes >= settings.max_bytes:
                    break
                continue
        left_out[reason] += 1
        if len(names.setdefault(reason, [])) < NAMED:
            names[reason].append(name)
    found.sort()
    documents: dict[str, list[dict]] = {"train": [], "validation": []}
    kept_bytes = 0
    kept: list[bytes] = []
    for digest, name, text in found:
        size = len(text.encode("utf-8", "replace"))
        if settings.max_bytes and kept_bytes + size > settings.max_bytes and kept_bytes:
            left_out["beyond max_bytes"] += 1
            continue
        kept_bytes += size
        kept.append(digest)
        split = "validation" if is_validation(digest, settings.validation_share) else "train"
        documents[split].append({"name": name, "text": text, "bytes": size})
    progress.remove_task(task)
    summary = {
        "source": printable(settings.source),
        "settings": asdict(settings),
        "left_out": dict(left_out.most_common()),
        "left_out_names": names,
        "digest": hashlib.sha256(b"".join(kept)).hexdigest(),  # of both splits
    }
    _enough(settings, documents, summary)
    return documents, summary


def _enough(settings: CorpusSettings, documents: dict[str, list[dict]], summary: dict[str, Any]) -> None:
    train_bytes = sum(document["bytes"] for document in documents["train"])
    need = MIN_TRAIN_ROWS * settings.length * 4  # about four bytes per token
    if train_bytes >= need and len(documents["validation"]) >= MIN_VALIDATION_DOCUMENTS:
        return
    left_out = ", ".join(f"{n} {reason}" for reason, n in summary["left_out"].items()) or "nothing"
    raise sources.SourceError(
        f"source {settings.source!r} has too little text: {len(documents['train'])} documents with {train_bytes:,} bytes to "
        f"train on and {len(documents['validation'])} to validate on. Needed are about {need:,} bytes and at least "
        f"{MIN_VALIDATION_DOCUMENTS} validation documents (validation_share={settings.validation_share}: raise it if documents are few). "
        f"Left out: {left_out}. For other kinds of files, set extensions, for instance --extensions .py .md{_tables(settings.source)}"
    )


def _tables(source: str) -> str:
    """Return advice on the tables in a folder, which are only read if the source names them."""
    path = Path(os.path.expanduser(source))
    endings = {file.suffix for file in sources.files_of(source)} & {".jsonl", ".parquet"} if path.is_dir() else set()
    globs = " or ".join(repr(str(path / "**" / f"*{ending}")) for ending in sorted(endings))
    return globs and f"; for the tables in this folder, give a glob as the source: {globs}"


def _tokenizer(settings: CorpusSettings, documents: dict[str, list[dict]], progress: Progress) -> PreTrainedTokenizerBase:
    if settings.tokenizer is not None:
        try:
            tokenizer = AutoTokenizer.from_pretrained(settings.tokenizer)
        except Exception as error:  # transformers raises a dozen kinds for files of a wrong form
            raise sources.SourceError(
                f"tokenizer {settings.tokenizer!r} cannot be loaded ({first_line(error)}): give a folder with tokenizer.json, a name of the Hub, "
                f"or leave it out to train one."
            ) from error
        if tokenizer.bos_token_id is None or tokenizer.eos_token_id is None:
            raise sources.SourceError(
                f"tokenizer {settings.tokenizer!r} has no bos_token or no eos_token; both mark document borders."
            )
        return tokenizer
    train = documents["train"]
    task = progress.add_task("tokenizer", total=len(train))

    def texts():
        for document in train:
            progress.advance(task)
            yield document["text"]

    tokenizer = train_tokenizer(texts(), settings.vocab_size)
    progress.remove_task(task)
    return tokenizer


def _store(settings, documents, tokenizer, folder: Path, progress: Progress) -> dict[str, Any]:
    """Tokenize, pack and write both splits. Returns their part of the summary."""
    summary = {}
    for split, items in documents.items():
        task = progress.add_task(f"packing {split[:5]}", total=len(items))
        tokens: list[np.ndarray] = []
        for start in range(0, len(items), 64):
            batch = items[start : start + 64]
            encoded = text_ids(tokenizer, [item["text"] for item in batch])
            tokens += [np.array([tokenizer.bos_token_id, *ids, tokenizer.eos_token_id], dtype=np.int32) for ids in encoded]
            progress.advance(task, len(batch))
        if split == "train":
            data = Dataset.from_dict(pack(tokens, settings.length))
        else:
            data = Dataset.from_dict({name: [item[name] for item in items] for name in ("name", "text", "bytes")})
        data.save_to_disk(str(folder / split))
        progress.remove_task(task)
        summary[split] = {
            "documents": len(items),
            "bytes": sum(item["bytes"] for item in items),
            "tokens": sum(len(ids) for ids in tokens),
        }
    return summary
