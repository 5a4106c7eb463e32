"""Fields of requests to the server without vLLM. All others are refused, so that a client never mistakes an answer for what it requested."""

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, Json, model_validator

Count = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Temperature = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(gt=0, le=1)]
Text = Annotated[str, Field(min_length=1)]

WITHOUT_EFFECT = {  # fields that change no answer, whatever their value. Usage is always in the last piece of a stream.
    "metadata", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention", "safety_identifier", "service_tier", "store",
    "stream_options", "user",
}  # fmt: skip
NEUTRAL = {  # values that request the server's usual behaviour
    "best_of": 1, "echo": False, "frequency_penalty": 0, "logprobs": False, "modalities": ["text"], "n": 1, "parallel_tool_calls": True,
    "presence_penalty": 0, "response_format": {"type": "text"}, "suffix": "", "top_logprobs": 0,
}  # fmt: skip


def _asks_nothing(field: str, value: Any) -> bool:
    neutral = NEUTRAL.get(field)  # False is not 0 here: logprobs=0 requests one
    return (
        value is None
        or field in WITHOUT_EFFECT
        or (value == neutral and isinstance(value, bool) is isinstance(neutral, bool))
    )


class Fields(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _asked(cls, body: Any) -> Any:
        asks = isinstance(body, dict)
        return {field: value for field, value in body.items() if not _asks_nothing(field, value)} if asks else body


class Generation(Fields):
    """Settings of generate() that a request may choose. Others change the way of computing, or what generate() returns."""

    max_new_tokens: Count | None = None
    min_new_tokens: Natural | None = None
    do_sample: bool | None = None
    temperature: Temperature | None = None
    top_k: Natural | None = None
    top_p: Share | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    typical_p: Share | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01)] | None = None
    no_repeat_ngram_size: Natural | None = None
    bad_words_ids: list[list[Natural]] | None = None
    sequence_bias: list[Annotated[tuple[list[Natural], float], Field(strict=False)]] | None = (
        None  # JSON has lists for tuples
    )
    suppress_tokens: list[Natural] | None = None
    eos_token_id: Natural | list[Natural] | None = None


class Request(Fields):
    model: str | None = None
    stream: bool = False
    temperature: Temperature | None = None
    top_p: Share | None = None
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    stop: Annotated[list[Text], BeforeValidator(lambda stop: [stop] if isinstance(stop, str) else stop)] = []
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    logit_bias: dict[Annotated[str, Field(pattern=r"^\d+$")], float] = {}
    generation_config: Json[Generation] = Generation()


class CompletionRequest(Request):
    prompt: str


class Tool(BaseModel, extra="allow"):
    type: Literal["function"]


class ChatRequest(Request):
    messages: "list[Message]" = Field(min_length=1)
    tools: list[Tool] = []
    tool_choice: Literal["auto", "none"] = "auto"
    chat_template_kwargs: dict[str, Any] = {}


class Part(BaseModel):
    type: Literal["text"]
    text: str


def _object(arguments: Any) -> Any:
    """Parse a call's arguments for a chat template. Text that is not JSON stays as it is."""
    try:
        return json.loads(arguments or "{}") if isinstance(arguments, str | None) else arguments
    except (ValueError, RecursionError):
        return arguments


class Function(BaseModel, extra="allow"):
    name: str
    arguments: Annotated[dict[str, Any] | str, BeforeValidator(_object)] = {}


class Call(BaseModel, extra="allow"):
    function: Function


class Message(BaseModel, extra="allow"):
    role: str
    content: str | list[Part] | None = None
    tool_calls: list[Call] | None = None

    def for_template(self) -> dict[str, Any]:
        """Return the message as chat templates read it, with its content as one text."""
        text = " ".join(part.text for part in self.content) if isinstance(self.content, list) else self.content or ""
        return self.model_dump(exclude_none=True) | {"content": text}
