"""Text from a dump as report.html may show it: personal data and secrets masked, long texts clipped.

A report is shown around, so every text that a dump or a user has written passes through here on its way to the page.
Escaping is the template's part.
"""

from typing import Any

from cleaning.filters.privacy import mask_text


def excerpt(text: str, longest: int = 200) -> str:
    """At most `longest` characters of `text`, masked before it is clipped: no pattern would recognise half of a key."""
    return clip(mask_text(text[: 2 * longest + 100]), longest)


def clip(text: str, longest: int) -> str:
    """`text` without white space at its ends, cut after `longest` characters with an ellipsis."""
    text = text.strip()
    return text if len(text) <= longest else text[:longest].rstrip() + " …"


def mask_all(value: Any) -> Any:
    """`value`, JSON of any shape, with all texts in it masked, keys included; counts whose keys become equal are added."""
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
