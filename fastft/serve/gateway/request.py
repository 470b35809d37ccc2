"""What a request says about itself: who asks, in which conversation, and with which messages."""

import hashlib
from typing import Any

import orjson
from starlette.types import Scope

from fastft.compose.abtest.policy import LONGEST_USER
from fastft.data.conversation import Message
from fastft.serve import protocol
from fastft.serve.protocol import ApiError

USER_HEADER = b"x-user-id"
CONVERSATION_HEADERS = ("x-fastft-conversation", "x-openwebui-chat-id")
LONGEST_ID = 200
BACKGROUND_HEADER = "x-fastft-background"
BACKGROUND_PROMPT = "### Task:\n"
"""How Open WebUI's own requests begin (for titles, tags, follow-up questions), which no person wrote."""


def header(scope: Scope, name: bytes) -> str:
    """The first header of this name, in lower case; "" if there is none."""
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), "")


def bearer(scope: Scope) -> bytes:
    """The key that a request sends."""
    return header(scope, b"authorization").removeprefix("Bearer ").strip().encode("latin-1")


def conversation_id(scope: Scope, messages: list[Any], key: str | None) -> tuple[str | None, str]:
    """(id, its source). If the client sends none, it is a hash of the conversation's beginning, the same at every turn."""
    first = next((i for i, each in enumerate(messages) if isinstance(each, dict) and each.get("role") == "user"), None)
    opening = messages[: first + 1] if first is not None else messages
    asked = messages[first].get("content") if first is not None else None
    if header(scope, BACKGROUND_HEADER.encode()) or (isinstance(asked, str) and asked.startswith(BACKGROUND_PROMPT)):
        return None, "background"
    for name in CONVERSATION_HEADERS:
        if given := header(scope, name.encode()):
            return given[:LONGEST_ID], "header"
    if not opening:
        return None, "none"
    return hashlib.blake2b(orjson.dumps([key, opening]), digest_size=12).hexdigest(), "messages"


def require_shallow(request: dict[str, Any]) -> None:
    """Raises ApiError for JSON that is too deep to be written again (orjson reads 1024 levels and writes 254)."""
    try:
        orjson.dumps(request)
    except TypeError:
        raise ApiError(400, "the body is nested too deeply", code="invalid_json") from None


def as_messages(messages: list[Any], prompt: Any) -> list[Message]:
    """Messages for a policy to read, or the prompt of a plain completion. The worker is who refuses wrong ones."""
    if isinstance(prompt, str) and not messages:
        return [Message("user", prompt)]
    dialogue = (each for each in messages if isinstance(each, dict))
    return [Message(str(each.get("role")), "\n".join(protocol.text_parts(each.get("content")))) for each in dialogue]


def user_of(scope: Scope, request: dict[str, Any]) -> str | None:
    """The user's name: the request's `user`, else the header X-User-Id; None if there is none."""
    named = request.get("user")
    # As UTF-8, so that a name has the same hash in a header and in a request.
    in_header = header(scope, USER_HEADER).encode("latin-1").decode("utf-8", "replace")
    user = named if isinstance(named, str) and named else in_header
    return user if 0 < len(user) <= LONGEST_USER else None
