"""What a task is: documents made from a number, split by content, with the answers that count and the group each belongs to.

A document has symbols that a model reads, and after some of them a target: what it must say there. Answers of `parity`, `s5`, `hops` and
`run` are said and not written: the next symbol that is read is the next one of the question, so that no answer gives a later one
away and many can be asked of one text. With `trace`, worked steps and the answer are written, and the model reads what it wrote.

Training and held-out documents share none: a document belongs to the split that the hash of its content says (the bits, the
table, the program), and is drawn anew until that is the one wanted.
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
HELD_OUT_SHARE = 1 / 8  # of all contents there are
ATTEMPTS = 1000  # draws for a document of a split, which takes 8 in the mean where it takes most
SPECIAL = (PAD, BOS, EOS)  # ids 0, 1, 2 of a task's own tokenizer; symbols follow
EOS_ID = SPECIAL.index(EOS)
NO_TARGET = -1


def option(default: Any, doc: str, at_least: int | None = None, at_most: int | None = None, choices: tuple[str, ...] = ()):
    """A field of a task that can be set in the source."""
    return field(default=default, metadata={"doc": doc, "at_least": at_least, "at_most": at_most, "choices": choices})


@dataclass(frozen=True)
class Document:
    """One document, in a task's own ids.

    Attributes:
        ids: int32 [n], the symbols that are read, without borders.
        targets: int32 [n], what must be said after each; NO_TARGET: nothing is asked.
        groups: int32 [n], the group of an answer; 0 where the target is a worked step, or there is none.
        prompt: how many symbols are given when the model writes the rest itself; n where it writes nothing.
    """

    ids: np.ndarray
    targets: np.ndarray
    groups: np.ndarray
    prompt: int

    @classmethod
    def of(cls, ids: Any, targets: Any, groups: Any, prompt: int) -> "Document":
        """From sequences of numbers."""
        return cls(*(np.asarray(values, dtype=np.int32) for values in (ids, targets, groups)), prompt=prompt)  # type: ignore[misc, arg-type]


@dataclass(frozen=True)
class Task(ABC):
    """A task with its options; the fields are what a source can set."""

    name: ClassVar[str]
    unit: ClassVar[str]  # what groups are numbers of
    pattern: ClassVar[str] = r"\S+"  # of one symbol in a text
    longer: ClassVar[int] = 1  # times the length of training documents that held-out ones have

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
        """The task as a source, options that are not at their default included."""
        given = [(f.name, getattr(self, f.name)) for f in dataclasses.fields(self) if getattr(self, f.name) != f.default]
        return PREFIX + ",".join([self.name, *(name if value is True else f"{name}={value}" for name, value in given)])

    @property
    @abstractmethod
    def symbols(self) -> tuple[str, ...]:
        """All symbols there are; the first has id 3 in the task's own tokenizer."""

    @property
    @abstractmethod
    def groups(self) -> tuple[int, ...]:
        """The groups that held-out answers fall into, easiest first."""

    @property
    def trained_groups(self) -> tuple[int, ...]:
        """Those that training has answers of."""
        return self.groups

    @abstractmethod
    def chance(self, group: int) -> float:
        """Share of a group's answers that are right if the most frequent one is always given, unread."""

    @abstractmethod
    def draw(self, rng: random.Random, split: str, group: int | None) -> tuple[str, Any]:
        """The content of a document, which decides its split, and what `write` makes the document from."""

    @abstractmethod
    def write(self, drawn: Any) -> Document:
        """The document of what was drawn."""

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
        """The task without what changes how a document is written and not what it is about: both forms have the same documents."""
        return (dataclasses.replace(self, trace=False) if self.is_written else self).source  # type: ignore[call-arg]

    def document(self, number: int, split: str = TRAIN, seed: int = 0, group: int | None = None) -> Document:
        """The document of this number, the same one whenever it is asked for.

        Args:
            split: TRAIN or HELD_OUT. Held-out ones may be longer.
            group: of what group, where a document is of one. None: of any, each as often.
        """
        for attempt in range(ATTEMPTS):
            rng = random.Random(f"{self.content_options} {seed} {split} {number} {group} {attempt}")
            content, drawn = self.draw(rng, split, group)
            if is_held_out(content) == (split == HELD_OUT):
                return self.write(drawn)
        raise SourceError(f"source {self.source!r} has too few different documents to hold some out: make it larger.")

    @cached_property
    def id_of(self) -> dict[str, int]:
        """Symbol -> id in the task's own tokenizer."""
        return {symbol: id for id, symbol in enumerate(self.symbols, len(SPECIAL))}

    def symbols_of(self, document: Document) -> list[str]:
        """What is read, as symbols."""
        return [self.symbol(id) for id in document.ids]

    def symbol(self, id: int) -> str:
        """What an id of the task's own tokenizer stands for."""
        return (*SPECIAL, *self.symbols)[id]

    def join(self, symbols: list[str]) -> tuple[str, list[int]]:
        """The text of symbols, and where each of them begins in it."""
        starts, at = [], 0
        for symbol in symbols:
            starts.append(at)
            at += len(symbol) + 1
        return " ".join(symbols), starts

    def text(self, document: Document) -> str:
        """What is read, as text."""
        return self.join(self.symbols_of(document))[0]

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The task's own tokenizer: one token for each symbol."""
        vocabulary = {symbol: id for id, symbol in enumerate((*SPECIAL, *self.symbols))}
        tokenizer = Tokenizer(
            models.WordLevel(vocabulary, unk_token="<|unknown|>")
        )  # not in it: an unknown symbol is an error
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
        """How tokens become text again. None: with spaces between them."""
        return None


def is_held_out(content: str) -> bool:
    """Whether a document with this content is held out of training."""
    digest = hashlib.sha256(content.encode()).digest()
    return int.from_bytes(digest[:8], "big") < HELD_OUT_SHARE * 2**64


def parse_options(kind: type[Task], given: list[str], source: str) -> Task:
    """A task of this kind with the options that a source sets, each NAME=VALUE, or NAME for what is on or off.

    Raises:
        SourceError: an unknown option, or a value that does not fit.
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
