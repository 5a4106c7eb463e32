"""The server without vLLM: answers over HTTP, as OpenAI's client reads them, against generate() in this process.

What a tiny random model says is scripted where it matters, with generate()'s sequence_bias, which a request may hold.
"""

import asyncio
import contextlib
import itertools
import json
import signal
import socket
import sys
import threading
import time
import urllib.error
import urllib.request
from types import SimpleNamespace

import openai
import pytest
import torch
import transformers
from transformers import GenerationConfig
from transformers.utils.chat_parsing import ResponseParser

from parloop.errors import CheckpointError, ServeError
from parloop.evaluate.serving import server_version
from parloop.serve.fallback import serve_with_transformers
from parloop.serve.fallback_answers import Ended, Writer, answer_template
from parloop.serve.fallback_requests import CompletionRequest, Generation
from parloop.serve.fallback_server import Served
from tests.helpers.chats import byte_tokenizer
from tests.helpers.models import tiny_model
from tests.helpers.servers import Here, Running, script, served_checkpoint

POSITIONS = 400
TEMPLATE = """{% for tool in tools or [] %}<tool_call>{"name": "{{ tool.function.name }}", "arguments": {}}</tool_call>
{% endfor %}{% for message in messages %}{{ message.role }}:{{ message.content }}
{% endfor %}assistant:"""
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": {"b": 1}}}\n</tool_call>'
HELLO = [{"role": "user", "content": "hello"}]
ADD = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]


def post(url, body: bytes) -> tuple[int, str]:
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
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
def chatty(made):
    """At the trained loop count."""
    with Here(served_checkpoint(made / "chatty", ["chatty@2", "chatty", str(made / "chatty")])) as here:
        yield here


@pytest.fixture(scope="module")
def plain(made):
    """At one loop, under another name, as the command starts it."""
    running = Running(made / "plain", made / "log", "--loops", "1", "--served-model-name", "small@1", "small")
    try:
        running.wait()
        yield running
        running.process.send_signal(signal.SIGINT)
        assert running.process.wait(60) == 0
    finally:
        running.process.kill()


@pytest.fixture(scope="module")
def servers(chatty, plain):
    return chatty, plain


class Stub:
    """Stands for a model: its generate() is given by a test."""

    def __init__(self):
        self.config, self.device = SimpleNamespace(max_position_embeddings=1000), torch.device("cpu")
        self.generation_config, self.tokenizer = GenerationConfig(), byte_tokenizer(chat_template=TEMPLATE)

    def says(self, streamer, text: str):
        for token in self.tokenizer(text).input_ids:
            streamer.put(torch.tensor([token]))


@pytest.fixture
def stub():
    stub = Stub()
    with Here(Served(stub, stub.tokenizer, ["stub"])) as here:
        stub.url, stub.client, stub.served = here.url, here.client, here.served
        yield stub


def generated(made, prompt: str, loops: int, tokens: int = 12) -> str:
    model, tokenizer = tiny_model(dtype=torch.float32, vocab_size=len(byte_tokenizer())), byte_tokenizer()
    model = type(model).from_pretrained(made / "chatty").eval()
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    return tokenizer.decode(
        model.generate(ids, max_new_tokens=tokens, do_sample=False, num_loops=loops)[0, ids.shape[1] :],
        skip_special_tokens=True,
    )


def said(text: str) -> dict:
    """Return a chat request with this message after HELLO."""
    return {"extra_body": {"generation_config": script("user:hello\nassistant:", text)}}


def streamed(stream) -> tuple[str, list, list]:
    """Return the text of a chat's stream, its tool calls, and the reasons why it ended."""
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
    for running, names in zip(servers, (("chatty@2", "chatty", str(made / "chatty")), ("small@1", "small"))):
        assert [model.id for model in running.client.models.list()] == [names[0]]
        for name in names:
            assert running.client.models.retrieve(name).id == names[0]
            assert running.client.completions.create(model=name, prompt="a", max_tokens=1).model == names[0]
        status, answer = post(f"{running.url}/v1/completions", b'{"prompt": "a", "max_tokens": 1}')  # and none
        assert (status, json.loads(answer)["model"]) == (200, names[0])
        with pytest.raises(openai.NotFoundError, match=f"use '{names[0]}'"):
            running.client.models.retrieve("other/model")


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
        answer = api.create(model="chatty", **call, stop=stop, extra_body=body, max_tokens=len("one\ntwo\n\n"))
        assert answer.choices[0].finish_reason == "stop"  # and not the limit, which it comes with


def test_a_stop_string_that_begins_in_the_prompt_does_not_end_the_answer(chatty):
    config = script("if x:\n", "\ny")
    answer = chatty.client.completions.create(
        model="chatty", prompt="if x:\n", stop="\n\n", extra_body={"generation_config": config}
    )
    assert answer.choices[0].text == "\ny"


async def written(text: str, ends=(), stop=(), parser=None) -> list[dict]:
    """Return the pieces that a writer makes of a text that arrives in parts."""
    writer = Writer(byte_tokenizer(), list(stop), parser)
    writer.put(torch.tensor([[5, 6, 7]]))  # the prompt
    with contextlib.suppress(Ended):
        for start, end in zip((0, *ends), (*ends, None)):
            writer.put(torch.tensor(byte_tokenizer()(text[start:end]).input_ids))
    writer.close()
    return [piece async for piece in writer.pieces()]


@pytest.mark.parametrize(
    ("stop", "kept"), [(["aab"], "ca"), (["b", "ab"], "caa"), (["ca", "aabc"], ""), (["x"], "caaabcab"), ([], "caaabcab")]
)
def test_answers_are_cut_the_same_however_they_come(stop, kept):
    for ends in itertools.combinations(range(1, 8), 3):
        pieces = asyncio.run(written("caaabcab", ends, stop))
        assert "".join(piece["content"] for piece in pieces) == kept


def test_half_a_character_is_not_lost():
    """generate() leaves one if the limit falls inside it."""
    tokens = byte_tokenizer()("aé").input_ids[:-1]

    async def said():
        writer = Writer(byte_tokenizer(), [])
        for value in ([1], tokens):
            writer.put(torch.tensor(value))
        writer.close()
        return [piece["content"] async for piece in writer.pieces()]

    assert "".join(asyncio.run(said())) == byte_tokenizer().decode(tokens) == "a\N{REPLACEMENT CHARACTER}"


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
    template = answer_template(tokenizer, tools=True)
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
        assert answer_template(byte_tokenizer(chat_template=template), tools=True) is None


def test_a_template_without_tools_refuses_them(stub):
    stub.tokenizer.chat_template = "{{ messages }}"
    with pytest.raises(openai.BadRequestError, match="does not support tools"):
        stub.client.chat.completions.create(model="stub", messages=HELLO, tools=ADD)


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


def test_a_seed_repeats_an_answer_whatever_else_is_asked(chatty):
    call = {"model": "chatty", "prompt": "def", "max_tokens": 40, "temperature": 1.0}
    alone = chatty.client.completions.create(**call, seed=1).choices[0].text
    beside = {}

    def ask(seed):
        beside[seed] = chatty.client.completions.create(**call, seed=seed).choices[0].text

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert beside[1] == alone
    assert len(set(beside.values())) == 6


def test_samples_are_drawn_from_all_tokens(stub):
    """And not from the 50 likeliest, as generate() would by itself; unless the checkpoint or the request says so."""

    def settings(defaults=None, **fields):
        stub.served.model = SimpleNamespace(generation_config=GenerationConfig(**defaults or {}))
        return stub.served._settings(CompletionRequest(prompt="a", **fields), room=100)

    assert settings(temperature=1.0).top_k == 0
    assert settings({"top_k": 7}, temperature=1.0).top_k == 7
    assert settings({"top_k": 7}, temperature=1.0, generation_config='{"top_k": 9}').top_k == 9
    assert settings(generation_config='{"temperature": 0.5}').do_sample
    assert not settings({"do_sample": True, "top_k": 7}, temperature=0).do_sample
    assert not settings(temperature=1e-40).do_sample  # dividing by it would not give numbers
    assert not settings(generation_config='{"do_sample": true, "temperature": 0}').do_sample
    assert not settings(temperature=0.5, generation_config='{"do_sample": false}').do_sample
    assert settings({"do_sample": True, "top_p": 0.9}).top_p == 0.9
    assert settings({"max_new_tokens": 5}).max_new_tokens == 5
    assert settings({"max_new_tokens": 5}, max_tokens=7).max_new_tokens == 7
    assert settings(max_tokens=700).max_new_tokens == 100


@pytest.mark.parametrize("stop", ["\n\n", ["zz", "\n\n"]])
def test_settings_of_the_checkpoint_that_are_for_other_uses(chatty, monkeypatch, stop):
    """Beams cannot be streamed; stop strings of its own it has beside those of the request, and they are not shown either."""
    own = GenerationConfig(num_beams=3, num_return_sequences=2, stop_strings=stop, max_length=20, eos_token_id=2)
    monkeypatch.setattr(chatty.served.model, "generation_config", own)
    for text, said_until in (("one\n\ntwo", "one"), ("one END two", "one ")):
        call = {"model": "chatty", "messages": HELLO, "stop": "END", **said(text)}
        assert chatty.client.chat.completions.create(**call).choices[0].message.content == said_until
        assert streamed(chatty.client.chat.completions.create(**call, stream=True)) == (said_until, [], ["stop"])


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
        ({"prompt": "a" * POSITIONS}, 400, f"maximum context length is {POSITIONS} tokens, and the prompt has {POSITIONS}"),
        ({"prompt": ""}, 400, "the prompt is empty"),
        ({"prompt": ["a", "b"]}, 400, "prompt=.*valid string"),
        ({"max_tokens": 0}, 400, "max_tokens=0: .*greater than or equal to 1"),
        ({"temperature": -1}, 400, "temperature=-1: .*greater than or equal to 0"),
        ({"temperature": "hot"}, 400, "temperature='hot'"),
        ({"temperature": "1"}, 400, "temperature='1'"),
        ({"max_tokens": True}, 400, "max_tokens=True"),
        ({"top_p": 2}, 400, "top_p=2: .*less than or equal to 1"),
        ({"seed": -1}, 400, "seed=-1"),
        ({"stop": [""]}, 400, "stop.0='': .*at least 1 character"),
        ({"n": 2}, 400, "n=2: not supported"),
        ({"best_of": 2}, 400, "best_of=2: not supported"),
        ({"echo": True}, 400, "echo=True: not supported"),
        ({"logprobs": 0}, 400, "logprobs=0: not supported"),
        ({"suffix": "b"}, 400, "suffix='b': not supported"),
        ({"presence_penalty": 0.5}, 400, "presence_penalty=0.5: not supported"),
        ({"logit_bias": {"x": 1}}, 400, "logit_bias.x"),
        ({"extra_body": {"top_k": 5}}, 400, "top_k=5: not supported"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_bad_completions_are_refused_and_the_next_works(chatty, options, status, message, stream):
    with pytest.raises(openai.APIStatusError, match=message) as refused:
        list(chatty.client.completions.create(**{"model": "chatty", "prompt": "abc", "stream": stream} | options))
    assert refused.value.status_code == status
    assert chatty.client.completions.create(model="chatty", prompt="a", max_tokens=1).usage.completion_tokens == 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ("[]", r"generation_config=\[\]: "),
        ("{", "generation_config: Invalid JSON"),
        ('{"assistant_early_exit": 1}', "generation_config.assistant_early_exit=1: not supported"),
        ('{"num_beams": 2}', "generation_config.num_beams=2: not supported"),
        ('{"num_return_sequences": 2}', "generation_config.num_return_sequences=2: not supported"),
        ('{"return_dict_in_generate": true}', "generation_config.return_dict_in_generate=True: not supported"),
        ('{"cache_implementation": "quantized"}', "generation_config.cache_implementation='quantized': not supported"),
        ('{"use_cache": false}', "generation_config.use_cache=False: not supported"),
        ('{"stop_strings": "a"}', "generation_config.stop_strings='a': not supported"),
        ('{"max_length": 2}', "generation_config.max_length=2: not supported"),
        ('{"no_such_field": 1}', "generation_config.no_such_field=1: not supported"),
        ('{"top_p": 5}', "generation_config.top_p=5: .*less than or equal to 1"),
        ('{"temperature": "hot"}', "generation_config.temperature='hot'"),
        ('{"top_k": "5"}', "generation_config.top_k='5'"),
        ('{"temperature": NaN}', "generation_config.temperature=nan"),
        ('{"top_k": -1}', "generation_config.top_k=-1"),
        ('{"max_new_tokens": 0}', "generation_config.max_new_tokens=0"),
        ('{"do_sample": "maybe"}', "generation_config.do_sample='maybe'"),
        ('{"eos_token_id": "x"}', "generation_config.eos_token_id"),
        ('{"sequence_bias": [[[1], "x"]]}', "generation_config.sequence_bias.0.1='x'"),
        ('{"repetition_penalty": 1e-40}', "generation_config.repetition_penalty=1e-40"),
        ('{"sequence_bias": [[[999999], 1]]}', "vocabulary"),
        ('{"bad_words_ids": []}', "bad_words_ids"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_generation_config_is_checked_and_breaks_nothing(chatty, made, fields, message, stream):
    """Whoever asks next gets the answer as before."""
    call = {"model": "chatty", "prompt": "abc", "stream": stream, "extra_body": {"generation_config": fields}}
    with pytest.raises(openai.BadRequestError, match=message):
        list(chatty.client.completions.create(**call))
    answer = chatty.client.completions.create(model="chatty", prompt="def f(x):", max_tokens=3)
    assert answer.choices[0].text == generated(made, "def f(x):", 2, tokens=3)


def test_settings_of_generate_that_a_request_may_choose(chatty):
    """Each of them, with a value that generate() takes; those of the tests beside have their effect."""
    fields = {
        "max_new_tokens": 3, "min_new_tokens": 2, "do_sample": True, "temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.1,
        "typical_p": 0.9, "repetition_penalty": 1.1, "no_repeat_ngram_size": 2, "bad_words_ids": [[4], [5, 6]],
        "sequence_bias": [[[7], -1.0], [[8, 9], 2]], "suppress_tokens": [10], "eos_token_id": [2, 11],
    }  # fmt: skip
    assert set(fields) == set(Generation.model_fields)
    for chosen in ({name: value} for name, value in fields.items() if name != "max_new_tokens"):
        body = {"generation_config": json.dumps(chosen | {"max_new_tokens": 3})}
        answer = chatty.client.completions.create(model="chatty", prompt="abc", extra_body=body)
        assert 1 <= answer.usage.completion_tokens <= 3
    body = {"generation_config": json.dumps(fields)}
    assert chatty.client.completions.create(model="chatty", prompt="abc", extra_body=body).usage.completion_tokens >= 2


@pytest.mark.parametrize("stream", [False, True])
def test_what_only_generate_refuses_has_its_status_before_the_first_token(chatty, stream):
    call = {"model": "chatty", "prompt": "abc", "stream": stream, "logit_bias": {"999999": 1}}
    with pytest.raises(openai.BadRequestError, match="vocab"):
        list(chatty.client.completions.create(**call))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("chat", [False, True])
def test_a_failure_before_the_first_token_is_the_servers(stub, stream, chat):
    def generate(streamer, **_):
        raise RuntimeError('out of "memory"\nat last')

    stub.generate = generate
    api, prompt = (stub.client.chat.completions, {"messages": HELLO}) if chat else (stub.client.completions, {"prompt": "a"})
    with pytest.raises(openai.InternalServerError, match="out of") as failed:
        list(api.create(model="stub", stream=stream, **prompt))
    assert failed.value.body["message"] == 'out of "memory"\nat last'


def test_a_failure_in_the_middle_is_told_in_the_stream(stub):
    def generate(streamer, **_):
        streamer.put(torch.tensor([[1]]))
        stub.says(streamer, "so far")
        raise RuntimeError('out of "memory"\nat last')

    stub.generate = generate
    for _ in range(5):  # on one connection, which a failure does not end
        with pytest.raises(openai.InternalServerError):
            stub.client.chat.completions.create(model="stub", messages=HELLO)
    pieces = []
    with pytest.raises(openai.APIError, match='out of "memory"\nat last'):
        pieces.extend(stub.client.chat.completions.create(model="stub", messages=HELLO, stream=True))
    assert "".join(piece.choices[0].delta.content for piece in pieces) == "so far"


@pytest.mark.parametrize(
    ("path", "prompt"), [("/v1/chat/completions", {"messages": HELLO}), ("/v1/completions", {"prompt": "a"})]
)
def test_streams_end_with_done(chatty, stub, path, prompt):
    def fails(streamer, **_):
        streamer.put(torch.tensor([[1]]))
        stub.says(streamer, "x")
        raise RuntimeError

    stub.generate = fails
    for server, model in ((chatty, "chatty"), (stub, "stub")):
        status, text = post(
            server.url + path, json.dumps({"model": model, "max_tokens": 3, "stream": True} | prompt).encode()
        )
        *events, last, end = text.split("\n\n")
        assert (status, last, end) == (200, "data: [DONE]", "")
        assert [json.loads(event.removeprefix("data: ")) for event in events]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_what_is_written_for_it(stub, stream):
    """Also while it waits for its turn: then nothing is begun."""
    ended, begun = threading.Event(), []

    def generate(streamer, input_ids, **_):
        streamer.put(input_ids)
        begun.append(input_ids.shape[1])
        try:
            while True:
                stub.says(streamer, "a")
                time.sleep(0.01)
        except Ended:
            ended.set()
            raise

    stub.generate = generate
    for prompt in ("first", "second one"):
        body = json.dumps({"model": "stub", "prompt": prompt, "max_tokens": 900, "stream": stream}).encode()
        client = socket.create_connection(("127.0.0.1", int(stub.url.rpartition(":")[2])))
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n")
        client.sendall(b"Content-Length: %d\r\n\r\n%s" % (len(body), body))
        if prompt == "first":
            first = client
            while not begun:
                time.sleep(0.01)
        else:
            time.sleep(0.3)  # it is in the queue
            client.close()
            time.sleep(0.3)
    assert not ended.is_set()
    first.close()
    assert ended.wait(10)
    stub.generate = lambda streamer, **_: (streamer.put(torch.tensor([[1]])), stub.says(streamer, "next"))
    assert stub.client.completions.create(model="stub", prompt="a").choices[0].text == "next"
    assert begun == [len("first")]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 2}, "n=2"),
        ({"logprobs": True}, "logprobs=True"),
        ({"top_logprobs": 3}, "top_logprobs=3"),
        ({"response_format": {"type": "json_object"}}, "response_format="),
        ({"tools": ADD, "tool_choice": "required"}, "tool_choice='required'"),
        ({"tools": ADD, "tool_choice": ADD[0]}, "tool_choice=.*'auto' or 'none'"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type='web_search': .*'function'"),
        ({"tools": ADD, "parallel_tool_calls": False}, "parallel_tool_calls=False"),
        ({"reasoning_effort": "high"}, "reasoning_effort='high': not supported"),
        ({"messages": []}, "messages=.*at least 1 item"),
        ({"messages": [{"content": "a"}]}, "messages.0.role: Field required"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "image_url.*'text'",
        ),
        ({"messages": [{"role": "user", "content": "a" * POSITIONS}]}, "shorten it"),
        ({"extra_body": {"chat_template_kwargs": {"tokenize": True}}}, "tokenize"),
        ({"extra_body": {"deep": json.loads("[" * 500 + "]" * 500)}}, "deep=.*not supported"),
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
    status, answer = post(chatty.url + "/v1/completions", body)
    assert status == 400
    assert json.loads(answer)["error"]["message"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--continuous-batching"], "--continuous-batching: no such option without vLLM.* one after another"),
        (["--max-model-len", "99"], "--max-model-len 99: no such option without vLLM.*--compile"),
        (["--trust-remote-code"], "--trust-remote-code: no such option"),
        (["--tool-call-parser", "hermes"], "--tool-call-parser hermes: no such option.* found by the chat template"),
        (["--quantization", "gguf"], "--quantization.*bnb-4bit"),
        (["--port", "x"], "--port.*int"),
        (["--port", "99999"], "port=99999 is not available"),
        (["--chat-template-kwargs", "[]"], "--chat-template-kwargs: \\[\\] must be a JSON object"),
        (["--chat-template-kwargs", "{"], "--chat-template-kwargs: { must be a JSON object"),
        (["--dtype", "int8"], "dtype='int8' is unknown"),
        (["--device", "cuda:99"], "device='cuda:99' is not available"),
        (["--host", "no.such.host.invalid"], "no.such.host.invalid.* is not available"),
        (["--host", "a" * 70], "is not available"),
        (["--chat-template-kwargs", "[" * 100_000], "must be a JSON object"),
    ],
)
def test_options_that_cannot_be(made, arguments, message):
    with pytest.raises((ServeError, CheckpointError), match=message):
        serve_with_transformers(str(made / "plain"), 2, ["plain"], arguments)


def test_a_port_in_use(made):
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ServeError, match="use another port"):
        serve_with_transformers(str(made / "plain"), 2, ["plain"], ["--port", str(taken.getsockname()[1])])


def test_without_the_packages_of_the_server(made, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(ServeError, match=r'needs more packages \(.*uvicorn.*\): pip install "parloop\[serve\]"'):
        serve_with_transformers(str(made / "plain"), 2, ["plain"])


def test_it_says_what_it_is(chatty):
    """For the record of an evaluation."""
    assert server_version(f"{chatty.url}/v1") == f"transformers {transformers.__version__}"
