"""A scripted OpenAI server in a thread: a function answers each request, rightly, wrongly, or as servers fail."""

import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = dict[str, Any]  # text, tool_calls, or a fault: status, raw, hang, close, part


class Listener(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128


class Scripted:
    """Attributes: url, with /v1; requests, what was asked; version, what it says of itself, if anything."""

    def __init__(self, answer: Callable[[dict[str, Any]], Reply], names: tuple[str, ...] = ("toy@2",)):
        self.answer, self.names, self.requests = answer, names, []
        self.version: Any = None
        self.server = Listener(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"

    def __enter__(self) -> "Scripted":
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.server.shutdown()
        self.server.server_close()


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}


def _handler(scripted: Scripted) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def _send(self, status: int, body: bytes, kind: str = "application/json") -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self) -> None:
            if self.path == "/v1/models":
                self._send(200, json.dumps({"data": [{"id": name} for name in scripted.names]}).encode())
            elif self.path == "/version" and scripted.version is not None:
                self._send(200, json.dumps(scripted.version).encode())
            else:
                self._send(404, b'{"error": {"message": "no such path"}}')

        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            scripted.requests.append(request)
            reply = scripted.answer(request)
            time.sleep(reply.get("hang", 0))
            if reply.get("close"):
                self.close_connection = True
                self.connection.close()
            elif "part" in reply:  # and the connection ends before the rest
                body = reply["part"].encode()
                self.send_response(200)
                self.send_header("Content-Type", "text/event-stream")
                self.send_header(
                    *(("Transfer-Encoding", "chunked") if reply.get("chunked") else ("Content-Length", str(len(body) + 9)))
                )
                self.end_headers()
                self.wfile.write(b"%x\r\n%s\r\n" % (len(body), body) if reply.get("chunked") else body)
                self.close_connection = True
            elif "raw" in reply:
                self._send(200, reply["raw"].encode())
            elif "status" in reply:
                self._send(reply["status"], json.dumps({"error": {"message": "scripted", "code": reply["status"]}}).encode())
            else:
                calls = [c | {"id": f"call_{len(scripted.requests)}_{i}"} for i, c in enumerate(reply.get("tool_calls", []))]
                message = {"role": "assistant", "content": reply.get("text")} | ({"tool_calls": calls} if calls else {})
                choice = {"index": 0, "finish_reason": "tool_calls" if calls else "stop", "logprobs": None}
                choice |= {"message": message} if "chat" in self.path else {"text": reply.get("text", "")}
                answer = {
                    "id": "a", "object": "chat.completion", "created": 0, "model": request["model"], "choices": [choice] * (request.get("n") or 1),
                    "usage": {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15},
                }  # fmt: skip
                if request.get("stream"):
                    event = json.dumps(answer | {"choices": [choice | {"delta": message}]})
                    self._send(200, f"data: {event}\n\ndata: [DONE]\n\n".encode(), "text/event-stream")
                else:
                    self._send(200, json.dumps(answer).encode())

    return Handler
