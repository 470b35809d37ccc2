"""Raw records that many tests of the cleaner use."""

from hypothesis import strategies as st

PAGE = '<div class="markdown prose w-full break-words">%s</div>'
LONG = "A question that is long enough to tell one dialogue from another, as most of them are, and then some more."


def share(*turns: str, id: str | None = "a", **more) -> dict:
    """A ShareGPT record; turns alternate, beginning with the human."""
    roles = ("human", "gpt")
    record = {"conversations": [{"from": roles[i % 2], "value": text} for i, text in enumerate(turns)], **more}
    return record if id is None else {"id": id, **record}


# Each record, the reason it must be rejected for, and what the detail must say.
REJECTED = {
    "number": (7, "not_a_conversation", "found 7"),
    "null": (None, "not_a_conversation", "None"),
    "no turns field": ({"id": "x", "text": "t"}, "not_a_conversation", "'text'"),
    "turns no list": ({"conversations": "q"}, "not_a_conversation", "not a list"),
    "turn no object": ({"conversations": ["q"]}, "not_a_conversation", "turn 1"),
    "content no text": ({"conversations": [{"from": "human", "value": 3}]}, "not_a_conversation", "turn 1"),
    "role": ({"conversations": [{"from": "alien", "value": "q"}]}, "unknown_role", "alien"),
    "no role": ({"conversations": [{"value": "q"}]}, "unknown_role", "None"),
    "nothing": (share(), "too_short", "no turns"),
    "no answer": (share("q"), "too_short", "no answer"),
    "empty answer": (share("q", " \n"), "empty_answer", "turn 2"),
    "empty answers": (share("q", " \n", "q", ""), "empty_answer", "turn 2"),
    "invisible answer": (share("q", "\u200b"), "empty_answer", "turn 2"),
    "null answer": (share("q", None), "empty_answer", "turn 2"),
    "empty HTML answer": (share("q", PAGE % "<p></p>"), "empty_answer", "turn 2"),
    "empty question": (share(" ", "a"), "empty_turn", "turn 1"),
    "two questions": (
        {"conversations": [{"from": f, "value": "x"} for f in ("human", "human", "gpt")]},
        "wrong_role_order",
        "turn 2 is from user",
    ),
    "tool": (
        {"messages": [{"role": r, "content": "x"} for r in ("user", "assistant", "tool", "assistant")]},
        "tool_session",
        "turn 3",
    ),
    "banner": (share("q", "Too many requests in 1 hour. Try again later."), "error_banner", "turn 2"),
    "banner as HTML": (share("q", PAGE % "<p>network error</p>"), "error_banner", "turn 2"),
    "banner as question": (share("!Too many requests in 1 hour. Try again later.", "a"), "error_banner", "turn 1"),
    "banner after an answer": (
        {"conversations": [{"from": f, "value": "network error"} for f in ("human", "gpt", "gpt")]},
        "error_banner",
        "turn 2",
    ),
    "blocked": (share("q", "Buy ACME pills now"), "blocked_phrase", "'acme Pills'"),
    "blocked without spaces": (share("我要买假药吗", "a"), "blocked_phrase", "turn 1"),
    "nested 3,000 deep": (share("q", PAGE % ("<div>" * 3000 + "x" + "</div>" * 3000)), "unreadable_html", "turn 2"),
    "nested 1,000 deep": (share("q", PAGE % ("<ul><li>" * 1000 + "x")), "unreadable_html", "levels deep"),
}  # fmt: skip


# --- laws -------------------------------------------------------------------------------------------------------------

TEXT = st.text(max_size=8) | st.sampled_from(["", "a", PAGE % "<p>a</p>", "network error", "<div><p>"])
ROLE = st.sampled_from(["human", "gpt", "system", "user", "assistant", "alien", "tool", None, 3])
TURN = st.fixed_dictionaries({"from": ROLE, "value": TEXT | st.none()}) | st.integers()
JSON = st.recursive(st.none() | st.integers() | st.floats() | TEXT, lambda x: st.lists(x, max_size=2), max_leaves=3)
RECORD = (
    st.fixed_dictionaries({}, optional={"id": TEXT | st.integers(), "conversations": st.lists(TURN, max_size=6)}) | JSON
)
