"""Conversations: from rows of messages to token ids, of which the assistant's are labels.

    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}], "tools": [...]}

A checkpoint's own chat template renders a conversation. If the template has {% generation %} blocks, they mark the assistant's tokens.
Otherwise these are found by rendering the conversation up to each of the assistant's turns, without the turn and with it. Some templates
render an earlier turn differently from the last one (they drop its reasoning); then the model saw another text when it answered, and the
turn gets a row of its own.
"""

import copy
import glob
import hashlib
import json
import multiprocessing
import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, List, Value
from datasets.exceptions import DatasetGenerationError

from ..errors import SourceError
from . import sources
from .corpus import is_validation

ROLES = {"system", "developer", "user", "assistant", "tool", "function", "environment"}
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
REASONING = ("reasoning", "reasoning_content")  # names of the field for reasoning beside the content
THOUGHT = re.compile(r"\s*<think>(?P<thought>.*?)</think>\s*(?P<answer>.*)", re.DOTALL)
OURS = {
    "tokenize",
    "tools",
    "return_dict",
    "return_assistant_tokens_mask",
    "add_generation_prompt",
    "conversation",
    "chat_template",
}
NAMED = 20  # how many left-out rows are named per reason
FEW = 2000  # up to this many conversations are encoded without further processes
COLUMNS = Features({"input_ids": List(Value("int32")), "labels": List(Value("int32"))})
Row = dict[str, list[int]]


@dataclass
class Chat:
    """Encoded conversations.

    Attributes:
        train: rows of input_ids and labels, equally long; the label is -100 where nothing is learnt.
        validation: held-out rows, likewise.
        conversations: number of conversations in both.
        left_out: reason -> number of rows left out.
        left_out_names: reason -> the first of these rows.
        digest: hash of the conversations that are used.
        stops: whether the last learnt token of every row ends generation.
        cut: number of conversations whose reasoning was cut.
    """

    train: Dataset
    validation: Dataset
    conversations: int = 0
    left_out: Counter = field(default_factory=Counter)
    left_out_names: dict[str, list[str]] = field(default_factory=dict)
    digest: str = ""
    stops: bool = True
    cut: int = 0


@dataclass(frozen=True)
class Reasoning:
    """Treatments of long reasoning.

    Attributes:
        tokens: reasoning of a turn is long if it has more tokens than this; 0: never.
        long: drop leaves the conversation out; cut keeps the first `tokens` tokens, before </think> and the answer, as a budget for
            reasoning does in generation.
    """

    tokens: int = 0
    long: str = "drop"


def load_chat(
    source: str, tokenizer: Any, length: int, validation_share: float, stop_ids: set[int], reasoning: Reasoning = Reasoning()
) -> Chat:
    """Read and encode conversations, on all cores if there are many. Rows that cannot be used are counted, not fatal.

    Args:
        source: a .jsonl or .parquet file, a glob of them, or hub:OWNER/NAME.
        tokenizer: a tokenizer with a chat template.
        length: conversations of more tokens are left out.
        validation_share: share of the conversations held out for validation.
        stop_ids: ids of the tokens that end generation.
        reasoning: how to treat long reasoning.

    Raises:
        SourceError: the source is missing, no conversation can be used, or the tokenizer has no chat template.
    """
    if not tokenizer.chat_template:
        raise SourceError(
            "the checkpoint's tokenizer has no chat template, so conversations cannot be rendered: put a chat_template.jinja "
            "into its folder."
        )
    empty = Dataset.from_dict({name: [] for name in COLUMNS}, features=COLUMNS)
    chat, digest = Chat(empty, empty), hashlib.sha256()
    held_out: list[int] = []
    learnt: list[int] = []

    def use() -> Iterator[Row]:
        for name, key, encoded, reason, is_cut in _encoded(_distinct(source), tokenizer, reasoning):
            if not reason and max(len(row["input_ids"]) for row in encoded) > length:
                reason = f"over {length} tokens"
            if reason:
                chat.left_out[reason] += 1
                if len(chat.left_out_names.setdefault(reason, [])) < NAMED:
                    chat.left_out_names[reason].append(name)
                continue
            digest.update(key)
            chat.conversations += 1
            chat.cut += is_cut
            for row in encoded:
                last = next(label for label in reversed(row["labels"]) if label != -100)
                chat.stops &= last in stop_ids
                indices = held_out if is_validation(key, validation_share) else learnt
                indices.append(len(held_out) + len(learnt))
                yield row

    rows = use()
    first = list(islice(rows, 1))
    if first:
        with tempfile.TemporaryDirectory() as folder:  # `datasets` writes the rows here and maps them into memory
            try:
                everything = Dataset.from_generator(
                    lambda: chain(first, rows), features=COLUMNS, cache_dir=folder, fingerprint=os.urandom(8).hex()
                )
            except DatasetGenerationError as error:
                raise error.__cause__ or error from error
        chat.train, chat.validation = everything.select(learnt), everything.select(held_out)
    if not learnt:
        left_out = ", ".join(f"{n} {reason}" for reason, n in chat.left_out.most_common()) or "nothing"
        raise SourceError(
            f"chat={source!r} has no conversation to train on (left out: {left_out}). Rows look like "
            f'{{"messages": [{{"role": "user", "content": ".."}}, {{"role": "assistant", "content": ".."}}], "tools": [..]}}'
        )
    chat.digest = digest.hexdigest()
    return chat


# Rows


def _distinct(source: str) -> Iterator[tuple[str, bytes, Any, str]]:
    """Yield (name, hash, messages and tools, reason why there are none) of every row."""
    seen = set()
    for name, row, reason in _rows(source):
        parsed, key = None, b""
        if not reason:
            try:
                parsed, reason = conversation(row)
            except RecursionError:
                reason = "nested too deeply"
        if not reason:
            key = hashlib.sha256(json.dumps(row, sort_keys=True).encode("utf-8", "replace")).digest()
            reason = "duplicate" if key in seen else ""
            seen.add(key)
        yield name, key, parsed, reason


def conversation(row: Any) -> tuple[Any, str]:
    """Convert a row to (messages, tools, template options) as templates expect them, or (None, reason why it is not a conversation).

    Content in parts is joined, and a call's arguments are parsed if they are JSON text: OpenAI's forms of both.
    Reasoning beside the content is stored under both of its usual names, `reasoning` and `reasoning_content`. Template
    options are `chat_template_kwargs`, as servers call them; `enable_thinking` may also stand alone in the row.
    """
    if not isinstance(row, dict) or not isinstance(row.get("messages"), list) or not row["messages"]:
        return None, "no messages"
    messages = []
    for message in row["messages"]:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str) or message["role"] not in ROLES:
            return None, "a message without a known role"
        content, calls = message.get("content"), message.get("tool_calls")
        if content is None and not calls:
            return None, "a message without content"
        if isinstance(content, list) and all(
            isinstance(part, dict) and isinstance(part.get("text"), str) for part in content
        ):
            content = "".join(part["text"] for part in content)
        if content is not None and not isinstance(content, str):
            return None, "content that is not text"
        messages.append(message | ({"content": content} if "content" in message else {}))
        thought = next((message[name] for name in REASONING if message.get(name)), None)
        if thought is not None and (not isinstance(thought, str) or message["role"] != "assistant"):
            return None, "reasoning that is not the assistant's text"
        messages[-1] = {name: value for name, value in messages[-1].items() if name not in REASONING}
        if thought is not None:
            messages[-1] |= dict.fromkeys(REASONING, thought)
        if calls:
            try:
                messages[-1]["tool_calls"] = [_call(call) for call in calls]
            except (ValueError, TypeError, AttributeError):
                return None, "tool calls without a function and its arguments as a JSON object"
    if not any(message["role"] == "assistant" for message in messages):
        return None, "no turn of the assistant's"
    try:
        tools = row.get("tools")
        tools = (json.loads(tools) if isinstance(tools, str) else tools) or None
    except ValueError:
        return None, "tools that are not JSON"
    if tools is not None and not isinstance(tools, list):
        return None, "tools that are not a list"
    options = row.get("chat_template_kwargs") or {}
    if not isinstance(options, dict) or options.keys() & OURS:
        return None, "chat_template_kwargs that are not options of a template"
    if row.get("enable_thinking") is not None:
        options = options | {"enable_thinking": row["enable_thinking"]}
    if not isinstance(options.get("enable_thinking", True), bool):
        return None, "enable_thinking that is neither true nor false"
    return (messages, tools, options), ""


def _call(call: dict[str, Any]) -> dict[str, Any]:
    function = dict(call.get("function") or call)
    arguments = function.get("arguments") or {}
    arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    if not isinstance(arguments, dict) or not isinstance(function.get("name"), str):
        raise TypeError
    function["arguments"] = arguments
    return call | {"function": function} if "function" in call else function


# Text and tokens


Encoded = tuple[str, bytes, list[Row], str, bool]  # name, hash, rows, reason why there are none, whether reasoning was cut


def _encoded(parsed: Iterator[tuple[str, bytes, Any, str]], tokenizer: Any, reasoning: Reasoning) -> Iterator[Encoded]:
    """Encode conversations in order, on all cores if there are more than FEW."""
    few = list(islice(parsed, FEW))
    encoder = _Encoder(tokenizer, reasoning)
    yield from map(encoder, few)
    if len(few) < FEW:
        return
    # Processes are spawned, not forked: a fork of a process that has threads can hang.
    context = multiprocessing.get_context("spawn")
    with context.Pool(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()) as pool:
        yield from pool.imap(encoder, parsed, chunksize=64)


class _Encoder:
    """Encodes a conversation. A fault in it is returned as a reason, and never raised."""

    def __init__(self, tokenizer: Any, reasoning: Reasoning):
        self.tokenizer, self.untrimmed, self.reasoning = tokenizer, without_post_processor(tokenizer), reasoning
        self.beside = writes_reasoning(tokenizer, beside=True)
        self.inside = writes_reasoning(tokenizer, beside=False)

    def __call__(self, item: tuple[str, bytes, Any, str]) -> Encoded:
        name, key, parsed, reason = item
        rows: list[Row] = []
        is_cut = False
        if not reason:
            try:
                messages, tools, options = parsed
                messages, is_cut, reason = self._with_reasoning(messages)
                rows = [] if reason else encode(self.tokenizer, messages, tools, self.untrimmed, options)
            except Exception as error:  # templates raise anything
                said = (str(error).splitlines() or [type(error).__name__])[0]
                reason = f"the chat template refuses it ({said[:80]})"
        rows = [row for row in rows if any(label != -100 for label in row["labels"])]
        if not reason and not rows:
            reason = "nothing of the assistant's to learn"
        return name, key, rows, reason, is_cut

    def _with_reasoning(self, messages: list[dict]) -> tuple[list[dict], bool, str]:
        """Put reasoning where the template reads it, cut if it is long. Returns the messages, whether any was cut, and
        the reason if they are left out."""
        made, is_cut = [], False
        for message in messages:
            thought, content, found = message.get(REASONING[0]), message.get("content") or "", None
            if message["role"] == "assistant" and thought is None:
                found = THOUGHT.match(content)
            if found:
                thought, content = found["thought"].strip("\n"), found["answer"]
            if thought is None:
                made.append(message)
                continue
            if not self.beside and not self.inside:
                return [], False, "reasoning, which the chat template does not write"
            short = self._cut(thought)
            if short != thought and self.reasoning.long == "drop":
                return [], False, f"reasoning over {self.reasoning.tokens} tokens"
            is_cut |= short != thought
            if found and short == thought and self.inside:
                made.append(message)  # unchanged
            elif self.beside and not (found and self.inside):
                made.append(message | dict.fromkeys(REASONING, short) | {"content": content})
            else:
                plain = {name: value for name, value in message.items() if name not in REASONING}
                made.append(plain | {"content": f"<think>\n{short}\n</think>\n\n{content}"})
        return made, is_cut, ""

    def _cut(self, thought: str) -> str:
        """Return the first tokens of reasoning, as many as are allowed."""
        if (
            not self.reasoning.tokens or len(thought.encode("utf-8", "replace")) <= self.reasoning.tokens
        ):  # a token has at least one byte
            return thought
        offsets = self.untrimmed(thought, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        return thought if len(offsets) <= self.reasoning.tokens else thought[: offsets[self.reasoning.tokens - 1][1]]


def writes_reasoning(tokenizer: Any, beside: bool) -> bool:
    """Return whether a tokenizer's template renders the reasoning of the last turn, given beside the content or inside
    it."""
    thought, asked = "Let me see.", {"role": "user", "content": "?"}
    answer = (
        {"content": "!"} | dict.fromkeys(REASONING, thought) if beside else {"content": f"<think>\n{thought}\n</think>\n\n!"}
    )
    try:
        text = tokenizer.apply_chat_template([asked, {"role": "assistant"} | answer], tokenize=False)
    except Exception:  # templates raise anything; encoding a conversation reports the reason
        return False
    return thought in text


def encode(
    tokenizer: Any,
    messages: list[dict],
    tools: list | None = None,
    untrimmed: Any = None,
    template_options: dict[str, Any] | None = None,
) -> list[Row]:
    """Encode a conversation as rows of input_ids and labels: one row, or several if the template renders earlier turns
    differently.

    Args:
        tokenizer: a tokenizer with a chat template.
        messages: the conversation's messages.
        tools: the tools that the assistant may call.
        untrimmed: `without_post_processor(tokenizer)`, to save making it.
        template_options: further variables of the template, such as enable_thinking.

    Returns:
        rows of token ids, in order; a label is -100 where nothing is learnt.

    Raises:
        ValueError: the template's text before a turn is not the beginning of its text with the turn.
    """
    options = (template_options or {}) | {"tools": tools, "tokenize": False}
    if GENERATION.search(_template(tokenizer, tools)) and not _forgets(tokenizer, messages, options):
        done = tokenizer.apply_chat_template(
            messages, **(options | {"tokenize": True}), return_dict=True, return_assistant_tokens_mask=True
        )
        ids, mask = list(done["input_ids"]), done["assistant_masks"]
        return [{"input_ids": ids, "labels": [i if m else -100 for i, m in zip(ids, mask)]}]
    turns = []  # for each of the assistant's turns: the text before it, and the text with it
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            after = tokenizer.apply_chat_template(messages[: i + 1], **options)
            if i:
                before = tokenizer.apply_chat_template(messages[:i], add_generation_prompt=True, **options)
            else:  # the assistant opens the conversation: the text up to the header that asks for its turn
                header = _header(tokenizer, options)
                before = after[: after.find(header) + len(header)] if header in after else ""
            turns.append((before, after))
    rows = []
    while turns:
        text = turns[-1][1]
        fitting = [(before, after) for before, after in turns if text.startswith(after) and after.startswith(before)]
        if turns[-1] not in fitting:
            raise ValueError("the text before a turn is not how the text with it begins")
        turns = [turn for turn in turns if turn not in fitting]
        spans = [(len(before), len(after.rstrip())) for before, after in fitting]
        encoded = (untrimmed or without_post_processor(tokenizer))(
            text, add_special_tokens=False, return_offsets_mapping=True
        )
        # A token that crosses a turn's border, such as a space with the first word, is learnt too.
        labels = [
            token if any(start < high and end > low for low, high in spans) else -100
            for token, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"])
        ]
        rows.append({"input_ids": list(encoded["input_ids"]), "labels": labels})
    return rows[::-1]


def _forgets(tokenizer: Any, messages: list[dict], options: dict[str, Any]) -> bool:
    """Return whether the template drops reasoning of an earlier turn from the text of the whole conversation."""
    thoughts = [message[REASONING[0]] for message in messages if message.get(REASONING[0])]
    thoughts += [found["thought"] for message in messages if (found := THOUGHT.match(message.get("content") or ""))]
    if not thoughts:
        return False
    text = tokenizer.apply_chat_template(messages, **options)
    return not all(thought.strip() in text for thought in thoughts)


def _header(tokenizer: Any, options: dict[str, Any]) -> str:
    """Return the text that a template renders to ask for the assistant's turn."""
    asked = [{"role": "user", "content": "?"}]
    without = tokenizer.apply_chat_template(asked, **options)
    return tokenizer.apply_chat_template(asked, add_generation_prompt=True, **options).removeprefix(without)


def without_post_processor(tokenizer: Any) -> Any:
    """Return a copy of the tokenizer whose token offsets include white space, which post-processors may trim off."""
    tokenizer = copy.deepcopy(tokenizer)
    if getattr(tokenizer, "backend_tokenizer", None) is not None:
        tokenizer.backend_tokenizer.post_processor = None
    return tokenizer


def _template(tokenizer: Any, tools: list | None) -> str:
    template = tokenizer.chat_template
    if isinstance(template, dict):  # several templates, by name
        template = template.get("tool_use" if tools and "tool_use" in template else "default", "")
    return template


def _rows(source: str) -> Iterator[tuple[str, Any, str]]:
    """Yield (name, row, reason why there is none)."""
    if source.startswith(sources.HUB):
        for number, row in enumerate(sources.open_hub(source.removeprefix(sources.HUB))):
            yield f"row {number}", _without_nulls(row), ""
        return
    for path in sources.files_of(source):
        if path.suffix == ".parquet":
            from datasets import load_dataset

            try:
                for number, row in enumerate(load_dataset("parquet", data_files=[str(path)], split="train", streaming=True)):
                    yield f"{path}, row {number}", _without_nulls(row), ""
            except Exception as error:
                if isinstance(error, OSError):
                    sources.stop_for(error, path)
                yield str(path), None, "a table that cannot be read, from some row on"
        elif path.suffix == ".jsonl" or (not Path(source).is_dir() and not glob.has_magic(source)):
            with open(path, "rb") as lines:
                for number, line in enumerate(lines, 1):
                    if not line.strip():
                        continue
                    try:
                        yield f"{path}, line {number}", json.loads(line), ""
                    except (ValueError, RecursionError):
                        yield f"{path}, line {number}", None, "not JSON"


def _without_nulls(value: Any) -> Any:
    """Remove null fields: tables give every message all fields that any message has."""
    if isinstance(value, dict):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
