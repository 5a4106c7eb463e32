"""Our server for one loop count, started for a benchmark and stopped after it."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path
from typing import Any

from rich.console import Console

from ..errors import EvaluationError
from ..serve.server import served_names

START_SECONDS = 1800  # 15 GB of weights from a slow disk


class Server:
    """`parloop serve` in a process of its own.

    Attributes:
        url: its address, with /v1.
        model: the model's name at the server, NAME@R.
        log: file of its output.
        engine: its engine and version.
    """

    def __init__(self, checkpoint: str, loops: int, log: Path, options: list[str]):
        self.checkpoint, self.loops, self.log, self.options = checkpoint, loops, log, options
        self.model = served_names(checkpoint, loops)[0]
        self.process: subprocess.Popen | None = None
        self.url = self.engine = ""

    def start(self) -> None:
        """Start the server, and wait until it answers.

        Raises:
            EvaluationError: it ended, or did not answer in time.
        """
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}/v1"
        command = [
            sys.executable,
            "-m",
            "parloop",
            "serve",
            self.checkpoint,
            "--loops",
            str(self.loops),
            "--port",
            str(port),
        ]
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("a", encoding="utf-8") as output:
            self.process = subprocess.Popen([*command, *self.options], stdout=output, stderr=output, start_new_session=True)
        deadline = time.time() + START_SECONDS
        while time.time() < deadline:
            if self.process.poll() is not None:
                raise EvaluationError(
                    f"the server ended with {self.process.returncode} at its start:\n{_tail(self.log)}\n({self.log})"
                )
            with contextlib.suppress(EvaluationError):
                check_model(self.url, self.model)
                self.engine = server_version(self.url)
                return
            time.sleep(0.5)
        self.stop()
        raise EvaluationError(f"the server did not answer within {START_SECONDS} s ({self.log}).")

    @property
    def pid(self) -> int:
        """Id of the process; 0 before it is started."""
        return 0 if self.process is None else self.process.pid

    def alive(self) -> bool:
        """Return whether the process is running."""
        return self.process is not None and self.process.poll() is None

    def stop(self) -> None:
        """Stop the server."""
        if self.process is None:
            return
        for how in (signal.SIGINT, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, how)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(20)
                return


@contextlib.contextmanager
def serving(checkpoint: str, loops: int, log: Path, options: list[str], console: Console) -> Iterator[Server]:
    """Start a server, and stop it at the end of the block."""
    server = Server(checkpoint, loops, log, options)
    try:
        with console.status(f"starting the server: {checkpoint} with {loops} loop(s)"):
            server.start()
        yield server
    finally:
        server.stop()


def ask(url: str, path: str) -> Any:
    """Return a server's answer to a GET request, read from JSON.

    Raises:
        EvaluationError: there is no answer, or it is not JSON.
    """
    try:
        with urllib.request.urlopen(url + path, timeout=20) as answer:
            return json.loads(answer.read())
    except (
        OSError,
        ValueError,
        HTTPException,
        OverflowError,
        RecursionError,
    ) as error:  # an invalid address raises these too
        raise EvaluationError(f"{url}{path} gives no answer ({error}): is the server there?") from error


def check_model(url: str, model: str) -> None:
    """Check that a server has a model.

    Raises:
        EvaluationError: the server does not answer, or has no such model.
    """
    listed = ask(url, "/models")
    try:
        names = [entry.get("id") for entry in listed.get("data", [])]
    except (AttributeError, TypeError) as error:
        raise EvaluationError(
            f"{url}/models lists no models as OpenAI's servers do: is /v1 missing from its address?"
        ) from error
    if model not in names:
        raise EvaluationError(f"the server at {url} has no model {model!r}; it has {', '.join(map(str, names))}.")


def server_version(url: str) -> str:
    """Return a server's engine and version: vLLM's reports its version, parloop's own server without vLLM also its
    engine."""
    answer: Any = None
    with contextlib.suppress(EvaluationError):
        answer = ask(url.removesuffix("/v1"), "/version")
    known = isinstance(answer, dict) and "version" in answer
    return f"{answer.get('engine', 'vLLM')} {answer['version']}" if known else "unknown"


def _tail(log: Path, lines: int = 8) -> str:
    return "\n".join(log.read_text(errors="replace", encoding="utf-8").splitlines()[-lines:])
