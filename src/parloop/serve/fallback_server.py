"""transformers' server (transformers/cli/serving) with a PLT in it: subclasses of its parts, put together by its `build_server`.

    PLTModelManager  loads one PLT, sets its loop count, and knows the names it answers to
    answer_template  how reasoning and tool calls are found in an answer
    PLTGenerator     prompts that do not fit, and stop strings
    Strict           a mixin of the handlers: what the server would ignore or misread is answered with status 400

Everything here is built on internals of transformers; tests/serve/test_fallback.py names them.
"""

import asyncio
import contextlib
import copy
import json
import math
import re
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from jinja2 import TemplateError
from starlette.exceptions import HTTPException as AnyHTTPException
from tokenizers.decoders import DecodeStream
from transformers import AutoModelForCausalLM, AutoTokenizer, StoppingCriteria, StoppingCriteriaList
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.response import ResponseHandler
from transformers.cli.serving.server import build_server
from transformers.cli.serving.systemone import SystemOneHandler
from transformers.cli.serving.utils import BaseHandler, GenerateManager, GenerationState, _StreamError, set_torch_seed
from transformers.utils import logging

from ..generate import load_part

logger = logging.get_logger(__name__)


def build_app(
    checkpoint: str,
    names: Sequence[str],
    num_loops: int,
    *,
    dtype: str = "auto",
    device: str = "cpu",
    attn_implementation: str | None = None,
    compile: bool = False,
    quantization: str | None = None,
    reasoning: str = "auto",
    chat_template_kwargs: str | None = None,
    decision_config: str | None = None,
    enable_cors: bool = False,
    log_level: str = "warning",
    default_seed: int | None = None,
) -> FastAPI:
    """The application of `transformers serve` around one PLT. The options are those of `transformers serve`.

    Raises:
        CheckpointError: the checkpoint cannot be loaded.
        ValueError: an option's value does not fit.
    """
    template_kwargs = json.loads(chat_template_kwargs or "{}")
    if reasoning != "auto":
        template_kwargs["enable_thinking"] = reasoning == "on"
    if default_seed is not None:
        set_torch_seed(default_seed)
    logging.get_logger("transformers").setLevel(logging.log_levels[log_level])

    manager = PLTModelManager(
        checkpoint,
        names,
        num_loops,
        dtype=dtype,
        device=device,
        attn_implementation=attn_implementation,
        quantization=quantization,
    )
    state = PLTGenerationState(compile=compile)
    app = build_server(
        manager,
        PLTChatHandler(manager, state, template_kwargs),
        completion_handler=PLTCompletionHandler(manager, state),
        response_handler=PLTResponseHandler(manager, state, template_kwargs),
        transcription_handler=NoTranscription(),  # type: ignore[arg-type]
        systemone_handler=PLTSystemOneHandler(manager, state, template_kwargs, decision_config),
        generation_state=state,
        enable_cors=enable_cors,
    )
    # generate() and chat templates raise these for what requests ask for; TypeError, where a template goes through the arguments of
    # a call and they are no object, or puts null between texts.
    for kind in (AnyHTTPException, RequestValidationError, ValueError, TypeError, TemplateError):
        app.add_exception_handler(kind, answer_error)
    return app


async def answer_error(request: Request, error: Exception) -> JSONResponse:
    """An error as OpenAI's clients read it. Bad requests are 400, also those that are not JSON."""
    status, message = 400, str(error)
    if isinstance(error, AnyHTTPException):
        status, message = error.status_code, str(error.detail)
    elif isinstance(error, RequestValidationError):
        message = "the request is not a JSON object: " + "; ".join(str(item["msg"]) for item in error.errors())
    else:
        logger.warning(f"request refused: {message}", exc_info=error)
    kind = "not_found_error" if status == 404 else "invalid_request_error"
    return JSONResponse({"error": {"message": message, "type": kind, "code": status}}, status_code=status)


# The model


class PLTModelManager(ModelManager):
    """One PLT and its tokenizer. transformers' manager looks for the model class in its own package, and would load whatever
    model a request names."""

    def __init__(self, checkpoint: str, names: Sequence[str], num_loops: int, **options: Any):
        super().__init__(model_timeout=-1, **options)  # never unloaded
        self.checkpoint, self.names, self.num_loops = checkpoint, list(names), num_loops
        self.load_model_and_processor(self.names[0])

    def process_model_name(self, model_id: Any) -> str:  # type: ignore[override]  # a staticmethod, called on the object
        if model_id not in self.names:
            raise HTTPException(404, f"model {model_id!r} is not served here: use {self.names[0]!r}.")
        return self.names[0]

    def get_gen_models(self, cache_dir: str | None = None) -> list[dict]:  # type: ignore[override]
        return [{"id": self.names[0], "object": "model", "created": 0, "owned_by": "parloop"}]

    def _load_processor(self, model_id_and_revision: str, gguf_file: str | None = None) -> Any:
        if gguf_file is not None:  # by /load_model
            raise ValueError(f"{gguf_file} is not served here: use {self.names[0]!r}.")
        tokenizer = load_part(AutoTokenizer, self.checkpoint, "tokenizer (tokenizer.json)")
        if tokenizer.response_template is None:
            tokenizer.response_template = answer_template(tokenizer)
        return tokenizer

    def _load_model(self, model_id_and_revision: str, *args: Any, **kwargs: Any) -> Any:
        options = {"attn_implementation": self.attn_implementation, "dtype": self.dtype, "device_map": self.device}
        if quantization := self.get_quantization_config():
            options["quantization_config"] = quantization
        model = load_part(AutoModelForCausalLM, self.checkpoint, "weights (model.safetensors)", **options)
        if self.num_loops != model.config.plt_num_loops:
            # The same as num_loops in every call. Only now: gates are made or left out by the count at loading.
            model.config.plt_num_loops = self.num_loops
        return model


JSON_CALLS = {  # <tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>, as Hermes and Qwen write them
    "open_pattern": r'\s*<tool_call>\s*\{\s*"name":\s*"(?P<name>[^"]*)",\s*"arguments":\s*(?=.*?\}\s*</tool_call>)',
    "close_pattern": r"\}\s*</tool_call>",
    "content": "json",
    "content_args": {"allow_non_json": True},
}
XML_CALLS = {  # <tool_call><function=add><parameter=a>1</parameter></function></tool_call>, as Qwen's coders do
    "open_pattern": r"\s*<tool_call>\s*<function=(?P<name>[^>\n]+)>(?=.*?</function>\s*</tool_call>)",
    "close_pattern": r"</function>\s*</tool_call>",
    "content": "xml-inline",  # one line break each before and after a value belongs to the form, spaces to the value
    "content_args": {"tag_pattern": r"<parameter=(?P<key>[^>\n]+)>\n?(?P<value>.*?)\n?</parameter>"},
}
TEXT = {"content": "text", "content_args": {"strip": False}, "repeats": True, "join": ""}
TAGS = {"<tool_call>", "</tool_call>", "<think>", "</think>"}


def answer_template(tokenizer: Any) -> dict | None:
    """How transformers' server takes answers apart, by what the chat template shows: tool calls, in JSON or in XML, and reasoning in
    <think>; None if it shows neither. A tokenizer that is saved with a `response_template` of its own needs none of this.

    What does not begin like a call, or does not end, stays text; arguments that are no JSON are handed on as they are, and nothing
    raises. Reasoning is what an answer begins with, or goes on with where the template has opened <think> for it.
    """
    shown = str(tokenizer.chat_template)
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    # With such a template, the server decodes special tokens too.
    ends = [rf"\s*{re.escape(token)}" for token in sorted((special | set(tokenizer.all_special_tokens)) - TAGS)]
    fields: dict[str, dict] = {}
    if "<think>" in shown:
        close = "|".join((r"\s*</think>\s*", *ends))
        fields["reasoning_content"] = TEXT | {"open_pattern": r"\A\s*<think>\s*", "close_pattern": close}
    if "<tool_call>" in shown:
        form = XML_CALLS if "<function=" in shown else JSON_CALLS
        call = {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}}
        fields["tool_calls"] = form | {"repeats": True, "transform": call}
    if not fields:
        return None
    # The prompt is not parsed, since it may show calls as examples, but for a <think> at its end.
    begun = r"(?=<think>\s*\Z)|(?<!<think>\s*)\Z" if "reasoning_content" in fields else r"\Z"
    fields["content"] = TEXT | ({"close_pattern": "|".join(ends)} if ends else {})
    return {"defaults": {"role": "assistant"}, "start_anchor_pattern": begun, "fields": fields}


def without_tool_calls(tokenizer: Any) -> Any:
    """The tokenizer for a request that offers no tools: what looks like a call is text."""
    template = tokenizer.response_template
    if template is None or "tool_calls" not in template["fields"]:
        return tokenizer
    fields = {name: field for name, field in template["fields"].items() if name != "tool_calls"}
    tokenizer = copy.copy(tokenizer)
    tokenizer.response_template = template | {"fields": fields}
    return tokenizer


# Generation


class PLTGenerationState(GenerationState):
    def get_manager(self, model_id: str, use_cb: bool = False) -> Any:
        if model_id not in self._generate_managers:  # each has a thread
            self._generate_managers[model_id] = PLTGenerator()
        return self._generate_managers[model_id]


class PLTGenerator(GenerateManager):
    def generate_streaming(self, model, processor, inputs, gen_config, request_id, response_parser=None):
        inputs, stop = self._prepare(model, processor, inputs, gen_config)
        queue, streamer = super().generate_streaming(model, processor, inputs, gen_config, request_id, response_parser)
        return CutQueue(queue, stop), streamer  # it is only read

    async def generate_non_streaming(self, model, processor, inputs, gen_config, request_id):
        inputs, stop = self._prepare(model, processor, inputs, gen_config)
        text, *rest = await super().generate_non_streaming(model, processor, inputs, gen_config, request_id)
        return (cut(text, stop), *rest)

    @staticmethod
    def _prepare(model, tokenizer, inputs, gen_config) -> tuple[dict, list[str]]:
        """What generate() gets, and the stop strings. The answer ends where the model's positions do."""
        tokens = inputs["input_ids"].shape[-1]
        room = model.config.max_position_embeddings - tokens
        if tokens == 0:
            raise HTTPException(400, "the prompt is empty, and this tokenizer begins texts with no token of its own.")
        if room < 1:
            raise HTTPException(
                400,
                f"the prompt has {tokens} tokens, and the model was made for {tokens + room}, answer included: shorten it.",
            )
        wanted = gen_config.max_new_tokens or (gen_config.max_length - tokens if gen_config.max_length else room)
        if wanted < 1:
            raise HTTPException(400, f"max_length={gen_config.max_length} leaves no room after a prompt of {tokens} tokens.")
        gen_config.max_new_tokens, gen_config.max_length = min(wanted, room), None
        stop = stop_strings(gen_config)
        gen_config.stop_strings = None  # generate()'s own also stops where a stop string began in the prompt
        # Note: tokenizers may give token_type_ids as well, which generate() does not take.
        prepared = {key: inputs[key] for key in ("input_ids", "attention_mask") if key in inputs}
        if stop:
            prepared["stopping_criteria"] = StoppingCriteriaList([StopStrings(tokenizer, stop, tokens)])
        return prepared, stop


def stop_strings(gen_config: Any) -> list[str]:
    stop = gen_config.stop_strings or []
    return [stop] if isinstance(stop, str) else list(stop)


def cut(text: str, stop: list[str]) -> str:
    """The text before the first stop string, as OpenAI's servers answer."""
    return text[: min((place for place in map(text.find, stop) if place >= 0), default=len(text))]


class StopStrings(StoppingCriteria):
    """Stops when the answer has a stop string."""

    def __init__(self, tokenizer: Any, stop: list[str], prompt_tokens: int):
        self.tokenizer, self.stop, self.seen = tokenizer._tokenizer, stop, prompt_tokens
        self.decoder, self.text = DecodeStream([], skip_special_tokens=True), ""

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> Any:
        for token in input_ids[0, self.seen :].tolist():
            self.text += self.decoder.step(self.tokenizer, token) or ""
        self.seen = input_ids.shape[1]
        found = any(stop in self.text for stop in self.stop)
        return torch.full((input_ids.shape[0],), found, dtype=torch.bool, device=input_ids.device)


class CutQueue:
    """The queue that a stream is read from, without what stop strings cut off. Text that may be the beginning of one waits.

    Reasoning is text of a type of its own.
    """

    def __init__(self, queue: asyncio.Queue, stop: list[str]):
        self.queue, self.stop = queue, stop
        self.ready: deque[Any] = deque()
        self.held, self.cut_off = "", False

    async def get(self) -> Any:
        while not self.ready:
            self._take(await self.queue.get())
        return self.ready.popleft()

    def get_nowait(self) -> Any:
        while not self.ready:
            self._take(self.queue.get_nowait())
        return self.ready.popleft()

    def _take(self, item: Any) -> None:
        if self.held and type(item) is not type(self.held):
            self.ready.append(self.held)
            self.held = ""
        if not isinstance(item, str):  # the end, an error, a tool call
            if isinstance(item, _StreamError):  # the server puts it into JSON as it is
                item.msg = json.dumps(item.msg)[1:-1]
            self.ready.append(item)
        elif not self.cut_off:
            kind, text = type(item), self.held + item
            kept = cut(text, self.stop)
            self.cut_off = len(kept) < len(text)
            begun = 0 if self.cut_off else max((_overlap(text, stop) for stop in self.stop), default=0)
            self.held = kind(kept[len(kept) - begun :])
            if kept := kept[: len(kept) - begun]:
                self.ready.append(kind(kept))


def _overlap(text: str, stop: str) -> int:
    """The longest end of the text, in characters, that a stop string begins with."""
    return next(n for n in range(min(len(text), len(stop)), -1, -1) if text.endswith(stop[:n]))


# Requests

ALWAYS = {"model", "stream", "temperature", "top_p", "seed", "generation_config"}
WITHOUT_EFFECT = {  # on the answer, whatever their value. Usage is always in the last piece of a stream.
    "metadata", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention", "safety_identifier", "service_tier",
    "store", "stream_options", "user",
}  # fmt: skip
NEUTRAL = {  # what the server does anyway
    "background": False,
    "best_of": 1,
    "echo": False,
    "frequency_penalty": 0,
    "include": [],
    "logprobs": False,
    "modalities": ["text"],
    "n": 1,
    "parallel_tool_calls": True,
    "presence_penalty": 0,
    "response_format": {"type": "text"},
    "suffix": "",
    "text": {"format": {"type": "text"}},
    "tool_choice": "auto",
    "top_logprobs": 0,
    "truncation": "disabled",
}
INSTEAD = {
    "frequency_penalty": "the server knows generate()'s repetition_penalty only: generation_config='{\"repetition_penalty\": 1.1}'",
    "suffix": "the server would append it to the answer",
    "tool_choice": "nothing forces a call here; 'auto' and 'none' are known, and vLLM's server knows all",
}


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _count(value: Any) -> bool:
    return type(value) is int and value >= 1


def _stops(value: Any) -> bool:
    return (isinstance(value, str) and value != "") or (
        isinstance(value, list) and all(isinstance(item, str) and item for item in value)
    )


def _biases(value: Any) -> bool:
    return isinstance(value, dict) and all(re.fullmatch(r"\d+", key) and _number(bias) for key, bias in value.items())


def _json_object(value: Any) -> bool:
    try:
        return isinstance(json.loads(value), dict)
    except (TypeError, ValueError):
        return False


ALLOWED = {
    "chat_template_kwargs": (lambda v: isinstance(v, dict), "a JSON object"),
    "generation_config": (_json_object, "a string with a JSON object"),
    "logit_bias": (_biases, "an object of token ids and numbers"),
    "max_completion_tokens": (_count, "an integer of at least 1"),
    "max_output_tokens": (_count, "an integer of at least 1"),
    "max_tokens": (_count, "an integer of at least 1"),
    "messages": (lambda v: isinstance(v, list) and v != [], "a list of at least one message"),
    "seed": (lambda v: type(v) is int and 0 <= v < 2**63, "an integer from 0 and below 2**63"),
    "stop": (_stops, "a string, or a list of strings, none of them empty"),
    "stream": (lambda v: isinstance(v, bool), "true or false"),
    "temperature": (lambda v: _number(v) and v >= 0, "a number from 0; 0 takes the likeliest token"),
    "tools": (lambda v: isinstance(v, list) and all(isinstance(tool, dict) for tool in v), "a list of tools"),
    "top_p": (lambda v: _number(v) and 0 < v <= 1, "above 0 and at most 1"),
}


def is_neutral(field: str, value: Any) -> bool:
    if field == "tool_choice" and value == "none":
        return True  # the tools are left out
    if field not in NEUTRAL or isinstance(value, bool) != isinstance(NEUTRAL[field], bool):
        return False  # logprobs=0 is not logprobs=False: it asks for one
    return value == NEUTRAL[field]


class Named(BaseHandler):
    """Answers to the names of the one model. (transformers' own takes a name apart at @ and at a colon.)"""

    def _resolve_model(self, body: dict) -> Any:
        manager: Any = self.model_manager
        asked = body.get("model")
        name = body["model"] = manager.process_model_name(manager.names[0] if asked is None else asked)
        model, tokenizer = manager.load_model_and_processor(name)
        if body.get("tools") and "tools" not in str(tokenizer.chat_template or "tools"):
            raise HTTPException(400, "the chat template of this model knows no tools.")
        return name, model, tokenizer if body.get("tools") else without_tool_calls(tokenizer)


class Strict(Named):
    """transformers' server only logs what it ignores. Here that is an error: a client would take the answer for what it asked."""

    required = ""
    understood: set[str] = set()

    def _validate_request(self, body: dict) -> None:
        super()._validate_request({key: value for key, value in body.items() if key not in NEUTRAL})
        if body.get(self.required) is None:
            raise HTTPException(400, f"the request has no {self.required}.")
        for field, value in body.items():
            if value is None or field in WITHOUT_EFFECT:
                continue
            if field in ALWAYS | self.understood:
                fits, what = ALLOWED.get(field, (None, ""))
                if fits is not None and not fits(value):
                    raise HTTPException(400, f"{field}={value!r} must be {what}.")
            elif not is_neutral(field, value):
                reason = INSTEAD.get(field, "leave it out")
                raise HTTPException(400, f"{field}={value!r} is not supported by transformers' server: {reason}.")
        if body.get("tool_choice") == "none":
            body.pop("tools", None)

    def _build_generation_config(self, body: dict, model_generation_config: Any, use_cb: bool = False) -> Any:
        # Note: transformers' own sets the temperature, but samples only if the checkpoint's generation_config.json says so, and
        # then from the 50 likeliest tokens unless that says otherwise.
        config = super()._build_generation_config(body, model_generation_config, use_cb=use_cb)
        temperature, top_p = body.get("temperature"), body.get("top_p")
        if temperature is not None or top_p is not None:
            config.do_sample = temperature != 0
        if config.do_sample and config.top_k is None:
            config.top_k = 0
        if not config.do_sample:
            config.temperature = config.top_p = config.top_k = None
        if body.get("logit_bias"):  # the server leaves them out of completions, and generate() takes floats only
            config.sequence_bias = {(int(token),): float(bias) for token, bias in body["logit_bias"].items()}
        return config

    @staticmethod
    def get_processor_inputs_from_messages(messages: Any, modality: Any) -> list[dict]:
        try:
            return [chat_message(message, modality) for message in messages]
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise HTTPException(400, f"messages must have a role, and text as content ({error!r}).") from error


def chat_message(message: dict, modality: Any) -> dict:
    """A message as chat templates take it. transformers' own drops images and sounds to a text model, reasoning, names, and what
    is said beside calls, and fails at calls that are null or have no JSON as arguments."""
    content = message.get("content")
    for part in content if isinstance(content, list) else []:
        if part["type"] not in ("text", "input_text", "output_text"):
            raise HTTPException(400, f"content of type {part['type']!r}: this model reads text only.")
    without_calls = {key: value for key, value in message.items() if key != "tool_calls"}
    (parsed,) = BaseHandler.get_processor_inputs_from_messages([without_calls], modality)
    if message.get("name"):
        parsed["name"] = message["name"]
    if reasoning := message.get("reasoning") or message.get("reasoning_content"):  # vLLM's name for it, and transformers'
        parsed["reasoning"] = parsed["reasoning_content"] = reasoning
    if calls := copy.deepcopy(message.get("tool_calls")):
        for call in calls:
            function = call.get("function") or call
            arguments = function.get("arguments") or {}
            if isinstance(arguments, str):
                with contextlib.suppress(ValueError):  # what a model wrote: the template may take it as it is
                    arguments = json.loads(arguments)
            function["arguments"] = arguments
        parsed["tool_calls"] = calls
    return parsed


class PLTChatHandler(Strict, ChatCompletionHandler):
    required = "messages"
    understood = {
        "chat_template_kwargs", "logit_bias", "max_completion_tokens", "max_tokens", "messages", "stop", "tools",
    }  # fmt: skip

    async def _non_streaming(self, request_id, model, processor, model_id, inputs, gen_config, *args, **kwargs):
        stop = stop_strings(gen_config)
        call = (request_id, model, processor, model_id, inputs, gen_config)
        response = await super()._non_streaming(*call, *args, **kwargs)
        if processor.response_template is None:
            return response
        answer = json.loads(bytes(response.body))
        message = answer["choices"][0]["message"]
        for field in {"content", "reasoning_content"} & message.keys():
            message[field] = cut(message[field], stop)  # read from the tokens again, which end behind a stop string
        if "reasoning_content" in message:
            message["reasoning"] = message["reasoning_content"]  # as vLLM calls it
        return JSONResponse(answer)

    @staticmethod
    def chunk_to_sse(chunk: Any) -> str:
        delta = chunk.choices[0].delta
        if getattr(delta, "reasoning_content", None) is not None:
            delta.reasoning = delta.reasoning_content
        return ChatCompletionHandler.chunk_to_sse(chunk)


class PLTCompletionHandler(Strict, CompletionHandler):
    required = "prompt"
    understood = {"logit_bias", "max_tokens", "prompt", "stop"}


class PLTResponseHandler(Strict, ResponseHandler):
    required = "input"
    understood = {"input", "instructions", "max_output_tokens", "tools"}

    def _validate_request(self, body: dict) -> None:
        super()._validate_request(body)
        body.setdefault("stream", False)  # OpenAI's default; transformers' is True


class PLTSystemOneHandler(Named, SystemOneHandler):
    @staticmethod
    def _answer(pipe: Any, request: dict) -> Any:
        room = pipe.model.config.max_position_embeddings
        longest = max(inputs["input_ids"].shape[-1] for inputs, _ in pipe.preprocess(request)["prompts"])
        if longest > room:
            raise ValueError(
                f"a question and the state have {longest} tokens, and the model was made for {room}: shorten them."
            )
        return SystemOneHandler._answer(pipe, request)


class NoTranscription:
    async def handle_request(self, request: Request) -> Any:
        raise HTTPException(404, "this model reads text only.")
