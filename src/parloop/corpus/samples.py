"""Samples for diagnosing a model: rows of tokens of one document each, the same ones every time.

Documents come in the order of their hashes: first the first window of every document, then every second window, and so on, so that samples
are as independent as the source allows.
"""

import bisect
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..errors import SourceError
from . import sources
from .corpus import CorpusSettings, is_validation
from .tasks import HELD_OUT, Encoder, Task, is_task, task_of
from .tasks.encode import IGNORED
from .tokenizer import text_ids

MIN_TOKENS = 16  # a shorter remainder of a document is no sample

Document = tuple[str, str]  # name and text


@dataclass
class Sample:
    """One row of tokens.

    Attributes:
        name: the document, and which of its tokens these are.
        ids: token ids, with <bos> where the document begins.
        labels: for a task, the answer to predict at the token before; -100 where nothing is asked.
    """

    name: str
    ids: list[int]
    labels: list[int] | None = None


def documents_of(settings: CorpusSettings, samples: int, held_out: bool) -> Iterator[Document]:
    """Yield the documents of a source to draw samples from; of a Hub data set, only as many as there are samples.

    Args:
        settings: the source and how it is read; tokenizer and length are not used.
        samples: number of samples.
        held_out: only documents that training with these settings keeps for validation.

    Yields:
        name and text of a document.

    Raises:
        sources.SourceError: the source cannot be read.
    """
    enough = samples if settings.source.startswith(sources.HUB) else 0
    seen: set[bytes] = set()
    for name, text, _ in sources.read_all(settings):
        if text is None or (held_out and not is_validation(_digest(text), settings.validation_share)):
            continue
        yield name, text
        if enough:
            seen.add(_digest(text))
            if len(seen) == enough:
                return


def draw_samples(documents: Iterable[Document], tokenizer: Any, length: int, samples: int) -> list[Sample]:
    """Draw at most `samples` rows of at most `length` tokens; none, if no document is long enough.

    Only the texts with the `samples` smallest hashes, among documents that give a row, are kept in memory.

    Raises:
        ValueError: a number is out of its bounds.
    """
    if length < 1 or samples < 1:
        raise ValueError(f"length={length} and samples={samples} must be at least 1.")
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]

    def encoded(text: str, tokens: int) -> list[int]:
        # A token rarely has more than sixteen characters.
        return bos + text_ids(tokenizer, text[: 16 * tokens])

    def gives_a_row(text: str) -> bool:
        clearly = len(encoded(text, 4 * MIN_TOKENS)) >= 2 * MIN_TOKENS  # the cheap test
        return clearly or len(encoded(text, length)[:length]) >= min(MIN_TOKENS, length)

    kept: list[tuple[bytes, Document]] = []  # in the order of their hashes
    distinct: set[bytes] = set()  # up to `samples` different hashes
    for name, text in documents:
        digest = _digest(text)
        if len(distinct) < samples:
            distinct.add(digest)
        index = bisect.bisect_left(kept, digest, key=lambda entry: entry[0])
        if index == samples:
            continue
        if index < len(kept) and kept[index][0] == digest:
            kept[index] = (digest, (name, text))
        elif gives_a_row(text):
            kept.insert(index, (digest, (name, text)))
            del kept[samples:]
    ids = [encoded(text, length * -(-samples // len(distinct))) for _, (_, text) in kept]
    rows: list[Sample] = []
    for start in range(0, max(map(len, ids), default=0), length):
        for (_, (name, _)), all_ids in zip(kept, ids):
            row = all_ids[start : start + length]
            if len(row) >= min(MIN_TOKENS, length) and len(rows) < samples:
                rows.append(Sample(f"{sources.short_name(name)} [{start}:{start + len(row)}]", row))
    return rows


def samples_of(settings: CorpusSettings, tokenizer: Any, length: int, samples: int, held_out: bool) -> list[Sample]:
    """Return at most `samples` rows of the documents of a source; of a task, the beginnings of held-out documents.

    Raises:
        sources.SourceError: the source cannot be read, or no document is long enough; the tokenizer cannot spell the task.
    """
    if is_task(settings.source):
        return _of_task(task_of(settings.source), tokenizer, length, samples)
    rows = draw_samples(documents_of(settings, samples, held_out), tokenizer, length, samples)
    if not rows:
        raise no_samples(settings, held_out)
    return rows


def _of_task(task: Task, tokenizer: Any, length: int, samples: int) -> list[Sample]:
    """Return the beginnings of a task's held-out documents."""
    encode, rows = Encoder(task, tokenizer), []
    for number in range(samples):
        document = encode(task.document(number, HELD_OUT))
        ids, labels = document.input_ids[:length].tolist(), document.labels[:length].tolist()
        if all(label == IGNORED for label in labels):
            first = int(np.flatnonzero(document.labels != IGNORED)[0]) + 1
            raise SourceError(
                f"{task.source!r} asks nothing in the first length={length} tokens of a document: use at least {first}."
            )
        rows.append(Sample(f"{task.source} {number} [0:{len(ids)}]", ids, labels))
    return rows


def no_samples(settings: CorpusSettings, held_out: bool) -> SourceError:
    """Return the error for a source none of whose documents gives a row."""
    share = f" among the {settings.validation_share:.0%} held out of training" if held_out else ""
    return SourceError(
        f"source {settings.source!r} has no document of at least {MIN_TOKENS} tokens{share}: choose another source, or, "
        f"for other kinds of files, set --extensions, for instance --extensions .py .md"
    )


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "replace")).digest()


def padded_batches(rows: list[Sample], batch_size: int) -> list[dict[str, torch.Tensor]]:
    """Batch rows of similar length, so the order changes.

    Returns:
        batches of input_ids and attention_mask, int64 [B, T], padded on the right, and of labels [B, T] if the rows have some.
    """
    batches = []
    ordered = sorted(rows, key=lambda row: len(row.ids))
    for start in range(0, len(ordered), batch_size):
        ids = [torch.tensor(row.ids) for row in ordered[start : start + batch_size]]
        padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
        real = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
        batches.append({"input_ids": padded, "attention_mask": real})
        labels = [torch.tensor(row.labels) for row in ordered[start : start + batch_size] if row.labels is not None]
        if labels:
            batches[-1]["labels"] = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=IGNORED)
    return batches
