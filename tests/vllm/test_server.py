"""`parloop serve` over HTTP on loopback: what the stock OpenAI client does, and a soak."""

import asyncio
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import openai
import pytest
from conftest import TOLERANCE, Checkpoint, random_checkpoint

from parloop.corpus.tokenizer import train_tokenizer
from parloop.evaluate.serving import server_version
from parloop.serve.plugin import vllm_version

LENGTH = 320  # tokens: the longest text that the servers take
TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
ENVIRONMENT = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}


class Server:
    def __init__(self, checkpoint: Path, *arguments: str, log: Path):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.log = log
        own = ["--port", str(self.port), "--host", "127.0.0.1", "--dtype", "float32", "--max-model-len", str(LENGTH)]
        command = [sys.executable, "-m", "parloop", "serve", str(checkpoint), *own, "--block-size", "32", *arguments]
        with log.open("w") as output:
            self.process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, env=ENVIRONMENT, start_new_session=True
            )
        self.url = f"http://127.0.0.1:{self.port}"
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)

    def wait(self, seconds: float = 240) -> "Server":
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            assert self.process.poll() is None, self.log.read_text()[-4000:]
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=5)
            except OSError:
                time.sleep(0.5)
            else:
                return self
        raise TimeoutError(self.log.read_text()[-4000:])

    def metric(self, name: str) -> float:
        lines = urllib.request.urlopen(f"{self.url}/metrics", timeout=10).read().decode().splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith((name + "{", name + " ")))

    def stop(self) -> None:
        os.killpg(self.process.pid, signal.SIGINT)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Three loops, 512 tokens of bytes and merges, and a chat template."""
    folder = random_checkpoint(tmp_path_factory.mktemp("serve") / "coder", plt_num_loops=3, eos_token_id=2)
    tokenizer = train_tokenizer([Path(argparse_source()).read_text()], 512)
    assert len(tokenizer) == 512
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return Checkpoint(folder)


def argparse_source() -> str:
    import argparse

    return argparse.__file__


@pytest.fixture(scope="module")
def server(checkpoint):
    running = Server(
        checkpoint.folder,
        "--num-gpu-blocks-override", "56", "--max-num-seqs", "8", "--max-num-batched-tokens", "128",
        "--prefix-cache-retention-interval", "32", "--enable-auto-tool-choice", "--tool-call-parser", "hermes",
        "--structured-outputs-config", '{"backend": "xgrammar", "disable_any_whitespace": true}',
        log=checkpoint.folder / "server.log",
    )  # fmt: skip
    yield running.wait()
    running.stop()


def complete(server, prompt: list[int], max_tokens: int = 24, **options):
    """Token ids, and the server's choice."""
    body = {"return_token_ids": True, "ignore_eos": True} | options.pop("extra_body", {})
    answer = server.client.completions.create(
        model="coder", prompt=prompt, max_tokens=max_tokens, temperature=0, extra_body=body, **options
    )
    return answer.choices[0].model_extra["token_ids"], answer.choices[0]


def expect_greedy(case, prompt: list[int], answer: list[int]) -> None:
    assert answer, "no tokens"
    likeliest = case.reference([*prompt, *answer[:-1]])[len(prompt) - 1 :].argmax(1)
    assert likeliest.tolist() == answer


def test_names_show_the_loop_count(server):
    names = [model.id for model in server.client.models.list()]
    assert names[:2] == ["coder@3", "coder"]


def test_it_says_what_it_is(server):
    """For the record of an evaluation."""
    assert server_version(f"{server.url}/v1") == f"vLLM {vllm_version()}"


def test_completions(server, checkpoint):
    for T in (1, 31, 32, 33, 200):
        prompt = checkpoint.prompt(T)
        answer, choice = complete(server, prompt, logprobs=5)
        expect_greedy(checkpoint, prompt, answer)
        expected = checkpoint.reference([*prompt, *answer[:-1]])[len(prompt) - 1 :].max(1)
        np.testing.assert_allclose(choice.logprobs.token_logprobs, expected, atol=TOLERANCE)


def test_several_samples(server, checkpoint):
    answer = server.client.completions.create(
        model="coder", prompt=checkpoint.prompt(40), n=4, temperature=1.0, seed=3, max_tokens=12
    )
    assert len({choice.text for choice in answer.choices}) == 4


def test_chat_whole_and_streamed(server):
    messages = [{"role": "user", "content": "def add(a, b):"}]
    whole = server.client.chat.completions.create(
        model="coder", messages=messages, temperature=0, max_tokens=20, logprobs=True, top_logprobs=3
    )
    assert len(whole.choices[0].logprobs.content) == whole.usage.completion_tokens
    stream = server.client.chat.completions.create(
        model="coder@3", messages=messages, temperature=0, max_tokens=20, stream=True, stream_options={"include_usage": True}
    )
    parts = list(stream)
    assert "".join(part.choices[0].delta.content or "" for part in parts if part.choices) == whole.choices[0].message.content
    assert parts[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_stop_strings(server, checkpoint):
    text = server.client.completions.create(model="coder", prompt="import os", temperature=0, max_tokens=40).choices[0].text
    stop = text[len(text) // 2 : len(text) // 2 + 3]
    stopped = server.client.completions.create(model="coder", prompt="import os", temperature=0, max_tokens=40, stop=[stop])
    assert stopped.choices[0].text == text[: text.index(stop)]
    assert stopped.choices[0].finish_reason == "stop"


WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}


def test_structured_output(server):
    answer = server.client.completions.create(
        model="coder", prompt="x", max_tokens=100, temperature=0, extra_body={"structured_outputs": {"json": WEATHER}}
    )
    assert json.loads(answer.choices[0].text)["city"] in ("Paris", "Rome")


def test_a_tool_call_that_is_asked_for(server):
    """Hermes's form, which random weights write as the grammar makes them; it is parsed."""
    answer = server.client.chat.completions.create(
        model="coder",
        messages=[{"role": "user", "content": "the weather in Rome"}],
        tools=[{"type": "function", "function": {"name": "weather", "parameters": WEATHER}}],
        tool_choice={"type": "function", "function": {"name": "weather"}},
        max_tokens=100,
        temperature=0,
    )
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.name == "weather"
    json.loads(call.function.arguments)


def test_bad_requests_and_the_next_one(server, checkpoint):
    with pytest.raises(openai.NotFoundError, match="other"):
        server.client.completions.create(model="other", prompt="x")
    with pytest.raises(openai.NotFoundError, match="coder@2"):  # the same weights at another loop count are another model
        server.client.completions.create(model="coder@2", prompt="x")
    with pytest.raises(openai.BadRequestError, match=str(LENGTH)):
        server.client.completions.create(model="coder", prompt=checkpoint.prompt(LENGTH + 1))
    with pytest.raises(openai.BadRequestError):
        server.client.completions.create(model="coder", prompt="x", temperature=-1)
    request = urllib.request.Request(
        f"{server.url}/v1/completions", data=b'{"model": "coder", "prompt": ', headers={"Content-Type": "application/json"}
    )
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(request, timeout=10)
    assert error.value.code in (400, 422)
    prompt = checkpoint.prompt(40)
    expect_greedy(checkpoint, prompt, complete(server, prompt)[0])


def test_soak(server, checkpoint):
    """200 requests of random lengths and arrivals, a third of which vanish, in a cache that holds a few: every answer that
    comes is the reference's, and at the end nothing is held."""
    rng = random.Random(0)
    shared = [checkpoint.prompt(160), checkpoint.prompt(96)]
    answers: list[tuple[list[int], list[int]]] = []
    aborted = 0
    before = server.metric("vllm:num_preemptions_total")

    async def one(client, i: int) -> None:
        nonlocal aborted
        prompt = [rng.randrange(512) for _ in range(rng.choice([1, 5, 31, 32, 33, 64, 150, 230]))]
        if rng.random() < 0.4:
            prompt = rng.choice(shared)[: rng.randrange(1, 160)] + prompt[:40]
        vanish = rng.random() < 0.33
        wait, length, after = rng.random() * 12, rng.randrange(4, 48), rng.randrange(1, 12)
        await asyncio.sleep(wait)
        got: list[int] = []
        stream = await client.completions.create(
            model="coder", prompt=prompt, max_tokens=length, temperature=0, stream=True,
            extra_body={"return_token_ids": True, "ignore_eos": True},
        )  # fmt: skip
        async for part in stream:
            for choice in part.choices:
                got += choice.model_extra.get("token_ids") or []
            if vanish and len(got) >= after:
                await stream.close()
                aborted += 1
                return
        assert len(got) == length
        answers.append((prompt, got))

    async def everyone() -> None:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120) as client:
            await asyncio.gather(*(one(client, i) for i in range(200)))

    asyncio.run(everyone())
    assert aborted > 30
    assert len(answers) == 200 - aborted
    for prompt, answer in answers:
        expect_greedy(checkpoint, prompt, answer)
    assert server.metric("vllm:num_preemptions_total") > before
    assert server.metric("vllm:prefix_cache_hits_total") > 0
    end = time.monotonic() + 20
    while server.metric("vllm:kv_cache_usage_perc") > 0 and time.monotonic() < end:
        time.sleep(0.5)
    for gauge in ("kv_cache_usage_perc", "num_requests_running", "num_requests_waiting"):
        assert server.metric(f"vllm:{gauge}") == 0


def test_the_same_weights_at_one_loop(checkpoint, tmp_path):
    running = Server(checkpoint.folder, "--loops", "1", "--enforce-eager", log=tmp_path / "log")
    try:
        running.wait()
        assert next(iter(running.client.models.list())).id == "coder@1"
        prompt = checkpoint.prompt(40)
        answer, _ = complete(running, prompt)
        likeliest = checkpoint.reference([*prompt, *answer[:-1]], num_loops=1)[len(prompt) - 1 :].argmax(1)
        assert likeliest.tolist() == answer
        assert "trained with 3" in running.log.read_text()
    finally:
        running.stop()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["nowhere"], "there is no such folder"),
        (["CHECKPOINT", "--loops", "0"], "at least 1"),
        (["CHECKPOINT", "--loops", "2", "--hf-overrides", '{"plt_num_loops": 1}'], "give one of the two"),
        (["CHECKPOINT", "--hf-overrides", "{plt"], "is not JSON"),
        (["CHECKPOINT", "--engine", "sglang"], "use one of"),
    ],
)
def test_what_cannot_be_served(checkpoint, arguments, told):
    arguments = [str(checkpoint.folder) if a == "CHECKPOINT" else a for a in arguments]
    result = subprocess.run(
        [sys.executable, "-m", "parloop", "serve", *arguments], capture_output=True, text=True, env=ENVIRONMENT, timeout=120
    )
    assert result.returncode == 2
    assert told in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr
