"""Formats in which a record is a list of turns, or columns of a table: no trees, no pages.

Each reader takes a record and returns its one conversation, or raises Rejection. Only ShareGPT's values can be HTML
(`cleaning.sources.eras` decides); everywhere else text is text.
"""

import re
from collections import Counter

from cleaning.sources.turns import (
    RawConversation,
    Rejection,
    Turn,
    as_list,
    as_object,
    first,
    id_in,
    keys_of,
    label,
    read_content,
    read_turn,
    role_of,
    shown,
    text_of,
    time_in,
)
from fastft.records import repair_text

# The names of languages in WildChat and LMSYS-Chat-1M, where they are common; others keep their name in lower case.
LANGUAGES = {
    "arabic": "ar", "bengali": "bn", "catalan": "ca", "chinese": "zh", "czech": "cs", "danish": "da", "dutch": "nl",
    "english": "en", "finnish": "fi", "french": "fr", "german": "de", "greek": "el", "hebrew": "he", "hindi": "hi",
    "hungarian": "hu", "indonesian": "id", "italian": "it", "japanese": "ja", "korean": "ko", "latin": "la",
    "malay": "ms", "norwegian": "nb", "persian": "fa", "polish": "pl", "portuguese": "pt", "romanian": "ro",
    "russian": "ru", "spanish": "es", "swedish": "sv", "tagalog": "tl", "thai": "th", "turkish": "tr",
    "ukrainian": "uk", "urdu": "ur", "vietnamese": "vi",
}  # fmt: skip


def read_sharegpt(record: dict) -> RawConversation:
    """{"conversations" or "items": [{"from": "human", "value": "…"}, …]}; `text` and `html` as they were shared."""
    return _turns_of(record, "conversations", "items")


def read_messages(record: dict) -> RawConversation:
    """OpenAI style: {"messages": [{"role": "user", "content": "…" or parts}, …]}."""
    return _turns_of(record, "messages")


def _turns_of(record: dict, *keys: str) -> RawConversation:
    turns = first(record, *keys)
    if turns is None:
        raise Rejection("not_a_conversation", f"no {' or '.join(map(repr, keys))}; keys: {keys_of(record)}")
    conversation = _conversation(record)
    turns = enumerate(as_list(turns, "turns"), start=1)
    conversation.turns = [read_turn(turn, number, conversation.notes) for number, turn in turns]
    call = next((number for number, turn in enumerate(conversation.turns, start=1) if turn.calls), None)
    if call is not None:
        conversation.sessions["tool_session"] = f"turn {call} calls a tool"
    return conversation


def read_chat_log(record: dict) -> RawConversation:
    """WildChat and LMSYS-Chat-1M: {"conversation": [{"role", "content", …}], "model", "language", …}.

    What the dump says about its content is noted, not judged: "flagged toxic", "flagged by moderation", "redacted".
    """
    conversation = _turns_of(record, "conversation")
    conversation.notes["flagged toxic"] += record.get("toxic") is True
    conversation.notes["redacted"] += record.get("redacted") is True
    moderation = record.get("openai_moderation")
    if isinstance(moderation, list) and any(isinstance(m, dict) and m.get("flagged") is True for m in moderation):
        conversation.notes["flagged by moderation"] += 1
    return conversation


def read_pairs(record: dict) -> RawConversation:
    """{"conversation": [{"human": "…", "assistant": "…"}, …]}: a round an object, its keys in the order of speech."""
    conversation = _conversation(record)
    for number, pair in enumerate(as_list(record.get("conversation"), "rounds"), start=1):
        for name, content in as_object(pair, f"round {number}").items():
            text = read_content(content, number, conversation.notes)
            conversation.turns.append(Turn(role_of(name, number), text))
    return conversation


_MARK = re.compile(r"(?:\A|\n)\s*<\|(system|user|human|bot|assistant)\|>:[ \t]?")


def read_marked_text(record: dict) -> RawConversation:
    """{"text": "<|user|>: …\\n\\n<|bot|>: …"}: one string, a mark at the beginning of a line before each turn."""
    conversation, text = _conversation(record), record.get("text")
    if not isinstance(text, str) or not _MARK.match(text):
        raise Rejection("not_a_conversation", f"its text does not begin with a mark like <|user|>: {shown(text)}")
    _, *pieces = _MARK.split(repair_text(text))
    conversation.turns = [
        Turn(role_of(name, number), text.removesuffix("\n").removesuffix("\n"))
        for number, (name, text) in enumerate(zip(pieces[::2], pieces[1::2]), start=1)
    ]
    return conversation


def read_alpaca(record: dict) -> RawConversation:
    """{"instruction", "input"?, "output", "system"?, "history"?: [[question, answer], …]}."""
    if record.get("instruction") is None or record.get("output") is None:
        raise Rejection("not_a_conversation", f"no 'instruction' or no 'output'; keys: {keys_of(record)}")
    conversation, notes = _conversation(record), Counter()
    texts = [("system", record.get("system"))] if record.get("system") else []
    history = as_list(record.get("history") or [], "earlier rounds")
    for number, pair in enumerate(history, start=1):
        if not isinstance(pair, list) or len(pair) != 2:
            raise Rejection("not_a_conversation", f"earlier round {number} is not a pair but {shown(pair)}")
        texts += zip(("user", "assistant"), pair)
    instruction, given = (read_content(record.get(key), 1, notes) for key in ("instruction", "input"))
    texts.append(
        ("user", f"{instruction}\n\n{given}" if instruction.strip() and given.strip() else instruction or given)
    )
    texts.append(("assistant", record.get("output")))
    conversation.turns = [
        Turn(role, read_content(text, number, notes)) for number, (role, text) in enumerate(texts, start=1)
    ]
    conversation.notes += notes
    return conversation


def read_claude_export(record: dict) -> RawConversation:
    """{"uuid", "chat_messages": [{"sender": "human", "text" or "content": parts, "attachments"?}, …]}.

    The text parts of `content` are what was said; `text`, where there are none, may also tell of tools.
    """
    conversation = _conversation(record)
    for number, message in enumerate(as_list(record.get("chat_messages"), "messages"), start=1):
        message = as_object(message, f"message {number}")
        parts = message.get("content")
        spoken = isinstance(parts, list) and any(isinstance(p, dict) and p.get("type") == "text" for p in parts)
        content = parts if spoken or not isinstance(message.get("text"), str) else message["text"]
        text = read_content(content, number, conversation.notes)
        conversation.turns.append(Turn(role_of(first(message, "sender", "role"), number), text))
        for key in ("attachments", "files"):
            if isinstance(message.get(key), list):
                conversation.notes[f"dropped {key}"] += len(message[key])
    return conversation


def _conversation(record: dict) -> RawConversation:
    """An empty one, with what the record says about itself."""
    lang = text_of(first(record, "lang", "language")).strip().lower()
    lang = LANGUAGES.get(lang, label(lang) if lang else "")
    conversation = RawConversation(id_in(record), text_of(record.get("model")), [], lang, time=time_in(record))
    if plugins := record.get("plugins"):
        conversation.sessions["plugin_session"] = f"its 'plugins' are {shown(plugins)}"
    # The contract has no place for them; a chat template would need them as an argument of its own.
    conversation.notes["dropped definitions of tools"] += record.get("tools") not in (None, "", "[]", [])
    return conversation
