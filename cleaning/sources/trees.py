"""Readers of formats in which a record is a tree of messages: asking or answering again makes a branch.

By default a tree gives one conversation: the branch that the page showed last, or the one that people ranked best. With
`--branches all` every leaf gives one. Trees are walked without recursion, so that none is too deep, and a walk that comes to
a message for the second time ends there.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Any

from cleaning.sources.lists import LANGUAGES
from cleaning.sources.turns import (
    RawConversation,
    Rejection,
    Turn,
    as_list,
    as_object,
    first_of,
    label,
    marked,
    number_of,
    read_content,
    role_of,
    shown,
    text_of,
    time_in,
)

# The most turns that all branches of a tree may have together. A tree of n messages can have n/2 leaves at a depth of n/2,
# so one megabyte that was made for it could give 10^9 turns.
MAX_TURNS = 200_000


def read_chatgpt_export(record: dict, every_branch: bool = False) -> list[RawConversation]:
    """Read the official export: {"mapping": {id: {"message", "parent", …}}, "current_node", "conversation_id"?}.

    The texts of user and assistant that the page showed are kept. Messages of tools and to tools, system messages, thoughts
    and hidden messages are dropped and counted by name.
    """
    nodes = as_object(record.get("mapping"), "'mapping'")
    parents = {id: _parent(node) for id, node in nodes.items()}
    leaves = _leaves(record, nodes, parents)
    paths = _limited(_path(leaf, parents) for leaf in (leaves if every_branch else leaves[:1]))
    id = text_of(first_of(record, "conversation_id", "id"))
    paths = _without_prefixes(paths, nodes) or paths[:1] or [[]]
    names = [id, *(f"{id}-{label(path[-1])}" if id else "" for path in paths[1:])]
    return [_conversation_on(path, nodes, name, record) for path, name in zip(paths, names)]


def _parent(node: Any) -> str | None:
    parent = node.get("parent") if isinstance(node, dict) else None
    return parent if isinstance(parent, str) else None


def _leaves(record: dict, nodes: dict[str, Any], parents: dict[str, str | None]) -> list[str]:
    """Return the node that was shown last, followed by the other leaves in the order of the file."""
    inner = set(parents.values())
    leaves = [id for id in nodes if id not in inner]
    current = record.get("current_node")
    if not isinstance(current, str) or current not in nodes:
        # Without a valid `current_node`, take the newest leaf, by the time that its message states.
        current = max(leaves, key=lambda id: _time(nodes[id]), default=None)
    return [] if current is None else [current, *(id for id in leaves if id != current)]


def _time(node: Any) -> float:
    message = node.get("message") if isinstance(node, dict) else None
    time = message.get("create_time") if isinstance(message, dict) else None
    return number_of(time) or 0.0


def _path(leaf: str, parents: dict[str, str | None]) -> list[str]:
    """Return the ids from the root to `leaf`."""
    path, seen, id = [], set(), leaf
    while id in parents and id not in seen:
        seen.add(id)
        path.append(id)
        id = parents[id]
    return path[::-1]


def _limited(paths: Iterator[list]) -> list[list]:
    """Return the paths as a list. Raises Rejection if they have more than MAX_TURNS turns together."""
    taken, turns = [], 0
    for path in paths:
        turns += len(path)
        if turns > MAX_TURNS and taken:
            raise Rejection("not_a_conversation", f"its branches have more than {MAX_TURNS:,} turns together")
        taken.append(path)
    return taken


def _without_prefixes(paths: list[list[str]], nodes: dict[str, Any]) -> list[list[str]]:
    """Return the paths without redundant ones, whose kept messages equal another path's or its beginning.

    A branch that continues only with messages of tools is such a path.
    """
    spoken = [[id for id in path if _is_kept(nodes[id])] for path in paths]
    passed = {id for path in spoken for id in path[:-1]}
    last, kept = set(), []
    for path, turns in zip(paths, spoken):
        if turns and turns[-1] not in passed and turns[-1] not in last:
            last.add(turns[-1])
            kept.append(path)
    return kept


def _is_kept(node: Any) -> bool:
    message = node.get("message") if isinstance(node, dict) else None
    return isinstance(message, dict) and _dropped_as(message) is None


def _dropped_as(message: dict) -> str | None:
    """Return the name under which a message is dropped, or None for one that is kept."""
    author, content = message.get("author"), message.get("content")
    metadata = message.get("metadata")
    role = author.get("role") if isinstance(author, dict) else None
    kind = content.get("content_type") if isinstance(content, dict) else None
    if role == "tool":
        return f"tool {label(author.get('name'))}"
    if role not in ("user", "assistant"):
        return label(role)
    if message.get("recipient") not in (None, "all"):
        return f"{role} to {label(message['recipient'])}"
    if kind not in ("text", "multimodal_text"):
        return f"{role} {label(kind)}"
    if isinstance(metadata, dict) and metadata.get("is_visually_hidden_from_conversation") is True:
        return f"hidden {role}"
    return None


def _conversation_on(path: list[str], nodes: dict[str, Any], id: str, record: dict) -> RawConversation:
    """Make a conversation of the messages on a path of an export."""
    notes, turns, model = Counter(), [], text_of(record.get("default_model_slug"))
    for node in path:
        message = nodes[node].get("message") if isinstance(nodes[node], dict) else None
        if message is None:
            continue  # the root
        message = as_object(message, "a message")
        dropped = _dropped_as(message)
        if dropped is not None:
            notes[f"dropped {dropped}"] += 1
            continue
        number = len(turns) + 1
        text = read_content(message["content"].get("parts"), number, notes)
        turns.append(marked(Turn(message["author"]["role"], text), message, number, notes))
        metadata = message.get("metadata")
        if isinstance(metadata, dict) and metadata.get("model_slug"):
            model = text_of(metadata["model_slug"])
    conversation = RawConversation(id, model, turns, time=time_in(record), notes=notes)
    if record.get("plugin_ids") and any(name.startswith("dropped tool ") for name in notes):
        conversation.sessions["plugin_session"] = f"its 'plugin_ids' are {shown(record['plugin_ids'])}"
    return conversation


def read_oasst(record: dict, every_branch: bool = False) -> list[RawConversation]:
    """Read OpenAssistant's trees: {"message_tree_id", "prompt": {"text", "role", "lang", "rank", "replies": [message, …]}}.

    At every message, the best branch takes the reply with the lowest rank; replies without a rank come last. A branch ends
    before a deleted message.
    """
    root = record.get("prompt") if isinstance(record.get("prompt"), dict) else record
    id = text_of(first_of(record, "message_tree_id", "message_id") or root.get("message_id"))
    notes: Counter[str] = Counter()
    paths = _limited(_reply_paths(root, every_branch, notes))
    names = [id, *(f"{id}-{text_of(path[-1].get('message_id')) or number}" for number, path in enumerate(paths[1:], 2))]
    conversations = [_oasst_conversation(path, name) for path, name in zip(paths, names)]
    conversations[0].notes += notes
    return conversations


def _reply_paths(root: dict, every: bool, notes: Counter[str]) -> Iterator[list[dict]]:
    """Yield the paths from the root to the leaves, the best first; only the best unless `every`.

    The search is depth-first. The path to each message is a linked list, so that branches share their common beginning.
    """
    waiting: list[tuple[dict, tuple | None]] = [(as_object(root, "the prompt"), None)]
    while waiting:
        message, above = waiting.pop()
        chain = (message, above)
        replies = as_list(message.get("replies") or [], "replies")
        replies = [as_object(reply, "a reply") for reply in replies]
        present = sorted((reply for reply in replies if reply.get("deleted") is not True), key=_rank)
        notes["dropped deleted"] += len(replies) - len(present)
        if present:
            waiting += [(reply, chain) for reply in (reversed(present) if every else present[:1])]
        else:
            yield _unrolled(chain)


def _rank(message: dict) -> float:
    rank = number_of(message.get("rank"))
    return float("inf") if rank is None else rank


def _unrolled(chain: tuple | None) -> list[dict]:
    """Return the messages of a linked list, the root first."""
    path = []
    while chain is not None:
        message, chain = chain
        path.append(message)
    return path[::-1]


def _oasst_conversation(path: list[dict], id: str) -> RawConversation:
    notes: Counter[str] = Counter()
    turns = [
        Turn(role_of(message.get("role"), number), read_content(message.get("text"), number, notes))
        for number, message in enumerate(path, start=1)
    ]
    lang = text_of(path[0].get("lang")).strip().lower()
    lang = LANGUAGES.get(lang, lang[:40])
    time = max(map(time_in, path))
    return RawConversation(id, text_of(path[-1].get("model_name")), turns, lang, time=time, notes=notes)
