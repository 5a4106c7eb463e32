"""Answers of the server without vLLM: the text that generate() writes, up to a stop string, split into content, reasoning and tool calls."""

import asyncio
import json
import re
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

from tokenizers.decoders import DecodeStream
from transformers.generation import BaseStreamer

Piece = dict[str, Any]  # part of a message: content, reasoning or tool_calls; a tool call comes whole


class Ended(Exception):  # noqa: N818 - not an error: a streamer ends generate() by it
    """A stop string was written, or the client has left."""


class Writer(BaseStreamer):
    """Streamer that receives tokens from generate()'s thread and passes on pieces of a message, up to the first stop string.

    (generate()'s own stop strings stay in the text, and also match if they begin in the prompt.)

    Attributes:
        tokens: tokens of the answer so far.
        calls: number of its tool calls.
        cut_off: whether a stop string ended it.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str], parser: Any = None):
        self.tokens, self.calls, self.cut_off, self._left = list[int](), 0, False, False
        self._tokenizer, self._stop, self._parser = tokenizer, stop, parser
        self._queue, self._loop = asyncio.Queue[Any](), asyncio.get_running_loop()
        self._skip = {"skip_special_tokens": parser is None}  # the parser needs special tokens, and removes them
        self._decoder = DecodeStream([], **self._skip)
        self._prompt_seen, self._text, self._held = False, "", ""

    async def pieces(self) -> AsyncIterator[Piece]:
        """Yield the pieces of the message, and raise errors of generate(). Leaving the iterator ends the generation."""
        try:
            while (piece := await self._queue.get()) is not None:
                if isinstance(piece, Exception):
                    raise piece
                yield piece
        finally:
            self._left = True

    def put(self, value: Any) -> None:
        if self._left:
            raise Ended
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        for token in value.tolist():
            self.tokens.append(token)
            self._write(self._decoder.step(self._tokenizer.backend_tokenizer, token) or "")
        if self.cut_off:
            raise Ended

    def end(self) -> None:
        """Do nothing: generate() does not call this after an early end, so `close` does the work."""

    def close(self, error: Exception | None = None) -> None:
        """Finish the message after generate(), or pass on its error."""
        if error is None:
            self._write(self._tokenizer.decode(self.tokens, **self._skip)[len(self._text) :])  # an incomplete character
            self._say(self._held)
            if self._parser is not None:
                self._parsed(self._parser.finalize()[1])
        self._add(error)

    def _write(self, text: str) -> None:
        if self.cut_off:
            return
        self._text += text
        self._held += text
        kept = self._held[: min((index for index in map(self._held.find, self._stop) if index >= 0), default=None)]
        self.cut_off = len(kept) < len(self._held)
        # A possible beginning of a stop string is held back until more text comes.
        waits = 0 if self.cut_off else max((_overlap(kept, stop) for stop in self._stop), default=0)
        self._say(kept[: len(kept) - waits])
        self._held = kept[len(kept) - waits :]

    def _say(self, text: str) -> None:
        if text and self._parser is not None:
            self._parsed(self._parser.feed(text))
        elif text:
            self._add({"content": text})

    def _parsed(self, events: list[dict[str, Any]]) -> None:
        for event in events:
            field = event["field"]
            if event["type"] == "region_chunk" and not event["dirty"]:
                names = (
                    ["content"] if field == "content" else ["reasoning", "reasoning_content"]
                )  # vLLM's, and transformers'
                self._add(dict.fromkeys(names, event["text"]))
            elif event["type"] == "region_close" and field == "tool_calls":
                function = event["value"]["function"]
                if not isinstance(function["arguments"], str):
                    function["arguments"] = json.dumps(function["arguments"])
                call = {"index": self.calls, "id": f"call_{uuid.uuid4().hex}", "type": "function", "function": function}
                self._add({"tool_calls": [call]})
                self.calls += 1

    def _add(self, piece: Any) -> None:
        self._loop.call_soon_threadsafe(self._queue.put_nowait, piece)


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of the text, in characters, that a stop string begins with."""
    return next(n for n in range(min(len(text), len(stop)), -1, -1) if text.endswith(stop[:n]))


JSON_CALLS = {  # <tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>, as Hermes and Qwen write them
    "open_pattern": r'\s*<tool_call>\s*\{\s*"name":\s*"(?P<name>[^"]*)",\s*"arguments":\s*(?=.*?\}\s*</tool_call>)',
    "close_pattern": r"\}\s*</tool_call>",
    "content": "json",
    "content_args": {"allow_non_json": True},
}
XML_CALLS = {  # <tool_call><function=add><parameter=a>1</parameter></function></tool_call>, as Qwen's coders do
    "open_pattern": r"\s*<tool_call>\s*<function=(?P<name>[^>\n]+)>(?=.*?</function>\s*</tool_call>)",
    "close_pattern": r"</function>\s*</tool_call>",
    "content": "xml-inline",  # one line break each before and after a value belongs to the form, spaces to the value
    "content_args": {"tag_pattern": r"<parameter=(?P<key>[^>\n]+)>\n?(?P<value>.*?)\n?</parameter>"},
}
TEXT = {"content": "text", "content_args": {"strip": False}, "repeats": True, "join": ""}
TAGS = {"<tool_call>", "</tool_call>", "<think>", "</think>"}


def answer_template(tokenizer: Any, tools: bool) -> dict[str, Any] | None:
    """Return the template that parses answers, or None.

    It is the tokenizer's `response_template`, or follows from its chat template: tool calls in JSON or in XML, and reasoning in <think>.
    Without tools, text that looks like a call is text.

    A call that does not begin or end properly stays text, arguments that are not JSON are passed on unchanged, and nothing raises. Reasoning
    stands at the beginning of an answer, or continues a <think> that the chat template has opened.
    """
    template = tokenizer.response_template or _shown_template(tokenizer)
    if tools or template is None:
        return template
    return template | {"fields": {name: field for name, field in template["fields"].items() if name != "tool_calls"}}


def _shown_template(tokenizer: Any) -> dict[str, Any] | None:
    shown = str(tokenizer.chat_template)
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    ends = [rf"\s*{re.escape(token)}" for token in sorted((special | set(tokenizer.all_special_tokens)) - TAGS)]
    fields: dict[str, dict[str, Any]] = {}
    if "<think>" in shown:
        close = "|".join((r"\s*</think>\s*", *ends))
        fields["reasoning_content"] = TEXT | {"open_pattern": r"\A\s*<think>\s*", "close_pattern": close}
    if "<tool_call>" in shown:
        form = XML_CALLS if "<function=" in shown else JSON_CALLS
        call = {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}}
        fields["tool_calls"] = form | {"repeats": True, "transform": call}
    if not fields:
        return None
    # The prompt is not parsed, since it may show calls as examples, except for a <think> at its end.
    begun = r"(?=<think>\s*\Z)|(?<!<think>\s*)\Z" if "reasoning_content" in fields else r"\Z"
    fields["content"] = TEXT | ({"close_pattern": "|".join(ends)} if ends else {})
    return {"defaults": {"role": "assistant"}, "start_anchor_pattern": begun, "fields": fields}
