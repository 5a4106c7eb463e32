"""Documents of a task as tokens, by the task's own tokenizer, whose tokens are its symbols, or by a given one.

Labels follow the convention of transformers: the label at a position is predicted at the position before. So the answer that is due after
a symbol is the label of the next position, even if the next symbol is a different one.
"""

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from ...errors import SourceError
from .task import EOS_ID, HELD_OUT, NO_TARGET, SPECIAL, TRAIN, Document, Task

IGNORED = -100  # label of positions without an answer
TRIED = 64  # documents that are checked to fit into a row before training begins


@dataclass(frozen=True)
class Encoded:
    """A tokenized document, `<bos> .. <eos>`.

    Attributes:
        input_ids: int32 [n].
        labels: int32 [n]; IGNORED where nothing is asked.
        groups: int32 [n], group of the answer that is the label; 0 elsewhere.
        prompt: number of tokens that are given if the model writes the rest itself; n - 1 if it writes nothing.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    groups: np.ndarray
    prompt: int


class Encoder:
    """Encodes the documents of a task.

    Raises:
        SourceError: the tokenizer cannot spell the task: it does not know a symbol, merges two symbols into one token, or needs several
            tokens for an answer.
    """

    def __init__(self, task: Task, tokenizer: Any):
        self.task, self.tokenizer = task, tokenizer
        vocabulary = tokenizer.get_vocab()
        self.is_own = all(vocabulary.get(symbol) == id for symbol, id in task.id_of.items())
        self._spelled: dict[int, int] = {EOS_ID: tokenizer.eos_token_id}
        if tokenizer.bos_token_id is None or tokenizer.eos_token_id is None:
            raise SourceError(
                f"source {task.source!r} needs a tokenizer with a bos_token and an eos_token, which mark borders."
            )

    def __call__(self, document: Document) -> Encoded:
        ids, ends = (document.ids, np.arange(1, len(document.ids) + 1)) if self.is_own else self._tokens(document)
        input_ids = np.array([self.tokenizer.bos_token_id, *ids, self.tokenizer.eos_token_id], dtype=np.int32)
        labels, groups = np.full(len(input_ids), IGNORED, dtype=np.int32), np.zeros(len(input_ids), dtype=np.int32)
        asked = np.flatnonzero(document.targets != NO_TARGET)
        positions = ends[asked] + 1
        if self.is_own:
            labels[positions], groups[positions] = document.targets[asked], document.groups[asked]
        else:
            for i, position in zip(asked, positions):
                if self.task.is_written and document.targets[i] != EOS_ID:  # the answer comes next, perhaps after a space
                    position = ends[i + 1]
                    labels[ends[i] + 1 : position + 1] = input_ids[ends[i] + 1 : position + 1]
                else:
                    labels[position] = self._token_of(int(document.targets[i]))
                groups[position] = document.groups[i]
        return Encoded(input_ids, labels, groups, int(ends[document.prompt - 1]) + 1)

    def _tokens(self, document: Document) -> tuple[list[int], np.ndarray]:
        """Return the token ids of a document's text, and for each symbol the number of tokens up to its end."""
        symbols = self.task.symbols_of(document)
        text, starts = self.task.join(symbols)
        try:
            encoded = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True)
        except (
            Exception
        ) as error:  # tokenizers raises plain Exception; here from a word-level vocabulary without an unknown token
            raise self._error(f"does not know a symbol of it ({error})") from error
        begins, stops = (np.array(offsets) for offsets in zip(*encoded["offset_mapping"]))
        symbol_ends = np.array([start + len(symbol) for start, symbol in zip(starts, symbols)])
        ends = np.searchsorted(begins, symbol_ends)  # tokens that begin before the symbol ends
        if self.tokenizer.unk_token_id is not None and self.tokenizer.unk_token_id in encoded["input_ids"]:
            at = int(begins[encoded["input_ids"].index(self.tokenizer.unk_token_id)])
            raise self._error(f"does not know {text[at : at + 10]!r}")
        for i in np.flatnonzero(document.targets != NO_TARGET):
            last = ends[i] - 1
            if text[symbol_ends[i] : stops[last]].strip():
                raise self._error(f"joins {text[begins[last] : stops[last]]!r} into one token")
        return encoded["input_ids"], ends

    def _token_of(self, target: int) -> int:
        """Return the one token of a symbol, without tokens of spaces around it."""
        if target not in self._spelled:
            symbol = self.task.symbols[target - len(SPECIAL)]
            text = f"{symbol} {symbol}"
            encoded = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True)
            second = [
                id
                for id, (begin, end) in zip(encoded["input_ids"], encoded["offset_mapping"])
                if end > len(symbol) + 1 and text[begin:end].strip()
            ]
            if len(second) != 1:
                raise self._error(f"takes {len(second)} tokens for the answer {symbol!r}")
            self._spelled[target] = second[0]
        return self._spelled[target]

    def _error(self, what: str) -> SourceError:
        name = self.tokenizer.name_or_path or type(self.tokenizer).__name__
        return SourceError(
            f"tokenizer {name!r} {what}, so it cannot spell {self.task.source!r}: leave the tokenizer out to use the task's own."
        )


def digest_of(task: Task) -> str:
    """Return a hash that identifies a task's documents. It covers the options and the first documents, so it changes if
    their generation does."""
    texts = [task.text(task.document(number, split)) for split in (TRAIN, HELD_OUT) for number in range(4)]
    return hashlib.sha256("\n".join([task.source, *texts]).encode()).hexdigest()


class TaskRows(Dataset):
    """Rows of whole documents: input_ids, labels and position_ids (from 0 in every document), int32 [length].

    Row i is always the same, and no document is in two rows. The rest of a row is padding, which is never a label.

    Args:
        task: the task.
        tokenizer: the task's own tokenizer, or another that can spell it.
        length: tokens per row.
        count: number of rows.
        split: TRAIN or HELD_OUT.
        seed: seed of the documents.

    Raises:
        SourceError: a document is longer than a row; the tokenizer cannot spell the task.
    """

    def __init__(self, task: Task, tokenizer: Any, length: int, count: int, split: str = TRAIN, seed: int = 0):
        self.encode = Encoder(task, tokenizer)
        self.pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self.length, self.count, self.split, self.seed = length, count, split, seed
        for number in range(TRIED):
            self._fitting(self._document(number))

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        if not 0 <= i < self.count:
            raise IndexError(i)
        row = {
            "input_ids": np.full(self.length, self.pad, dtype=np.int32),
            "labels": np.full(self.length, IGNORED, dtype=np.int32),
            "position_ids": np.zeros(self.length, dtype=np.int32),
        }
        at = 0
        for number in range(i * self.length, (i + 1) * self.length):  # a row has fewer documents than tokens
            document = self._fitting(self._document(number)) if not at else self._document(number)
            end = at + len(document.input_ids)
            if end > self.length:
                break
            row["input_ids"][at:end], row["labels"][at:end] = document.input_ids, document.labels
            row["position_ids"][at:end] = np.arange(end - at)
            at = end
        row["position_ids"][at:] = np.arange(self.length - at)
        return row

    def _document(self, number: int) -> Encoded:
        return self.encode(self.encode.task.document(number, self.split, self.seed))

    def _fitting(self, document: Encoded) -> Encoded:
        if len(document.input_ids) > self.length:
            raise SourceError(
                f"a document of {self.encode.task.source!r} has {len(document.input_ids)} tokens, and a row length={self.length}: raise "
                f"length, or make the task smaller."
            )
        return document
