"""Requests and answers as OpenAI's API reference has them; what an artifact cannot do is refused by name."""

from __future__ import annotations

import json
import time
import uuid
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from memc.errors import MemcError
from memc.runtime.generate import Conversation

COMPLETION_TOKENS = 16
"""New tokens of a completion that does not say ``max_tokens``: the reference's default."""

# Parameters of the reference that may be given as long as they ask for nothing: their neutral values.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "presence_penalty": (0, 0.0),
    "frequency_penalty": (0, 0.0),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "web_search_options": (),
}
IGNORED = frozenset(["user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"])
"""Parameters about the caller and the service, which say nothing about the answer."""


@dataclass
class RequestError(Exception):
    """What is answered in place of a completion: an HTTP status and the fields of OpenAI's error object."""

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    headers: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, error: MemcError) -> RequestError:
        """Tell what the caller can change from what only the server can; no path of the server goes out."""
        message = f"{error.code} {error.message}"
        if error.code not in ("E200", "E205", "E206", "E208", "E308"):
            return cls(500, message)
        return cls(400, message, code="context_length_exceeded" if error.code == "E206" else None)

    def body(self) -> dict[str, Any]:
        """Return the error document."""
        kind = "invalid_request_error" if self.status < 500 and self.status != 429 else "server_error"
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": {**error, "type": "rate_limit_error"} if self.status == 429 else error}


class _Edge(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(_Edge):
    """``include_usage`` asks for a last piece with the counts of tokens; ``include_obfuscation`` changes nothing."""

    include_usage: bool = False
    include_obfuscation: bool = False


Token = Annotated[int, Field(ge=0, lt=1 << 32)]
StopText = Annotated[str, Field(min_length=1, max_length=256)]


class Request(_Edge):
    """What both kinds of request have. What is not said of sampling comes from the model's generation config."""

    model: str
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=1, description="not OpenAI's; as other servers have it")
    seed: int | None = Field(default=None, ge=0, lt=1 << 63)
    stop: StopText | Annotated[list[StopText], Field(max_length=4)] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None

    chat: ClassVar[bool]
    kind: ClassVar[str]
    prefix: ClassVar[str]

    @property
    def limit(self) -> int | None:
        """Most new tokens asked for."""
        return self.max_tokens

    @property
    @abstractmethod
    def input(self) -> str | list[int] | Conversation:
        """What the session is given."""

    @property
    def stops(self) -> list[str]:
        """Texts that end the answer."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class CompletionRequest(Request):
    """``POST /v1/completions``, of one prompt."""

    prompt: str | list[Token] | Annotated[list[str] | list[list[Token]], Field(min_length=1, max_length=1)]

    chat = False
    kind = "text_completion"
    prefix = "cmpl"

    @property
    def limit(self) -> int | None:
        """Most new tokens asked for."""
        return self.max_tokens or COMPLETION_TOKENS

    @property
    def input(self) -> str | list[int]:
        """The prompt, out of the list that it may come in."""
        if isinstance(self.prompt, list) and self.prompt and not isinstance(self.prompt[0], int):
            return self.prompt[0]
        return self.prompt  # type: ignore[return-value]  # a text or ids: the lists of prompts are dealt with


class TextPart(_Edge):
    """One part of a message. Parts of other types (images, sound) are refused."""

    type: Literal["text"]
    text: str


class Message(_Edge):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1)]
    name: str | None = None
    refusal: None = None

    def as_dict(self) -> dict[str, str]:
        """Return what a chat template reads."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatRequest(Request):
    """``POST /v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: int | None = Field(default=None, ge=1)

    chat = True
    kind = "chat.completion"
    prefix = "chatcmpl"

    @property
    def limit(self) -> int | None:
        """Most new tokens asked for."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def input(self) -> Conversation:
        """The messages, for the chat template."""
        return [message.as_dict() for message in self.messages]


def parse(body: bytes, kind: type[Request]) -> Request:
    """Read a request. Raises ``RequestError`` 400 that names the parameter which is wrong or not supported."""
    try:
        given = json.loads(body)
        json.dumps(given, ensure_ascii=False).encode()  # half of a surrogate pair is JSON, but no text
    except (ValueError, RecursionError) as error:
        raise RequestError(400, f"the body is no JSON: {error}") from None
    if not isinstance(given, dict):
        raise RequestError(400, "the body is no JSON object")
    for name in (name for name in NEUTRAL if name in given):
        value = given.pop(name)
        if value is not None and not any(type(value) is type(each) and value == each for each in NEUTRAL[name]):
            raise RequestError(400, f"{name} is not supported here", name, "unsupported_parameter")
    try:
        return kind.model_validate({name: value for name, value in given.items() if name not in IGNORED})
    except ValidationError as error:
        where, message = _fault(error)
        raise RequestError(400, f"{where}: {message}" if where else message, where or None) from None


def _fault(error: ValidationError) -> tuple[str, str]:
    """Return where the first fault of a request is, and what.

    Of what may be of several types it is what the type that was given is refused for, not that it is no other; the
    names that pydantic gives those types are left out of the place.
    """
    faults = error.errors(include_url=False, include_context=False)
    place = faults[0]["loc"][:1]
    fault = next(
        (each for each in faults if each["loc"][:1] == place and not each["type"].endswith("_type")), faults[0]
    )
    parts = [str(part) for part in fault["loc"] if isinstance(part, int) or (part.isidentifier() and part != "str")]
    return ".".join(parts), fault["msg"]


@dataclass(frozen=True)
class Answer:
    """One answer on its way out: what all of its pieces have in common."""

    request: Request
    fingerprint: str
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, text: str, finish: str, usage: dict[str, Any]) -> dict[str, Any]:
        """Return the document of a request that is not streamed."""
        said = {"message": {"role": "assistant", "content": text, "refusal": None}} if self.request.chat else {}
        return {**self._document([self._choice(said or {"text": text}, finish)]), "usage": usage}

    def opening(self) -> list[dict[str, Any]]:
        """Return what a stream begins with: of a chat, who speaks."""
        return [self._piece({"delta": {"role": "assistant", "content": ""}}, None)] if self.request.chat else []

    def piece(self, text: str) -> dict[str, Any]:
        """Return one piece of a stream."""
        return self._piece({"delta": {"content": text}} if self.request.chat else {"text": text}, None)

    def closing(self, finish: str, usage: dict[str, Any]) -> list[dict[str, Any]]:
        """Return what a stream ends with: why it ends, and the counts where they were asked for."""
        last = [self._piece({"delta": {}} if self.request.chat else {"text": ""}, finish)]
        if self._counts:
            last.append({**self._document([], streamed=True), "usage": usage})
        return last

    @property
    def _counts(self) -> bool:
        return self.request.stream_options is not None and self.request.stream_options.include_usage

    def _piece(self, said: dict[str, Any], finish: str | None) -> dict[str, Any]:
        return {
            **self._document([self._choice(said, finish)], streamed=True),
            **({"usage": None} if self._counts else {}),
        }

    def _choice(self, said: dict[str, Any], finish: str | None) -> dict[str, Any]:
        return {"index": 0, **said, "logprobs": None, "finish_reason": finish}

    def _document(self, choices: Sequence[dict[str, Any]], *, streamed: bool = False) -> dict[str, Any]:
        return {
            "id": f"{self.request.prefix}-{self.id}",
            "object": self.request.kind + (".chunk" if streamed and self.request.chat else ""),
            "created": self.created,
            "model": self.request.model,
            "system_fingerprint": self.fingerprint,
            "choices": list(choices),
        }


def usage(prompt: int, new: int, cached: int) -> dict[str, Any]:
    """Return the counts of tokens; ``cached`` of the prompt were held from an earlier request."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": new,
        "total_tokens": prompt + new,
        "prompt_tokens_details": {"cached_tokens": cached},
    }
