"""The splitter: whole rounds, every part within the window, none lost."""

import json

from hypothesis import given
from hypothesis import strategies as st

from cleaning.pipeline import clean
from cleaning.split import rounds_of, split_conversation
from fastft.conversation import Conversation, Message, read_conversations


def by_words(messages: list[Message]) -> int:
    """Like a template: some tokens a message, and merges across borders make the whole less than its pieces."""
    words = sum(len(m.content.split()) for m in messages)
    return 3 + 4 * len(messages) + words - len(messages) // 3


def dialogue(lengths: list[tuple[int, int]], system: int | None = None) -> Conversation:
    messages = [] if system is None else [Message("system", "s " * system)]
    for i, (question, answer) in enumerate(lengths):
        messages += [Message("user", f"q{i} " + "w " * question), Message("assistant", f"a{i} " + "w " * answer, True)]
    return Conversation("id", messages, source="f", model="m")


LENGTHS = st.integers(0, 60)


@given(
    st.lists(st.tuples(LENGTHS, LENGTHS), min_size=1, max_size=30), st.one_of(st.none(), LENGTHS), st.integers(1, 300)
)
def test_no_round_is_lost_and_every_part_fits(lengths, system, window):
    conversation = dialogue(lengths, system)
    parts, over = split_conversation(conversation, window, by_words)
    lead, rounds = rounds_of(conversation.messages)
    found = {each.number: each.messages for each in over}
    kept = iter([r for part in parts for r in rounds_of(part.messages)[1]])
    assert [found.get(i) or next(kept) for i in range(1, len(rounds) + 1)] == rounds
    assert next(kept, None) is None
    for i, part in enumerate(parts):
        assert by_words(part.messages) <= window
        assert part.messages[: len(lead)] == lead
        assert (part.id, part.source, part.model, part.part, part.parts) == ("id", "f", "m", i, len(parts))
    for each in over:
        assert by_words(lead + each.messages) == each.tokens > window


@given(st.lists(st.tuples(LENGTHS, LENGTHS), min_size=1, max_size=30), st.integers(80, 300))
def test_parts_are_as_long_as_possible(lengths, window):
    conversation = dialogue(lengths)
    parts, over = split_conversation(conversation, window, by_words)
    missing = {each.number - 1 for each in over}
    _, rounds = rounds_of(conversation.messages)
    next_round = 0
    for part in parts:
        while next_round in missing:
            next_round += 1
        next_round += len(rounds_of(part.messages)[1])
        if next_round < len(rounds) and next_round not in missing:
            assert by_words(part.messages + rounds[next_round]) > window


def test_a_part_never_reaches_across_a_missing_round():
    parts, over = split_conversation(dialogue([(1, 1), (500, 1), (1, 1)]), 100, by_words)
    assert [p.messages[0].content.split()[0] for p in parts] == ["q0", "q2"]
    assert [(each.number, each.rounds) for each in over] == [(2, 3)]


def test_a_short_conversation_is_one_part():
    conversation = dialogue([(1, 1)])
    assert split_conversation(conversation, 1000, by_words) == ([conversation], [])


def test_a_very_long_dialogue_costs_a_few_times_its_length():
    conversation = dialogue([(i % 37, i % 53) for i in range(5_000)])
    counted = 0

    def count(messages: list[Message]) -> int:
        nonlocal counted
        counted += (tokens := by_words(messages))
        assert tokens <= 3 * 2048  # no candidate much longer than the window
        return tokens

    parts, over = split_conversation(conversation, 2048, count)
    assert not over and len(parts) > 100
    assert counted < 12 * by_words(conversation.messages)


def test_the_real_template_counts(tmp_path):
    import tiny  # trains tokenizers: not for every test of this file

    from fastft.template import load_template

    tiny.KINDS["byte_level"]().save_pretrained(tmp_path / "model")
    turns = [{"from": ("human", "gpt")[i % 2], "value": f"turn {i}: " + "hello world " * (i % 9)} for i in range(60)]
    (tmp_path / "dump.json").write_text(json.dumps([{"id": "a", "conversations": turns}]))
    report = clean(
        [tmp_path / "dump.json"], tmp_path / "out", max_tokens=200, model=str(tmp_path / "model"), template="chatml"
    )
    parts = list(read_conversations(tmp_path / "out/conversations.jsonl"))
    template = load_template(str(tmp_path / "model"), "chatml")
    assert report.kept == 1 and report.parts == len(parts) > 3
    assert [m.content for p in parts for m in p.messages] == [t["value"] for t in turns]
    assert all(len(template.encode(p.messages).ids) <= 200 for p in parts)
    assert report.rounds == {"in": 30, "kept": 30, "rejected": 0}


def test_a_conversation_that_the_template_refuses_is_a_ledger_line(tmp_path):
    """Vicuna's template knows no tool turns; the rest of the dump must not suffer."""
    import json

    import models

    from cleaning.pipeline import clean

    model = models.make_model(tmp_path / "model", template="vicuna")
    good = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]
    odd = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "</think> a"}]
    (tmp_path / "dump.json").write_text(
        json.dumps([{"id": "a", "conversations": good}, {"id": "b", "conversations": odd}])
    )
    refuses_thoughts = tmp_path / "odd.jinja"
    refuses_thoughts.write_text(
        "{% for m in messages %}{% if '</think>' in m.content %}{{ raise_exception('no thoughts') }}{% endif %}"
        "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    report = clean(
        [tmp_path / "dump.json"], tmp_path / "out", max_tokens=64, model=str(model), template=str(refuses_thoughts)
    )
    assert (report.kept, report.rejected) == (1, {"refused_by_template": 1})
    assert "no thoughts" in (tmp_path / "out" / "rejected.jsonl").read_text()
