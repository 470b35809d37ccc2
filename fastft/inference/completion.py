"""Read what an endpoint sent back: the body of a chat completion becomes text and token counts, or the error that it holds.

Endpoints differ: content may be a list of parts, counts may be missing, an error may come with status 200. Whatever the shape,
`read_completion` returns a text that can be written to any file, or raises `ErrorInBody` or `Malformed`.
"""

from dataclasses import dataclass
from typing import Any

from fastft.common.records import parse_json, repair_text


@dataclass(frozen=True)
class Reply:
    """A model's reply to one request. `cached` is true if an earlier run has paid for it."""

    text: str
    finish_reason: str | None
    prompt_tokens: int
    completion_tokens: int
    seconds: float
    cached: bool = False


class Malformed(Exception):
    """The endpoint sent status 200 with a body that is no completion. `foreign` says that it is not JSON: no model wrote it."""

    def __init__(self, said: str, foreign: bool = False):
        super().__init__(said)
        self.foreign = foreign


class ErrorInBody(Exception):
    """The endpoint sent status 200 with an error as its body, as gateways do for the endpoints that they forward to."""

    def __init__(self, error: dict[str, Any]):
        code = error.get("code")
        super().__init__(f"Error code: {code} - {error.get('message') or error}")
        self.status_code = int(code) if str(code).isdigit() else 502
        self.body, self.param = error, error.get("param")


def read_completion(body: bytes) -> tuple[str, str | None, tuple[int, int] | None]:
    """Return (text, finish reason, (prompt tokens, completion tokens) or None if they were not counted).

    Raises ErrorInBody for an error that was sent with status 200, and Malformed for a body that is no completion.
    """
    try:
        completion = parse_json(body)
    except ValueError:
        start = " ".join(body[:200].decode(errors="replace").split())[:60]
        raise Malformed(f"the reply is not JSON but {start!r}: is the URL right (most end in /v1)?", True) from None
    completion = completion if isinstance(completion, dict) else {}
    choices = completion.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}
    for error in (completion.get("error"), choice.get("error")):
        if error:
            raise ErrorInBody(error if isinstance(error, dict) else {"message": str(error)})
    message = choice.get("message")
    if not isinstance(message, dict):
        raise Malformed("the reply has no choice with a message")
    reason = choice.get("finish_reason")
    text = text_of(message.get("content")) or text_of(message.get("refusal"))
    return text, repair_text(reason) if isinstance(reason, str) else None, _token_counts(completion.get("usage"))


def _token_counts(usage: Any) -> tuple[int, int] | None:
    counts = [usage.get(name) if isinstance(usage, dict) else None for name in ("prompt_tokens", "completion_tokens")]
    counted = all(isinstance(count, int) and not isinstance(count, bool) and count >= 0 for count in counts)
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
