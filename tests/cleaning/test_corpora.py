"""Fidelity on corpora of which the truth is known. Their text is not ours to ship: without it, these are skipped."""

import json

import pytest
from helpers.corpora import benchmark

from cleaning.pipeline import clean
from cleaning.settings import FilterSettings
from fastft.data.conversation import read_conversations

pytestmark = pytest.mark.skipif(
    not benchmark.DATA.is_dir(), reason=f"no corpora at {benchmark.DATA}: set FASTFT_DATA to the directory of chats/"
)


def test_generated_pages_are_read_back_exactly():
    f = benchmark.measure(benchmark.DATA / "generated_html_with_truth.jsonl")
    assert f.answers == 934 and f.answers_exact >= 0.99 * f.answers
    assert f.code_blocks_exact == f.code_blocks == 482
    assert f.human_turns_intact == f.human_turns == 934


def test_rendered_conversations_are_read_back():
    f = benchmark.measure(benchmark.DATA / "rendered_html_with_truth.jsonl")
    assert f.answers == 320 and f.answers_exact >= 269  # the others differ in what their pages do not say
    assert f.code_blocks_exact == f.code_blocks == 266
    assert f.human_turns_intact == f.human_turns == 320


def test_real_pages_become_markdown(tmp_path):
    report = clean([benchmark.DATA / "chatgpt_pages_as_sharegpt.json"], tmp_path)
    answers = [m.content for c in read_conversations(tmp_path / "conversations.jsonl") for m in c.messages if m.train]
    assert (report.kept, report.answers, report.repairs) == (
        5,
        {"html": 16, "as_is": 0},
        {"merged_assistant_turns": 4},
    )
    assert not any("<" in answer or "Copy code" in answer for answer in answers)
    assert any("\n11. **E-commerce App**" in answer for answer in answers)


@pytest.mark.parametrize("name", ["sharegpt_v3_sample.json", "sharegpt_zh.jsonl"])
def test_markdown_dumps_pass_untouched(tmp_path, name):
    # A third of the chunks in the first file begin in the middle of a dialogue, some with `continue`.
    settings = FilterSettings(without_filters=("orphan_continue", "merged_continued_answers"))
    report = clean([benchmark.DATA / name], tmp_path, settings=settings)
    assert report.kept > 0.97 * report.input and report.answers["html"] == 0
    path = benchmark.DATA / name
    records = json.loads(path.read_text()) if name.endswith("json") else map(json.loads, path.open())
    shared = {turn["value"] for record in records for turn in record["conversations"]}
    messages = [m for c in read_conversations(tmp_path / "conversations.jsonl") for m in c.messages]
    assert all(m.content in shared for m in messages)
