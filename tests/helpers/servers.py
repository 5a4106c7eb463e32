"""The server without vLLM, in a process of its own or in this one, and answers that are scripted."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import openai
import uvicorn

from parloop.serve.fallback import load, parse_options
from parloop.serve.fallback_server import Served, build_app
from tests.helpers.chats import byte_tokenizer


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Running:
    """`parloop serve` in a process of its own, and OpenAI's client of it."""

    def __init__(self, checkpoint, log, *arguments):
        port = free_port()
        self.url, self.log = f"http://127.0.0.1:{port}", log
        options = ["--engine", "transformers", "--port", str(port), *arguments]
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        with log.open("w") as output:
            command = [sys.executable, "-m", "parloop", "serve", str(checkpoint), *options]
            self.process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=30)

    def wait(self):
        deadline = time.monotonic() + 240  # on a busy machine
        while time.monotonic() < deadline:
            try:
                return urllib.request.urlopen(f"{self.url}/health", timeout=5).read()
            except OSError:
                assert self.process.poll() is None, self.log.read_text()
                time.sleep(0.1)
        raise AssertionError(self.log.read_text())


class Here:
    """The server in this process, which has loaded all that it needs already, and OpenAI's client of it."""

    def __init__(self, served):
        port = free_port()
        self.served, self.url = served, f"http://127.0.0.1:{port}"
        self.server = uvicorn.Server(uvicorn.Config(build_app(served), port=port, log_level="warning"))
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=30)

    def __enter__(self):
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        while not self.server.started:
            assert self.thread.is_alive()
            time.sleep(0.01)
        return self

    def __exit__(self, *_):
        self.server.should_exit = True
        self.thread.join(20)
        self.server.force_exit = True  # where a test failed and left an answer that does not end


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


def served_checkpoint(checkpoint, names, loops=2):
    return Served(*load(str(checkpoint), loops, parse_options(["--device", "cpu"])), names)
