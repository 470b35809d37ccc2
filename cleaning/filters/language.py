"""Which language a conversation is in: CLD2, 28 MB/s on one core, its tables inside the wheel (pycld2, Apache-2.0).

Judged over the whole conversation with code taken out: `yes` and `continue` are no evidence, and code is English to
any detector. What CLD2 is not sure of is "unknown", which is not "other": `--languages` keeps it, because it is mostly
code and dialogues of a few words; `--with unknown_language` rejects it.
"""

import re

from cleaning.filters.base import Settings
from fastft.conversation import Conversation

try:
    import pycld2
except ImportError:  # no wheel for this platform: `lang` stays empty, and --languages says what to install
    pycld2 = None

UNKNOWN = "unknown"
ENOUGH = 50_000  # characters; the rest of a long dialogue changes nothing
_OLD_CODES = {"iw": "he", "jw": "jv", "in": "id", "ji": "yi", "sh": "sr", "no": "nb", "un": UNKNOWN}
_CODE = re.compile(r"^[ \t>]*(`{3,}|~{3,})[\s\S]*?(?:^[ \t>]*\1|\Z)|`[^`\n]*`|https?://\S+|<[^<>\n]{1,200}>", re.M)
# CLD2 refuses text that holds these (bytes that are no interchange-valid UTF-8).
_INVALID = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff\U0000e000-\U0000f8ff]"
)


def available() -> bool:
    return pycld2 is not None


def detect_language(conversation: Conversation) -> str:
    """An ISO 639-1 code where there is one, "unknown", or "" where nothing can judge (pycld2 is not installed)."""
    if pycld2 is None:
        return ""
    texts, size = [], 0
    for message in conversation.messages:
        if message.role in ("user", "assistant") and size < ENOUGH:
            texts.append(message.content[: ENOUGH - size])
            size += len(texts[-1])
    return language_of("\n".join(texts))


def language_of(text: str) -> str:
    text = _INVALID.sub(" ", _CODE.sub(" ", text))
    try:
        reliable, _, ((_, code, percent, _), *_) = pycld2.detect(text.encode("utf-8", "ignore"))
    except pycld2.error:  # planes of the private use area and noncharacters beyond the basic plane
        return UNKNOWN
    if not reliable or percent < 50:
        return UNKNOWN
    code = code.split("-")[0]  # zh-Hant is zh: a script, not a language
    return _OLD_CODES.get(code, code)


def other_language(conversation: Conversation, settings: Settings) -> str | None:
    if not settings.languages or conversation.lang in ("", UNKNOWN, *settings.languages):
        return None
    return f"is in {conversation.lang!r}"


def unknown_language(conversation: Conversation, settings: Settings) -> str | None:
    return "too little text, or too mixed" if conversation.lang == UNKNOWN else None
