"""An OpenAI server around generate(): chats and completions of one PLT at one loop count, one after another.

`transformers serve` takes neither a model class nor a loop count, ignores many fields of requests, and consists of private parts. So this
server is built on documented parts of transformers: generate() and its streamers, chat templates, response templates.
"""

import asyncio
import contextlib
import copy
import json
import queue
import reprlib
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import torch
import transformers
from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from jinja2 import TemplateError
from starlette.exceptions import HTTPException as AnyHTTPException
from transformers.utils import logging
from transformers.utils.chat_parsing import ResponseParser

from ..generate import GREEDY_BELOW
from .fallback_answers import Ended, Piece, Writer, answer_template
from .fallback_requests import ChatRequest, CompletionRequest
from .fallback_requests import Request as Fields

ANSWER_TOKENS = 1024  # where neither the request nor the checkpoint has a limit, as in `transformers serve`
# Errors of generate() and of chat templates that a request causes. TypeError: a template iterates over something that is not a list.
BAD_REQUEST = (ValueError, TypeError, RecursionError, TemplateError)

logger = logging.get_logger(__name__)


class Served:
    """One model under its names, and the thread in which it generates."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        names: Sequence[str],
        compile: bool = False,
        template_kwargs: dict[str, Any] | None = None,
    ):
        self.model, self.tokenizer, self.names = model, tokenizer, names
        self.compile, self.template_kwargs = compile, template_kwargs or {}
        self.jobs: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        threading.Thread(target=self._work, daemon=True).start()

    def _work(self) -> None:
        while True:
            self.jobs.get()()

    def entry(self, name: str | None) -> dict[str, Any]:
        """Return the model's entry in OpenAI's format. Raises HTTPException if the name is not one of the model's."""
        if name not in (None, *self.names):
            raise HTTPException(404, f"model {name!r} is not served here: use {self.names[0]!r}.")
        return {"id": self.names[0], "object": "model", "created": 0, "owned_by": "parloop"}

    def chat_prompt(self, fields: ChatRequest) -> tuple[str, Any]:
        """Return the text before the answer, and the parser of the answer."""
        tools: list[Any] = [tool.model_dump() for tool in fields.tools if fields.tool_choice != "none"]
        if tools and "tools" not in str(self.tokenizer.chat_template or "tools"):
            raise HTTPException(400, "the chat template of this model does not support tools.")
        messages = [message.for_template() for message in fields.messages]
        options = {"tools": tools or None} | self.template_kwargs | fields.chat_template_kwargs
        prompt = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **options)
        template = answer_template(self.tokenizer, bool(tools))
        return prompt, template and ResponseParser(template, prefix=prompt, tools=tools)

    def begin(self, fields: Fields, prompt: str, parser: Any, chat: bool) -> "Reply":
        """Queue a request, and return its reply. Raises HTTPException if the prompt is empty, or leaves no room for an answer."""
        inputs = self.tokenizer(prompt, return_tensors="pt", add_special_tokens=not chat)
        tokens, limit = inputs["input_ids"].shape[1], self.model.config.max_position_embeddings
        if tokens == 0:
            raise HTTPException(400, "the prompt is empty, and this tokenizer adds no token at the beginning of a text.")
        if tokens >= limit:  # OpenAI's wording, which agents look for
            raise HTTPException(
                400, f"This model's maximum context length is {limit} tokens, and the prompt has {tokens}: shorten it."
            )
        settings = self._settings(fields, limit - tokens)
        own = settings.stop_strings or []  # those of the checkpoint
        writer = Writer(self.tokenizer, [*fields.stop, *([own] if isinstance(own, str) else own)], parser)

        def write() -> None:
            try:
                if fields.seed is not None:  # set in this thread, where no other answer draws numbers in between
                    torch.manual_seed(fields.seed)
                given = {name: inputs[name].to(self.model.device) for name in ("input_ids", "attention_mask")}
                with contextlib.suppress(Ended):
                    self.model.generate(**given, generation_config=settings, streamer=writer, tokenizer=self.tokenizer)
                writer.close()
            except Exception as error:
                writer.close(error)

        self.jobs.put(write)
        return Reply(writer, self.names[0], chat, tokens, settings.max_new_tokens)

    def _settings(self, fields: Fields, room: int) -> Any:
        """Return the settings of generate(). With a temperature or top_p it samples, from all tokens unless the request
        or the checkpoint has a top_k."""
        given = fields.generation_config.model_dump(exclude_none=True)
        given |= fields.model_dump(include={"temperature", "top_p"}, exclude_none=True)
        if given.get("temperature", 1) < GREEDY_BELOW:
            given["do_sample"] = False
        elif given.keys() & {"temperature", "top_p"}:
            given.setdefault("do_sample", True)
        biases = [[[int(token)], bias] for token, bias in fields.logit_bias.items()] + given.get("sequence_bias", [])
        most = fields.max_completion_tokens or fields.max_tokens or given.get("max_new_tokens")
        settings = copy.deepcopy(self.model.generation_config)
        most = min(most or settings.max_new_tokens or ANSWER_TOKENS, room)
        one = {"num_beams": 1, "num_return_sequences": 1}  # whatever the checkpoint's own settings are
        settings.update(**given | one | {"max_new_tokens": most, "max_length": None, "sequence_bias": biases or None})
        if not settings.do_sample:
            settings.temperature = settings.top_k = settings.top_p = settings.min_p = settings.typical_p = None
        elif settings.top_k is None:
            settings.top_k = 0
        if self.compile:
            settings.cache_implementation = "static"
        return settings


class Reply:
    """An answer in OpenAI's format."""

    def __init__(self, writer: Writer, model: str, chat: bool, prompt_tokens: int, limit: int):
        self.writer, self.chat, self.prompt_tokens, self.limit = writer, chat, prompt_tokens, limit
        self.head = {"id": uuid.uuid4().hex, "created": int(time.time()), "model": model}

    async def to(self, request: Request, stream: bool) -> Response:
        """Return the answer, or the error that generate() raised before a stream began. Stop writing if the client
        leaves."""
        pieces = self.writer.pieces()
        answering = asyncio.ensure_future(self._stream(pieces) if stream else self._whole(pieces))
        leaving = asyncio.ensure_future(_left(request))
        await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
        leaving.cancel()
        if answering.done():
            # The error is not raised: Starlette answers unknown errors and raises them again, and the server then silently closes.
            error = answering.exception()
            return answering.result() if not isinstance(error, Exception) else await _refuse(request, error)
        answering.cancel()
        return Response(status_code=499)  # the client has left

    async def _whole(self, pieces: AsyncIterator[Piece]) -> Response:
        message: Piece = {"role": "assistant", "content": ""}
        async for piece in pieces:
            for field, part in piece.items():
                message[field] = message[field] + part if field in message else part
        for call in message.get("tool_calls", []):
            del call["index"]  # only streams have it
        return JSONResponse(self._body("message", message, *self._end()))

    async def _stream(self, pieces: AsyncIterator[Piece]) -> Response:
        begun = await anext(pieces, {"content": ""})
        return StreamingResponse(self._events(begun, pieces), media_type="text/event-stream")

    async def _events(self, begun: Piece, pieces: AsyncIterator[Piece]) -> AsyncIterator[str]:
        try:
            yield _event(self._body("delta", {"role": "assistant"} | begun))
            async for piece in pieces:
                yield _event(self._body("delta", piece))
            yield _event(self._body("delta", {}, *self._end()))
        except Exception as error:  # too late for an HTTP status
            yield _event(_problem(error))
        yield "data: [DONE]\n\n"

    def _body(
        self, part: str, message: Piece, reason: str | None = None, usage: dict[str, int] | None = None
    ) -> dict[str, Any]:
        choice = {part: message} if self.chat else {"text": message.get("content", ""), "logprobs": None}
        kind = "text_completion" if not self.chat else "chat.completion" if part == "message" else "chat.completion.chunk"
        return self.head | {"object": kind, "choices": [{"index": 0, **choice, "finish_reason": reason}], "usage": usage}

    def _end(self) -> tuple[str, dict[str, int]]:
        read, written = self.prompt_tokens, len(self.writer.tokens)
        by_itself = self.writer.cut_off or written < self.limit
        usage = {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
        return "tool_calls" if self.writer.calls else "stop" if by_itself else "length", usage


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body)}\n\n"


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _problem(error: Exception) -> dict[str, Any]:
    """Return an error in OpenAI's format."""
    status, message = 400 if isinstance(error, BAD_REQUEST) else 500, str(error) or type(error).__name__
    if isinstance(error, AnyHTTPException):
        status, message = error.status_code, str(error.detail)
    elif isinstance(error, RequestValidationError):
        status, message = 400, "; ".join(map(_wrong, error.errors()))
    else:
        logger.warning(f"no answer: {message}", exc_info=error)
    kind = {404: "not_found_error", 500: "server_error"}.get(status, "invalid_request_error")
    return {"error": {"message": message, "type": kind, "code": status}}


def _wrong(item: dict[str, Any]) -> str:
    field, kind, what = ".".join(map(str, item["loc"][1:])) or "the request", item["type"], item["msg"]
    if kind == "extra_forbidden":
        what = "not supported without vLLM, leave it out"
    return f"{field}: {what}" if kind in ("missing", "json_invalid") else f"{field}={reprlib.repr(item['input'])}: {what}"


async def _refuse(request: Request, error: Exception) -> JSONResponse:
    problem = _problem(error)
    return JSONResponse(problem, problem["error"]["code"])


def build_app(served: Served) -> FastAPI:
    """Return the application with OpenAI's routes."""
    kinds: tuple[Any, ...] = (*BAD_REQUEST, AnyHTTPException, RequestValidationError, Exception)
    app = FastAPI(exception_handlers=dict.fromkeys(kinds, _refuse))

    @app.post("/v1/chat/completions")
    async def chat(request: Request, fields: ChatRequest) -> Response:
        served.entry(fields.model)
        return await served.begin(fields, *served.chat_prompt(fields), chat=True).to(request, fields.stream)

    @app.post("/v1/completions")
    async def completions(request: Request, fields: CompletionRequest) -> Response:
        served.entry(fields.model)
        return await served.begin(fields, fields.prompt, None, chat=False).to(request, fields.stream)

    @app.get("/v1/models")
    def models() -> Any:
        return {"object": "list", "data": [served.entry(None)]}

    @app.get("/v1/models/{name:path}")
    def model(name: str) -> Any:
        return served.entry(name)

    @app.get("/health")
    def health() -> Any:
        return {"status": "ok"}

    @app.get("/version")
    def version() -> Any:
        return {"engine": "transformers", "version": transformers.__version__}

    return app
