"""The server for agents: tool calls and reasoning separated from text, whole and streamed, conversations that continue with
what tools answered, and stop strings.

The chat template has the form that Qwen's models and their relatives are released with: roles in <|im_start|>, calls as JSON in
<tool_call>, reasoning in <think>. What the model says is scripted, see test_fallback.py.
"""

import json

import openai
import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.utils.chat_parsing import ResponseParser

from parloop.serve.fallback_answers import answer_template
from tests.helpers.chats import byte_tokenizer
from tests.helpers.models import tiny_model
from tests.helpers.servers import Here, script, served_checkpoint

TEMPLATE = """{%- if tools %}<|im_start|>system
Tools: {{ tools | map(attribute="function") | map(attribute="name") | join(", ") }}. Call one by
<tool_call>
{"name": NAME, "arguments": OBJECT}
</tool_call><|im_end|>
{% endif %}
{%- for message in messages %}
    {%- if message.role == "tool" %}
        {{- "<|im_start|>user\n<tool_response>\n" + message.content + "\n</tool_response><|im_end|>\n" }}
    {%- else %}
        {{- "<|im_start|>" + message.role + "\n" }}
        {%- if message.reasoning_content %}{{ "<think>\n" + message.reasoning_content + "\n</think>\n\n" }}{% endif %}
        {{- message.content }}
        {%- for call in message.tool_calls %}
            {{- '\n<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- call.function.arguments if call.function.arguments is string else call.function.arguments | tojson }}
            {{- "}\n</tool_call>" }}
        {%- endfor %}
        {{- "<|im_end|>\n" }}
    {%- endif %}
{%- endfor %}
{{- "<|im_start|>assistant\n" }}{% if thinking %}{{ "<think>\n" }}{% endif %}"""
XML_TEMPLATE = "<tool_call>\n<function=NAME>\n<parameter=KEY>\nVALUE\n</parameter>\n</function>\n</tool_call> <think>"

ASSISTANT = "<|im_start|>assistant\n"
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
OTHER = '<tool_call>\n{"name": "sub", "arguments": {"b": "{}"}}\n</tool_call>'
TOOLS = [{"type": "function", "function": {"name": name, "parameters": {"type": "object"}}} for name in ("add", "sub")]
HELLO = [{"role": "user", "content": "hello"}]


def chat_tokenizer(template: str = TEMPLATE):
    tokenizer = byte_tokenizer(chat_template=template)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.add_tokens(["<think>", "</think>", "<tool_call>", "</tool_call>"])
    tokenizer.eos_token = "<|im_end|>"
    return tokenizer


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = tmp_path_factory.mktemp("agents") / "coder"
    tokenizer = chat_tokenizer()
    ends = [2, tokenizer.eos_token_id]
    options = {"vocab_size": len(tokenizer), "max_position_embeddings": 1024, "eos_token_id": ends}
    tiny_model(dtype=torch.float32, **options).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with Here(served_checkpoint(folder, ["coder"])) as here:
        here.folder = folder
        yield here


def ask(served, says: str | None = None, before: str = ASSISTANT, **options):
    """The answer, whole, and the same put together from its pieces: text, reasoning, calls, and why it ended."""
    body = options.pop("extra_body", {})
    if says is not None:
        body |= {"generation_config": script(before, says, chat_tokenizer(), context_tokens=20)}
    call = {"model": "coder", "messages": HELLO, "extra_body": body} | options
    choice = served.client.chat.completions.create(**call).choices[0]
    message = choice.message
    calls = [(made.function.name, made.function.arguments) for made in message.tool_calls or []]
    assert all(made.model_dump().keys() == {"id", "type", "function"} for made in message.tool_calls or [])
    reasoning = getattr(message, "reasoning", None)
    assert reasoning == getattr(message, "reasoning_content", None)
    whole = (message.content or "", reasoning or "", calls, choice.finish_reason)

    choices = [piece.choices[0] for piece in served.client.chat.completions.create(**call, stream=True)]
    text = "".join(choice.delta.content or "" for choice in choices)
    reasoning = "".join(getattr(choice.delta, "reasoning", None) or "" for choice in choices)
    assert reasoning == "".join(getattr(choice.delta, "reasoning_content", None) or "" for choice in choices)
    names, arguments, ids = {}, {}, {}
    for part in [part for choice in choices for part in choice.delta.tool_calls or []]:
        names[part.index] = names.get(part.index, "") + (part.function.name or "")
        arguments[part.index] = arguments.get(part.index, "") + (part.function.arguments or "")
        ids[part.index] = part.id or ids[part.index]
    assert list(names) == list(range(len(names)))
    assert len(set(ids.values())) == len(ids)
    assert choices[0].delta.role == "assistant"
    assert [choice.finish_reason for choice in choices[:-1]] == [None] * (len(choices) - 1)
    assert (text, reasoning, [(names[i], arguments[i]) for i in names], choices[-1].finish_reason) == whole
    return whole


def test_reasoning_text_and_two_calls(served):
    says = f"<think>\nhm\n</think>\n\nI add.\n{CALL}\n{OTHER}"
    text, reasoning, calls, reason = ask(served, says, tools=TOOLS, tool_choice="auto")
    assert (text, reasoning, reason) == ("I add.", "hm", "tool_calls")
    assert [(name, json.loads(arguments)) for name, arguments in calls] == [("add", {"a": 1}), ("sub", {"b": "{}"})]


def test_a_call_without_valid_json_is_handed_on(served):
    assert ask(served, CALL.replace("1", "?"), tools=TOOLS) == ("", "", [("add", '{"a": ?}')], "tool_calls")


def test_a_call_that_does_not_end_is_text(served):
    """Whether the model ends it, or the limit; a call before it stays one."""
    unfinished = CALL.removesuffix("}}\n</tool_call>")
    assert ask(served, unfinished, tools=TOOLS) == (unfinished, "", [], "stop")
    tokens = len(chat_tokenizer()(unfinished).input_ids)
    assert ask(served, CALL, tools=TOOLS, max_tokens=tokens) == (unfinished, "", [], "length")


def test_without_tools_what_looks_like_a_call_is_text(served):
    assert ask(served, f"<think>\nhm\n</think>{CALL}") == (CALL, "hm", [], "stop")
    assert ask(served, CALL, tools=TOOLS, tool_choice="none") == (CALL, "", [], "stop")
    tokens = [
        served.client.chat.completions.create(model="coder", messages=HELLO, max_tokens=1, **options).usage.prompt_tokens
        for options in ({}, {"tools": TOOLS, "tool_choice": "none"}, {"tools": TOOLS})
    ]
    assert tokens[0] == tokens[1] < tokens[2]


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "add"}}])
def test_nothing_forces_a_call(served, choice):
    with pytest.raises(openai.BadRequestError, match="tool_choice="):
        served.client.chat.completions.create(model="coder", messages=HELLO, tools=TOOLS, tool_choice=choice)


def test_reasoning_that_the_limit_cuts_off(served):
    assert ask(served, "<think>\nlong thoughts", max_tokens=6) == ("", "long", [], "length")


def test_reasoning_that_the_template_opens(served):
    options = {"before": f"{ASSISTANT}<think>\n", "extra_body": {"chat_template_kwargs": {"thinking": True}}}
    assert ask(served, "hm\n</think>\n\nhi", **options) == ("hi", "hm", [], "stop")
    assert ask(served, "hm, so", max_tokens=2, **options) == ("", "hm", [], "length")


@pytest.mark.parametrize(
    ("says", "stop", "answer"),
    [
        (
            "<think>\na b\n</think>\n\nc d\nObservation: e",
            ["zz", "\nObservation:", "Observation: e"],
            ("c d", "a b", [], "stop"),
        ),
        ("<think>\na ENDEND b\n</think>\n\nc", "END", ("", "a ", [], "stop")),
        ("x END" + CALL, ["EN"], ("x ", "", [], "stop")),
        (CALL, ['"arguments"'], ('<tool_call>\n{"name": "add", ', "", [], "stop")),
        (CALL + "\n\nEND", ["\n\nE"], ("", "", [("add", '{"a": 1}')], "tool_calls")),
    ],
)
def test_stop_strings_beside_reasoning_and_calls(served, says, stop, answer):
    assert ask(served, says, tools=TOOLS, stop=stop) == answer


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
def test_a_conversation_with_what_tools_answered(served, name):
    """It is rendered by the template as written here, and what is answered is what the model says to that."""
    messages = [
        *HELLO,
        {
            "role": "assistant", "content": "I add.", name: "hm", "refusal": None,
            "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}},
                {"id": "2", "type": "function", "function": {"name": "sub", "arguments": ""}},
                {"id": "3", "type": "function", "function": {"name": "sub", "arguments": '{"a": ?}'}},
            ],
        },
        {"role": "tool", "tool_call_id": "1", "content": "2"},
        {"role": "tool", "tool_call_id": "2", "content": [{"type": "text", "text": "none"}]},
        {"role": "tool", "tool_call_id": "3", "content": "bad"},
        {"role": "assistant", "content": "So 2.", "tool_calls": None, "function_call": None},
        {"role": "user", "content": "sure?"},
    ]  # fmt: skip
    prompt = f"""<|im_start|>user
hello<|im_end|>
<|im_start|>assistant
<think>
hm
</think>

I add.
{CALL}
<tool_call>
{{"name": "sub", "arguments": {{}}}}
</tool_call>
<tool_call>
{{"name": "sub", "arguments": {{"a": ?}}}}
</tool_call><|im_end|>
<|im_start|>user
<tool_response>
2
</tool_response><|im_end|>
<|im_start|>user
<tool_response>
none
</tool_response><|im_end|>
<|im_start|>user
<tool_response>
bad
</tool_response><|im_end|>
<|im_start|>assistant
So 2.<|im_end|>
<|im_start|>user
sure?<|im_end|>
<|im_start|>assistant
"""
    ids = chat_tokenizer()(prompt, return_tensors="pt").input_ids
    model = AutoModelForCausalLM.from_pretrained(served.folder)
    expected = model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
    answer = served.client.chat.completions.create(model="coder", messages=messages, max_tokens=8, temperature=0)
    assert answer.usage.prompt_tokens == ids.shape[1]
    assert answer.choices[0].message.content == chat_tokenizer().decode(expected, skip_special_tokens=True)


def test_an_agents_second_turn(served):
    """The message that the server gave, as clients send it back."""
    body = {"generation_config": script(ASSISTANT, f"<think>\nhm\n</think>\n\n{CALL}", chat_tokenizer(), context_tokens=20)}
    call = {"model": "coder", "messages": HELLO, "tools": TOOLS}
    message = served.client.chat.completions.create(**call, extra_body=body).choices[0].message
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "2"}
    for sent in (message, message.model_dump()):
        text, *_, reason = ask(served, "It is 2.", tools=TOOLS, messages=[*HELLO, sent, result])
        assert (text, reason) == ("It is 2.", "stop")


@pytest.mark.parametrize("value", ["1", "  x = 1\n  y = 2", "a </param b"])
def test_calls_in_xml(value):
    """In the form of Qwen's coders, if the chat template shows it. Line breaks around a value are not part of it."""
    text = f"<think>\nhm\n</think>\n\nI add.\n<tool_call>\n<function=add>\n<parameter=n>\n7\n</parameter>\n<parameter=a>\n{value}\n</parameter>\n</function>\n</tool_call><|im_end|>"
    tools = [
        {"function": {"name": "add", "parameters": {"properties": {"n": {"type": "integer"}, "a": {"type": "string"}}}}}
    ]
    template = answer_template(chat_tokenizer(XML_TEMPLATE), tools=True)
    for pieces in ([text], text):
        parser = ResponseParser(template, prefix=ASSISTANT, tools=tools)
        for piece in pieces:
            parser.feed(piece)
        message, _ = parser.finalize()
        assert (message["content"], message["reasoning_content"]) == ("I add.", "hm")
        assert message["tool_calls"] == [
            {"type": "function", "function": {"name": "add", "arguments": {"n": 7, "a": value}}}
        ]


@pytest.mark.parametrize("stream", [False, True])
def test_messages_that_a_template_cannot_take(served, stream):
    """A call without a name, which the template would put between two texts."""
    nameless = {"role": "assistant", "tool_calls": [{"function": {"name": None, "arguments": "{}"}}]}
    with pytest.raises(openai.BadRequestError):
        served.client.chat.completions.create(model="coder", messages=[*HELLO, nameless], stream=stream)
