"""Read what an endpoint sent back: the body of a chat completion becomes text and token counts, or the error that it holds.

Endpoints differ: content may be a list of parts, counts may be missing, an error may come with status 200. Whatever the shape,
`read_completion` returns a text that can be written to any file, or raises `ErrorInBody` or `Malformed`.
"""

import re
from dataclasses import dataclass
from typing import Any, NamedTuple

from fastft.common.records import parse_json, repair_text

MOST_TOKENS = 10**9  # no request has so many: a count above is none


@dataclass(frozen=True)
class Reply:
    """A model's reply to one request, and where it came from.

    `cached` is true for a reply that this request has not paid for: an earlier run has, or an equal request of this run that it
    shares the reply with. So the `usd` of all replies that are not cached are what the answers of this run have cost.
    """

    text: str
    finish_reason: str | None
    """"stop", "length" (cut at max_tokens), "content_filter", or whatever the endpoint says."""
    prompt_tokens: int
    completion_tokens: int
    seconds: float
    """From the first try to the answer, waits between tries included; 0 for a batch."""
    cached: bool = False
    reasoning: str = ""
    """The model's thoughts, where the endpoint sends them apart from its answer."""
    refused: bool = False
    """Whether the endpoint itself marks the text as a refusal (`refusal` in OpenAI's message)."""
    model: str = ""
    """The name that the endpoint gives to the model that answered, such as gpt-4.1-2025-04-14 for gpt-4.1."""
    endpoint: str = ""
    """URL#name of the endpoint that was asked."""
    request_id: str = ""
    """The endpoint's id of the request (x-request-id), or else of the completion."""
    batch: str = ""
    """The id of the batch that it came in, if any."""
    usd: float = 0.0
    """What it cost, without the tries before it that failed."""


class Completion(NamedTuple):
    """What the body of a chat completion holds. `usage` is (prompt tokens, completion tokens), None if they were not counted."""

    text: str
    finish_reason: str | None
    usage: tuple[int, int] | None
    reasoning: str
    refused: bool
    model: str
    id: str


class Malformed(Exception):
    """The endpoint sent status 200 with a body that is no completion. `foreign` says that it is not JSON: no model wrote it."""

    def __init__(self, said: str, foreign: bool = False):
        super().__init__(said)
        self.foreign = foreign


class ErrorInBody(Exception):
    """The endpoint sent an error: with its status, or with status 200, as gateways do for the endpoints that they forward to.

    `status_code` is the status, or else the code in the body; `pause_s` how long the endpoint asks to wait, 0 if it does not.
    """

    def __init__(self, error: dict[str, Any], status: int | None = None, pause_s: float = 0.0):
        code = status or error.get("code")
        super().__init__(f"Error code: {code} - {error.get('message') or error}")
        self.status_code = int(code) if re.fullmatch("[0-9]{3,9}", str(code)) else 502
        self.body, self.param, self.pause_s = error, error.get("param"), pause_s


def error_of(status: int, content: bytes, pause_s: float = 0.0) -> ErrorInBody:
    """Return the error that a response with a status of 300 or more stands for."""
    try:
        body = parse_json(content)
    except ValueError:
        body = " ".join(content[:1000].decode(errors="replace").split())
    return error_in(status, body, pause_s)


def error_in(status: int, body: Any, pause_s: float = 0.0) -> ErrorInBody:
    """Return the error that a status of 300 or more stands for, with a body whose JSON is parsed already."""
    if isinstance(body, dict) and "error" in body:
        body = body["error"]
    if isinstance(body, dict) and not body.get("message") and body.get("detail"):  # FastAPI's servers
        body = {**body, "message": body["detail"]}
    return ErrorInBody(body if isinstance(body, dict) else {"message": str(body)}, status, pause_s)


def parse_body(body: bytes) -> Any:
    """Parse JSON that is paid for: bytes that are not UTF-8 become U+FFFD. Raises ValueError if it is no JSON even so."""
    try:
        return parse_json(body)
    except UnicodeDecodeError:
        return parse_json(body.decode(errors="replace").encode())


def read_completion(body: bytes) -> Completion:
    """Read the body of a chat completion.

    Raises ErrorInBody for an error that was sent with status 200, and Malformed for a body that is no completion.
    """
    try:
        completion = parse_body(body)
    except ValueError:
        start = " ".join(body[:200].decode(errors="replace").split())[:60]
        raise Malformed(f"the reply is not JSON but {start!r}: is the URL right (most end in /v1)?", True) from None
    return read_parsed(completion)


def read_parsed(completion: Any) -> Completion:
    """Read a chat completion whose JSON is parsed already. Raises ErrorInBody and Malformed as `read_completion` does."""
    completion = completion if isinstance(completion, dict) else {}
    choices = completion.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}
    for error in (completion.get("error"), choice.get("error")):
        if error:
            raise ErrorInBody(error if isinstance(error, dict) else {"message": str(error)})
    message = choice.get("message")
    if not isinstance(message, dict):
        raise Malformed("the reply has no choice with a message")
    text, refusal = text_of(message.get("content")), text_of(message.get("refusal"))
    return Completion(
        text=text or refusal,
        finish_reason=_name(choice.get("finish_reason")) or None,
        usage=_token_counts(completion.get("usage")),
        reasoning=_thoughts(message),
        refused=bool(refusal and not text),
        model=_name(completion.get("model")),
        id=_name(completion.get("id")),
    )


def _name(value: Any) -> str:
    return repair_text(value) if isinstance(value, str) else ""


def _thoughts(message: dict[str, Any]) -> str:
    """Return the reasoning of a message: vLLM, SGLang and DeepSeek send `reasoning_content`, OpenRouter and newer vLLM
    `reasoning`, Mistral parts of the type "thinking".
    """
    for name in ("reasoning_content", "reasoning"):
        if isinstance(message.get(name), str) and message[name]:
            return repair_text(message[name])
    content = message.get("content")
    parts = [part for part in content if isinstance(part, dict)] if isinstance(content, list) else []
    thoughts = [part.get("thinking") for part in parts if part.get("type") == "thinking"]
    return "".join(text_of(each) for each in thoughts if isinstance(each, (str, list)))


def _token_counts(usage: Any) -> tuple[int, int] | None:
    counts = [usage.get(name) if isinstance(usage, dict) else None for name in ("prompt_tokens", "completion_tokens")]
    counted = all(
        isinstance(count, int) and not isinstance(count, bool) and 0 <= count < MOST_TOKENS for count in counts
    )
    return (counts[0], counts[1]) if counted else None


def text_of(content: Any) -> str:
    """Return the text of a message's content. In a list of parts, only text parts count; a model's thoughts have another
    type.

    Raises Malformed if the content is neither text nor a list.
    """
    if isinstance(content, list):
        content = "".join(_text_of_part(part) for part in content)
    if content is not None and not isinstance(content, str):
        raise Malformed(f"the reply's content is of type {type(content).__name__}")
    return repair_text(content or "")


def _text_of_part(part: Any) -> str:
    if isinstance(part, dict):
        part = part.get("text") if part.get("type", "text") in ("text", "output_text") else ""
    return part if isinstance(part, str) else ""
