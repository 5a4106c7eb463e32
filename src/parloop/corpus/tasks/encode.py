"""Documents of a task as tokens: by its own tokenizer, whose tokens are its symbols, or by one that is given.

Labels stand where transformers' models want them: the label of a token is predicted at the token before it. So what must be said after a
symbol is the label of the next place, also where the next symbol is another one.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...errors import SourceError
from .task import EOS_ID, NO_TARGET, SPECIAL, TRAIN, Document, Task

IGNORED = -100  # the label of tokens that nothing is asked at


@dataclass(frozen=True)
class Encoded:
    """A document between its borders, `<bos> .. <eos>`.

    Attributes:
        input_ids: int32 [n].
        labels: int32 [n]; IGNORED where nothing is asked.
        groups: int32 [n], the group of the answer that is the label; 0 elsewhere.
        prompt: tokens that are given when the model writes the rest itself; n - 1 where it writes nothing.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    groups: np.ndarray
    prompt: int


class Encoder:
    """Encodes the documents of a task.

    Raises:
        SourceError: the tokenizer cannot spell the task: it does not know a symbol, joins two of them into one token, or takes several
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
        places = ends[asked] + 1
        if self.is_own:
            labels[places], groups[places] = document.targets[asked], document.groups[asked]
        else:
            for i, place in zip(asked, places):
                if self.task.is_written and document.targets[i] != EOS_ID:  # it is read next, with a space before it perhaps
                    place = ends[i + 1]
                    labels[ends[i] + 1 : place + 1] = input_ids[ends[i] + 1 : place + 1]
                else:
                    labels[place] = self._token_of(int(document.targets[i]))
                groups[place] = document.groups[i]
        return Encoded(input_ids, labels, groups, int(ends[document.prompt - 1]) + 1)

    def _tokens(self, document: Document) -> tuple[list[int], np.ndarray]:
        """Token ids of a document's text, and of each symbol how many of them there are up to its end."""
        symbols = self.task.symbols_of(document)
        text, starts = self.task.join(symbols)
        try:
            encoded = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True)
        except (
            Exception
        ) as error:  # of tokenizers, which has no kinds: a tokenizer of whole words without one for unknown words
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
        """The token that says a symbol: what is left of its tokens without those of spaces."""
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
            f"tokenizer {name!r} {what}, so it cannot spell {self.task.source!r}: leave the tokenizer out, and the task's own is used."
        )


def rows(
    task: Task, tokenizer: Any, length: int, split: str = TRAIN, seed: int = 0, first: int = 0
) -> Iterator[dict[str, Any]]:
    """Rows of `length` tokens without end, each of whole documents one after another, from document `first` on.

    Yields:
        input_ids, labels, position_ids (from 0 in every document), int32 [length]; and `next`, the number of the document that the next
        row begins with. What a row has left over is padding that is never a label.

    Raises:
        SourceError: a document is longer than a row; the tokenizer cannot spell the task.
    """
    encode = Encoder(task, tokenizer)
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    while True:
        row = {
            "input_ids": np.full(length, pad, dtype=np.int32),
            "labels": np.full(length, IGNORED, dtype=np.int32),
            "position_ids": np.zeros(length, dtype=np.int32),
        }
        at = 0
        while True:
            document = encode(task.document(first, split, seed))
            end = at + len(document.input_ids)
            if end > length:
                break
            row["input_ids"][at:end], row["labels"][at:end] = document.input_ids, document.labels
            row["position_ids"][at:end] = np.arange(end - at)
            at, first = end, first + 1
        if not at:
            raise SourceError(
                f"document {first} of {task.source!r} has {len(document.input_ids)} tokens, and a row length={length}: raise length, or make "
                f"the task smaller."
            )
        row["position_ids"][at:] = np.arange(length - at)
        yield {**row, "next": first}
