"""Examples of every format that the cleaner reads, and strategies for broken ones."""

import json

from hypothesis import strategies as st

PAGE = '<div class="markdown prose w-full break-words dark:prose-invert light">%s</div>'
CODE = '<pre><div class="bg-black mb-4 rounded-md"><div class="flex items-center"><span>css</span>%s</div>'
LABEL = CODE % '<svg class="h-4"></svg>Copy code' + "<div><code>code .\n</code></div></div></pre>"


def node(id: str, parent: str | None, role: str | None, text: str = "", **message) -> dict:
    """Return a node of the official export; `message` overrides fields of its message."""
    if role is None:
        return {"id": id, "message": None, "parent": parent, "children": []}
    content = {"content_type": "text", "parts": [text]}
    return {
        "id": id,
        "parent": parent,
        "children": [],
        "message": {"author": {"role": role}, "content": content, "recipient": "all", "metadata": {}, **message},
    }


NODES = [
    node("root", None, None),
    node("sys", "root", "system"),
    node("q", "sys", "user", "What is the tide?"),
    node("search", "q", "assistant", "", recipient="browser", content={"content_type": "code", "text": "search()"}),
    node("tool", "search", "tool", "found", author={"role": "tool", "name": "browser"}),
    node("a", "tool", "assistant", "The sea’s <b>rise</b>.", metadata={"model_slug": "gpt-4"}),
    node("q2", "a", "user", "And the ebb?"),
    node("a2", "q2", "assistant", "Its fall.", metadata={"model_slug": "gpt-4"}),
    node("a3", "q2", "assistant", "It falls."),
    node("dead end", "a2", "tool", "x", author={"role": "tool", "name": "python"}),
]
EXPORT = {"conversation_id": "tide", "current_node": "a3", "mapping": {n["id"]: n for n in NODES}}

REPLIES = [
    {"text": "worse", "role": "assistant", "rank": 1, "message_id": "w", "replies": []},
    {"text": "gone", "role": "assistant", "rank": 0, "deleted": True, "replies": []},
    {
        "text": "best",
        "role": "assistant",
        "rank": 0,
        "replies": [{"text": "thanks", "role": "prompter", "replies": []}],
    },
    {"text": "unranked", "role": "assistant", "rank": None, "replies": None},
]
OASST = {"message_tree_id": "t", "prompt": {"text": "q", "role": "prompter", "lang": "de", "replies": REPLIES}}

SHARED = {"items": [{"from": "human", "value": "a &lt; b"}, {"from": "gpt", "value": "<div><p>yes &amp; no</p></div>"}]}
SHAREGPT_PAGE = '<!DOCTYPE html><html><script id="__NEXT_DATA__" type="application/json">%s</script></html>'
CHATGPT_PAGE = """<html><head><link rel="canonical" href="https://chatgpt.com/c/0123-abcd"/></head><body>
<div data-message-author-role="user"><div><div class="whitespace-pre-wrap">vector&lt;int&gt; v;
  x<br>y</div></div></div>
<div data-message-author-role="tool">searched</div>
<div data-message-author-role="assistant" data-message-model-slug="gpt-4o"><div class="markdown prose w-full">
<p>Use <code>a&lt;b</code>.</p></div></div></body></html>"""

# format -> (a record of it, its first conversation as (id, model, lang, [(role, text), …]))
EXAMPLES = {
    "sharegpt": (
        {"id": 7, "conversations": [{"from": "human", "value": "q<T>"}, {"from": "bard", "value": "a"}], "model": "m"},
        ("7", "m", "", [("user", "q<T>"), ("assistant", "a")]),
    ),
    "sharegpt_page": (
        SHAREGPT_PAGE % json.dumps({"props": {"pageProps": {"content": {**SHARED, "model": "GPT-4"}, "id": "Ab1"}}}),
        ("Ab1", "GPT-4", "", [("user", "a < b"), ("assistant", "<div><p>yes &amp; no</p></div>")]),
    ),
    "messages": (
        {
            "messages": [
                {"role": "developer", "content": "s"},
                {"role": "user", "content": [{"type": "text", "text": "see"}, {"type": "image_url"}, "this"]},
                {"role": "assistant", "content": PAGE % "<p>text</p>"},
            ],
            "lang": "fr",
        },
        ("", "", "fr", [("system", "s"), ("user", "see\nthis"), ("assistant", PAGE % "<p>text</p>")]),
    ),
    "chatgpt_page": (
        CHATGPT_PAGE,
        (
            "0123-abcd",
            "gpt-4o",
            "",
            [
                ("user", "vector<int> v;\n  x\ny"),
                (
                    "assistant",
                    '<div class="markdown prose w-full">\n<p>Use <code>a&lt;b</code>.</p></div>',
                ),
            ],
        ),
    ),
    "chatgpt_export": (
        EXPORT,
        (
            "tide",
            "gpt-4",
            "",
            [
                ("user", "What is the tide?"),
                ("assistant", "The sea’s <b>rise</b>."),
                ("user", "And the ebb?"),
                ("assistant", "It falls."),
            ],
        ),
    ),
    "claude_export": (
        {
            "uuid": "u",
            "name": "title",
            "chat_messages": [
                {"sender": "human", "text": "q", "content": [], "attachments": [{}], "files": []},
                {
                    "sender": "assistant",
                    "text": "a with a tool",
                    "content": [{"type": "tool_use", "name": "x"}, {"type": "text", "text": "a"}],
                },
            ],
        },
        ("u", "", "", [("user", "q"), ("assistant", "a")]),
    ),
    "chat_log": (
        {
            "conversation_hash": "h",
            "model": "vicuna-13b",
            "conversation": [{"role": r, "content": r, "language": "English"} for r in ("user", "assistant")],
            "language": "English",
            "openai_moderation": [{"flagged": True}, None],
            "toxic": True,
        },
        ("h", "vicuna-13b", "en", [("user", "user"), ("assistant", "assistant")]),
    ),
    "oasst": (OASST, ("t", "", "de", [("user", "q"), ("assistant", "best"), ("user", "thanks")])),
    "pairs": (
        {"conversation_id": "c", "conversation": [{"human": "q", "assistant": "a"}, {"human": "r", "assistant": "b"}]},
        ("c", "", "", [("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "b")]),
    ),
    "marked_text": (
        {"id": "m", "lang": "en", "text": "\n<|user|>: q <|bot|>: \n\nr\n\n<|bot|>: a\n\n"},
        ("m", "", "en", [("user", "q <|bot|>: \n\nr"), ("assistant", "a")]),
    ),
    "alpaca": (
        {"instruction": "Add.", "input": "1, 2", "output": "3", "history": [["hi", "hello"]], "system": ""},
        ("", "", "", [("user", "hi"), ("assistant", "hello"), ("user", "Add.\n\n1, 2"), ("assistant", "3")]),
    ),
    "completion": (
        {"id": "c", "prompt": "q", "completion": [{"role": "assistant", "content": "a"}], "label": False},
        ("c", "", "", [("user", "q"), ("assistant", "a")]),
    ),
    "preference": (
        {"id": "p", "question": "q", "chosen": "a", "rejected": "b"},
        ("p", "", "", [("user", "q"), ("assistant", "a")]),
    ),
}


def spoken(conversation) -> str:
    """Return the texts of a conversation's turns in one line."""
    return " | ".join(turn.text for turn in conversation.turns)


def shared(*turns: str) -> dict:
    """Return a record in ShareGPT's format of human and assistant turns by turns."""
    return {"conversations": [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(turns)]}


# Values to put into records in the place of what belongs there.
JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([10**400, -1, 0, 1.5, float("nan"), float("inf"), "", "\ud83d", "user", "q", "<p>", "x" * 10_000]),
    st.text(max_size=5),
)
ANYTHING = st.recursive(JUNK, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3))


def places(value, path=()):
    """Yield the path of every place inside a JSON value."""
    yield path
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(inner, (*path, key))


def replaced(value, path, by):
    """Return a copy of `value` with the value at `path` replaced by `by`, or left out if `by` is `...`."""
    if not path:
        return by
    copy = dict(value) if isinstance(value, dict) else list(value)
    if by is ... and len(path) == 1:
        del copy[path[0]]
    else:
        copy[path[0]] = replaced(copy[path[0]], path[1:], by)
    return copy


OBJECTS = {name: record for name, (record, _) in EXAMPLES.items() if isinstance(record, dict)}
