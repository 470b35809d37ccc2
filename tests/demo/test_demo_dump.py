"""The dump that `fastft demo` ships: what make_dump writes, large and varied enough, and cleaned as it says itself."""

import json
import re
import subprocess
import sys
from collections import Counter

import pytest

from cleaning.html.markdown import html_to_markdown
from fastft.demo import make_dump

SOURCES = make_dump.read_sources()
GOOD = [source for source in SOURCES if source.good]
ANSWERS = [text for source in GOOD for role, text in source.turns if role == "assistant"]
QUESTIONS = [text for source in GOOD for role, text in source.turns if role == "user"]


def test_dump_is_what_make_dump_writes_now():
    written = make_dump.DUMP.read_text(encoding="utf-8")
    assert written == make_dump.dump_text(make_dump.make_records()), "run: python -m fastft.demo.make_dump"
    assert len(written.encode()) < 1_200_000


def test_enough_conversations_in_enough_languages():
    languages = Counter(source.lang for source in GOOD)
    assert sum(languages.values()) >= 120
    assert len(languages) >= 3 and min(languages.values()) >= 10, languages
    characters = sum(len(text) for source in GOOD for _, text in source.turns)
    assert 60_000 <= characters <= 110_000  # a tiny model has about 90 seconds to learn it by heart


def test_ids_and_opening_questions_are_distinct():
    assert len({source.id for source in SOURCES}) == len(SOURCES)
    assert len({source.turns[0][1] for source in SOURCES}) == len(SOURCES)
    records = [record for record in make_dump.make_records() if isinstance(record, dict)]
    ids = [record["id"] for record in records]
    assert len(set(ids)) == len(ids) and all(re.fullmatch(r"\w{7}", name) for name in ids)


def test_good_conversations_alternate_and_answer():
    for source in GOOD:
        roles = [role for role, _ in source.turns]
        assert roles == ["user", "assistant"] * (len(roles) // 2), source.id
        assert all(text.strip() for _, text in source.turns), source.id


def test_showcase_questions_are_single_rounds_of_the_dump():
    questions = json.loads((make_dump.HERE / "questions.json").read_text(encoding="utf-8"))
    assert len(questions) == 3
    for question in questions:
        (source,) = [source for source in GOOD if source.turns[0][1] == question]
        assert len(source.turns) == 2


@pytest.mark.parametrize(
    "construct",
    [
        r"^```python\n",
        r"^```bash\n",
        r"^```sql\n",
        r"^```json\n",
        r"^```javascript\n",
        r"(?:\A|\n\n)```\n",  # a block without language
        r"^````\n[^`]*\n```",  # a block that holds three backticks
        r"^```python\n[^`]*\n\n\n",  # two blank lines in code
        r"^```python\n    \w",  # the first line is indented
        r"^```\n\n[2-9]\. ",  # an ordered list goes on after a code block
        r"^   - ",  # a list in an ordered list
        r"^  - ",  # a list in a list
        r"^\| --- \|",
        r"^\$\$$",
        r"(?<!\$)\$[^$\n]+\$(?!\$)",
        r"\]\(https://",
        r"\*\*\w",
        r"(?<!\*)\*\w[^*\n]*\*(?!\*)",
        r"^### ",
        r"^> ",
        r"`<div>`",
    ],
)
def test_answers_hold_every_construct_of_markdown(construct):
    assert any(re.search(construct, text, re.MULTILINE) for text in ANSWERS)


@pytest.mark.parametrize("construct", [r"^ {4}\w", r"List<String>", r"a < b", r"</s>", r"<\|im_end\|>", r"<div class="])
def test_questions_hold_every_text_that_is_easily_lost(construct):
    assert any(re.search(construct, text, re.MULTILINE) for text in QUESTIONS)


@pytest.mark.parametrize(
    "shape",
    [
        "request-:r0:",
        'class="bg-black mb-4 rounded-md"',
        'class="bg-black rounded-md mb-4"',
        "bg-gray-950",
        "</span>Copy code</div>",
        "hljs-keyword",
        '<ol start="2">',
        "annotation encoding",
        "katex-html",
        'target="_new"',
        "Copy code</button>",
    ],
)
def test_the_dump_has_pages_of_all_eras(shape):
    assert shape in "".join(turn["value"] for turn in _answers_in_dump())


def test_dirt_is_what_the_table_says():
    reasons = Counter([*make_dump.DIRT.values(), *(reason for _, reason in make_dump.BROKEN)])
    reasons += Counter("duplicate_beginning" if rounds else "duplicate" for _, rounds in make_dump.COPIES)
    kept = len(GOOD) + len(make_dump.REPAIRED)
    expected = make_dump.EXPECTED
    assert (expected["kept"], expected["rejected"]) == (kept, dict(reasons))
    assert expected["input"] == kept + sum(reasons.values())
    assert expected["input"] == len(make_dump.make_records())
    assert r"\ud83d" in make_dump.DUMP.read_text(encoding="utf-8")  # half an emoji, legal in JSON


def test_every_answer_survives_the_page():
    for number, source in enumerate(SOURCES):
        page = make_dump.share_record(source, make_dump.pick_era(source, number))["conversations"]
        for (role, text), turn in zip(source.turns, page):
            assert role == "user" or _loose(html_to_markdown(turn["value"])) == _loose(text), source.id


def test_the_cleaner_finds_the_dirt(tmp_path):
    phrases = make_dump.HERE / "blocked_phrases.txt"
    command = [sys.executable, "-m", "cleaning", make_dump.DUMP, "-o", tmp_path, "--blocked_phrases", phrases]
    subprocess.run(command, check=True, capture_output=True)
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    expected = make_dump.EXPECTED
    assert report["input"] == expected["input"]
    # No --max_tokens is given here, so no conversation is over it.
    assert report["kept"] == expected["kept"] + expected["rejected"]["over_window"]
    assert report["rejected"] == {name: count for name, count in expected["rejected"].items() if name != "over_window"}
    assert report["repairs"] == Counter(make_dump.REPAIRED.values())
    lines = (tmp_path / "conversations.jsonl").read_text(encoding="utf-8").splitlines()
    cleaned = {m[0]["content"]: m for m in (json.loads(line)["messages"] for line in lines)}
    for source in GOOD:
        for (role, text), message in zip(source.turns, cleaned[_opening(source)], strict=True):
            assert message["role"] == role
            if role == "assistant":
                assert _loose(message["content"]) == _loose(text), source.id
            else:
                assert message["content"] in (text, _opening(source)), source.id


def _opening(source: make_dump.Dialogue) -> str:
    """The first question as the cleaner keeps it: byte for byte, half an emoji as U+FFFD."""
    return source.turns[0][1] + (" \ufffd" if source.id in make_dump.CUT_EMOJI else "")


def _answers_in_dump() -> list[dict]:
    records = json.loads(make_dump.DUMP.read_text(encoding="utf-8"))
    dialogues = [record.get("conversations") for record in records if isinstance(record, dict)]
    turns = [turn for dialogue in dialogues if isinstance(dialogue, list) for turn in dialogue]
    return [turn for turn in turns if turn["from"] == "gpt" and isinstance(turn["value"], str)]


def _loose(text: str) -> str:
    """Without what a page cannot show: spaces at line ends, runs of blank lines, and the bullet character."""
    lines = [re.sub(r"^( *)[*+] ", r"\1- ", line.rstrip()) for line in text.strip().split("\n")]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines))
