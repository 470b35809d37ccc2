"""OpenAI's interface of moderation endpoints: POST {"input": [texts]}, answered by {"results": [{"flagged", "categories"}]}.

    body, headers = moderation_request(texts, model, key)
    for categories in read_verdicts(content, len(texts)): …    # [] if the text is not flagged

Whoever asks sends the request in its own way: the cleaner with retries and a cache, the gateway within its event loop.
"""

import json
from collections.abc import Sequence


class NoVerdictsError(Exception):
    """An answer that holds no verdicts; another try may give a better one."""


def moderation_request(texts: Sequence[str], model: str | None, key: str | None) -> tuple[bytes, dict[str, str]]:
    """(body, headers) of a request about `texts`. `model` is left to the endpoint if it is None or empty."""
    body = {"input": list(texts)} | ({"model": model} if model else {})
    return json.dumps(body).encode(), {"Content-Type": "application/json"} | (
        {"Authorization": f"Bearer {key}"} if key else {}
    )


def read_verdicts(content: bytes, count: int) -> list[list[str]]:
    """The sorted categories of each of `count` texts: [] if it is not flagged, ["flagged"] if the endpoint names none.

    Raises NoVerdictsError.
    """
    try:
        verdicts = [
            sorted(name for name, holds in (result.get("categories") or {}).items() if holds) or ["flagged"]
            if result["flagged"]
            else []
            for result in json.loads(content)["results"]
        ]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):  # not JSON, or JSON of another shape
        raise NoVerdictsError("a reply that is not in the form of /v1/moderations") from None
    if len(verdicts) != count:
        raise NoVerdictsError(f"{len(verdicts)} results for {count} texts")
    return verdicts
