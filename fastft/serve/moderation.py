"""Ask an OpenAI-compatible moderation endpoint about what users write, before a model reads it.

    found = await Moderation(settings).check(request)        # {"flagged", "categories"}, or {"unreachable": True}

Every text that no model wrote is checked once; the latest thousands of verdicts are kept. If the endpoint cannot be reached,
`closed` decides: either requests are refused (503), or they are answered and the turn's event records that they were not
checked.
"""

import asyncio
import hashlib
import logging
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from fastft.common.moderation_api import NoVerdictsError, moderation_request, read_verdicts
from fastft.serve.protocol import ApiError, text_parts

logger = logging.getLogger(__name__)

KEPT_VERDICTS = 10_000


@dataclass(frozen=True)
class ModerationSettings:
    url: str
    """The endpoint itself: https://api.openai.com/v1/moderations."""
    model: str | None = None
    key: str | None = field(default=None, repr=False)
    closed: bool = False
    limit_s: float = 5.0


def content_flagged(categories: list[str]) -> ApiError:
    why = f" ({', '.join(categories)})" if categories else ""
    return ApiError(400, f"the moderation service refuses this message{why}", "messages", "content_flagged")


def unreadable() -> ApiError:
    message = "the prompt is token ids, which the moderation service cannot read; send it as text"
    return ApiError(400, message, "prompt", "content_unreadable")


def moderation_unavailable() -> ApiError:
    message = "the moderation service cannot be reached, and nothing is answered without it; try again soon"
    return ApiError(503, message, code="moderation_unavailable", kind="server_error", retry_after=5)


class Moderation:
    def __init__(self, settings: ModerationSettings):
        self.settings = settings
        self.verdicts: OrderedDict[bytes, list[str]] = OrderedDict()
        """Flagged categories by the hash of the text; none if it is not flagged."""

    async def check(self, session: aiohttp.ClientSession, request: dict[str, Any]) -> dict[str, Any]:
        """The verdict on a request, as it is recorded. `session` must keep no cookies and follow no redirects."""
        texts = {_digest(text): text for text in texts_of(request)}
        verdicts = {digest: self.verdicts[digest] for digest in texts if digest in self.verdicts}
        if new := {digest: text for digest, text in texts.items() if digest not in verdicts}:
            try:
                found = await self._ask(session, [*new.values()])
            except (aiohttp.ClientError, asyncio.TimeoutError, OSError, NoVerdictsError) as error:
                logger.warning("moderation: %s: %s", self.settings.url, error or type(error).__name__)
                return {"unreachable": True}
            verdicts |= zip(new, found)
        self.verdicts |= verdicts
        while len(self.verdicts) > KEPT_VERDICTS:
            self.verdicts.popitem(last=False)
        categories = {name for names in verdicts.values() for name in names}
        return {"flagged": bool(categories), "categories": sorted(categories)}

    async def _ask(self, session: aiohttp.ClientSession, texts: list[str]) -> list[list[str]]:
        """The categories of each text. Raises what `check` catches."""
        settings = self.settings
        body, headers = moderation_request(texts, settings.model, settings.key)
        limit = aiohttp.ClientTimeout(total=settings.limit_s)
        async with session.post(
            settings.url, data=body, headers=headers, allow_redirects=False, timeout=limit
        ) as response:
            if response.status != 200:
                raise NoVerdictsError(f"status {response.status}")
            return read_verdicts(await response.read(), len(texts))


def has_token_ids(request: dict[str, Any]) -> bool:
    """Whether a prompt is given as token ids, which nobody can read here."""
    prompt = request.get("prompt")
    return isinstance(prompt, list) and any(isinstance(each, (int, list)) for each in prompt)


def texts_of(request: dict[str, Any]) -> list[str]:
    """All texts of a request that no model wrote, none empty."""
    found: list[Any] = [request.get("prompt")] if isinstance(request.get("prompt"), str) else []
    found += request["prompt"] if isinstance(request.get("prompt"), list) else []
    messages = request.get("messages")
    for message in messages if isinstance(messages, list) else []:
        if isinstance(message, dict) and message.get("role") != "assistant":
            found += text_parts(message.get("content"))
    return [text for text in found if isinstance(text, str) and text.strip()]


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
