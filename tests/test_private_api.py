"""Canaries: what parloop relies on in other libraries beyond what they document. Each test says what breaks when it fails.

A release of a library that changes one of these makes its test fail here, by name, and not somewhere in the suite.
"""

import pytest
import torch
from conftest import tiny_model
from transformers.generation import BaseStreamer
from transformers.utils.chat_parsing import ResponseParser

# The server without vLLM (serve/fallback_*.py). It uses nothing private of transformers' own server.


def test_a_streamer_gets_the_prompt_first_and_then_one_token_at_a_time():
    """serve/fallback_answers.Writer: else prompts are in answers, or first tokens are lost."""
    got, ended = [], []

    class Streamer(BaseStreamer):
        def put(self, value):
            got.append(value)

        def end(self):
            ended.append(True)

    prompt = torch.tensor([[5, 6, 7]])
    written = tiny_model().generate(prompt, max_new_tokens=3, do_sample=False, streamer=Streamer(), eos_token_id=-1)
    assert got[0].tolist() == prompt.tolist()
    assert [value.tolist() for value in got[1:]] == [[token] for token in written[0, 3:].tolist()]
    assert ended == [True]


def test_what_a_streamer_raises_ends_generate():
    """serve/fallback_answers.Writer: else stop strings end no answer, and answers are written for clients that left."""

    class EndedError(Exception):
        pass

    class Streamer(BaseStreamer):
        puts = 0

        def put(self, value):
            self.puts += 1
            if self.puts == 3:
                raise EndedError

    model, prompt, streamer = tiny_model(), torch.tensor([[5, 6, 7]]), Streamer()
    before = model.generate(prompt, max_new_tokens=5, do_sample=False)
    with pytest.raises(EndedError):
        model.generate(prompt, max_new_tokens=50, do_sample=False, streamer=streamer)
    assert streamer.puts == 3
    assert torch.equal(model.generate(prompt, max_new_tokens=5, do_sample=False), before)


def test_events_of_a_response_parser():
    """serve/fallback_answers.Writer and answer_template: else reasoning and tool calls are not told apart from text."""
    text = {"content": "text", "content_args": {"strip": False}, "repeats": True, "join": ""}
    call = {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}}
    fields = {
        "reasoning_content": text | {"open_pattern": r"\A<think>", "close_pattern": "</think>"},
        "tool_calls": {
            "open_pattern": r"<call (?P<name>\w+)>(?=.*?</call>)", "close_pattern": "</call>", "content": "json",
            "content_args": {"allow_non_json": True}, "repeats": True, "transform": call,
        },
        "content": text | {"close_pattern": "<end>"},
    }  # fmt: skip
    template = {"defaults": {"role": "assistant"}, "start_anchor_pattern": r"(?=<think>\Z)", "fields": fields}
    parser = ResponseParser(template, prefix="<call no>{}</call><think>", tools=[])
    events = (
        parser.initial_events + parser.feed('a</think>b<call f>{"x": 1}</call><call g>?</call><call') + parser.finalize()[1]
    )
    assert {event["type"] for event in events} == {"region_open", "region_chunk", "region_close"}
    shown = [(event["field"], event["text"]) for event in events if event["type"] == "region_chunk" and not event["dirty"]]
    assert shown == [("reasoning_content", "a"), ("content", "b"), ("content", "<call")]
    called = [event["value"] for event in events if event["type"] == "region_close" and event["field"] == "tool_calls"]
    assert [(made["function"]["name"], made["function"]["arguments"]) for made in called] == [("f", {"x": 1}), ("g", "?")]
