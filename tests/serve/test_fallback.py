"""transformers' server with a PLT: answers over HTTP, as OpenAI's client reads them, against generate() in this process.

What a tiny random model says is scripted where it matters, with generate()'s sequence_bias, which a request may hold.
"""

import asyncio
import inspect
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from types import SimpleNamespace

import openai
import pytest
import torch
from conftest import tiny_model
from fastapi import HTTPException
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast
from transformers.cli.serve import Serve
from transformers.cli.serving import chat_completion, completion, model_manager, response, server, systemone, utils
from transformers.utils.chat_parsing import ResponseParser

from parloop.errors import CheckpointError, ServeError
from parloop.serve import fallback, fallback_server
from parloop.serve.fallback import model_names, serve_with_transformers, server_options

POSITIONS = 400
TEMPLATE = """{% for tool in tools or [] %}<tool_call>{"name": "{{ tool.function.name }}", "arguments": {}}</tool_call>
{% endfor %}{% for message in messages %}{{ message.role }}:{{ message.content }}
{% endfor %}assistant:"""
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": {"b": 1}}}\n</tool_call>'
HELLO = [{"role": "user", "content": "hello"}]
ADD = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]


def byte_tokenizer(**options) -> PreTrainedTokenizerFast:
    """Every byte is a token."""
    tokens = ["<pad>", "<bos>", "<eos>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special, **options)


class Running:
    """A server in a process of its own, and OpenAI's client of it."""

    def __init__(self, checkpoint, log, **options):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url, self.log = f"http://127.0.0.1:{port}", log
        call = f"serve_with_transformers({str(checkpoint)!r}, port={port}, **{options!r})"
        code = f"import torch; torch.set_num_threads(1); from parloop.serve.fallback import *; {call}"
        environment = os.environ | {"HF_HUB_OFFLINE": "1"}
        with log.open("w") as output:
            self.process = subprocess.Popen([sys.executable, "-c", code], stdout=output, stderr=output, env=environment)
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=30)

    def wait(self):
        for _ in range(600):
            try:
                return urllib.request.urlopen(f"{self.url}/health", timeout=5).read()
            except OSError:
                assert self.process.poll() is None, self.log.read_text()
                time.sleep(0.1)
        raise AssertionError(self.log.read_text())

    def post(self, path, body: bytes) -> tuple[int, str]:
        request = urllib.request.Request(self.url + path, body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A checkpoint, once with a chat template that shows tool calls, and once without any."""
    folder = tmp_path_factory.mktemp("made")
    for name, template in (("chatty", TEMPLATE), ("plain", None)):
        vocab_size = len(byte_tokenizer())
        tiny_model(dtype=torch.float32, vocab_size=vocab_size, max_position_embeddings=POSITIONS).save_pretrained(
            folder / name
        )
        byte_tokenizer(chat_template=template).save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def servers(made):
    """At the trained loop count; and at one loop, under another name."""
    both = [
        Running(made / "chatty", made / "chatty.log", arguments=["--log-level", "error"]),
        Running(made / "plain", made / "plain.log", num_loops=1, name="small@1"),
    ]
    try:
        for running in both:
            running.wait()
        yield both
        for running in both:
            running.process.send_signal(signal.SIGINT)
        assert [running.process.wait(30) for running in both] == [0, 0]
    finally:
        for running in both:
            running.process.kill()


@pytest.fixture(scope="module")
def chatty(servers):
    return servers[0]


@pytest.fixture(scope="module")
def plain(servers):
    return servers[1]


def generated(made, prompt: str, loops: int, tokens: int = 12) -> str:
    model, tokenizer = tiny_model(dtype=torch.float32, vocab_size=len(byte_tokenizer())), byte_tokenizer()
    model = type(model).from_pretrained(made / "chatty").eval()
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    return tokenizer.decode(
        model.generate(ids, max_new_tokens=tokens, do_sample=False, num_loops=loops)[0, ids.shape[1] :],
        skip_special_tokens=True,
    )


def script(before: str, text: str, tokenizer=None, context_tokens: int = 12) -> str:
    """A generation_config with which any model continues `before`, the prompt or its end, with `text` and ends."""
    tokenizer = tokenizer or byte_tokenizer()
    ids = [*tokenizer(before + text).input_ids, tokenizer.eos_token_id]
    start = len(tokenizer(before).input_ids)
    biases = {}
    for place in range(start, len(ids)):
        context = tuple(ids[max(0, place - context_tokens) : place])
        assert biases.setdefault(context, ids[place]) == ids[place], "longer contexts are needed"
    fields = {"sequence_bias": [[[*context, token], 1000.0] for context, token in biases.items()]}
    return json.dumps(fields | {"eos_token_id": tokenizer.eos_token_id, "max_new_tokens": 200})


def said(text: str) -> dict:
    """Of a chat request after HELLO."""
    return {"extra_body": {"generation_config": script("user:hello\nassistant:", text)}}


def streamed(stream) -> tuple[str, list, list]:
    """What a chat's stream says, its tool calls, and why it ended."""
    choices = [piece.choices[0] for piece in stream]
    text = "".join(choice.delta.content or "" for choice in choices)
    calls = [call for choice in choices for call in choice.delta.tool_calls or []]
    return text, calls, [choice.finish_reason for choice in choices if choice.finish_reason]


def test_greedy_answers_are_those_of_generate(servers, made):
    prompt = "def f(x):"
    answers = []
    for running, name, loops in zip(servers, ("chatty@2", "small@1"), (2, 1)):
        answer = running.client.completions.create(model=name, prompt=prompt, max_tokens=12, temperature=0)
        answers.append(answer.choices[0].text)
        assert answers[-1] == generated(made, prompt, loops)
        assert (answer.model, answer.choices[0].finish_reason) == (name, "length")
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(prompt), 12)
    assert answers[0] != answers[1]  # or the loop dial has no effect, and this test no force


def test_chat_uses_the_checkpoints_template(chatty, made):
    answer = chatty.client.chat.completions.create(model="chatty", messages=HELLO, max_tokens=12)
    assert answer.choices[0].message.content == generated(made, "user:hello\nassistant:", 2)
    assert answer.choices[0].finish_reason == "length"


def test_streams(chatty):
    call = {"model": "chatty", "messages": HELLO}
    text = "x = 1\nprint(x)"
    assert chatty.client.chat.completions.create(**call, **said(text)).choices[0].message.content == text
    assert streamed(chatty.client.chat.completions.create(**call, **said(text), stream=True)) == (text, [], ["stop"])
    pieces = list(
        chatty.client.completions.create(
            model="chatty", prompt="ab", stream=True, extra_body={"generation_config": script("ab", text)}
        )
    )
    assert "".join(piece.choices[0].text for piece in pieces) == text
    assert len(pieces) > len(text) / 2
    assert pieces[-1].usage.completion_tokens == len(text) + 1


def test_every_name_of_the_model_is_answered(servers, made):
    for running, names in zip(servers, (("chatty@2", "chatty", made / "chatty"), ("small@1", "small", made / "plain"))):
        assert [model.id for model in running.client.models.list()] == [names[0]]
        for name in names:
            assert running.client.completions.create(model=str(name), prompt="a", max_tokens=1).model == names[0]


@pytest.mark.parametrize("stop", ["\n\n", ["zz", "\n\n"]])
def test_stop_strings_end_the_answer_and_are_not_in_it(chatty, stop):
    text, before = "one\ntwo\n\nthree", "user:hello\nassistant:"
    for call in (
        {"messages": HELLO, "generation_config": script(before, text)},
        {"prompt": before, "generation_config": script(before, text)},
    ):
        api = chatty.client.chat.completions if "messages" in call else chatty.client.completions
        body = {"generation_config": call.pop("generation_config")}
        answer = api.create(model="chatty", **call, stop=stop, extra_body=body)
        choice = answer.choices[0]
        assert (choice.message.content if "messages" in call else choice.text, choice.finish_reason) == ("one\ntwo", "stop")
        assert answer.usage.completion_tokens == len("one\ntwo\n\n")
        pieces = [piece.choices[0] for piece in api.create(model="chatty", **call, stop=stop, extra_body=body, stream=True)]
        parts = [piece.delta.content if "messages" in call else piece.text for piece in pieces]
        assert "".join(part or "" for part in parts) == "one\ntwo"
        assert pieces[-1].finish_reason == "stop"


def test_a_stop_string_that_begins_in_the_prompt_does_not_end_the_answer(chatty):
    config = script("if x:\n", "\ny")
    answer = chatty.client.completions.create(
        model="chatty", prompt="if x:\n", stop="\n\n", extra_body={"generation_config": config}
    )
    assert answer.choices[0].text == "\ny"


@pytest.mark.parametrize("stop", [["aab"], ["b", "ab"], ["ca", "aabc"], ["x"], []])
def test_streams_are_cut_where_whole_texts_are(stop):
    text = "caaabcab"
    for ends in itertools.combinations(range(1, len(text)), 3):
        source = asyncio.Queue()
        for start, end in zip((0, *ends), (*ends, None)):
            source.put_nowait(text[start:end])
        source.put_nowait(None)
        queue = fallback_server.CutQueue(source, stop)
        assert "".join(iter(queue.get_nowait, None)) == fallback_server.cut(text, stop)


def test_text_that_only_looks_like_a_stop_string_is_not_lost(chatty):
    stream = chatty.client.chat.completions.create(
        model="chatty", messages=HELLO, stop="EEF", stream=True, **said("aEEEEb EE")
    )
    assert streamed(stream) == ("aEEEEb EE", [], ["stop"])


def test_tool_calls_are_parsed(chatty):
    before = CALL.replace("\n", "").replace('{"a": {"b": 1}}', "{}") + "\nuser:hello\nassistant:"
    call = {"model": "chatty", "messages": HELLO, "tools": ADD}
    body = {"generation_config": script(before, f"I add.\n{CALL}")}
    choice = chatty.client.chat.completions.create(**call, extra_body=body).choices[0]
    function = choice.message.tool_calls[0].function
    assert (choice.message.content, choice.finish_reason, len(choice.message.tool_calls)) == ("I add.", "tool_calls", 1)
    assert (function.name, json.loads(function.arguments)) == ("add", {"a": {"b": 1}})
    text, calls, reasons = streamed(chatty.client.chat.completions.create(**call, extra_body=body, stream=True))
    assert (text, reasons) == ("I add.", ["tool_calls"])
    assert [(c.function.name, json.loads(c.function.arguments)) for c in calls] == [("add", {"a": {"b": 1}})]


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        (" plain <b> text ", " plain <b> text ", []),
        (CALL + "\n" + CALL + "\n<eos>", None, [("add", {"a": {"b": 1}})] * 2),
        ("<tool_call>nonsense</tool_call>", "<tool_call>nonsense</tool_call>", []),
        (CALL.replace("1", "?"), None, [("add", '{"a": {"b": ?}}')]),
        (CALL[:-1], CALL[:-1], []),
        (CALL + "\n" + CALL[:40], "\n" + CALL[:40], [("add", {"a": {"b": 1}})]),
        ("a<pad>b<eos>", "ab", []),
    ],
)
def test_tool_calls_that_are_none_and_broken_ones(text, content, calls):
    tokenizer = byte_tokenizer(chat_template=TEMPLATE)
    template = fallback_server.answer_template(tokenizer)
    for pieces in ([text], list(text)):
        parser = ResponseParser(template, prefix=CALL)
        for piece in pieces:
            parser.feed(piece)
        message, _ = parser.finalize()
        assert message.get("content") == content
        found = [call["function"] for call in message.get("tool_calls", [])]
        assert [(function["name"], function["arguments"]) for function in found] == calls


def test_templates_that_show_neither_calls_nor_reasoning_leave_answers_as_they_are():
    for template in (None, "{{ messages }}"):
        assert fallback_server.answer_template(byte_tokenizer(chat_template=template)) is None


def test_a_template_without_tools_refuses_them():
    tokenizer = byte_tokenizer(chat_template="{{ messages }}")
    manager = SimpleNamespace(
        names=["m"], process_model_name=lambda name: name, load_model_and_processor=lambda _: (None, tokenizer)
    )
    handler = fallback_server.PLTChatHandler(manager, None)
    assert handler._resolve_model({"model": "m", "messages": HELLO})[0] == "m"
    with pytest.raises(HTTPException, match="knows no tools"):
        handler._resolve_model({"model": "m", "messages": HELLO, "tools": ADD})


def test_a_checkpoint_without_a_chat_template_completes_only(plain):
    with pytest.raises(openai.BadRequestError, match="chat template"):
        plain.client.chat.completions.create(model="small", messages=HELLO)
    assert plain.client.completions.create(model="small", prompt="a", max_tokens=2).usage.completion_tokens == 2


def test_temperatures_sample(chatty):
    def answer(**options):
        return chatty.client.completions.create(model="chatty", prompt="def", max_tokens=16, **options).choices[0].text

    assert answer() == answer(temperature=0)
    assert answer(temperature=1.0, seed=1) == answer(temperature=1.0, seed=1)
    assert len({answer(temperature=1.0, seed=seed) for seed in range(3)} | {answer()}) == 4
    assert answer(temperature=1.0, top_p=1e-6) == answer()


def test_samples_are_drawn_from_all_tokens():
    """And not from the 50 likeliest, as generate() would by itself; unless the checkpoint or the request says so."""
    handler = fallback_server.PLTChatHandler(None, utils.GenerationState())
    build = handler._build_generation_config
    assert build({"temperature": 1.0}, GenerationConfig()).top_k == 0
    assert build({"temperature": 1.0}, GenerationConfig(top_k=7)).top_k == 7
    assert build({"temperature": 1.0, "generation_config": '{"top_k": 9}'}, GenerationConfig(top_k=7)).top_k == 9
    assert not build({"temperature": 0}, GenerationConfig(do_sample=True, top_k=7)).do_sample
    assert build({}, GenerationConfig(do_sample=True, top_p=0.9)).top_p == 0.9


def test_answers_end_where_the_models_positions_do(chatty):
    prompt = "a" * (POSITIONS - 3)
    answer = chatty.client.completions.create(model="chatty", prompt=prompt, max_tokens=50)
    assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (3, "length")
    *_, last = chatty.client.completions.create(model="chatty", prompt=prompt, stream=True)
    assert (last.usage.completion_tokens, last.choices[0].finish_reason) == (3, "length")


def test_logit_bias(chatty):
    body = {
        "model": "chatty",
        "max_tokens": 3,
        "temperature": 0,
        "logit_bias": {str(byte_tokenizer()("q").input_ids[0]): 100},
    }
    assert chatty.client.completions.create(prompt="a", **body).choices[0].text == "qqq"
    assert chatty.client.chat.completions.create(messages=HELLO, **body).choices[0].message.content == "qqq"


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        ({"model": "other/model"}, 404, "'other/model' is not served here: use 'chatty@2'"),
        ({"model": "chatty@1"}, 404, "'chatty@1' is not served"),
        ({"prompt": "a" * POSITIONS}, 400, f"the prompt has {POSITIONS} tokens, and the model was made for {POSITIONS}"),
        ({"prompt": ""}, 400, "the prompt is empty"),
        ({"prompt": ["a", "b"]}, 400, "prompt must be a string"),
        ({"max_tokens": 0}, 400, "max_tokens=0 must be an integer of at least 1"),
        ({"temperature": -1}, 400, "temperature=-1 must be a number from 0"),
        ({"temperature": "hot"}, 400, "temperature='hot'"),
        ({"top_p": 2}, 400, "top_p=2 must be above 0"),
        ({"stop": [""]}, 400, "stop=.* none of them empty"),
        ({"n": 2}, 400, "n=2 is not supported"),
        ({"best_of": 2}, 400, "best_of=2 is not supported"),
        ({"echo": True}, 400, "echo=True is not supported"),
        ({"logprobs": 0}, 400, "logprobs=0 is not supported"),
        ({"suffix": "b"}, 400, "suffix='b' is not supported"),
        ({"presence_penalty": 0.5}, 400, "presence_penalty=0.5 is not supported"),
        ({"frequency_penalty": 0.5}, 400, "frequency_penalty=0.5 is not supported.*repetition_penalty"),
        ({"logit_bias": {"x": 1}}, 400, "logit_bias=.*token ids"),
        ({"extra_body": {"top_k": 5}}, 422, "top_k"),
        ({"extra_body": {"generation_config": "[]"}}, 400, "generation_config='\\[\\]'"),
        ({"extra_body": {"generation_config": '{"max_length": 2}'}}, 400, "max_length=2 leaves no room"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_bad_completions_are_refused_and_the_next_works(chatty, options, status, message, stream):
    with pytest.raises(openai.APIStatusError, match=message) as refused:
        list(chatty.client.completions.create(**{"model": "chatty", "prompt": "abc", "stream": stream} | options))
    assert refused.value.status_code == status
    assert chatty.client.completions.create(model="chatty", prompt="a", max_tokens=1).usage.completion_tokens == 1


@pytest.mark.parametrize("stream", [False, True])
def test_what_only_generate_refuses(chatty, stream):
    call = {"model": "chatty", "prompt": "abc", "stream": stream, "logit_bias": {"999999": 1}}
    with pytest.raises(openai.APIError) as refused:  # if it is streamed, in the middle of the stream
        list(chatty.client.completions.create(**call))
    assert "vocab" in str(refused.value.body)
    assert chatty.client.completions.create(model="chatty", prompt="a", max_tokens=1).usage.completion_tokens == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 2}, "n=2"),
        ({"logprobs": True}, "logprobs=True"),
        ({"top_logprobs": 3}, "top_logprobs=3"),
        ({"response_format": {"type": "json_object"}}, "response_format="),
        ({"tools": ADD, "tool_choice": "required"}, "tool_choice='required'"),
        ({"tools": ADD, "tool_choice": ADD[0]}, "tool_choice=.*nothing forces a call here"),
        ({"tools": ADD, "parallel_tool_calls": False}, "parallel_tool_calls=False"),
        ({"reasoning_effort": "high"}, "reasoning_effort='high'"),
        ({"messages": []}, "at least one message"),
        ({"messages": [{"content": "a"}]}, "must have a role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "text only"),
        ({"messages": [{"role": "user", "content": "a" * POSITIONS}]}, "shorten it"),
    ],
)
def test_bad_chats_are_refused_and_the_next_works(chatty, options, message):
    with pytest.raises(openai.BadRequestError, match=message):
        chatty.client.chat.completions.create(**{"model": "chatty", "messages": HELLO} | options)
    assert chatty.client.chat.completions.create(model="chatty", messages=HELLO, max_tokens=1).usage.completion_tokens == 1


def test_fields_with_the_value_that_they_have_anyway(chatty):
    neutral = {
        "n": 1,
        "logprobs": False,
        "presence_penalty": 0,
        "frequency_penalty": 0.0,
        "tool_choice": "auto",
        "user": "me",
    }
    neutral |= {"response_format": {"type": "text"}, "stream_options": None, "parallel_tool_calls": True, "store": False}
    answer = chatty.client.chat.completions.create(model="chatty", messages=HELLO, max_tokens=1, tools=ADD, **neutral)
    assert answer.usage.completion_tokens == 1


@pytest.mark.parametrize("body", [b'{"model": "chatty", "prompt": "a', b"[1]", b""])
def test_bodies_that_are_not_json_objects(chatty, body):
    status, answer = chatty.post("/v1/completions", body)
    assert status == 400
    assert "not a JSON object" in json.loads(answer)["error"]["message"]


def test_nothing_else_is_loaded(chatty):
    for model in ("gpt2", "chatty:weights.gguf", "other/model:weights.gguf", "chatty@main"):
        for path, body in (("/v1/completions", {"prompt": "a"}), ("/v1/responses", {"input": "a"}), ("/load_model", {})):
            status, answer = chatty.post(path, json.dumps({"model": model} | body).encode())
            assert status == 404 or (path == "/load_model" and '"status": "error"' in answer)
    assert chatty.post("/v1/audio/transcriptions", b"")[0] == 404


def test_reset_loads_the_same_model_again(plain, made):
    assert plain.post("/reset", b"")[0] == 200
    answer = plain.client.completions.create(model="small", prompt="def f(x):", max_tokens=12)
    assert answer.choices[0].text == generated(made, "def f(x):", 1)


def test_responses(chatty, made):
    answer = chatty.client.responses.create(model="chatty", input="hello", max_output_tokens=12, temperature=0)
    assert answer.output_text == generated(made, "user:hello\nassistant:", 2)
    assert "".join(
        event.delta
        for event in chatty.client.responses.create(model="chatty", input="hello", stream=True, **said("a long answer"))
        if event.type == "response.output_text.delta"
    ) == ("a long answer")
    with pytest.raises(openai.BadRequestError, match="previous_response_id"):
        chatty.client.responses.create(model="chatty", input="hello", previous_response_id="resp_1")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arguments": ["--continuous-batching"]}, "--continuous-batching does not work with a PLT"),
        ({"arguments": ["--cb-block-size", "32"]}, "--cb-block-size does not work with a PLT"),
        ({"arguments": ["--max-model-len", "99"]}, "--max-model-len 99: no such option here.*--compile"),
        ({"arguments": ["--trust-remote-code"]}, "--trust-remote-code: no such option"),
        ({"arguments": ["--tool-call-parser", "hermes"]}, "--tool-call-parser is an option of vLLM.*Leave it out"),
        ({"arguments": ["--enable-auto-tool-choice"]}, "--enable-auto-tool-choice is an option of vLLM"),
        ({"arguments": ["--reasoning-parser=qwen3"]}, "--reasoning-parser=qwen3 is an option of vLLM"),
        ({"arguments": ["--quantization", "gguf"]}, "--quantization.*bnb-4bit"),
        ({"arguments": ["--default-seed", "x"]}, "--default-seed.*int"),
        ({"arguments": ["--chat-template-kwargs", "[]"]}, "--chat-template-kwargs \\[\\] must be a JSON object"),
        ({"arguments": ["--chat-template-kwargs", "{"]}, "--chat-template-kwargs { must be a JSON object"),
        ({"num_loops": 0}, "num_loops=0 must be"),
        ({"dtype": "int8"}, "dtype='int8' is unknown"),
        ({"device": "cuda:99"}, "device='cuda:99' is not there"),
        ({"host": "no.such.host.invalid"}, "no.such.host.invalid.* cannot be listened at"),
    ],
)
def test_options_that_cannot_be(made, options, message):
    with pytest.raises((ServeError, CheckpointError), match=message):
        serve_with_transformers(str(made / "plain"), **options)


def test_a_port_in_use(made):
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ServeError, match="use another port"):
        serve_with_transformers(str(made / "plain"), port=taken.getsockname()[1])


def test_checkpoints_that_are_none(tmp_path):
    with pytest.raises(CheckpointError, match="no such folder"):
        serve_with_transformers(str(tmp_path / "nothing"), num_loops=2)


def test_without_the_packages_of_the_server(made, monkeypatch):
    monkeypatch.setattr(fallback, "is_serve_available", lambda: False)
    with pytest.raises(ServeError, match='pip install "transformers\\[serving\\]"'):
        serve_with_transformers(str(made / "plain"))


def test_decisions(chatty):
    question = {"type": "choice", "instructions": "which?", "criteria": {"a": "1", "b": "2"}}
    for state, status in (("s", 200), ("s" * POSITIONS, 400), ("s", 200)):
        body = {"model": "chatty", "state": state, "questions": {"q": question}}
        answer = chatty.post("/v1/systemone", json.dumps(body).encode())
        assert answer[0] == status
        if status == 200:
            assert sum(json.loads(answer[1])["answers"]["q"]["probabilities"].values()) == pytest.approx(1)


def test_names(tmp_path):
    (tmp_path / "runs").mkdir()
    folder = str(tmp_path / "runs")
    assert model_names(folder, 2) == ["runs@2", "runs", folder]
    assert model_names("owner/model", 3) == ["owner/model@3", "owner/model"]
    assert model_names("owner/model", 3, "mine") == ["mine", "owner/model"]


def test_the_options_are_those_of_transformers_serve():
    known = inspect.signature(Serve.__init__).parameters
    for option, value in server_options([]).items():
        assert known[option].default == value
    taken = inspect.signature(fallback_server.build_app).parameters
    assert set(server_options([])) < set(taken)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (model_manager.ModelManager, fallback_server.PLTModelManager),
        (utils.GenerationState, fallback_server.PLTGenerationState),
        (utils.GenerateManager, fallback_server.PLTGenerator),
        (chat_completion.ChatCompletionHandler, fallback_server.PLTChatHandler),
        (completion.CompletionHandler, fallback_server.PLTCompletionHandler),
        (response.ResponseHandler, fallback_server.PLTResponseHandler),
        (systemone.SystemOneHandler, fallback_server.PLTSystemOneHandler),
    ],
)
def test_what_is_overridden_is_there_in_transformers(theirs, ours):
    """If this fails, transformers' server was rebuilt: compare fallback_server.py with transformers/cli/serving."""
    own = {name: vars(part)[name] for part in ours.__mro__ if part.__module__ == ours.__module__ for name in vars(part)}
    methods = {name for name, value in own.items() if inspect.isfunction(value) or isinstance(value, staticmethod)}
    assert methods - {"_prepare"} <= set(dir(theirs))


def test_the_parts_of_transformers_that_are_called():
    assert list(inspect.signature(server.build_server).parameters) == [
        *("model_manager", "chat_handler", "completion_handler", "response_handler", "transcription_handler"),
        *("systemone_handler", "generation_state", "enable_cors"),
    ]
    assert list(inspect.signature(utils.GenerateManager.generate_streaming).parameters) == [
        *("self", "model", "processor", "inputs", "gen_config", "request_id", "response_parser")
    ]
    handled = inspect.signature(chat_completion.ChatCompletionHandler._non_streaming).parameters
    assert list(handled)[:7] == ["self", "request_id", "model", "processor", "model_id", "inputs", "gen_config"]
    # What a new version learns to do, or to ignore, must be sorted by hand.
    for handler in (
        fallback_server.PLTChatHandler,
        fallback_server.PLTCompletionHandler,
        fallback_server.PLTResponseHandler,
    ):
        acted_on = set(handler._valid_params_class.__mutable_keys__) - handler._unused_fields
        assert handler.understood <= acted_on | {"logit_bias"}
