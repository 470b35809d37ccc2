"""Filter conversations by their language, which fastft.data.language detects.

`--languages` keeps conversations in an unknown language, and `--with unknown_language` rejects them.
"""

from cleaning.settings import FilterSettings
from fastft.data.conversation import Conversation
from fastft.data.language import UNKNOWN, code_of


def other_language(conversation: Conversation, settings: FilterSettings) -> str | None:
    if not settings.languages or code_of(conversation.lang) in ("", UNKNOWN, *map(code_of, settings.languages)):
        return None
    return f"is in {conversation.lang!r}"


def unknown_language(conversation: Conversation, settings: FilterSettings) -> str | None:
    return "too little text, or too mixed" if conversation.lang == UNKNOWN else None
