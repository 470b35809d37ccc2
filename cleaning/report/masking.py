"""Prepare text from a dump for report.html: personal data and secrets are masked, long texts are clipped.

A report is shown around, so every text that a dump or a user has written passes through here on its way to the page.
The template escapes it.
"""

from typing import Any

from cleaning.filters.privacy import mask_text


def excerpt(text: str, longest: int = 200) -> str:
    """Return at most `longest` characters of `text`. It is masked first, because no pattern would recognise half of a key."""
    return clip(mask_text(text[: 2 * longest + 100]), longest)


def clip(text: str, longest: int) -> str:
    """Return `text` without white space at its ends; if it is longer than `longest` characters, its beginning and an ellipsis."""
    text = text.strip()
    return text if len(text) <= longest else text[:longest].rstrip() + " …"


def mask_all(value: Any) -> Any:
    """Return JSON of any shape with all texts in it masked, keys included. Counts whose keys become equal are added up."""
    if isinstance(value, str):
        return mask_text(value)
    if isinstance(value, list):
        return [mask_all(each) for each in value]
    if not isinstance(value, dict):
        return value
    masked: dict[str, Any] = {}
    for name, each in value.items():
        name, each = mask_text(name), mask_all(each)
        masked[name] = masked[name] + each if isinstance(each, int) and name in masked else each
    return masked
