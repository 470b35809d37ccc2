"""OpenAI's API as this project speaks it: request bodies read and checked, and errors in OpenAI's shape.

    request = read_request(body, chat=True)          # ChatRequest or CompletionRequest; raises ApiError
    error.content()                                  # {"error": {"message", "type", "param", "code"}}

A request for something unsupported is refused in one sentence. A field that can be ignored without changing the answer's
form is ignored, and named in `ignored` and in the response header `x-fastft-ignored`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import orjson

from fastft.data.conversation import Message

if TYPE_CHECKING:  # this module imports torch; the gateway uses the errors here and does not need torch
    from fastft.inference.sampling import Sampling

MOST_STOPS = 4
MOST_TOP_LOGPROBS = 20
IGNORED_HEADER = "x-fastft-ignored"
USAGE_COMMENT = b": usage "
"""A comment line at the end of a worker's stream, where the client did not ask for usage: the tokens as JSON, for the record."""
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
# Clients send these routinely, and they do not affect the answer, so they are ignored without a note.
SILENT = {"user", "metadata", "store"}
# Fields of a message: those that identify it, and those that clients copy from an answer.
SILENT_IN_MESSAGES = {"id", "refusal", "annotations", "tool_call_id"}


class ApiError(Exception):
    """An error that is answered in OpenAI's shape."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        kind: str = "invalid_request_error",
        retry_after: int | None = None,
    ):
        """`kind` is the error's `type`; `retry_after` in seconds becomes the header of that name."""
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.kind = status, message, param, code, kind
        self.retry_after = retry_after

    def content(self) -> dict:
        """The body of the response, or the data of an event in a stream that has begun."""
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return {"error": error}

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.retry_after is None else {"retry-after": str(self.retry_after)}


def model_not_found(name: str, served: Sequence[str]) -> ApiError:
    shown = name if len(name) <= 100 else name[:97] + "..."
    return ApiError(404, f"the model {shown!r} does not exist; served: {', '.join(served)}", "model", "model_not_found")


def route_not_found(method: str, path: str) -> ApiError:
    return ApiError(404, f"{method} {path} does not exist here", code="not_found")


def invalid_api_key() -> ApiError:
    message = "the API key is missing or wrong; send it as 'Authorization: Bearer KEY'"
    return ApiError(401, message, code="invalid_api_key", kind="authentication_error")


def body_too_large(limit: int) -> ApiError:
    return ApiError(413, f"the request's body is larger than {limit:,} bytes", code="body_too_large")


def queue_full(waiting: int, retry_after: int) -> ApiError:
    message = f"{waiting} requests are waiting already; try again in {retry_after} s"
    return ApiError(429, message, code="queue_full", kind="rate_limit_error", retry_after=retry_after)


def shutting_down() -> ApiError:
    message = "this server is shutting down; ask another one"
    return ApiError(503, message, code="shutting_down", kind="server_error", retry_after=1)


def internal_error() -> ApiError:
    return ApiError(500, "the answer failed; the server's log says why", code="internal_error", kind="server_error")


def context_too_long(context_length: int, prompt: int, answer: int | None, param: str) -> ApiError:
    """`answer`: how many tokens the request asks for; None if it leaves that open."""
    asked = f"{prompt} tokens in {param}" + (f" and {answer} in the answer" if answer is not None else "")
    message = f"the model's context is {context_length} tokens, and the request needs {prompt + (answer or 1)}: {asked}"
    return ApiError(400, message, param, "context_length_exceeded")


# Requests ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GenerationRequest:
    """What chats and plain completions have in common, checked."""

    model: str
    sampling: "Sampling"
    max_tokens: int | None
    """None means as many as fit the context for chats, and OpenAI's default for completions."""
    n: int
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool
    ignore_eos: bool
    top_logprobs: int | None
    """None reports no log-probabilities; 0 reports those of the answer's own tokens only."""
    ignored: tuple[str, ...]


@dataclass(frozen=True)
class ChatRequest(GenerationRequest):
    messages: tuple[Message, ...]


@dataclass(frozen=True)
class CompletionRequest(GenerationRequest):
    prompts: tuple[str | tuple[int, ...], ...]
    """Texts, or token ids."""


def read_request(body: bytes, chat: bool) -> ChatRequest | CompletionRequest:
    """Read the body of a request to /v1/chat/completions, or to /v1/completions. Raises ApiError."""
    fields = _Fields(parse_object(body))
    messages = _messages(fields) if chat else ()
    prompts = () if chat else _prompts(fields)
    common = {
        "model": _model(fields),
        "sampling": _sampling(fields),
        "max_tokens": _max_tokens(fields),
        "n": fields.integer("n", 1, 1, 128),
        "stop": _stop(fields),
        "stream": fields.flag("stream"),
        "ignore_eos": fields.flag("ignore_eos"),
        "include_usage": _include_usage(fields),
        "top_logprobs": _chat_logprobs(fields) if chat else fields.optional_integer("logprobs", 0, MOST_TOP_LOGPROBS),
    }
    _refuse_unsupported(fields)
    common["ignored"] = tuple(fields.ignored())
    return ChatRequest(messages=messages, **common) if chat else CompletionRequest(prompts=prompts, **common)


def parse_object(body: bytes) -> dict:
    """The JSON object that a body holds. Raises ApiError."""
    try:
        content = orjson.loads(body)
    except orjson.JSONDecodeError as error:  # invalid UTF-8, NaN and lone surrogates included
        raise ApiError(400, f"the body cannot be read as JSON: {error}", code="invalid_json") from None
    if not isinstance(content, dict):
        raise ApiError(400, "the body must be a JSON object", code="invalid_json")
    return content


class _Fields:
    """The fields of an object, each read once by its type; null is the same as a field that is missing."""

    def __init__(self, content: dict, prefix: str = ""):
        self.content, self.prefix = {key: value for key, value in content.items() if value is not None}, prefix
        self.unread = set(self.content)
        self.noted: list[str] = []

    def take(self, name: str, default: Any = None) -> Any:
        self.unread.discard(name)
        return self.content.get(name, default)

    def wrong(self, name: str, wanted: str) -> ApiError:
        return ApiError(400, f"{self.prefix}{name} must be {wanted}", self.prefix + name, "invalid_value")

    def number(self, name: str, default: float, low: float, high: float) -> float:
        value = self.take(name, default)
        # Written so that NaN is refused, too; JSON cannot hold it, but 1e999 is read as infinity.
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
            raise self.wrong(
                name, f"a number from {low:g} to {high:g}" if high < math.inf else f"a number, {low:g} or more"
            )
        return float(value)

    def integer(self, name: str, default: int, low: int, high: int) -> int:
        value = self.take(name, default)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            most = (
                f"from {low} to {high}" if high < 1 << 31 else f"of {low} or more" if low > -(1 << 31) else "of 64 bits"
            )
            raise self.wrong(name, f"a whole number {most}")
        return value

    def optional_integer(self, name: str, low: int, high: int) -> int | None:
        return self.integer(name, 0, low, high) if name in self.content else None

    def flag(self, name: str) -> bool:
        value = self.take(name, False)
        if not isinstance(value, bool):
            raise self.wrong(name, "true or false")
        return value

    def refuse_unless(self, name: str, neutral: tuple, why: str) -> None:
        """Refuse a field whose value is not one of those that have no effect."""
        if self.take(name) not in (None, *neutral):
            raise ApiError(400, f"{name} is not supported: {why}", name, "unsupported_parameter")

    def note(self, name: str) -> None:
        """Ignore a field, and add it to `ignored`."""
        if self.take(name) not in (None, [], {}, ""):
            self.noted.append(self.prefix + name)

    def ignored(self) -> list[str]:
        """Names of the ignored fields: those passed to `note`, and all that were never read."""
        # Names are written into a header.
        unread = (name for name in self.unread - SILENT if name.isascii() and name.isidentifier())
        return list(dict.fromkeys([*self.noted, *sorted(unread)]))


def _model(fields: _Fields) -> str:
    name = fields.take("model")
    if not isinstance(name, str) or not name:
        raise fields.wrong("model", "the name of a model; GET /v1/models lists them")
    return name


def _sampling(fields: _Fields) -> "Sampling":
    from fastft.inference.sampling import Sampling

    top_k = fields.integer("top_k", 0, -1, (1 << 31) - 1)
    seed = fields.integer("seed", 0, -(1 << 63), (1 << 64) - 1) if "seed" in fields.content else None
    penalty = fields.number("repetition_penalty", 1.0, 0.01, 100.0)
    return Sampling(
        temperature=fields.number("temperature", 1.0, 0.0, 2.0),
        top_k=max(top_k, 0),
        top_p=fields.number("top_p", 1.0, 0.0, 1.0),
        min_p=fields.number("min_p", 0.0, 0.0, 1.0),
        repetition_penalty=penalty,
        seed=seed,
    )


def _max_tokens(fields: _Fields) -> int | None:
    limits = [fields.optional_integer(name, 1, (1 << 31) - 1) for name in ("max_tokens", "max_completion_tokens")]
    return min((limit for limit in limits if limit is not None), default=None)


def _stop(fields: _Fields) -> tuple[str, ...]:
    stop = fields.take("stop", [])
    stops = [stop] if isinstance(stop, str) else stop
    fits = isinstance(stops, list) and len(stops) <= MOST_STOPS and all(isinstance(s, str) and s for s in stops)
    if not fits:
        raise fields.wrong("stop", f"a text, or up to {MOST_STOPS} of them, none of them empty")
    return tuple(stops)


def _include_usage(fields: _Fields) -> bool:
    options = fields.take("stream_options", {})
    if not isinstance(options, dict):
        raise fields.wrong("stream_options", "an object")
    inner = _Fields(options, "stream_options.")
    include = inner.flag("include_usage")
    fields.noted += [f"stream_options.{name}" for name in inner.ignored()]
    return include


def _chat_logprobs(fields: _Fields) -> int | None:
    top = fields.optional_integer("top_logprobs", 0, MOST_TOP_LOGPROBS)
    if fields.flag("logprobs"):
        return top or 0
    if top is not None:
        raise ApiError(400, "top_logprobs needs logprobs to be true", "top_logprobs", "invalid_value")
    return None


def _refuse_unsupported(fields: _Fields) -> None:
    """Refuse unsupported fields that would change the answer that the client expects."""
    for name in ("presence_penalty", "frequency_penalty"):
        fields.refuse_unless(name, (0,), "only 0 is; repetition_penalty is another way to the same end")
    fields.refuse_unless("logit_bias", ({},), "nothing here applies it")
    fields.refuse_unless("echo", (False,), "the prompt is not given back")
    fields.refuse_unless("suffix", ("",), "answers go on at the end only")
    fields.refuse_unless("best_of", (1, fields.content.get("n")), "use n")
    fields.refuse_unless("functions", ([],), "nothing here reads calls out of an answer")
    fields.refuse_unless("audio", (), "answers are text")
    fields.refuse_unless("modalities", (["text"], []), "answers are text")
    response_format = fields.take("response_format", {"type": "text"})
    if not isinstance(response_format, dict) or response_format.get("type") != "text":
        why = "nothing here enforces a format, so an answer might not have it"
        raise ApiError(400, f"response_format is not supported: {why}", "response_format", "unsupported_parameter")
    # Chat pages and editors send tools with every question, and most of the answers need none.
    fields.note("tools")
    choice = fields.take("tool_choice", "auto")
    if choice not in ("auto", "none"):
        why = "the model's tool calls are not read; only auto and none are"
        raise ApiError(
            400, f"tool_choice {_short(choice)} is not supported: {why}", "tool_choice", "unsupported_parameter"
        )


def _short(value: Any) -> str:
    text = orjson.dumps(value).decode()
    return text if len(text) <= 60 else text[:57] + "..."


# Messages and prompts ------------------------------------------------------------------------------------------------------


def _messages(fields: _Fields) -> tuple[Message, ...]:
    messages = fields.take("messages")
    if not isinstance(messages, list) or not messages:
        raise fields.wrong("messages", "a list of at least one message")
    read, noted = [], {}
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            raise ApiError(400, f"messages[{i}] must be an object", f"messages[{i}]", "invalid_value")
        inner = _Fields(message, f"messages[{i}].")
        read.append(_message(inner))
        noted |= dict.fromkeys(f"messages.{name}" for name in inner.ignored() if name not in SILENT_IN_MESSAGES)
    fields.noted += noted
    return tuple(read)


def _message(fields: _Fields) -> Message:
    role = fields.take("role")
    if not isinstance(role, str) or role not in ROLES:
        raise fields.wrong("role", f"one of {', '.join(ROLES)}")
    content = fields.take("content")
    if content is None and role == "assistant":  # one that called a tool and said nothing
        content = ""
    if isinstance(content, list):
        content = "\n".join(_part(part, i, fields) for i, part in enumerate(content))
    if not isinstance(content, str):
        raise fields.wrong("content", "a text, or a list of text parts")
    return Message(ROLES[role], content)


def _part(part: Any, i: int, fields: _Fields) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in ("text", "input_text", "output_text") and isinstance(part.get("text"), str):
        return part["text"]
    where = f"{fields.prefix}content[{i}]"
    what = f"of type {kind!r}" if isinstance(kind, str) else "without a type"
    raise ApiError(400, f"{where} is {what[:60]}; the model reads text parts only", where, "unsupported_content")


def text_parts(content: Any) -> list[str]:
    """The texts in a message's content, which is a text or a list of parts; pictures and the like are left out."""
    if isinstance(content, list):
        return [part["text"] for part in content if isinstance(part, dict) and isinstance(part.get("text"), str)]
    return [content] if isinstance(content, str) else []


def text_of(content: Any) -> str | None:
    """A message's content as one text; None if it is more than text, or none at all."""
    parts = text_parts(content)
    return "\n".join(parts) if len(parts) == (len(content) if isinstance(content, list) else 1) else None


def _prompts(fields: _Fields) -> tuple[str | tuple[int, ...], ...]:
    prompt = fields.take("prompt")
    if isinstance(prompt, str) or _is_ids(prompt):
        prompt = [prompt]
    if not isinstance(prompt, list) or not prompt or not all(isinstance(p, str) or _is_ids(p) for p in prompt):
        raise fields.wrong("prompt", "a text, a list of token ids, or a list of either")
    return tuple(p if isinstance(p, str) else tuple(p) for p in prompt)


def _is_ids(prompt: Any) -> bool:
    return isinstance(prompt, list) and bool(prompt) and all(type(token) is int for token in prompt)
