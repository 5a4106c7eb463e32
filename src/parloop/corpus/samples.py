"""Samples to look at a model with: rows of tokens of one document each, the same ones every time.

Documents come in the order of their hashes. First the first window of every document, then the second one, and so on, so that
samples stay as independent as the source allows.
"""

import hashlib
from dataclasses import dataclass
from typing import Any

import torch

from . import sources
from .corpus import CorpusSettings, is_validation
from .tasks import HELD_OUT, Encoder, Task, is_task, task_of
from .tokenizer import text_ids

MIN_TOKENS = 16  # a shorter rest of a document is no sample


@dataclass
class Sample:
    """One row: `ids`, with <bos> where the document begins, and `name`, which tokens of which document they are."""

    name: str
    ids: list[int]


def draw_samples(settings: CorpusSettings, tokenizer: Any, length: int, samples: int, held_out: bool) -> list[Sample]:
    """At most `samples` rows of at most `length` tokens.

    Args:
        settings: the source and what is read from it; its tokenizer and length are not used.
        held_out: only documents that training with these settings keeps for validation; of a task always.

    Raises:
        sources.SourceError: the source cannot be read, or has no text; the tokenizer cannot spell the task.
    """
    if is_task(settings.source):
        return _of_task(task_of(settings.source), tokenizer, length, samples)
    documents = {}
    for name, text, _ in sources.read(settings.source, settings.extensions, settings.text_column, settings.max_file_bytes):
        if text is None:
            continue
        digest = hashlib.sha256(text.encode("utf-8", "replace")).digest()
        if not held_out or is_validation(digest, settings.validation_share):
            documents[digest] = (name, text)
            if settings.source.startswith(sources.HUB) and len(documents) >= samples:
                break
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    rows: list[Sample] = []
    encoded: dict[bytes, list[int]] = {}
    window = 0
    while len(rows) < samples:
        before = len(rows)
        for digest in sorted(documents):
            if len(rows) == samples:
                break
            name, text = documents[digest]
            if digest not in encoded:  # a token has at least a byte, but rarely more than sixteen characters
                wanted = 16 * length * -(-samples // len(documents))
                encoded[digest] = bos + text_ids(tokenizer, text[:wanted])
            ids = encoded[digest][window * length : (window + 1) * length]
            if len(ids) >= min(MIN_TOKENS, length):
                start = window * length
                rows.append(Sample(f"{sources.short_name(name)} [{start}:{start + len(ids)}]", ids))
        if len(rows) == before:
            break
        window += 1
    if not rows:
        share = f" among the {settings.validation_share:.0%} held out of training" if held_out else ""
        raise sources.SourceError(
            f"source {settings.source!r} has no document of at least {MIN_TOKENS} tokens{share}: choose another source, or, "
            f"for other kinds of files, set --extensions, for instance --extensions .py .md"
        )
    return rows


def _of_task(task: Task, tokenizer: Any, length: int, samples: int) -> list[Sample]:
    """The beginnings of held-out documents."""
    encode = Encoder(task, tokenizer)
    rows = [encode(task.document(number, HELD_OUT)).input_ids[:-1][:length].tolist() for number in range(samples)]
    return [Sample(f"{task.source} {number} [0:{len(ids)}]", ids) for number, ids in enumerate(rows)]


def padded_batches(rows: list[Sample], batch_size: int) -> list[dict[str, torch.Tensor]]:
    """Rows in batches of input_ids and attention_mask [B, T], padded on the right; rows of similar length together, so the
    order changes."""
    batches = []
    ordered = sorted(rows, key=lambda row: len(row.ids))
    for start in range(0, len(ordered), batch_size):
        ids = [torch.tensor(row.ids) for row in ordered[start : start + batch_size]]
        padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
        real = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
        batches.append({"input_ids": padded, "attention_mask": real})
    return batches
