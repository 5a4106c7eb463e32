"""Mixtures: several sources, streamed, shuffled and mixed by tokens, with a cursor that can be saved.

    documents of each source -> sharded over `streams` by their number -> shuffled in blocks -> the source that is furthest behind
    its share of the tokens gives the next document -> rows of T tokens

The seed and the cursor determine everything, so a restored stream continues with the very next row: within an epoch of its source, no
document is seen twice and none is skipped. Streams do not depend on processes: a step takes equally many rows of each stream, in a fixed
order, and the streams are divided among the processes, so any number of processes reads the same rows.

A block of documents is read, shuffled and consumed before the next one is read, so its cursor is three numbers: where the block
begins, its number, and how many of its documents were consumed. (A reservoir that is refilled document by document would have to be saved
whole.)
"""

import contextlib
import hashlib
import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset

from ..errors import CheckpointError, SourceError
from . import sources
from .corpus import CorpusSettings, is_validation
from .packing import collate, pack
from .tokenizer import document_ids, text_ids

Cursor = Any  # position of a reader in a source: a value that JSON can hold
ENCODED_AT_ONCE = 32


@dataclass(frozen=True)
class Part:
    """One source of a mixture, and its share of the tokens, relative to the others'."""

    settings: CorpusSettings
    weight: float


@dataclass
class Mixture:
    """A mixture: its sources, their weights, and how they are read.

    Attributes:
        parts: the sources and their weights.
        length: T, tokens per row.
        streams: number of independent streams that documents are sharded over.
        shuffle_documents: documents of a source that are shuffled at a time, over all streams.
        seed: seed of the shuffling.
    """

    parts: list[Part]
    length: int
    streams: int
    shuffle_documents: int
    seed: int = 0
    _files: dict[str, list[Path]] = field(default_factory=dict, repr=False)

    def digest(self) -> str:
        """Hash the names and sizes of the files that are read. Hub data sets enter by name only."""
        files = [sources.fingerprint(part.settings.source) for part in self.parts]
        known = [[part.settings.source, [entry[:2] for entry in found]] for part, found in zip(self.parts, files)]
        return hashlib.sha256(json.dumps(known).encode()).hexdigest()

    def files_of(self, part: Part) -> list[Path]:
        """Return the files of a source, listed once. Empty for the Hub."""
        source = part.settings.source
        if source not in self._files:
            self._files[source] = [] if source.startswith(sources.HUB) else sources.files_of(source)
        return self._files[source]

    def sample_texts(self, max_bytes: int) -> Iterator[str]:
        """Yield training documents, mixed by bytes, up to `max_bytes`, to train a tokenizer on."""
        readers = [
            _Shard(part.settings, 0, 1, number, self.seed, 50, self.files_of(part)) for number, part in enumerate(self.parts)
        ]
        given, left = [0.0] * len(self.parts), set(range(len(self.parts)))
        while sum(given) < max_bytes and left:
            number = min(left, key=lambda i: given[i] / self.parts[i].weight)
            _, text = readers[number].next()
            if readers[number].epoch:  # read to its end
                left.discard(number)
                continue
            given[number] += len(text.encode("utf-8", "replace"))
            yield text

    def validation_documents(self, tokenizer: Any, tokens: int) -> list[np.ndarray]:
        """Return token ids of held-out documents: `tokens` in all if there are as many, shared among the sources by
        weight."""
        total, documents = sum(part.weight for part in self.parts), []
        for part in self.parts:
            wanted = math.ceil(tokens * part.weight / total)
            for _, text, _ in sources.read_all(part.settings):
                if text is not None and _held_out(text, part.settings):
                    documents.append(document_ids(tokenizer, text)[:wanted])
                    wanted -= len(documents[-1])
                    if not wanted:
                        break
        return documents


def _held_out(text: str, settings: CorpusSettings) -> bool:
    digest = hashlib.sha256(text.encode("utf-8", "replace")).digest()
    return is_validation(digest, settings.validation_share)


class _Shard:
    """Documents of one source for one stream, epoch after epoch, in shuffled blocks."""

    def __init__(
        self, settings: CorpusSettings, stream: int, streams: int, number: int, seed: int, block_size: int, files: list[Path]
    ):
        self.settings, self.stream, self.streams, self.files = settings, stream, streams, files
        self.seed, self.number, self.block_size = seed, number, block_size
        self.epoch = 0
        self.block_number = -1  # within this epoch
        self.block_cursor: Cursor = None  # where the block begins; None: at the epoch's beginning
        self.given = 0  # documents of the block that were consumed
        self.left_out: Counter[str] = Counter()  # by reason, in earlier blocks
        self.left_out_of_block: Counter[str] = Counter()
        self.block: list[tuple[str, str]] = []
        self.items: Iterator[tuple[sources.Item, Callable[[], Cursor]]] | None = None
        self.next_cursor: Callable[[], Cursor] = lambda: None
        self.found = False  # whether this epoch has given a document

    def next(self) -> tuple[str, str]:
        """Return (name, text) of the next document.

        Raises:
            SourceError: the source cannot be read, or has no document for this stream.
        """
        while self.given >= len(self.block):
            self._next_block()
        self.given += 1
        return self.last()

    def last(self) -> tuple[str, str]:
        """Return (name, text) of the document that `next` returned last."""
        return self.block[self.given - 1]

    def peek(self, count: int) -> list[tuple[str, str]]:
        """Return up to `count` documents that follow in this block."""
        return self.block[self.given : self.given + count]

    def _next_block(self) -> None:
        cursor = self.next_cursor() if self.items is not None else self.block_cursor
        self.left_out += self.left_out_of_block
        self.block_number += 1
        self._read_block(cursor)
        if not self.block:  # the epoch is over
            if not self.found:
                left_out = self.left_out + self.left_out_of_block
                remedy = "lower data_streams, or give a source with more documents"
                if any(reason.startswith("no column") for reason in left_out):
                    remedy = "set text_column"
                raise SourceError(
                    f"source {self.settings.source!r} has no document for stream {self.stream + 1} of {self.streams}: {remedy}. "
                    f"Left out: {dict(left_out)}."
                )
            self.left_out += self.left_out_of_block
            self.epoch, self.block_number, self.items, self.found = self.epoch + 1, 0, None, False
            self._read_block(None)
        self.given = 0

    def _read_block(self, cursor: Cursor) -> None:
        """Read and shuffle the block that begins at a cursor."""
        self.block_cursor, self.left_out_of_block, self.block = cursor, Counter(), []
        if self.items is None:
            order = np.random.default_rng([self.seed, self.number, self.stream, self.epoch])
            self.items = sources.read_dealt(self.settings, self.files, self.stream, self.streams, order, cursor)
        self.next_cursor = lambda: cursor
        for (name, text, reason), next_cursor in self.items:
            self.next_cursor = next_cursor
            if text is None:
                self.left_out_of_block[reason] += 1
            elif not _held_out(text, self.settings):
                self.block.append((name, text))
                if len(self.block) == self.block_size:
                    break
        if self.block:
            # A Hub data set knows its cursor only until it reads on.
            after = self.next_cursor()
            self.next_cursor = lambda: after
            self.found = True
            rng = np.random.default_rng([self.seed, self.number, self.stream, self.epoch, self.block_number])
            self.block = [self.block[i] for i in rng.permutation(len(self.block))]

    def state(self) -> dict[str, Any]:
        """Return the cursor, as JSON holds it."""
        return {
            "source": self.settings.source,
            "epoch": self.epoch,
            "block": self.block_number,
            "place": self.block_cursor,
            "given": self.given,
            "left_out": dict(self.left_out),
            "left_out_of_block": dict(self.left_out_of_block),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a cursor that `state` returned."""
        self.epoch, self.block_number, self.found = state["epoch"], state["block"], True
        self.left_out, self.items = Counter(state["left_out"]), None
        if self.block_number >= 0:
            self._read_block(state["place"])
            self.given = state["given"]


class Stream:
    """One stream of a mixture: an endless sequence of rows of T tokens."""

    def __init__(self, mixture: Mixture, tokenizer: Any, number: int):
        self.mixture, self.tokenizer, self.number = mixture, tokenizer, number
        options = (number, mixture.streams)
        block = max(1, mixture.shuffle_documents // mixture.streams)
        self.parts = [
            _Shard(part.settings, *options, i, mixture.seed, block, mixture.files_of(part))
            for i, part in enumerate(mixture.parts)
        ]
        self.ahead: list[list[np.ndarray]] = [[] for _ in self.parts]  # encoded documents of each part, not yet used
        self.tokens = [0] * len(self.parts)
        self.documents = [0] * len(self.parts)
        self.last = 0  # index of the part that gave the last document
        self.rest = np.zeros(0, dtype=np.int32)  # remaining tokens of that document
        self.rest_name = ""
        self.rows = 0

    def row(self) -> dict[str, Any]:
        """Return the next row: input_ids and position_ids, int32 [T], and the names of its documents."""
        T = self.mixture.length
        pieces, names = ([self.rest], [self.rest_name]) if len(self.rest) else ([], [])
        total = len(self.rest)
        while total < T:
            name, ids = self._document()
            pieces.append(ids)
            names.append(name)
            total += len(ids)
        over = total - T
        last = pieces[-1]
        self.rest, self.rest_name = last[len(last) - over :], names[-1]
        pieces[-1] = last[: len(last) - over]
        self.rows += 1
        packed = pack(pieces, T)
        return {"input_ids": packed["input_ids"][0], "position_ids": packed["position_ids"][0], "documents": names}

    def _document(self) -> tuple[str, np.ndarray]:
        i = min(range(len(self.parts)), key=lambda i: self.tokens[i] / self.mixture.parts[i].weight)
        name, text = self.parts[i].next()
        self.last = i
        if not self.ahead[i]:
            texts = [text, *(text for _, text in self.parts[i].peek(ENCODED_AT_ONCE - 1))]
            bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
            encoded = text_ids(self.tokenizer, texts)
            self.ahead[i] = [np.array([bos, *ids, eos], dtype=np.int32) for ids in reversed(encoded)]
        ids = self.ahead[i].pop()
        self.tokens[i] += len(ids)
        self.documents[i] += 1
        return name, ids

    def state(self) -> dict[str, Any]:
        """Return the cursors of all parts and the counts so far, as JSON holds them."""
        return {
            "stream": self.number,
            "rows": self.rows,
            "tokens": list(self.tokens),
            "documents": list(self.documents),
            "last": self.last,
            "rest": len(
                self.rest
            ),  # only its length: the state is kept at every step and must be small, so the document is read again
            "parts": [part.state() for part in self.parts],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from the state that `state` returned."""
        self.rows, self.tokens, self.documents = state["rows"], list(state["tokens"]), list(state["documents"])
        for part, kept in zip(self.parts, state["parts"]):
            part.restore(kept)
        self.last = state["last"]
        if state["rest"]:
            self.rest_name, text = self.parts[self.last].last()
            self.rest = document_ids(self.tokenizer, text)[-state["rest"] :]


@dataclass
class StreamLoader:
    """Loader of a process's share of every step's rows, in batches.

    Attributes:
        mixture: the mixture to read.
        tokenizer: its tokenizer.
        batch_size: rows of a step, over all processes.
        accumulation: number of batches that a process's rows of a step are divided into.
        index: number of this process.
        processes: number of processes.
        prefetch: steps that a worker process reads ahead; 0: no worker process.
        states: cursors of this process's streams, after the last step that was consumed.
    """

    mixture: Mixture
    tokenizer: Any
    batch_size: int
    accumulation: int = 1
    index: int = 0
    processes: int = 1
    prefetch: int = 4
    states: dict[int, dict] = field(default_factory=dict)

    def __post_init__(self) -> None:
        S, W = self.mixture.streams, self.processes
        if S % W and W % S:
            raise SourceError(f"data_streams={S} and {W} processes: one must be a multiple of the other.")
        each = self.batch_size // W
        first = self.index * each
        per_stream = self.batch_size // S
        self.own = sorted({row // per_stream for row in range(first, first + each)})
        self.first, self.each, self.per_stream = first, each, per_stream

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        # Without a collate_fn, DataLoader would recurse through all states.
        loader = DataLoader(
            _Batches(self), batch_size=None, collate_fn=_unchanged, num_workers=1 if self.prefetch else 0,
            prefetch_factor=self.prefetch or None,
        )  # fmt: skip
        for batch, states, error in loader:
            if error is not None:
                raise SourceError(error)
            if states is not None:
                self.states = states
            yield batch

    def steps(self) -> Iterator[tuple[list[dict[str, Any]], dict[int, dict]]]:
        """Yield this process's rows of each step, and the states of its streams after it."""
        _allow_open_files()
        streams = {number: Stream(self.mixture, self.tokenizer, number) for number in self.own}
        for number, state in self.states.items():
            streams[number].restore(state)
        while True:
            rows = [(s * self.per_stream + n, streams[s].row()) for s in self.own for n in range(self.per_stream)]
            mine = [row for index, row in rows if self.first <= index < self.first + self.each]
            yield mine, {number: stream.state() for number, stream in streams.items()}

    def save(self, folder: Path) -> None:
        """Write the cursors of this process's streams; the first process of each stream writes it."""
        folder.mkdir(parents=True, exist_ok=True)
        for number, state in self.states.items():
            if self.first <= number * self.per_stream < self.first + self.each:
                (folder / f"stream-{number:04}.json").write_text(json.dumps(state), encoding="utf-8")

    def restore(self, folder: Path) -> None:
        """Continue from cursors that any number of processes saved.

        Raises:
            CheckpointError: it was saved with another number of streams.
        """
        there = places_in(folder)
        if len(there) != self.mixture.streams:
            raise CheckpointError(
                f"{str(folder)!r} holds the cursors of {len(there)} streams, but data_streams={self.mixture.streams}."
            )
        self.states = {number: json.loads(there[number].read_text(encoding="utf-8")) for number in self.own}


def _unchanged(batch: Any) -> Any:
    return batch


class _Batches(IterableDataset):
    """Yields (batch, states, None), with states only at the last batch of a step, or (None, None, text of an error).

    Errors are passed as text, because a worker process would raise them illegibly.
    """

    def __init__(self, loader: StreamLoader):
        self.loader = loader

    def __iter__(self):
        if torch.utils.data.get_worker_info() is not None:
            os.environ["TOKENIZERS_PARALLELISM"] = "false"  # it would hang in a forked process
        size = self.loader.each // self.loader.accumulation
        try:
            for rows, states in self.loader.steps():
                for start in range(0, len(rows), size):
                    last = start + size == len(rows)
                    yield collate(rows[start : start + size]), states if last else None, None
        except SourceError as error:
            yield None, None, str(error)


def _allow_open_files() -> None:
    """Raise the limit of open files, usually 1024: every stream holds a file of every source open."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)
        if 0 <= soft < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def places_in(folder: Path) -> list[Path]:
    """Return the files with the cursors of streams, in the order of the streams."""
    return sorted(path for path in folder.glob("stream-*.json") if re.fullmatch(r"stream-\d+\.json", path.name))


def what_was_read(folder: Path) -> list[dict[str, Any]]:
    """Sum up what was read from each source of a mixture: tokens, documents, highest epoch, and documents left out, by reason.

    Args:
        folder: checkpoint with the cursors of all streams.
    """
    read: list[dict[str, Any]] = []
    for path in places_in(folder):
        state = json.loads(path.read_text(encoding="utf-8"))
        for i, part in enumerate(state["parts"]):
            if len(read) <= i:
                read.append({"source": part["source"], "tokens": 0, "documents": 0, "epochs": 0, "left_out": Counter()})
            read[i]["tokens"] += state["tokens"][i]
            read[i]["documents"] += state["documents"][i]
            read[i]["epochs"] = max(read[i]["epochs"], part["epoch"] + 1)
            read[i]["left_out"] += Counter(part["left_out"]) + Counter(part["left_out_of_block"])
    return [entry | {"left_out": dict(entry["left_out"])} for entry in read]
