"""Base class of tasks: documents generated from a number, split by content, with their answers and each answer's group.

A document has symbols that a model reads, and after some of them a target that it must predict there. Answers of `parity`, `s5`, `hops` and
`run` are predicted but not written: the next symbol that the model reads is the next one of the question, so that no answer gives away a
later one and a document can ask many. With `trace`, worked steps and the answer are written, and the model reads what it wrote.

No document is in both splits: the hash of its content (the bits, the table, the program) decides the split, and content is drawn again
until the split is the wanted one.
"""

import dataclasses
import hashlib
import random
import types
import typing
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from ...errors import SourceError
from ..tokenizer import BOS, EOS, PAD

PREFIX = "task:"
TRAIN, HELD_OUT = "train", "held-out"
HELD_OUT_SHARE = 1 / 8  # of all possible contents
ATTEMPTS = 1000  # draws for a document of a split; a held-out one takes 8 on average
SPECIAL = (PAD, BOS, EOS)  # ids 0, 1, 2 of a task's own tokenizer; symbols follow
EOS_ID = SPECIAL.index(EOS)
NO_TARGET = -1


def option(default: Any, doc: str, at_least: int | None = None, at_most: int | None = None, choices: tuple[str, ...] = ()):
    """Return a field of a task that a source can set."""
    return field(default=default, metadata={"doc": doc, "at_least": at_least, "at_most": at_most, "choices": choices})


@dataclass(frozen=True)
class Document:
    """One document, in a task's own ids.

    Attributes:
        ids: int32 [n], the symbols that the model reads, without <bos> and <eos>.
        targets: int32 [n], the symbol to predict after each; NO_TARGET where nothing is asked.
        groups: int32 [n], group of an answer; 0 where the target is a worked step, or there is none.
        prompt: number of symbols that are given if the model writes the rest itself; n if it writes nothing.
    """

    ids: np.ndarray
    targets: np.ndarray
    groups: np.ndarray
    prompt: int

    @classmethod
    def of(cls, ids: Any, targets: Any, groups: Any, prompt: int) -> "Document":
        """Make a document from sequences of numbers."""
        return cls(*(np.asarray(values, dtype=np.int32) for values in (ids, targets, groups)), prompt=prompt)  # type: ignore[misc, arg-type]


@dataclass(frozen=True)
class Task(ABC):
    """A task with its options. The fields are the options that a source can set."""

    name: ClassVar[str]
    unit: ClassVar[str]  # unit of the groups
    pattern: ClassVar[str] = r"\S+"  # regular expression of one symbol in a text
    longer: ClassVar[int] = 1  # length of held-out documents over that of training documents

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            value, wanted = getattr(self, f.name), f.metadata
            low, high = wanted["at_least"], wanted["at_most"]
            if (low is not None and value < low) or (high is not None and value > high):
                allowed = f"at least {low}" if high is None else f"from {low} to {high}"
                raise SourceError(f"{PREFIX}{self.name}: {f.name}={value} must be {allowed}: {wanted['doc']}.")
            if wanted["choices"] and value not in wanted["choices"]:
                raise SourceError(
                    f"{PREFIX}{self.name}: {f.name}={value!r} is unknown: use one of {', '.join(wanted['choices'])}."
                )

    @property
    def source(self) -> str:
        """The task as a source, with the options that are not at their default."""
        given = [(f.name, getattr(self, f.name)) for f in dataclasses.fields(self) if getattr(self, f.name) != f.default]
        return PREFIX + ",".join([self.name, *(name if value is True else f"{name}={value}" for name, value in given)])

    @property
    @abstractmethod
    def symbols(self) -> tuple[str, ...]:
        """All symbols; the first has id 3 in the task's own tokenizer."""

    @property
    @abstractmethod
    def groups(self) -> tuple[int, ...]:
        """The groups of held-out answers, easiest first."""

    @property
    def trained_groups(self) -> tuple[int, ...]:
        """The groups whose answers occur in training."""
        return self.groups

    @abstractmethod
    def chance(self, group: int) -> float:
        """Return the share of a group's answers that are right if the most frequent one is always given."""

    @abstractmethod
    def draw(self, rng: random.Random, split: str, group: int | None) -> tuple[str, Any]:
        """Draw the content of a document, which decides its split, and the data that `write` makes the document from."""

    @abstractmethod
    def write(self, drawn: Any) -> Document:
        """Return the document for the data that `draw` returned."""

    @property
    def is_written(self) -> bool:
        """Whether the model writes worked steps before it answers."""
        return bool(getattr(self, "trace", False))

    @property
    def asks_every_group(self) -> bool:
        """Whether each held-out document has answers of every group."""
        return not self.is_written

    @property
    def content_options(self) -> str:
        """The task without options that change only how a document is written: both forms have the same documents."""
        return (dataclasses.replace(self, trace=False) if self.is_written else self).source  # type: ignore[call-arg]

    def document(self, number: int, split: str = TRAIN, seed: int = 0, group: int | None = None) -> Document:
        """Return the document with this number, always the same one.

        Args:
            number: number of the document.
            split: TRAIN or HELD_OUT. Held-out documents may be longer.
            seed: seed of the documents.
            group: group of the document, for tasks whose documents have one; None: any, equally often.

        Raises:
            SourceError: too few different documents exist to hold some out.
        """
        for attempt in range(ATTEMPTS):
            rng = random.Random(f"{self.content_options} {seed} {split} {number} {group} {attempt}")
            content, drawn = self.draw(rng, split, group)
            if is_held_out(content) == (split == HELD_OUT):
                return self.write(drawn)
        raise SourceError(f"source {self.source!r} has too few different documents to hold some out: make it larger.")

    @cached_property
    def id_of(self) -> dict[str, int]:
        """Ids in the task's own tokenizer: symbol -> id."""
        return {symbol: id for id, symbol in enumerate(self.symbols, len(SPECIAL))}

    def symbols_of(self, document: Document) -> list[str]:
        """Return a document's symbols."""
        return [self.symbol(id) for id in document.ids]

    def symbol(self, id: int) -> str:
        """Return the symbol of an id of the task's own tokenizer."""
        return (*SPECIAL, *self.symbols)[id]

    def join(self, symbols: list[str]) -> tuple[str, list[int]]:
        """Return the text of symbols, and the index in it at which each symbol begins."""
        starts, at = [], 0
        for symbol in symbols:
            starts.append(at)
            at += len(symbol) + 1
        return " ".join(symbols), starts

    def text(self, document: Document) -> str:
        """Return a document's text."""
        return self.join(self.symbols_of(document))[0]

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Return the task's own tokenizer: one token per symbol."""
        vocabulary = {symbol: id for id, symbol in enumerate((*SPECIAL, *self.symbols))}
        tokenizer = Tokenizer(
            models.WordLevel(vocabulary, unk_token="<|unknown|>")
        )  # the unknown token is not in the vocabulary, so an unknown symbol is an error
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(self.pattern), behavior="removed", invert=True)
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 1)])
        decoder = self.decoder()
        if decoder is not None:
            tokenizer.decoder = decoder
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            pad_token=PAD,
            bos_token=BOS,
            eos_token=EOS,
            padding_side="left",
            clean_up_tokenization_spaces=False,
        )

    def decoder(self) -> decoders.Decoder | None:
        """Return the decoder from tokens to text; None: join them with spaces."""
        return None


def is_held_out(content: str) -> bool:
    """Return whether a document with this content is held out of training."""
    digest = hashlib.sha256(content.encode()).digest()
    return int.from_bytes(digest[:8], "big") < HELD_OUT_SHARE * 2**64


def parse_options(kind: type[Task], given: list[str], source: str) -> Task:
    """Return a task of this kind with the options of a source, each NAME=VALUE, or NAME for a switch.

    Raises:
        SourceError: an option is unknown, or its value is out of bounds.
    """
    hints = typing.get_type_hints(kind)
    known = {f.name: f.metadata["doc"] for f in dataclasses.fields(kind)}
    values: dict[str, Any] = {}
    for text in given:
        name, _, value = text.partition("=")
        if name not in known:
            listed = "; ".join(f"{name} ({doc})" for name, doc in known.items())
            raise SourceError(f"source {source!r} has an unknown option {name!r}. Options of {PREFIX}{kind.name}: {listed}.")
        kinds = typing.get_args(hints[name]) if isinstance(hints[name], types.UnionType) else (hints[name],)
        try:
            values[name] = _typed(kinds[0], value, bool("=" in text))
        except ValueError as error:
            raise SourceError(f"source {source!r}: {name}={value!r} must be {error}: {known[name]}.") from error
    return kind(**values)


def _typed(kind: type, value: str, has_value: bool) -> Any:
    if kind is bool:
        if has_value and value not in ("true", "false"):
            raise ValueError("true or false")
        return value != "false"
    if kind is int:
        try:
            return int(value)
        except ValueError:
            raise ValueError("a whole number") from None
    return value
