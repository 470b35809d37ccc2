"""What a dump says about its answers: not to learn from, cut, preferred; and the cleaner's own output, read again."""

import io
import json
from pathlib import Path

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from cleaning.filters.steps import ALWAYS, STEPS
from cleaning.pipeline import _make_unique, clean
from cleaning.report.ledger import print_ledger
from cleaning.settings import FilterSettings
from cleaning.sources.formats import conversations_in
from cleaning.sources.turns import RawConversation, Rejection
from fastft.data import marks
from fastft.data.conversation import Conversation, Message, parse_conversation, read_conversations
from fastft.data.marks import LOSS_FLAGS
from fastft.data.split import split_conversation

ASK, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


def dialogue(*answers: dict, **more) -> dict:
    """Return a record whose answers have these fields beside their text."""
    turns = [turn for number, answer in enumerate(answers) for turn in (ASK, {**ANSWER, **answer})]
    return {"messages": turns, **more}


def read(record: dict) -> RawConversation:
    (conversation,) = conversations_in(record)
    return conversation


def learned(record: dict) -> list[bool]:
    return [turn.train for turn in read(record).turns if turn.role == "assistant"]


def whole(record: dict) -> list[bool]:
    return [turn.ends for turn in read(record).turns if turn.role == "assistant"]


def written(tmp_path: Path, *records: dict, **options) -> tuple:
    (tmp_path / "dump.jsonl").write_bytes(b"".join(json.dumps(record).encode() + b"\n" for record in records))
    report = clean([tmp_path / "dump.jsonl"], tmp_path / "out", workers=1, **options)
    kept = tmp_path / "out/conversations.jsonl"
    return report, list(read_conversations(kept)) if kept.exists() else []


# --- not to learn from ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", LOSS_FLAGS)
def test_every_spelling_of_a_loss_flag(flag):
    no, yes = (0, 1) if LOSS_FLAGS[flag] else (1, 0)
    for kind in (int, float, bool):
        record = dialogue({flag: kind(no)}, {flag: kind(yes)}, {flag: None}, {})
        assert learned(record) == [False, True, True, True]
        assert read(record).notes == {"answers marked not to learn from": 1}
    shared = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a", flag: no}]}
    assert learned(shared) == [False]


@pytest.mark.parametrize(
    "mark, said",
    [
        ({"weight": "0"}, "'weight' is \"0\""),
        ({"train": "false"}, "'train'"),
        ({"loss": float("nan")}, "'loss'"),
        ({"weight": -1}, "'weight' is -1"),
        ({"mask": [1, 0]}, "'mask'"),
        ({"train": True, "weight": 0}, "contradict"),
        ({"train": True, "label": False}, "'train': true and 'label': false contradict"),
        ({"kto_tag": "no"}, "its 'kto_tag' is neither true nor false"),
        ({"train_detail": [{"begin_offset": 0, "end_offset": 1, "train": False}]}, "pieces"),
    ],
)
def test_a_flag_that_says_neither_yes_nor_no_rejects_the_record(tmp_path, mark, said):
    with pytest.raises(Rejection) as caught:
        conversations_in(dialogue({}, mark))
    assert caught.value.reason == "unclear_loss_flag"
    assert caught.value.detail.startswith("turn 4: ") and said in caught.value.detail
    report, conversations = written(tmp_path, dialogue(mark))
    assert report.rejected == {"unclear_loss_flag": 1} and not conversations


@pytest.mark.parametrize("label", [{"label": False}, {"kto_tag": False}, {"kto_tag": 0}, {"label": False, "weight": 0}])
def test_a_label_of_an_answer_is_obeyed_as_one_of_its_record(label):
    record = dialogue(label, {"label": True}, {"label": 0}, {"label": "bad"}, {})
    assert learned(record) == [False, True, True, True, True]
    assert read(record).notes == {"answers marked not to learn from": 1}


MARKS = [
    *({flag: value} for flag in LOSS_FLAGS for value in (0, 1)),
    *({label: value} for label in marks.LABELS for value in (True, False)),
    *({key: ending} for key in marks.ENDINGS_OF_MESSAGE for ending in ("stop", "length", {"type": "max_tokens"})),
    *({"metadata": {key: "interrupted"}} for key in marks.ENDINGS_OF_MESSAGE),
    *({"finish_reason": ending} for ending in sorted(marks.CUT)),
    {"interrupted": True},
    {"ends": False},
]


@pytest.mark.parametrize("mark", MARKS, ids=str)
def test_the_trainers_reader_obeys_the_same_marks(mark):
    """Whether a file is cleaned first or not, the same answers are whole ones to learn."""
    record = dialogue(mark, {}, mark)
    in_trainer = [m.train and m.ends for m in parse_conversation(record).messages if m.role == "assistant"]
    assert in_trainer == [train and ends for train, ends in zip(learned(record), whole(record))]


# The trainer's reader refuses the loss flags of a record, and looks at no other keys of it.
OF_RECORD = [mark for mark in MARKS if {*mark} <= {*marks.LABELS, *marks.ENDINGS}]


@pytest.mark.parametrize("mark", OF_RECORD, ids=str)
def test_the_trainers_reader_obeys_the_same_marks_of_a_record(mark):
    record = dialogue({}, {}, **mark)
    in_trainer = [m.train and m.ends for m in parse_conversation(record).messages if m.role == "assistant"]
    assert in_trainer == [train and ends for train, ends in zip(learned(record), whole(record))]


def test_flags_on_anything_but_an_answer_have_no_effect():
    turns = [{**ASK, "weight": "x"}, ANSWER, {"role": "user", "content": "r", "train": True, "ends": False}, ANSWER]
    assert [(turn.train, turn.ends) for turn in read({"messages": turns}).turns] == [(True, True)] * 4


def test_a_fraction_is_learned_in_full_and_counted():
    record = dialogue({"weight": 0.5}, {"loss_weight": 2}, {"weight": 1.0})
    assert learned(record) == [True] * 3
    assert read(record).notes == {"answers with a weight other than 0 and 1, learned in full": 2}


def test_flags_reach_the_output_and_are_counted(tmp_path):
    system = {"role": "system", "content": "s", "weight": 0.0}
    record = dialogue({"weight": 0}, {"finish_reason": "length"})
    record["messages"][0] = {**ASK, "content": "something else"}
    report, (conversation,) = written(tmp_path, {**record, "messages": [system, *record["messages"]]})
    assert [(m.train, m.ends) for m in conversation.messages] == [
        (False, True),
        (False, True),
        (False, True),
        (False, True),
        (True, False),
    ]
    assert report.marked == {"not_learned": 1, "cut": 1}
    assert orjson.loads((tmp_path / "out/report.json").read_bytes())["marked"] == report.marked
    console = Console(width=120, file=io.StringIO())
    print_ledger(report, console)
    lines = console.file.getvalue()
    for line in ("answers not to learn from", "answers cut before their end", "read: answers marked not to learn from"):
        assert line in lines


@pytest.mark.parametrize(
    "more, expected",
    [
        ({"label": False}, [True, False]),  # the completion is what answers the last question
        ({"kto_tag": False}, [True, False]),
        ({"kto_tag": 0}, [True, False]),
        ({"label": True}, [True, True]),
        ({"kto_tag": True}, [True, True]),
        ({"label": None}, [True, True]),
        ({"label": 0}, [True, True]),  # the label of a class
        ({"label": "good"}, [True, True]),
        ({"train": False}, [False, False]),
        ({"weight": 0.0}, [False, False]),
        ({"mask": True}, [False, False]),
        ({"mask": "User"}, [True, True]),  # NeMo names whose turns are not learned
        ({"loss": 1.7}, [True, True]),
    ],
)
def test_marks_of_a_record(more, expected):
    assert learned(dialogue({}, {}, **more)) == expected


def test_an_unclear_mark_of_a_record():
    with pytest.raises(Rejection, match="unclear_loss_flag: its 'kto_tag'"):
        conversations_in(dialogue({}, kto_tag="no"))


def test_completions_that_nobody_wants():
    for record in (
        {"prompt": "q", "completion": "a", "label": False},
        {"instruction": "q", "output": "a", "kto_tag": False},
        {"conversation": [{"human": "q", "assistant": "a"}], "label": False},
        {"text": "<|user|>: q\n\n<|bot|>: a", "label": False},
        {"prompt": [ASK], "completion": [ANSWER], "label": False},
    ):
        assert learned(record) == [False]
        assert read(record).notes == {"answers that their record labels as bad, not to learn from": 1}


# --- preferences ------------------------------------------------------------------------------------------------------

GOOD, BAD = {"role": "assistant", "content": "good"}, {"role": "assistant", "content": "bad"}
QUESTION = {"role": "user", "content": "q"}


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "q", "chosen": "good", "rejected": "bad"},
        {"question": "q", "chosen": "good", "rejected": "bad"},
        {"instruction": "q", "input": "", "chosen": "good", "rejected": "bad"},
        {"prompt": [QUESTION], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": "q", "chosen": [QUESTION, GOOD], "rejected": [QUESTION, BAD]},
        {"chosen": [QUESTION, GOOD], "rejected": [QUESTION, BAD]},
        {"prompt": "q", "chosen": [QUESTION, GOOD], "rejected": [QUESTION, BAD], "messages": [QUESTION, BAD]},
        {"messages": [QUESTION], "chosen": GOOD, "rejected": BAD},
        {"messages": [QUESTION, BAD], "chosen": "good", "rejected": "bad"},
        {
            "conversations": [{"from": "human", "value": "q"}],
            "chosen": {"from": "gpt", "value": "good"},
            "rejected": {"from": "gpt", "value": "bad"},
        },
        {"chosen": "\n\nHuman: q\n\nAssistant: good", "rejected": "\n\nHuman: q\n\nAssistant: bad"},
        {"prompt": "\n\nHuman: q\n\nAssistant:", "chosen": " good", "rejected": " bad"},
        {"input": {"messages": [QUESTION]}, "preferred_output": [GOOD], "non_preferred_output": [BAD]},
        {"conversation_a": [QUESTION, GOOD], "conversation_b": [QUESTION, BAD], "winner": "model_a"},
        {"conversation_a": [QUESTION, BAD], "conversation_b": [QUESTION, GOOD], "winner": "model_b"},
        {"conversation_a": [QUESTION, GOOD], "conversation_b": [QUESTION, BAD], "winner": "tie"},
    ],
)
def test_the_preferred_answer_is_learned(record):
    conversation = read(record)
    assert conversation.format == "preference"
    assert [(t.role, t.text.strip(), t.train) for t in conversation.turns] == [
        ("user", "q", True),
        ("assistant", "good", True),
    ]
    assert conversation.notes == {"rejected answers of preferences, left out": 1}


def test_both_answers_are_bad():
    sides = {"conversation_a": [QUESTION, BAD], "conversation_b": [QUESTION, BAD], "model_a": "m"}
    assert learned({**sides, "winner": "tie (bothbad)"}) == [False] and read({**sides, "winner": "tie"}).model == "m"
    with pytest.raises(Rejection, match="'winner' is 'nobody'"):
        read({**sides, "winner": "nobody"})


def test_what_only_looks_like_a_preference():
    assert read({**dialogue({}), "chosen": True, "rejected": False}).format == "messages"
    assert read({**dialogue({}), "chosen": "a", "rejected": None}).format == "messages"
    with pytest.raises(Rejection, match="no question"):
        read({"chosen": "good", "rejected": "bad"})


def test_system_prompts_and_history_beside_a_prompt():
    conversation = read({"query": "q", "response": "a", "system": "s", "history": [["p", "b"]]})
    assert [(t.role, t.text) for t in conversation.turns] == [
        ("system", "s"),
        ("user", "p"),
        ("assistant", "b"),
        ("user", "q"),
        ("assistant", "a"),
    ]


@pytest.mark.parametrize("key", ["system", "system_prompt", "system_message", "instructions"])
def test_a_system_prompt_beside_the_turns(key):
    for record in (dialogue({}), {"conversations": [ASK, ANSWER]}, {"conversation": [ASK, ANSWER]}):
        assert [t.role for t in read({**record, key: "s"}).turns] == ["system", "user", "assistant"]
        assert [t.role for t in read({**record, key: ""}).turns] == ["user", "assistant"]
        assert read({**record, key: {"a": 1}}).notes == {"dropped system prompts that are no text": 1}
    parts = {**dialogue({}), key: [{"type": "text", "text": "s"}]}
    assert read(parts).turns[0].text == "s"
    own = {"messages": [{"role": "system", "content": "its own"}, ASK, ANSWER], key: "s"}
    assert [t.text for t in read(own).turns] == ["its own", "q", "a"]
    assert read(own).notes == {"dropped system prompts beside one among the turns": 1}


def test_parts_of_a_text_are_one_text():
    for key in ("text", "value", "content"):
        cited = [{"type": "text", key: "It opened in "}, {"type": "text", key: "1937", "citations": []}, "."]
        assert read(dialogue({"content": cited})).turns[1].text == "It opened in 1937."
    nested = [{"type": "text", "text": {"value": "a", "annotations": []}}]
    assert read(dialogue({"content": nested})).turns[1].text == "a"
    seen = [{"type": "text", "text": "see"}, {"type": "image_url"}, {"type": "text", "text": ""}, "this"]
    assert read(dialogue({"content": seen})).turns[1].text == "see\nthis"


def test_turns_that_are_json_in_a_column():
    assert [turn.text for turn in read({"messages": json.dumps([ASK, ANSWER])}).turns] == ["q", "a"]
    with pytest.raises(Rejection, match="its turns are not a list"):
        read({"messages": "[broken"})


# --- cut --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mark",
    [
        {"finish_reason": "length"},
        {"finish_reason": "content_filter"},
        {"finishReason": "MAX_TOKENS"},
        {"stop_reason": "max_tokens"},
        {"stop_reason": "user_canceled"},
        {"done_reason": "length"},
        {"status": "finished_partial_completion"},
        {"status": "in_progress"},
        {"status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}},
        {"finish_details": {"type": "interrupted"}},
        {"metadata": {"finish_details": {"type": "max_tokens"}}},
        {"metadata": {"finish_reason": "length"}},
        {"interrupted": True},
        {"ends": False},
    ],
)
def test_an_answer_that_was_cut(mark):
    assert whole(dialogue({}, mark)) == [True, False] and learned(dialogue({}, mark)) == [True, True]
    counted = sum(count for name, count in read(dialogue(mark)).notes.items() if name.startswith("answers cut before"))
    assert counted == ("ends" not in mark)
    export = {"sender": "assistant", "text": "a", **mark}
    assert whole({"uuid": "u", "chat_messages": [{"sender": "human", "text": "q"}, export]}) == [False]


@pytest.mark.parametrize(
    "mark",
    [
        *({"finish_reason": reason} for reason in ("stop", "tool_calls", "eos", None, 7, ["length"], {"type": 1}, "")),
        {"stop_reason": "end_turn"},
        {"status": "finished_successfully", "metadata": {"finish_details": {"type": "stop"}}},
        {"status": "approved", "interrupted": False, "ends": True, "metadata": "length"},
    ],
)
def test_an_answer_that_came_to_its_end(mark):
    assert whole(dialogue(mark)) == [True] and not read(dialogue(mark)).notes


def test_a_record_that_says_how_its_answer_ended():
    shared = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}] * 2}
    assert whole({**shared, "finish_reason": "length"}) == [True, False]
    assert whole({"prompt": "q", "response": "a", "stop_reason": "max_tokens"}) == [False]
    assert whole({**shared, "status": "in_progress", "finish_reason": "stop"}) == [True, True]
    unanswered = {"messages": [ASK, ANSWER, ASK], "finish_reason": "length"}
    assert whole(unanswered) == [True] and not read(unanswered).notes


def export(*answers: tuple[str, dict]) -> dict:
    """Return an official export of one question, followed by one node after the other of its answer."""
    nodes = {
        "q": {
            "parent": None,
            "message": {"author": {"role": "user"}, "content": {"content_type": "text", "parts": ["q"]}},
        }
    }
    above = "q"
    for number, (text, more) in enumerate(answers):
        message = {"author": {"role": "assistant"}, "content": {"content_type": "text", "parts": [text]}, **more}
        nodes[f"a{number}"] = {"parent": above, "message": message}
        above = f"a{number}"
    return {"id": "x", "mapping": nodes, "current_node": above}


LIMIT = {"metadata": {"finish_details": {"type": "max_tokens"}}}


def test_an_export_that_was_cut(tmp_path):
    report, (conversation,) = written(tmp_path, export(("It is four, because two and", LIMIT)))
    assert conversation.messages[1] == Message("assistant", "It is four, because two and", True, False)
    assert report.marked == {"not_learned": 0, "cut": 1}
    assert report.notes == {"answers cut before their end (max_tokens)": 1}


@pytest.mark.parametrize(
    ("marks", "trained"), [({"ends": False}, True), ({"finish_reason": "length"}, False), ({}, True)]
)
def test_ends_means_the_same_to_cleaner_and_trainer_and_other_tools_marks_need_the_cleaner(tmp_path, marks, trained):
    """`ends` false: the text is learned, its end is not. Of another tool's mark the cleaner makes that; the trainer is strict."""
    question = {"role": "user", "content": "What would one see from the train?"}
    record = {
        "id": "a",
        "messages": [question, {"role": "assistant", "content": "Fields and a river, and then", **marks}],
    }
    (tmp_path / "in.jsonl").write_text(json.dumps(record) + "\n")
    clean([tmp_path / "in.jsonl"], tmp_path / "out", settings=EVERYTHING_OFF, near=0, workers=1)
    [cleaned] = read_conversations(tmp_path / "out/conversations.jsonl")
    [direct] = read_conversations(tmp_path / "in.jsonl")
    assert (cleaned.messages[1].train, cleaned.messages[1].ends) == (True, not marks)
    assert (direct.messages[1].train, direct.messages[1].ends) == (trained, not marks)


def test_a_cut_answer_continues_in_the_next(tmp_path):
    stop = {"metadata": {"finish_details": {"type": "stop"}}}
    _, (conversation,) = written(tmp_path, export(("two and", LIMIT), (" two is four.", stop)))
    assert conversation.messages[1] == Message("assistant", "two and two is four.", True, True)
    _, (conversation,) = written(tmp_path, export(("two.", stop), ("four", LIMIT)))
    assert conversation.messages[1] == Message("assistant", "two.\n\nfour", True, False)


def test_merged_answers_are_not_learned_if_one_of_them_is_not(tmp_path):
    _, (conversation,) = written(tmp_path, {"messages": [ASK, {**ANSWER, "weight": 0}, ANSWER]})
    assert conversation.messages[1] == Message("assistant", "a\n\na", False, True)


def test_an_answer_cut_inside_a_code_block_is_kept(tmp_path):
    code = {"content": "Run:\n\n```sh\nmake te"}
    report, (conversation,) = written(tmp_path, dialogue({**code, "finish_reason": "length"}), dialogue(code))
    assert not conversation.messages[1].ends and report.rejected == {"unfinished_answer": 1}


def test_halves_of_a_cut_answer_are_joined_with_the_end_of_the_second(tmp_path):
    first, second = "1. one\n2. two\n", "3. three"
    turns = [ASK, {**ANSWER, "content": first, "finish_reason": "length"}, {"role": "user", "content": "continue"}]
    _, (conversation,) = written(tmp_path, {"messages": [*turns, {**ANSWER, "content": second}]})
    assert conversation.messages[1] == Message("assistant", "1. one\n2. two\n3. three", True, True)
    untaught = {**turns[1], "train": False}
    _, (conversation,) = written(tmp_path, {"messages": [turns[0], untaught, turns[2], {**ANSWER, "content": second}]})
    assert [m.train for m in conversation.messages] == [False, False, False, True]


def test_rejected_rounds_and_branches_keep_their_marks(tmp_path):
    refused = {**ANSWER, "content": "I'm sorry, but I cannot browse the internet.", "train": False}
    report, _ = written(tmp_path, {"messages": [ASK, ANSWER, {**ASK, "content": "r"}, refused]})
    assert report.repairs["dropped_rounds:refusal"] == 1
    again = clean(
        [tmp_path / "out/rejected.jsonl"], tmp_path / "again", settings=FilterSettings(without_filters=("refusal",))
    )
    (conversation,) = read_conversations(tmp_path / "again/conversations.jsonl")
    assert again.kept == 1 and not conversation.messages[1].train


# --- our own output ---------------------------------------------------------------------------------------------------

EVERYTHING_OFF = FilterSettings(without_filters=tuple(step.name for step in STEPS if step.name not in ALWAYS))
TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40)


@st.composite
def rounds(draw) -> list[Message]:
    messages = [Message("system", draw(TEXT))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages.append(Message("user", draw(TEXT)))
        messages.append(Message("assistant", draw(TEXT), draw(st.booleans()), draw(st.booleans())))
    return messages


@st.composite
def outputs(draw) -> list[Conversation]:
    """Draw what a run of the cleaner may write: conversations, some in several parts, all of them different."""
    lines = []
    for number in range(draw(st.integers(1, 3))):
        parts = draw(st.integers(1, 3))
        about = [f"{draw(TEXT)}-{number}", draw(TEXT), draw(st.sampled_from(["", "en", "zh-Hant"])), draw(TEXT)]
        for part in range(parts):
            messages = draw(rounds())
            messages[0].content += f" {number}, {part}"
            next(m for m in messages if m.role == "user").content += f" {number}.{part}"
            lines.append(Conversation(about[0], messages, *about[1:], part, parts))
    return lines


@settings(deadline=None, max_examples=60)
@given(outputs())
def test_reading_our_own_output_changes_nothing(tmp_path_factory, lines):
    directory = tmp_path_factory.mktemp("own")
    own = b"".join(line.to_json() + b"\n" for line in lines)
    (directory / "conversations.jsonl").write_bytes(own)
    report = clean([directory / "conversations.jsonl"], directory / "again", settings=EVERYTHING_OFF, near=0, workers=1)
    assert (directory / "again/conversations.jsonl").read_bytes() == own
    assert (report.kept, report.rejected) == (len(lines), {})


@settings(deadline=None, max_examples=40)
@given(st.lists(rounds(), min_size=1, max_size=4))
def test_cleaning_twice_is_cleaning_once(tmp_path_factory, dialogues):
    directory = tmp_path_factory.mktemp("twice")
    records = [
        {"messages": [{"role": m.role, "content": m.content, "weight": int(m.train)} for m in messages]}
        for messages in dialogues
    ]
    (directory / "dump.jsonl").write_bytes(b"".join(orjson.dumps(record) + b"\n" for record in records))
    first = clean([directory / "dump.jsonl"], directory / "once", near=0, workers=1, settings=EVERYTHING_OFF)
    once = directory / "once/conversations.jsonl"
    again = clean([once], directory / "twice", near=0, workers=1, settings=EVERYTHING_OFF)
    assert (directory / "twice/conversations.jsonl").read_bytes() == once.read_bytes() and again.kept == first.kept


def test_a_record_that_only_shares_our_keys():
    own = Conversation("i", [Message("user", "q"), Message("assistant", "a", True)], "s", "Arabic", "m", 1, 2)
    record = orjson.loads(own.to_json())
    found = read(record)
    assert (found.source, found.lang, found.part, found.parts) == ("s", "Arabic", 1, 2)
    for other in ({"part": 2}, {"parts": True}, {"part": -1}, {"source": 3}, {"more": 1}, {"lang": None}):
        found = read({**record, **other})
        assert (found.source, found.part, found.parts) == ("", 0, 1)


def test_parts_keep_the_id_that_they_share():
    ids, parts = ["a", "a", "a", "a", "b", "a-2"], [0, 1, 0, 1, 0, 0]
    assert _make_unique(ids, parts, {}) == [("a", "a-3"), ("a", "a-2")]
    assert ids == ["a", "a", "a-3", "a-2", "b", "a-2"]


def test_a_part_that_is_split_again():
    def count(messages: list[Message]) -> int:
        return sum(len(message.content) for message in messages)

    part = Conversation("a", [Message("user", "q"), Message("assistant", "a", True)] * 2, part=1, parts=3)
    assert split_conversation(part, 9, count)[0] == [part]
    again = split_conversation(part, 3, count)[0]
    assert [(each.id, each.part, each.parts) for each in again] == [("a-part-1", 0, 2), ("a-part-1", 1, 2)]


def test_the_strict_reader_takes_what_we_write(tmp_path):
    written(tmp_path, dialogue({"weight": 0}, {"finish_reason": "length"}))
    (line,) = (tmp_path / "out/conversations.jsonl").open("rb")
    assert parse_conversation(orjson.loads(line)).to_json() + b"\n" == line


def test_what_is_learned_is_no_duplicate_of_context(tmp_path):
    """A part is not a duplicate of the next one, which begins with its last round as context.

    Neither is an answer that is not to be learned a duplicate of the same answer that is.
    """
    first = Conversation("a", [Message("user", "q"), Message("assistant", "a", True)], "s", "en", "m", 0, 2)
    context = [Message("user", "q"), Message("assistant", "a")]
    second = Conversation("a", [*context, Message("user", "r"), Message("assistant", "b", True)], "s", "en", "m", 1, 2)
    report, conversations = written(tmp_path, *(orjson.loads(each.to_json()) for each in (first, second)))
    assert report.kept == 2 and conversations == [first, second]
    report, conversations = written(tmp_path, dialogue({"train": False}), dialogue({}), dialogue({}))
    assert report.rejected == {"duplicate": 1}
    assert [each.messages[1].train for each in conversations] == [False, True]
