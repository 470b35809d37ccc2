"""Ask a moderation endpoint with OpenAI's interface: POST {"input": [texts]}, answered by {"results": [{"flagged", …}]}.

Nothing is sent unless `--moderation URL` is given. Then the text of every conversation that the other filters keep is sent
there, in batches. A verdict is remembered in a file (by a hash of the text, never the text), so an interrupted run asks
nothing twice. The key comes from the environment variable FASTFT_MODERATION_KEY, or, for api.openai.com only, from
OPENAI_API_KEY, so that no key reaches a host that it was not made for. Redirects are refused for the same reason.
"""

import hashlib
import http.client
import json
import os
import random
import re
import sqlite3
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import closing

from cleaning.settings import FilterSettings
from fastft.common.moderation_api import NoVerdictsError, moderation_request, read_verdicts
from fastft.common.urls import parse_http
from fastft.data.conversation import Conversation
from fastft.errors import UserError

BATCH = 32  # texts in a request
PIECE = 10_000  # characters; a longer text is sent in pieces, and flagged if one of them is
TRIES = 6
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds; the wait doubles each time, and is at least what Retry-After says
TIMEOUT = 60.0  # seconds


def flagged(conversations: Sequence[Conversation], settings: FilterSettings) -> list[str | None]:
    """Return the complaint about each conversation, or None. Raises UserError if the endpoint cannot be used."""
    keys = [[[_key(piece, settings) for piece in _pieces(m.content)] for m in c.messages] for c in conversations]
    texts = {
        key: piece
        for conversation, by_turn in zip(conversations, keys)
        for message, by_piece in zip(conversation.messages, by_turn)
        for piece, key in zip(_pieces(message.content), by_piece)
    }
    verdicts = _verdicts(texts, settings)
    return [_complaint([[verdicts[key] for key in turn] for turn in conversation]) for conversation in keys]


def _complaint(turns: list[list[list[str]]]) -> str | None:
    for number, pieces in enumerate(turns, start=1):
        categories = sorted({category for piece in pieces for category in piece})
        if categories:
            return f"turn {number} is flagged: {', '.join(categories)}"
    return None


def _pieces(text: str) -> list[str]:
    return [text[start : start + PIECE] for start in range(0, len(text), PIECE)] if text.strip() else []


def _key(text: str, settings: FilterSettings) -> bytes:
    name = f"{settings.moderation}\0{settings.moderation_model or ''}\0"
    return hashlib.blake2b((name + text).encode("utf-8", "replace"), digest_size=16).digest()


def _verdicts(texts: dict[bytes, str], settings: FilterSettings) -> dict[bytes, list[str]]:
    """Return {key: flagged categories}, from the file or the endpoint. Each reply is stored before the next request."""
    with closing(_open_cache(settings.moderation_cache)) as cache:
        known = dict(_remembered(cache, list(texts)))
        missing = [key for key in texts if key not in known]
        for start in range(0, len(missing), BATCH):
            keys = missing[start : start + BATCH]
            answers = _ask([texts[key] for key in keys], settings)
            with cache:
                rows = [(key, json.dumps(answer)) for key, answer in zip(keys, answers)]
                cache.executemany("insert or replace into verdicts values (?, ?)", rows)
            known.update(zip(keys, answers))
    return known


def _open_cache(path: str | None) -> sqlite3.Connection:
    """Open the file of verdicts. Workers share it: one waits a few milliseconds while another writes."""
    try:
        cache = sqlite3.connect(path or ":memory:", timeout=60)
        cache.execute("create table if not exists verdicts (key blob primary key, categories text) without rowid")
    except sqlite3.Error as error:
        raise UserError(f"{path}: cannot be used to remember moderation verdicts: {error}") from None
    return cache


def _remembered(cache: sqlite3.Connection, keys: list[bytes]) -> Iterator[tuple[bytes, list[str]]]:
    for start in range(0, len(keys), 500):
        some = keys[start : start + 500]
        query = f"select key, categories from verdicts where key in ({','.join('?' * len(some))})"
        yield from ((key, json.loads(categories)) for key, categories in cache.execute(query, some))


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_):
        return None


_OPENER = urllib.request.build_opener(_NoRedirect)


def _ask(texts: list[str], settings: FilterSettings) -> list[list[str]]:
    data, headers = moderation_request(texts, settings.moderation_model, _key_for(settings.moderation))
    wait, problem = FIRST_WAIT, ""
    for attempt in range(1, TRIES + 1):
        request = urllib.request.Request(settings.moderation, data, headers)
        try:
            with _OPENER.open(request, timeout=TIMEOUT) as response:
                return read_verdicts(response.read(), len(texts))
        except urllib.error.HTTPError as error:
            if error.code not in (408, 409, 425, 429) and error.code < 500:
                raise UserError(f"{shown(settings.moderation)}: HTTP {error.code} {error.reason}") from None
            problem, asked = f"HTTP {error.code} {error.reason}", _seconds(error.headers.get("Retry-After"))
        # No connection, a timeout, a truncated reply.
        except (OSError, http.client.HTTPException, NoVerdictsError) as error:
            problem, asked = str(getattr(error, "reason", error)) or type(error).__name__, 0.0
        if attempt < TRIES:
            # Workers that failed together should not come back together.
            time.sleep(min(max(wait * random.uniform(0.5, 1.0), asked), LONGEST_WAIT))
            wait *= 2
    raise UserError(
        f"{shown(settings.moderation)}: failed {TRIES} times, last: {problem}; run again to continue from here"
    )


def _key_for(url: str) -> str | None:
    key = os.environ.get("FASTFT_MODERATION_KEY")
    if not key and urllib.parse.urlsplit(url).hostname == "api.openai.com":
        key = os.environ.get("OPENAI_API_KEY")
    return key


def _seconds(value: str | None) -> float:
    return float(value) if value and value.replace(".", "", 1).isdecimal() else 0.0


def check_url(url: str) -> None:
    """Raise UserError for a URL that is not an endpoint's address, or that holds a key."""
    parts = parse_http(url)
    if not parts:
        raise UserError(f"--moderation {re.sub('//[^/]*@', '//', url).partition('?')[0]}: is not an http(s) URL")
    if parts.username or parts.password or parts.query:
        raise UserError(f"--moderation {shown(url)}: a key goes into FASTFT_MODERATION_KEY, not into the URL")


def shown(url: str) -> str:
    """Return the URL without the parts that may hold a secret."""
    parts = urllib.parse.urlsplit(url)
    return urllib.parse.urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
