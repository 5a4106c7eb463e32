"""Proxy between a tool and the server: counts requests and tokens, and detects a server that fails for good.

Tools handle a failing server differently: some retry for ever, some take the error for an answer. So they send requests to a proxy on this
machine that forwards them, records tokens and seconds of every request, and gives up for them.
"""

import contextlib
import http.client
import json
import re
import socket
import struct
import threading
import time
from collections.abc import Iterable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

GIVE_UP = 12  # failed requests in a row
ADDRESS = re.compile(r"http://127\.0\.0\.1:\d+/v1")
HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "host", "content-length", "accept-encoding", "te", "upgrade"}


class Listener(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # with the default of 5, the ninth concurrent request of a tool waits a second


class Meter:
    """A proxy for one server.

    Attributes:
        url: address that it listens at, with /v1.
        failed_in_a_row: number of failed requests since the last good one.
        last_failure: the last failure, in words.
    """

    def __init__(self, upstream: str, log: Path, request_seconds: float = 900):
        self.upstream, self.log, self.request_seconds = upstream.rstrip("/"), log, request_seconds
        self.failed_in_a_row, self.last_failure = 0, ""
        self.lock = threading.Lock()
        self.server = _listener(_handler(self), log.with_name("port"))
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"

    @contextlib.contextmanager
    def running(self) -> Iterator["Meter"]:
        """Run the proxy for the duration of the block."""
        thread = threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.server.shutdown()
            self.server.server_close()

    @property
    def given_up(self) -> bool:
        """Whether too many requests in a row have failed."""
        return self.failed_in_a_row >= GIVE_UP

    def count(self, path: str, status: int, seconds: float, body: bytes, problem: str) -> None:
        """Record a request that was answered, or was not (status 0)."""
        usage: dict[str, Any] = {}
        if not problem and status == 200:
            usage, problem = _usage(body)
        if not problem and status >= 400:
            problem = f"{status}: {body[:300].decode('utf-8', 'replace')}"
        entry = {
            "time": time.time(),
            "path": path,
            "status": status,
            "seconds": round(seconds, 3),
            "prompt_tokens": usage.get("prompt_tokens", 0),
            "completion_tokens": usage.get("completion_tokens", 0),
        }
        if problem:
            entry["problem"] = problem[:500]
        with self.lock:
            if path.endswith(("completions", "responses")):
                self.failed_in_a_row = self.failed_in_a_row + 1 if problem else 0
                self.last_failure = problem or self.last_failure
            with self.log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")


def _listener(handler: type[BaseHTTPRequestHandler], kept: Path) -> Listener:
    """Listen at the port of earlier runs, or at a new one if it is taken.

    Some tools continue only with the address that they began with.
    """
    kept.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(OSError, ValueError, OverflowError):
        return Listener(("127.0.0.1", int(kept.read_text(encoding="utf-8"))), handler)
    listener = Listener(("127.0.0.1", 0), handler)
    kept.write_text(str(listener.server_address[1]), encoding="utf-8")
    return listener


def move(kept: Iterable[Path], url: str) -> None:
    """Write this run's address into files that hold a tool's settings, in case the port has changed."""
    for path in kept:
        before = path.read_text(encoding="utf-8")
        now = ADDRESS.sub(url, before)
        if now != before:
            path.write_text(now, encoding="utf-8")


def _usage(body: bytes) -> tuple[dict[str, Any], str]:
    """Return the token counts of an answer, or of a stream's last event that has them; and what is wrong with the answer."""
    text = body.decode("utf-8", "replace")
    if text.lstrip().startswith("data:"):
        usage: dict[str, Any] = {}
        for line in text.splitlines():
            if line.startswith("data:") and "[DONE]" not in line:
                try:
                    usage = json.loads(line[5:]).get("usage") or usage
                except ValueError:
                    return usage, "an event that is not JSON"
        return usage, ""
    try:
        answer = json.loads(text)
    except ValueError:
        return {}, f"an answer that is not JSON: {text[:200]}"
    return (answer.get("usage") or {} if isinstance(answer, dict) else {}), ""


def _handler(meter: Meter) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def _pass_on(self) -> None:
            target = urlsplit(meter.upstream)  # changes when our server is restarted
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = target.path.removesuffix("/v1") + self.path
            headers = {name: value for name, value in self.headers.items() if name.lower() not in HOP_BY_HOP}
            started, status, seen, problem, refusal = time.perf_counter(), 0, b"", "", 0
            kind = http.client.HTTPSConnection if target.scheme == "https" else http.client.HTTPConnection
            connection = kind(target.netloc, timeout=meter.request_seconds)
            try:
                connection.request(self.command, path, body or None, headers | {"Accept-Encoding": "identity"})
                answer = connection.getresponse()
                status = answer.status
                self.send_response(status)
                for name, value in answer.getheaders():
                    if name.lower() not in HOP_BY_HOP:
                        self.send_header(name, value)
                self.send_header("Connection", "close")  # so that streams need no length
                self.end_headers()
                self.close_connection = True
                while chunk := answer.read1(65536):
                    seen += chunk
                    self.wfile.write(chunk)
                    self.wfile.flush()
                if self.command != "HEAD" and len(seen) < int(answer.getheader("Content-Length") or 0):
                    raise http.client.IncompleteRead(seen)
            except TimeoutError:
                problem, refusal = f"no answer within {meter.request_seconds:g} s", 504
            except (OSError, http.client.HTTPException) as error:
                problem, refusal = f"{type(error).__name__}: {error}", 502
            finally:
                connection.close()
                meter.count(self.path, status, time.perf_counter() - started, seen, problem)
            if refusal:  # after counting, since the refused client may read the counts
                self._refuse(status, refusal, problem)

        def _refuse(self, sent: int, status: int, problem: str) -> None:
            self.close_connection = True
            if (
                sent
            ):  # too late for another status; without a length, only a reset distinguishes a partial answer from a whole one
                with contextlib.suppress(OSError):
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    self.connection.close()
                return
            body = json.dumps(
                {"error": {"message": f"the server cannot be reached ({problem})", "type": "server_error"}}
            ).encode()
            with contextlib.suppress(OSError):
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = _pass_on  # noqa: N815 - names that http.server calls

    return Handler


def cost(log: Path) -> dict[str, float]:
    """Sum over all requests: requests, prompt_tokens, completion_tokens, seconds (of requests, which may overlap),
    failures."""
    total = {"requests": 0, "prompt_tokens": 0, "completion_tokens": 0, "seconds": 0.0, "failures": 0}
    if log.exists():
        for line in log.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            total["requests"] += 1
            total["failures"] += "problem" in entry
            for name in ("prompt_tokens", "completion_tokens", "seconds"):
                total[name] += entry[name]
    return total
