"""Conversations: from rows of messages to token ids, of which the assistant's are to be learnt.

    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}], "tools": [...]}

A checkpoint's own chat template writes a conversation out. Which of its tokens are the assistant's, the template says itself if it has
{% generation %} blocks. If it has none, they are found by writing out the conversation up to each of the assistant's turns, without
it and with it. Some templates write an earlier turn otherwise than the last one (they drop its reasoning); then what a
model would see when it answered is another text, and the turn gets a row of its own.
"""

import glob
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import SourceError
from . import sources
from .corpus import is_validation

ROLES = {"system", "developer", "user", "assistant", "tool", "function", "environment"}
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
NAMED = 20  # how many left-out rows of each reason are named


@dataclass
class Chat:
    """Encoded conversations.

    Attributes:
        train, validation: rows of {"input_ids": [..], "labels": [..]}, both as long; -100 where nothing is learnt.
        left_out: reason -> how many rows.
        left_out_names: reason -> the first of them.
        digest: of the conversations that are used.
        stops: whether the last learnt token of every turn ends generation.
    """

    train: list[dict[str, list[int]]] = field(default_factory=list)
    validation: list[dict[str, list[int]]] = field(default_factory=list)
    conversations: int = 0
    left_out: Counter = field(default_factory=Counter)
    left_out_names: dict[str, list[str]] = field(default_factory=dict)
    digest: str = ""
    stops: bool = True


def load_chat(source: str, tokenizer: Any, length: int, validation_share: float, stop_ids: set[int]) -> Chat:
    """Read and encode conversations. Rows that cannot be used are counted, not fatal.

    Args:
        source: a .jsonl or .parquet file, a glob of them, or hub:OWNER/NAME.
        tokenizer: with a chat template.
        length: longer conversations are left out, in tokens.
        stop_ids: the tokens that end generation.

    Raises:
        SourceError: nothing is there, nothing can be used, or the tokenizer has no chat template.
    """
    if not tokenizer.chat_template:
        raise SourceError(
            "the checkpoint's tokenizer has no chat template, so it is not known how it writes conversations: put a chat_template.jinja "
            "into its folder."
        )
    chat, seen, digest = Chat(), set(), hashlib.sha256()
    for name, row, reason in _rows(source):
        encoded: list[dict[str, list[int]]] = []
        key = b""
        if not reason:
            reason = what_is_wrong(row)
        if not reason:
            key = hashlib.sha256(json.dumps(row, sort_keys=True).encode("utf-8", "replace")).digest()
            reason = "duplicate" if key in seen else ""
        if not reason:
            try:
                encoded = encode(tokenizer, row["messages"], _tools(row))
            except Exception as error:  # templates raise what they like
                reason = f"the chat template refuses it ({str(error).splitlines()[0][:80]})"
        if not reason and not any(label != -100 for example in encoded for label in example["labels"]):
            reason = "nothing of the assistant's to learn"
        if not reason and max(len(example["input_ids"]) for example in encoded) > length:
            reason = f"over {length} tokens"
        if reason:
            chat.left_out[reason] += 1
            if len(chat.left_out_names.setdefault(reason, [])) < NAMED:
                chat.left_out_names[reason].append(name)
            continue
        seen.add(key)
        digest.update(key)
        chat.conversations += 1
        for example in encoded:
            learnt = [label for label in example["labels"] if label != -100]
            chat.stops &= learnt[-1] in stop_ids
        (chat.validation if is_validation(key, validation_share) else chat.train).extend(encoded)
    if not chat.train:
        left_out = ", ".join(f"{n} {reason}" for reason, n in chat.left_out.most_common()) or "nothing"
        raise SourceError(
            f"chat={source!r} has no conversation to train on (left out: {left_out}). Rows look like "
            f'{{"messages": [{{"role": "user", "content": ".."}}, {{"role": "assistant", "content": ".."}}], "tools": [..]}}'
        )
    chat.digest = digest.hexdigest()
    return chat


def what_is_wrong(row: Any) -> str:
    """Why a row is no conversation, or nothing."""
    if not isinstance(row, dict) or not isinstance(row.get("messages"), list) or not row["messages"]:
        return "no messages"
    for message in row["messages"]:
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            return "a message without a known role"
        if message.get("content") is None and not message.get("tool_calls"):
            return "a message without content"
    if not any(message["role"] == "assistant" for message in row["messages"]):
        return "no turn of the assistant's"
    try:
        tools = _tools(row)
    except ValueError:
        return "tools that are not JSON"
    return "" if tools is None or isinstance(tools, list) else "tools that are no list"


def encode(tokenizer: Any, messages: list[dict], tools: list | None = None) -> list[dict[str, list[int]]]:
    """A conversation as rows of input_ids and labels: one row, or several if the template writes earlier turns otherwise."""
    options = {"tools": tools, "tokenize": False}
    if GENERATION.search(_template(tokenizer, tools)):
        done = tokenizer.apply_chat_template(
            messages, tools=tools, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        ids, mask = list(done["input_ids"]), done["assistant_masks"]
        return [{"input_ids": ids, "labels": [i if m else -100 for i, m in zip(ids, mask)]}]
    turns = []  # of each of the assistant's: the text before it, and with it
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            before = tokenizer.apply_chat_template(messages[:i], add_generation_prompt=True, **options) if i else ""
            turns.append((before, tokenizer.apply_chat_template(messages[: i + 1], **options)))
    rows = []
    while turns:
        text = turns[-1][1]
        fitting = [(before, after) for before, after in turns if text.startswith(after) and after.startswith(before)]
        if turns[-1] not in fitting:
            raise ValueError("the text before a turn is not how the text with it begins")
        turns = [turn for turn in turns if turn not in fitting]
        spans = [(len(before), len(after.rstrip())) for before, after in fitting]
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        labels = [
            token if end > start and any(low <= start and end <= high for low, high in spans) else -100
            for token, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"])
        ]
        rows.append({"input_ids": list(encoded["input_ids"]), "labels": labels})
    return rows[::-1]


def _template(tokenizer: Any, tools: list | None) -> str:
    template = tokenizer.chat_template
    if isinstance(template, dict):  # several, by name
        template = template.get("tool_use" if tools and "tool_use" in template else "default", "")
    return template


def _tools(row: dict) -> list | None:
    tools = row.get("tools")
    return (json.loads(tools) if isinstance(tools, str) else tools) or None


def _rows(source: str) -> Iterator[tuple[str, Any, str]]:
    """(name, row, or why there is none)."""
    if source.startswith(sources.HUB):
        for number, row in enumerate(sources.open_hub(source.removeprefix(sources.HUB))):
            yield f"row {number}", _without_nulls(row), ""
        return
    for path in sources.files_of(source):
        if path.suffix == ".parquet":
            from datasets import load_dataset

            for number, row in enumerate(load_dataset("parquet", data_files=[str(path)], split="train", streaming=True)):
                yield f"{path}, row {number}", _without_nulls(row), ""
        elif path.suffix == ".jsonl" or (not Path(source).is_dir() and not glob.has_magic(source)):
            with open(path, "rb") as lines:
                for number, line in enumerate(lines, 1):
                    if not line.strip():
                        continue
                    try:
                        yield f"{path}, line {number}", json.loads(line), ""
                    except ValueError:
                        yield f"{path}, line {number}", None, "not JSON"


def _without_nulls(value: Any) -> Any:
    """Tables give every message all fields that any message has."""
    if isinstance(value, dict):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
