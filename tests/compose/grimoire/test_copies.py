"""The guard finds runs of eight words, whatever their case and punctuation, in scripts without spaces, too."""

import gzip
import json
import os
from pathlib import Path

import pytest

from fastft.compose.grimoire.writing.copies import CopyGuard

DATA = Path(os.environ.get("FASTFT_DATA", "data")) / "grimoire"
TEXT = "The main story involves an innocent teenage boy, who meets her on a beach."


def test_eight_words_in_a_row_are_a_copy_and_seven_are_not():
    guard = CopyGuard([TEXT])
    assert guard.copies("As in: THE MAIN STORY -- involves an innocent\nteenage boy; objective.") == [
        "the main story involves an innocent teenage boy"
    ]
    assert guard.copies("the main story involves an innocent teenage girl") == []
    assert guard.copies("") == [] and CopyGuard([]).copies(TEXT) == []


def test_overlapping_runs_are_one_passage():
    twice = f"{TEXT} But: {TEXT}"
    assert len(CopyGuard([TEXT]).copies(twice)) == 2


def test_scripts_without_spaces_are_counted_by_character():
    guard = CopyGuard(["这部电影讲述了一个关于爱情的故事"])
    assert guard.copies("例如讲述了一个关于爱情是客观的") == ["讲 述 了 一 个 关 于 爱 情"]
    assert guard.copies("讲述了一个关于") == []


@pytest.mark.skipif(not DATA.is_dir(), reason="NOT CHECKED HERE: FASTFT_DATA has no grimoire/")
def test_26_of_the_56_profound_grimoires_of_the_paper_copy_and_no_simple_one():
    rows = [json.loads(line) for line in (DATA / "grimoires.jsonl").read_text("utf-8").splitlines()]
    found = {}
    for task in ("Subj", "TREC", "AgNews", "RTE"):
        lines = gzip.decompress((DATA / f"{task}_train.jsonl.gz").read_bytes()).splitlines()
        guard = CopyGuard(json.loads(line)["text"] for line in lines)
        own = [row for row in rows if row["task"] == task]
        found[task] = [sum(bool(guard.copies(row[kind])) for row in own) for kind in ("profound", "simple")]
    assert found == {"Subj": [7, 0], "TREC": [4, 0], "AgNews": [3, 0], "RTE": [12, 0]}
