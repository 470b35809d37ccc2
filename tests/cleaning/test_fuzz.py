"""Random input to the three places at which bytes from outside come in: records, HTML and files.

tests/fuzz/converter.py searches the HTML converter further, guided by coverage (`make fuzz`).
"""

import json

import pytest
from fuzz.converter import PIECES, check
from helpers.sources import ANYTHING, OBJECTS, places, replaced
from hypothesis import given, settings
from hypothesis import strategies as st

from cleaning.filters.base import Repair
from cleaning.filters.steps import STEPS
from cleaning.first_pass import Conversion, Shard, convert_shard, pack, unpack
from cleaning.settings import FilterSettings, RunSettings
from cleaning.sources.eras import ERAS, EraDecision, Evidence, decide
from cleaning.sources.formats import FORMATS, Reading
from fastft.common import records
from fastft.common.records import RawRecord, parse_json, parsed, read_raw, read_records, to_json
from fastft.data.conversation import parse_conversation
from fastft.errors import UserError

# --- records ----------------------------------------------------------------------------------------------------------


@st.composite
def nearly_records(draw):
    """Draw a record of a format with some of its values replaced or removed, or any JSON value."""
    record = draw(st.sampled_from([*OBJECTS.values(), None]))
    if record is None:
        return draw(ANYTHING)
    for _ in range(draw(st.integers(0, 3))):
        path = draw(st.sampled_from(list(places(record))))
        record = replaced(record, path, ... if path and draw(st.booleans()) else draw(ANYTHING))
        if not isinstance(record, (dict, list)) or not record:
            break
    return record


EVERYTHING = tuple(step.name for step in STEPS if not isinstance(step, Repair) and not step.default and not step.option)
CONVERSIONS = st.builds(
    lambda format, branches, era, filters: Conversion(filters, [Reading(format, branches, era)], RunSettings()),
    st.none() | st.sampled_from(sorted(FORMATS)),
    st.booleans(),
    st.sampled_from([EraDecision(), *(decide(Evidence(), name) for name in ERAS)]),
    st.sampled_from(
        [
            FilterSettings(),
            FilterSettings(with_filters=(*EVERYTHING, "masked_keys", "masked_emails", "masked_ips", "masked_phones")),
            FilterSettings(
                without_filters=("tool_session", "plugin_session"), min_turns=2, max_chars=50, consecutive="last"
            ),
        ]
    ),
)


@given(st.lists(nearly_records(), min_size=1, max_size=3), CONVERSIONS)
@settings(max_examples=100)
def test_any_json_value_has_an_outcome(values, conversion):
    texts = [json.dumps(value).encode() for value in values]
    shard = Shard(0, "d", 5, [RawRecord(f"d: record {n}", text, 9) for n, text in enumerate(texts)])
    packed = convert_shard(conversion, shard)
    outcomes = unpack(packed)
    assert pack(outcomes) == packed and unpack(pack(outcomes)) == outcomes
    for number in range(len(values)):
        own = [each for each in outcomes if each.where.split(",")[0] == f"d: record {number}"]
        assert own and (len(own) > 1 or parse_json(own[0].record) == parse_json(to_json(parse_json(texts[number]))))
    for outcome in outcomes:
        assert outcome.id and bool(outcome.reason) != bool(outcome.conversation)
        if outcome.conversation:
            conversation = parse_conversation(parse_json(outcome.conversation))
            assert conversation.messages and outcome.fingerprint is not None


@given(st.binary(max_size=60) | st.text(max_size=60).map(str.encode), CONVERSIONS)
@settings(max_examples=60)
def test_any_bytes_have_an_outcome(data, conversion):
    packed = convert_shard(conversion, Shard(0, "d", 0, [RawRecord("d: line 1", data, len(data))]))
    assert len(unpack(packed)) == 1 and pack(unpack(packed)) == packed


# --- HTML -------------------------------------------------------------------------------------------------------------


@given(st.lists(st.sampled_from(PIECES), max_size=40).map("".join))
@settings(max_examples=150)
def test_any_soup_of_tags_is_converted(html):
    check(html)


@given(st.text(max_size=60))
@settings(max_examples=80)
def test_any_text_is_converted_as_html(text):
    check(text)


# --- files ------------------------------------------------------------------------------------------------------------

_TOKENS = [b"[", b"]", b"{", b"}", b",", b":", b'"', b"\\", b"\n", b" ", b'{"a": ', b'"a"', b"1", b"-", b"1e999", b"NaN",
           b"null", b"\xef\xbb\xbf", b"\xff", b"\0", b"[[[[", b'"\\ud83d"', b'{"a": 1}', b"9" * 5_000]  # fmt: skip
FILES = st.binary(max_size=80) | st.lists(st.sampled_from(_TOKENS), max_size=12).map(b"".join)


@given(FILES, st.sampled_from([1, 5, 1 << 22]), st.sampled_from(["d.json", "d.jsonl", "d.gz", "d.zst", "d.parquet"]))
@settings(max_examples=150)
def test_any_bytes_as_a_file(tmp_path_factory, data, chunk, name):
    """The file gives every record once and in order, good or with a reason, or one line that says what is wrong with it."""
    path = tmp_path_factory.getbasetemp() / name
    path.write_bytes(data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "CHUNK", chunk)
        try:
            raw = list(read_raw(path))
        except (UserError, ValueError) as error:
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
            return
        assert [(each.where, each.error) for each in read_records(path)] == [(r.where, parsed(r).error) for r in raw]
    assert all(each.where.startswith(f"{name}: ") for each in raw)
    assert all(each.text or each.error for each in raw) and [each.end for each in raw] == sorted(e.end for e in raw)
    between = b" \t\r\n\x0b\x0c,[]\xef\xbb\xbf"  # what may be between records; all other bytes belong to a record
    assert b"".join(each.text for each in raw).translate(None, between) == data.translate(None, between)
