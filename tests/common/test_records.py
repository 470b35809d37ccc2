"""Records from every container, with every kind of damage: nothing is lost, and a broken record costs only itself."""

import gzip
import json

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from fastft.common import records
from fastft.common.records import read_records, repair_text
from fastft.errors import UserError

values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
objects = st.lists(st.dictionaries(st.text(max_size=5), values, max_size=4), max_size=6)


@given(objects, st.sampled_from([None, 1, 4]), st.integers(1, 40))
def test_an_array_reads_as_json_reads_it_whatever_the_window(tmp_path_factory, items, indent, chunk):
    path = tmp_path_factory.mktemp("array") / "a.json"
    path.write_text(json.dumps(items, indent=indent, ensure_ascii=False))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "CHUNK", chunk)
        assert [r.value for r in read_records(path)] == items


@given(st.lists(st.dictionaries(st.text(max_size=5), values, max_size=4), min_size=1, max_size=6), st.integers(1, 40))
def test_lines_read_as_json_reads_them_whatever_the_window(tmp_path_factory, items, chunk):
    path = tmp_path_factory.mktemp("lines") / "a.jsonl"
    path.write_text("\n".join(json.dumps(item) for item in items))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "CHUNK", chunk)
        assert [r.value for r in read_records(path)] == items


def zstd_in_two_frames(data: bytes) -> bytes:
    return b"".join(zstandard.ZstdCompressor().compress(part) for part in (data[:5], data[5:]))


@pytest.mark.parametrize(("name", "wrap"), [("a.jsonl.gz", gzip.compress), ("a.jsonl.zst", zstd_in_two_frames)])
def test_archives_are_read_and_damaged_ones_refused(tmp_path, name, wrap):
    path = tmp_path / name
    path.write_bytes(wrap(b'{"a": 1}\n{"a": 2}\n'))
    assert [r.value for r in read_records(path)] == [{"a": 1}, {"a": 2}]
    whole = path.read_bytes()
    for damaged in (whole[:-6], whole[:15] + b"\xff\xff\xff" + whole[18:], whole + b"no archive"):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="damaged or cut short"):
            list(read_records(path))


def test_parquet_is_read_and_what_only_looks_like_it_refused(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"id": "a", "messages": [{"role": "user", "content": "hi"}]}, {"id": "b", "messages": []}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert [r.value for r in read_records(tmp_path / "a.parquet")] == rows
    (tmp_path / "b.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(UserError, match="not a readable Parquet file"):
        list(read_records(tmp_path / "b.parquet"))


def test_broken_records_are_records_with_a_reason(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[{"a": 1}, {"a": bad}, {"a": NaN}, 5, {"b": "\\ud83d"}, {"c": "cut')
    read = list(read_records(path))
    assert [r.error is None for r in read] == [True, False, True, True, True, False, False]
    assert read[1].raw.startswith('{"a": bad}') and "record 2" in read[1].where
    assert "cut short" in read[-1].error


def test_bytes_that_are_not_utf8_and_deep_nesting(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": "\xff"}\n' + b"[" * 100_000 + b'\n{"a": 2}')
    read = list(read_records(path))
    assert [r.value for r in read] == [{"a": 1}, None, None, {"a": 2}]
    assert "not UTF-8" in read[1].error and "nested too deeply" in read[2].error


@pytest.mark.parametrize(
    ("content", "says"), [(b"", "is empty"), (b" \n ", "is empty"), (b"\x7fELF\0", "is a binary file")]
)
def test_files_that_are_no_data(tmp_path, content, says):
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(UserError, match=says):
        list(read_records(tmp_path / "a"))
    with pytest.raises(UserError, match="no such file"):
        list(read_records(tmp_path / "b"))
    with pytest.raises(UserError, match="is a directory"):
        list(read_records(tmp_path))


@given(st.text(st.characters(exclude_categories=[])))
def test_repaired_text_is_text_and_good_text_is_untouched(text):
    repaired = repair_text(text)
    repaired.encode()
    if all(not 0xD800 <= ord(c) <= 0xDFFF for c in text):
        assert repaired == text


DAMAGE = [
    '"a "quote" b"',
    '"a raw\nline end"',
    '"a bad \\x escape"',
    "unquoted",
    '"never closed',
    '"closed twice""',
    "}",
]


@given(st.integers(1, 9), st.integers(0, 9), st.sampled_from(DAMAGE), st.sampled_from([1, 7, 1 << 22]))
def test_one_broken_record_of_an_array_costs_only_itself(tmp_path_factory, count, at, damage, chunk):
    """Records hold lists of turns, whose ends look like ends of records."""
    turns = [{"from": "human", "value": "a, b"}, {"from": "gpt", "value": "c } , { d"}]
    good = [json.dumps({"id": str(i), "conversations": turns}) for i in range(count)]
    broken = good[0].replace('"a, b"', damage, 1)
    at = min(at, count)
    path = tmp_path_factory.mktemp("damage") / "a.json"
    path.write_text("[" + ",\n".join([*good[:at], broken, *good[at:]]) + "]")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "CHUNK", chunk)
        read = list(read_records(path))
    assert [json.dumps(r.value) for r in read if r.error is None] == good
    assert sum(r.error is not None and r.raw != "" for r in read) == 1


def test_nothing_after_the_first_array_is_lost(tmp_path):
    path = tmp_path / "a.json"
    for text in ('[{"a": 1}]\n[{"a": 2}]', '[{"a": 1}]\n{"a": 2}\n', '[]\n[{"a": 1}]\n[{"a": 2}]'):
        path.write_text(text)
        assert [r.value for r in read_records(path)] == [{"a": 1}, {"a": 2}]
    path.write_text('[{"a": 1}];')
    assert [r.error is None for r in read_records(path)] == [True, False]


def test_a_pipe_is_refused(tmp_path):
    import os

    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="not a regular file"):
        list(read_records(tmp_path / "pipe"))
