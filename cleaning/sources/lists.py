"""Readers of formats in which a record is a list of turns, or a row of a table. Trees and pages have modules of their own.

Each reader takes a record and returns its one conversation, or raises Rejection. Only ShareGPT's values can be HTML, which
`cleaning.sources.eras` decides; in all other formats text is text.
"""

import contextlib
import hashlib
import re
from collections import Counter
from dataclasses import fields

from cleaning.sources.turns import (
    RawConversation,
    Rejection,
    Turn,
    as_list,
    as_object,
    first_of,
    id_in,
    keys_of,
    label,
    mark_by_record,
    marked,
    read_content,
    read_turn,
    role_of,
    shown,
    text_of,
    time_in,
)
from fastft.common.records import parse_json, repair_text
from fastft.data.conversation import Conversation

# The common names of languages in WildChat and LMSYS-Chat-1M. Other languages keep their names, in lower case.
LANGUAGES = {
    "arabic": "ar", "bengali": "bn", "catalan": "ca", "chinese": "zh", "czech": "cs", "danish": "da", "dutch": "nl",
    "english": "en", "finnish": "fi", "french": "fr", "german": "de", "greek": "el", "hebrew": "he", "hindi": "hi",
    "hungarian": "hu", "indonesian": "id", "italian": "it", "japanese": "ja", "korean": "ko", "latin": "la",
    "malay": "ms", "norwegian": "nb", "persian": "fa", "polish": "pl", "portuguese": "pt", "romanian": "ro",
    "russian": "ru", "spanish": "es", "swedish": "sv", "tagalog": "tl", "thai": "th", "turkish": "tr",
    "ukrainian": "uk", "urdu": "ur", "vietnamese": "vi",
}  # fmt: skip


def read_sharegpt(record: dict) -> RawConversation:
    """Read {"conversations" or "items": [{"from": "human", "value": "…"}, …]}. The texts stay as they were shared."""
    return _turns_of(record, "conversations", "items")


def read_messages(record: dict) -> RawConversation:
    """Read OpenAI's style: {"messages": [{"role": "user", "content": "…" or parts}, …]}."""
    return _turns_of(record, "messages")


def _turns_of(record: dict, *keys: str) -> RawConversation:
    """Read the list of turns under the first of `keys` that the record has."""
    turns = first_of(record, *keys)
    if turns is None:
        raise Rejection("not_a_conversation", f"no {' or '.join(map(repr, keys))}; keys: {keys_of(record)}")
    conversation = start_conversation(record)
    if isinstance(turns, str) and turns.startswith("["):  # a table with the list as JSON in a column
        with contextlib.suppress(ValueError):  # text that is not JSON is rejected below
            turns = parse_json(repair_text(turns).encode())
    turns = enumerate(as_list(turns, "turns"), start=1)
    conversation.turns = [read_turn(turn, number, conversation.notes) for number, turn in turns]
    return finished(conversation, record)


def finished(conversation: RawConversation, record: dict) -> RawConversation:
    """Add to `conversation` the record's system prompt and its marks on answers, and return it. This also notes the first
    turn that calls a tool.
    """
    _add_system(conversation, record)
    mark_by_record(conversation, record)
    call = next((number for number, turn in enumerate(conversation.turns, start=1) if turn.calls), None)
    if call is not None:
        conversation.sessions["tool_session"] = f"turn {call} calls a tool"
    return conversation


def read_chat_log(record: dict) -> RawConversation:
    """Read WildChat and LMSYS-Chat-1M: {"conversation": [{"role", "content", …}], "model", "language", …}.

    The dump's labels of content ("flagged toxic", "flagged by moderation", "redacted") are counted, but have no effect.
    """
    conversation = _turns_of(record, "conversation")
    conversation.notes["flagged toxic"] += record.get("toxic") is True
    conversation.notes["redacted"] += record.get("redacted") is True
    moderation = record.get("openai_moderation")
    if isinstance(moderation, list) and any(isinstance(m, dict) and m.get("flagged") is True for m in moderation):
        conversation.notes["flagged by moderation"] += 1
    return conversation


def read_pairs(record: dict) -> RawConversation:
    """Read {"conversation": [{"human": "…", "assistant": "…"}, …]}: each object is a round, its keys in the order spoken."""
    conversation = start_conversation(record)
    for number, pair in enumerate(as_list(record.get("conversation"), "rounds"), start=1):
        for name, content in as_object(pair, f"round {number}").items():
            text = read_content(content, number, conversation.notes)
            conversation.turns.append(Turn(role_of(name, number), text))
    return finished(conversation, record)


_ROLE_MARK = re.compile(r"(?:\A|\n)\s*<\|(system|user|human|bot|assistant)\|>:[ \t]?")


def read_marked_text(record: dict) -> RawConversation:
    """Read {"text": "<|user|>: …\\n\\n<|bot|>: …"}: one string, in which a mark at the start of a line begins each turn."""
    conversation, text = start_conversation(record), record.get("text")
    if not isinstance(text, str) or not _ROLE_MARK.match(text):
        raise Rejection("not_a_conversation", f"its text does not begin with a mark like <|user|>: {shown(text)}")
    _, *pieces = _ROLE_MARK.split(repair_text(text))
    conversation.turns = [
        Turn(role_of(name, number), text.removesuffix("\n").removesuffix("\n"))
        for number, (name, text) in enumerate(zip(pieces[::2], pieces[1::2]), start=1)
    ]
    return finished(conversation, record)


def read_alpaca(record: dict) -> RawConversation:
    """Read {"instruction", "input" or "context"?, "output" or "response", "system"?, "history"?: [[question, answer], …]}."""
    if record.get("instruction") is None or first_of(record, "output", "response") is None:
        raise Rejection("not_a_conversation", f"no 'instruction' or no 'output'; keys: {keys_of(record)}")
    conversation = start_conversation(record)
    conversation.turns = earlier_rounds(record, conversation.notes)
    conversation.turns.append(Turn("user", instruction_of(record, conversation.notes)))
    answer = read_content(first_of(record, "output", "response"), len(conversation.turns) + 1, conversation.notes)
    conversation.turns.append(Turn("assistant", answer))
    return finished(conversation, record)


def instruction_of(record: dict, notes: Counter[str]) -> str:
    """Return Alpaca's question: the instruction and, below it, the input that it is about."""
    instruction = read_content(record.get("instruction"), 1, notes)
    given = read_content(first_of(record, "input", "context"), 1, notes)
    return f"{instruction}\n\n{given}" if instruction.strip() and given.strip() else instruction or given


def earlier_rounds(record: dict, notes: Counter[str]) -> list[Turn]:
    """Return the turns in `history`, a list of pairs of a question and its answer."""
    turns = []
    for number, pair in enumerate(as_list(record.get("history") or [], "earlier rounds"), start=1):
        if not isinstance(pair, list) or len(pair) != 2:
            raise Rejection("not_a_conversation", f"earlier round {number} is not a pair but {shown(pair)}")
        for role, text in zip(("user", "assistant"), pair):
            turns.append(Turn(role, read_content(text, len(turns) + 1, notes)))
    return turns


def read_claude_export(record: dict) -> RawConversation:
    """Read {"uuid", "chat_messages": [{"sender": "human", "text" or "content": parts, "attachments"?}, …]}.

    The text parts of `content` are what was said. `text` is used only where there are none, because it may also hold
    descriptions of tool calls.
    """
    conversation = start_conversation(record)
    for number, message in enumerate(as_list(record.get("chat_messages"), "messages"), start=1):
        message = as_object(message, f"message {number}")
        parts = message.get("content")
        spoken = isinstance(parts, list) and any(isinstance(p, dict) and p.get("type") == "text" for p in parts)
        content = parts if spoken or not isinstance(message.get("text"), str) else message["text"]
        turn = Turn(
            role_of(first_of(message, "sender", "role"), number), read_content(content, number, conversation.notes)
        )
        conversation.turns.append(marked(turn, message, number, conversation.notes))
        for key in ("attachments", "files"):
            if isinstance(message.get(key), list):
                conversation.notes[f"dropped {key}"] += len(message[key])
    return conversation


def start_conversation(record: dict) -> RawConversation:
    """Return a conversation that has no turns yet, with the id, the model and so on that the record states."""
    if record.keys() == _OWN and (own := _start_own(record)):
        return own
    lang = text_of(first_of(record, "lang", "language")).strip().lower()
    lang = LANGUAGES.get(lang, label(lang) if lang else "")
    conversation = RawConversation(id_in(record), text_of(record.get("model")), [], lang, time=time_in(record))
    if plugins := record.get("plugins"):
        conversation.sessions["plugin_session"] = f"its 'plugins' are {shown(plugins)}"
    # Definitions of tools are dropped: our conversations have no place for them, because a chat template takes them as a
    # separate argument.
    conversation.notes["dropped definitions of tools"] += record.get("tools") not in (None, "", "[]", [])
    return conversation


# The keys of a line of conversations.jsonl.
_OWN = frozenset(each.name for each in fields(Conversation))


def _start_own(record: dict) -> RawConversation | None:
    """Start a conversation that the cleaner wrote, all fields unchanged; None if the values are not the cleaner's."""
    id, source, lang, model = texts = [record[key] for key in ("id", "source", "lang", "model")]
    part, parts = record["part"], record["parts"]
    if not all(isinstance(text, str) and text == repair_text(text) for text in texts):
        return None
    if type(part) is not int or type(parts) is not int or not 0 <= part < parts < 1 << 31:
        return None
    own = RawConversation(id, model, [], lang, source=source, part=part, parts=parts)
    if parts > 1:  # like branches of a tree, parts have text in common and are not duplicates of each other
        own.tree = hashlib.blake2b(id.encode(), digest_size=8).digest()
    return own


_SYSTEM = ("system", "system_prompt", "system_message", "instructions")


def _add_system(conversation: RawConversation, record: dict) -> None:
    """Insert the record's separate system prompt as the first turn, unless the turns have one already."""
    prompt = next((record[key] for key in _SYSTEM if record.get(key)), None)
    if prompt is None:
        return
    if not isinstance(prompt, (str, list)):
        conversation.notes["dropped system prompts that are no text"] += 1
    elif conversation.turns and conversation.turns[0].role == "system":
        conversation.notes["dropped system prompts beside one among the turns"] += 1
    elif text := read_content(prompt, 1, conversation.notes).strip("\n"):
        conversation.turns.insert(0, Turn("system", text))
