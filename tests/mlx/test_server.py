"""`parloop serve --engine mlx`: mlx-lm's own server over HTTP on loopback, as the stock OpenAI client and `parloop check` see it."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest

from parloop.check import check_checkpoint, check_endpoint
from parloop.check.check import PROBE
from parloop.errors import ExportError, ServeError
from parloop.export.export import export
from parloop.serve.server import serve

ANSWERS = json.loads((PROBE / "answers.json").read_text())
RIGHT = dict(zip(ANSWERS["prompts"], ANSWERS["variants"][0]["answers"]))
TOKENS = ANSWERS["tokens"]


class Server:
    def __init__(self, checkpoint: Path, *arguments: str, scratch: Path):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.log, self.scratch = scratch / "server.log", scratch
        command = [
            sys.executable,
            "-m",
            "parloop",
            "serve",
            str(checkpoint),
            "--engine",
            "mlx",
            "--port",
            str(port),
            *arguments,
        ]
        with self.log.open("w") as output:
            environment = {**os.environ, "TMPDIR": str(scratch)}
            self.process = subprocess.Popen(command, stdout=output, stderr=output, env=environment, start_new_session=True)
        self.url = f"http://127.0.0.1:{port}/v1"
        self.client = openai.OpenAI(base_url=self.url, api_key="none", max_retries=0, timeout=120)
        end = time.monotonic() + 240
        while time.monotonic() < end:
            assert self.process.poll() is None, self.log.read_text()[-4000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                return
            except OSError:
                time.sleep(0.5)
        raise TimeoutError(self.log.read_text()[-4000:])

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


@pytest.fixture(scope="module")
def server(probe, tmp_path_factory):
    running = Server(probe, scratch=tmp_path_factory.mktemp("serve"))
    yield running
    assert running.stop() == 0
    assert not list(running.scratch.glob("parloop-mlx-*"))  # what was made for it is removed


def test_the_model_is_listed_with_its_loop_count(server):
    assert [model.id for model in server.client.models.list()] == ["probe@2"]


@pytest.mark.parametrize("name", ["probe@2", "probe", "default_model"])
def test_completions_with_log_probabilities(server, name):
    for prompt, right in RIGHT.items():
        answer = server.client.completions.create(
            model=name, prompt=prompt, max_tokens=TOKENS, temperature=0, extra_body={"logprobs": True}
        )
        choice = answer.choices[0]
        assert (choice.text, choice.finish_reason) == (right["text"], "length")
        found = [token["logprob"] for token in choice.logprobs.content]
        assert found == pytest.approx(right["logprobs"], abs=1e-3)


def test_requests_at_the_same_time(server):
    def ask(prompt: str) -> str:
        return (
            server.client.completions.create(model="probe", prompt=prompt, max_tokens=TOKENS, temperature=0).choices[0].text
        )

    prompts = list(RIGHT) * 3
    with ThreadPoolExecutor(len(prompts)) as pool:
        assert list(pool.map(ask, prompts)) == [RIGHT[prompt]["text"] for prompt in prompts]


def test_chat_whole_streamed_and_stopped(server):
    prompt, right = next(iter(RIGHT.items()))
    options = {"model": "probe@2", "messages": [{"role": "user", "content": prompt}], "temperature": 0, "max_tokens": TOKENS}
    whole = server.client.chat.completions.create(**options)
    assert whole.choices[0].message.content == right["text"]
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (len(prompt), TOKENS)
    parts = list(server.client.chat.completions.create(**options, stream=True))
    assert "".join(part.choices[0].delta.content or "" for part in parts) == right["text"]
    assert len(parts) > 2
    stopped = server.client.chat.completions.create(**options, stop=[right["text"][6:8]])
    assert stopped.choices[0].message.content == right["text"][: right["text"].index(right["text"][6:8])]
    assert stopped.choices[0].finish_reason == "stop"


def test_a_text_is_continued_exactly_where_its_answer_ended(server):
    """This ends mlx-lm 0.32's own server, and all requests that wait there."""
    prompt, right = next(iter(RIGHT.items()))
    text = prompt
    for _ in range(3):
        answer = server.client.completions.create(model="probe", prompt=text, max_tokens=TOKENS // 3, temperature=0)
        text += answer.choices[0].text
        assert text == prompt + right["text"][: len(text) - len(prompt)]
    assert answer.usage.prompt_tokens_details.cached_tokens > 0


def test_no_request_makes_it_load_another_model(server, tmp_path):
    for asked, told in (
        ({"model": "probe@1"}, "'probe@1' is not served here: use 'probe@2'"),
        ({"model": str(PROBE)}, "not served here"),
        ({"model": "probe", "extra_body": {"adapters": str(tmp_path)}}, "--adapter-path"),
    ):
        with pytest.raises(openai.NotFoundError) as refused:
            server.client.completions.create(**asked, prompt="a", max_tokens=1)
        assert told in refused.value.response.json()["error"]


def test_the_check_calls_it_right_also_the_second_time(server):
    for _ in range(2):
        verdict = check_endpoint(server.url, "probe@2")
        assert verdict.right, verdict
        assert "log-probabilities" in verdict.details[0]


def test_the_loop_dial_and_quantised_caches(probe, tmp_path):
    """Checked with one loop, one loop is what it is found to have."""
    running = Server(probe, "--loops", "1", scratch=tmp_path)
    assert [model.id for model in running.client.models.list()] == ["probe@1"]
    assert check_endpoint(running.url, "probe@1").faults == ("one loop",)
    assert running.stop() == 0
    running = Server(probe, "--kv-bits", "8", "--kv-group-size", "32", "--quantized-kv-start", "0", scratch=tmp_path)
    assert check_endpoint(running.url, "probe").right
    assert running.stop() == 0


def test_an_export_in_8_bits_is_served_and_right(tmp_path):
    """Its model file needs no trust here, since our class is registered."""
    assert check_checkpoint(export(PROBE, tmp_path / "probe8", to="mlx", bits=8), "mlx").right


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--model", "x"], "--model cannot be given"),
        (["--draft-model=x"], "--draft-model cannot be given here: a rejected draft"),
        (["--hf-overrides", '{"vocab_size": 1}'], "loop count only"),
    ],
)
def test_options_that_cannot_be(arguments, told):
    with pytest.raises(ServeError, match=told):
        serve(str(PROBE), None, "mlx", arguments)


def test_a_checkpoint_that_mlx_cannot_compute_is_refused_at_the_start(probe, tmp_path):
    for path in probe.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((probe / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}))
    with pytest.raises(ExportError, match="rope_type='dynamic'"):
        serve(str(tmp_path), None, "mlx", [])
