"""The trainer's reader: what it reads, what it refuses in one line, and that it drops nothing silently."""

import json
import logging

import pytest
from helpers import tiny

from fastft.data.conversation import UNREAD, UNREAD_OF_RECORD, parse_conversation, read_conversations
from fastft.data.inspect import check_file
from fastft.data.marks import ENDINGS, LOSS_FLAGS, loss_weight
from fastft.data.template.chat_template import template_for
from fastft.errors import UserError

CALL = [{"id": "c1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}]


def answered(**keys) -> dict:
    """A record whose last message is an answer with `keys` beside, or instead of, its content."""
    return {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello.", **keys}]}


def refusal(record: dict) -> str:
    """The line with which a record is refused."""
    with pytest.raises(UserError) as error:
        parse_conversation(record, "data.jsonl: line 3")
    assert "\n" not in str(error.value)
    return str(error.value)


def write(path, *records) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.mark.parametrize("key", LOSS_FLAGS)
def test_every_spelling_of_a_loss_flag_is_read(key):
    learned = LOSS_FLAGS[key]
    for value in (True, 1, 1.0):
        assert loss_weight({key: value}) == (1 if learned else 0)
    for value in (False, 0, 0.0):
        assert loss_weight({key: value}) == (0 if learned else 1)
    assert loss_weight({key: None}) is None


def test_masks_say_the_opposite_of_weights():
    assert loss_weight({"weight": 0}) == loss_weight({"mask": True}) == loss_weight({"masked": 1}) == 0
    assert loss_weight({"train": True, "weight": 1, "mask": False}) == 1
    assert loss_weight({"content": "no flag"}) is None
    assert loss_weight({"weight": 0.5}) == 0.5


@pytest.mark.parametrize(
    ("turn", "said"),
    [
        ({"weight": "0"}, "'weight' is \"0\"; expected true or false, 1 or 0"),
        ({"train": "false"}, "'train' is \"false\""),
        ({"weight": -1}, "'weight' is -1"),
        ({"weight": float("nan")}, "'weight' is NaN"),
        ({"loss": 10**400}, "'loss' is a number"),
        ({"mask": [1, 0]}, "'mask' is a list"),
        ({"mask": 2}, "'mask' is 2"),
        ({"train": True, "weight": 0}, "'train': true and 'weight': 0 contradict each other"),
        ({"train": True, "mask": True}, "'train': true and 'mask': true contradict each other"),
        ({"train": True, "label": False}, "'train': true and 'label': false contradict each other"),
        ({"weight": 1, "kto_tag": 0}, "'weight': 1 and 'kto_tag': 0 contradict each other"),
        ({"kto_tag": "no"}, "its 'kto_tag' is neither true nor false"),
    ],
)
def test_a_loss_flag_that_cannot_be_obeyed_is_named(turn, said):
    with pytest.raises(UserError) as error:
        loss_weight(turn)
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("key", LOSS_FLAGS)
def test_answers_that_are_not_to_be_learned_are_not_trained(key, tmp_path, capsys):
    no, yes = (0, 1) if LOSS_FLAGS[key] else (1, 0)
    record = {
        "messages": [
            {"role": "user", "content": "Hi", key: no},
            {"role": "assistant", "content": "bad answer", key: no},
            {"role": "user", "content": "Again", key: None},
            {"role": "assistant", "content": "Good.", key: yes},
            {"role": "assistant", "content": "No flag.", key: None},
        ]
    }
    assert [m.train for m in parse_conversation(record).messages] == [False, False, False, True, True]
    assert all(isinstance(m.train, bool) for m in parse_conversation(record).messages)
    template = template_for(tiny.KINDS["byte_level"](), "chatml")
    encoded = template.encode(parse_conversation(record).messages)
    learned = template.tokenizer.decode([t for t, trained in zip(encoded.ids, encoded.trained) if trained])
    assert "bad answer" not in learned and "Good." in learned
    assert check_file(write(tmp_path / "data.jsonl", record), template) == 0, capsys.readouterr().err


def marks_of(record: dict) -> list[tuple[bool, bool]]:
    """(train, ends) of the answers of a record."""
    return [(m.train, m.ends) for m in parse_conversation(record).messages if m.role == "assistant"]


@pytest.mark.parametrize(
    ("keys", "train", "ends"),
    [
        ({"label": False}, False, True),
        ({"kto_tag": False}, False, True),
        ({"kto_tag": 0}, False, True),
        ({"label": False, "weight": 0}, False, True),
        ({"label": True, "kto_tag": 1}, True, True),
        ({"label": 0}, True, True),  # the number of a class
        ({"label": "bad"}, True, True),
        ({"finish_reason": "length"}, False, False),
        ({"finish_reason": "length", "weight": 1}, False, False),
        ({"finishReason": "MAX_TOKENS"}, False, False),
        ({"stop_reason": "max_tokens"}, False, False),
        ({"finish_details": {"type": "max_tokens", "stop": None}}, False, False),
        ({"status": "finished_partial_completion"}, False, False),
        ({"interrupted": True}, False, False),
        ({"metadata": {"finish_details": {"type": "interrupted"}}}, False, False),
        ({"finish_reason": "stop", "status": "finished_successfully", "interrupted": False}, True, True),
        ({"stop_reason": "end_turn", "metadata": {"finish_details": {"type": "stop"}}}, True, True),
        ({"finish_reason": None, "metadata": "none"}, True, True),
        ({"ends": False}, True, False),  # our own splitter's: it goes on in the next part
    ],
)
def test_an_answer_that_its_file_marks_as_bad_or_cut_is_not_trained(keys, train, ends):
    assert marks_of(answered(**keys)) == [(train, ends)]


def test_marks_of_questions_say_nothing_about_answers():
    marks = {"finish_reason": "length", "status": "error", "interrupted": True, "label": False}
    record = answered()
    record["messages"][0] |= marks
    assert marks_of(record) == [(True, True)] and parse_conversation(record).messages[0].ends


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"label": False}, [(True, True), (False, True)]),
        ({"kto_tag": False}, [(True, True), (False, True)]),
        ({"label": True, "kto_tag": None}, [(True, True), (True, True)]),
        ({"label": 0}, [(True, True), (True, True)]),
        *(({key: "length"}, [(True, True), (False, False)]) for key in ENDINGS),
        ({"finish_reason": "stop", "status": "error", "interrupted": True}, [(True, True), (True, True)]),
    ],
)
def test_a_mark_of_a_record_is_about_its_last_answer(keys, expected):
    record = {"messages": answered()["messages"] * 2, **keys}
    assert marks_of(record) == expected


def test_an_unclear_label_of_a_record_is_named():
    assert refusal({"kto_tag": "no", **answered()}) == "data.jsonl: line 3: its 'kto_tag' is neither true nor false"


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"weight": 0.5}, "'weight' gives it a weight of 0.5; only 1 (learned) and 0 (not) can be obeyed"),
        ({"loss_weight": 2}, "'loss_weight' gives it a weight of 2"),
        ({"train": True, "weight": 0}, "'train': true and 'weight': 0 contradict each other"),
        ({"role": "user", "weight": 1}, "'weight' says that a user message is learned; only the assistant's are"),
        ({"role": "tool", "mask": False}, "'mask' says that a tool message is learned"),
        ({"weight": "1"}, "'weight' is \"1\"; expected true or false, 1 or 0"),
        ({"ends": 0}, "'ends' is 0; it is true or false"),
        ({"value": "Other."}, "its 'content' and its 'value' differ"),
        ({"content": None}, "its content is nothing, not text"),
        ({"content": []}, "its content is an empty list, not text"),
    ],
)
def test_what_cannot_be_obeyed_is_refused_where_it_stands(keys, said):
    assert refusal(answered(**keys)).startswith("data.jsonl: line 3, message 2: ")
    assert said in refusal(answered(**keys))


@pytest.mark.parametrize("key", UNREAD)
def test_what_a_template_would_show_beside_the_content_is_refused_with_the_remedy(key):
    for content in ("", "Hello.", None):
        said = refusal(answered(content=content, **{key: CALL}))
        assert said.startswith(f"data.jsonl: line 3, message 2: {key!r} cannot be read") and UNREAD[key] in said
    assert repr(key) in refusal(answered(**{key: "Two and two."}))


@pytest.mark.parametrize("value", [None, "", " ", [], {}, False, "[]", "null", {"name": None, "arguments": None}])
def test_keys_without_a_value_are_fine(value):
    """Tables have every column in every row; some hold lists as JSON text."""
    plain = parse_conversation(answered())
    for key in UNREAD:
        assert parse_conversation(answered(**{key: value})) == plain
    for key in UNREAD_OF_RECORD:
        assert parse_conversation({key: value, **answered()}) == plain


@pytest.mark.parametrize("key", UNREAD_OF_RECORD)
def test_what_belongs_into_the_prompt_is_not_left_beside_the_messages(key):
    for value in (CALL, json.dumps(CALL)):
        said = refusal({key: value, **answered()})
        assert said.startswith(f"data.jsonl: line 3: {key!r} cannot be read") and UNREAD_OF_RECORD[key] in said


def test_a_flag_of_a_whole_record_is_refused_unless_it_says_nothing_new():
    assert parse_conversation({"weight": 1.0, **answered()}).messages[1].train
    assert "line 3: 'weight' of a record is not obeyed" in refusal({"weight": 0, **answered()})
    assert "'train' and 'mask' of a record" in refusal({"train": False, "mask": True, **answered()})


def test_text_parts_are_joined_as_the_api_means_them():
    parts = [{"type": "text", "text": "Hel"}, {"type": "output_text", "text": "lo", "annotations": []}, ".\n"]
    assert parse_conversation(answered(content=parts)).messages[1].content == "Hello.\n"
    assert parse_conversation(answered(content=[{"text": "x"}])).messages[1].content == "x"


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ({"type": "image_url", "image_url": {"url": "data:x"}}, 'part 2: is of type "image_url", not text'),
        ({"type": "thinking", "thinking": "Hm.", "text": "Hm."}, 'part 2: is of type "thinking", not text'),
        ({"type": "refusal", "refusal": "No."}, 'part 2: is of type "refusal", not text'),
        ({"type": "text", "text": None}, "part 2: its text is nothing, not text"),
        ({"type": "text"}, "part 2: its text is nothing, not text"),
        (7, "part 2: expected an object with a text, found a number"),
    ],
)
def test_a_part_that_is_no_text_is_refused_by_name(part, said):
    assert f"line 3, message 2, {said}" in refusal(answered(content=[{"type": "text", "text": "See:"}, part]))


def test_developer_is_the_newer_name_of_system():
    record = {"messages": [{"role": "developer", "content": "Be terse."}, *answered()["messages"]]}
    assert [m.role for m in parse_conversation(record).messages] == ["system", "user", "assistant"]


def test_null_columns_of_the_other_format_are_no_hindrance():
    turns = [
        {"from": "human", "value": "Hi", "role": None, "content": None},
        {"from": "gpt", "value": "Hello.", "role": None, "content": None},
    ]
    plain = parse_conversation(answered())
    assert parse_conversation({"messages": None, "conversations": turns}) == plain


def test_unknown_keys_are_named_once_per_file_and_known_notes_never(tmp_path, caplog):
    noted = answered(id="m1", name="Ann", timestamp=1.5, tool_call_id="c1", mood="kind", empty=None)
    path = write(tmp_path / "data.jsonl", answered(), noted, noted)
    with caplog.at_level(logging.WARNING):
        assert len(list(read_conversations(path))) == len(list(read_conversations(path))) == 3
    (line,) = caplog.messages
    assert "data.jsonl: line 2, message 2: the key 'mood' is not read" in line


def test_our_own_files_are_read_as_they_were_written(tmp_path, caplog):
    record = {**answered(), "id": "a", "source": "dump", "lang": "en", "model": "m", "part": 1, "parts": 2}
    record["messages"][1] |= {"train": False, "ends": False}
    written = parse_conversation(record)
    (read,) = read_conversations(write(tmp_path / "own.jsonl", json.loads(written.to_json())))
    assert read == written and not caplog.messages
