"""The cleaner's page: true to the outputs of a run, made again from them, safe and without secrets whatever they hold."""

import json
import re
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import orjson
import pytest
from helpers.dumps import LONG, PAGE, share
from helpers.pages import CHROMIUM, HOSTILE, browse, texts
from helpers.sources import LABEL
from hypothesis import given
from hypothesis import strategies as st
from lxml import html as lxml_html

import cleaning.pipeline
import cleaning.report.figures
import cleaning.second_pass
import fastft.data.dedup
from cleaning.first_pass import Outcome
from cleaning.pipeline import clean
from cleaning.report.examples import AMONG, LONGEST, pick_examples
from cleaning.report.figures import LENGTH_EDGES, ROUND_EDGES, Kept, Names, Sizes, bars, trained_lengths
from cleaning.report.ledger import Report
from cleaning.report.masking import excerpt
from cleaning.report.page import write_report
from cleaning.report.rejections import DESCRIPTIONS, Rejected
from cleaning.settings import FilterSettings
from cleaning.sources.formats import Reading
from fastft.common.html import visible
from fastft.common.records import repair_text
from fastft.data.conversation import Conversation, Message
from fastft.errors import UserError

ROOT = Path(__file__).parents[2]


def run(tmp_path: Path, records, name: str = "dump.json", **options) -> str:
    (tmp_path / name).write_text(json.dumps(records))
    clean([tmp_path / name], tmp_path / "out", **options)
    return (tmp_path / "out/report.html").read_text(encoding="utf-8")


CODE = PAGE % ("<p>Run it:</p>" + LABEL.replace("\n", ""))
RECORDS = [
    share("How?", CODE, id="code", model="gpt-4", lang="de"),
    share("Sort a list.", PAGE % "<ul><li>a</li><li>b</li></ul>", "More?", PAGE % "<p>No.</p>", id="list"),
    *(share(LONG, "Yes.", id=f"copy {i}") for i in range(4)),
    share("q", "", id="empty"),
    share("Hi", "Hello.", "And?", "network error", id="banner"),
    *({"id": "x", "text": f"shape {i}"} for i in range(5)),
]


# --- what is on the page ----------------------------------------------------------------------------------------------


def test_the_page_has_its_pieces(tmp_path):
    page = run(tmp_path, RECORDS, seed=7)
    assert texts(page, "//h1") == ["The cleaning of dump.json"]
    assert texts(page, "//h2") == [
        "From input to output",
        "Why conversations were rejected",
        "What is kept",
        "Pages to markdown",
        "Repairs",
        "Duplicates",
        "Contamination",
        "Inputs",
        "Settings and versions",
    ]
    (lede,) = texts(page, "//*[@class='lede']")
    assert lede == (
        "Of 13 conversations, 4 are kept and 9 rejected, most often: "
        "not a conversation (5), duplicate (3), empty answer (1)."
    )
    assert texts(page, "//section[1]//table//tr") == [
        "conversations in 13 100.0 %",
        "not a conversation 5 38.5 %",
        "duplicate 3 23.1 %",
        "empty answer 1 7.7 %",
        "conversations kept 4 30.8 %",
    ]
    root = lxml_html.fromstring(page)
    for link in root.xpath("//nav/a/@href | //table//a/@href"):
        assert root.xpath(f"//*[@id='{link[1:]}']"), link
    assert [len(root.xpath(f"//details[@id='reason-{i}']/article")) for i in range(3)] == [3, 3, 1]
    assert "shape" in texts(page, "//details[@id='reason-0']//dd")[0]
    assert texts(page, "//details[@id='reason-1']/article[1]")[0].endswith(f"kept as copy 0 user {LONG} assistant Yes.")
    assert texts(page, "//details[@id='reason-2']/article") == [
        "empty dump.json: record 7 turn 2 is empty user q assistant (nothing)"
    ]
    assert texts(page, "//details[@id='round-0']/article") == [
        "banner dump.json: record 8, round 2 turn 4 is 'network error' user And? assistant network error"
    ]
    charts = {h: texts(page, f"//h3[text()='{h}']/following-sibling::table//tr") for h in texts(page, "//h3")}
    assert charts["Models"] == ["not named 3 75.0 %", "gpt-4 1 25.0 %"]
    assert "German 1 25.0 %" in charts["Languages"] and charts["Sources"] == ["dump.json 4 100.0 %"]
    assert charts["Formats, of all found"] == ["sharegpt 8 100.0 %"]
    clusters = texts(page, "//h2[@id='duplicates']/..//article")
    assert clusters == [
        f"copy 0 3 conversations removed in its favour {LONG} copy 1 (duplicate), copy 2 (duplicate), copy 3 (duplicate)."
    ]
    settings = texts(page, "//dl[@class='settings']/div")
    assert {"seed 7", "near 0.8", f"python {sys.version.split()[0]}"} <= set(settings)
    assert not any(setting.startswith("transformers") for setting in settings)  # was not used


def test_lengths_are_those_of_what_is_kept(tmp_path):
    answer = " ".join(map(str, range(1000)))[:700]
    more = "more?", "Twenty-five characters, yes."[:25]
    records = [share(f"question {i:0>21}", answer, *more * i, id=str(i)) for i in range(12)]
    page = run(tmp_path, records, near=0)
    names = texts(page, "//figure//*[@class='name']")
    assert names[0] == "Rounds of a conversation, median 6" and names[3] == "Length of an answer, median 25"
    hovers = [texts(page, f"(//figure)[{i}]//*[local-name()='title']") for i in range(1, 5)]
    assert hovers[0][0] == "1 rounds: 1 conversations (8.3 %)"
    assert hovers[0][6] == "8 to 10 rounds: 3 conversations (25.0 %)"
    assert hovers[1][0] == "500 to 999 characters: 9 conversations (75.0 %)"
    assert hovers[2] == [
        "0 to 9 characters: 66 questions (84.6 %)",
        "10 to 19 characters: 0 questions (0.0 %)",
        "20 to 49 characters: 12 questions (15.4 %)",
    ]


def test_context_and_pieces_are_counted_once():
    def message(role, content, train=None, ends=True):
        return {
            "role": role,
            "content": content,
            "train": role == "assistant" if train is None else train,
            "ends": ends,
        }

    part = [message("system", "s"), message("user", "four"), message("assistant", "a" * 6, ends=False)]
    assert trained_lengths(part) == ([4], [6], 0)
    tail = message("assistant", "tail", train=False, ends=False)
    part = [message("user", "four"), tail, message("user", "Continue"), message("assistant", "b" * 7)]
    assert trained_lengths(part) == ([], [7], 1)
    overlap = [
        message("user", "q"),
        message("assistant", "a", train=False),
        message("user", "qq"),
        message("assistant", "b"),
    ]
    assert trained_lengths(overlap) == ([2], [1], 1)
    tools = [message("user", "q"), message("assistant", "call"), message("tool", "t"), message("assistant", "answer")]
    assert trained_lengths(tools) == ([1], [4, 6], 1)
    cut_in_its_dump = [message("user", "q"), message("assistant", "a", ends=False), *overlap]
    assert trained_lengths(cut_in_its_dump) == ([1, 2], [1, 1], 2)


def test_conversations_with_cut_answers_and_lost_parts_are_counted(tmp_path):
    cut = share("q", "a", id="cut") | {"finish_reason": "length"}
    page = run(tmp_path, [cut])
    assert Kept(tmp_path / "out", set()).lengths["rounds"].counts == {1: 1} and page
    part = Conversation("p", [Message("user", "q"), Message("assistant", "a", True)], part=1, parts=2)
    (tmp_path / "out/conversations.jsonl").write_bytes(part.to_json() + b"\n")
    assert Kept(tmp_path / "out", set()).lengths["conversations"].counts == {2: 1}


def test_answers_are_shown_before_and_after_conversion(tmp_path):
    escaped = share("1 / 1a &lt; b", f"<div><p>yes</p>{LABEL}</div>", "1 / 1c", "<div><p>no</p></div>", id="escaped")
    page = run(tmp_path, [*RECORDS, escaped])
    pairs = [e.text_content() for e in lxml_html.fromstring(page).xpath("//article[@class='pair']//*[@class='text']")]
    assert pairs == [
        CODE,
        "Run it:\n\n```css\ncode .\n```",
        PAGE % "<ul><li>a</li><li>b</li></ul>",
        "- a\n- b",
        "1 / 1a &lt; b",
        "a < b",
    ]
    assert texts(page, "//article[@class='pair']/h3") == ["An answer with code", "An answer with a list", "A question"]


def test_contamination_and_the_limit_are_told(tmp_path, monkeypatch):
    def count(messages):
        return sum(3 + len(m.content.split()) for m in messages)

    monkeypatch.setattr(cleaning.second_pass, "token_counter", lambda *_: (count, lambda part: None, lambda part: None))
    (tmp_path / "exam.jsonl").write_text(json.dumps({"question_id": 81, "question": LONG}))
    records = [share(LONG, "a", id="hit"), share("q", "word " * 60, "r", "b", id="long")]
    page = run(
        tmp_path,
        records,
        against=[tmp_path / "exam.jsonl"],
        contaminated="flag",
        max_tokens=40,
        model="m",
        holdout=0.01,
    )
    (found,) = texts(page, "//h2[@id='contamination']/..//article")
    assert found.startswith(
        "exam 1 of 1 item found, in 1 conversation 81 hit, turn 1 (user), characters: a question that is"
    )
    assert "3 of 3 rounds in the parts, 2 parts that end before their answer does" in " ".join(texts(page, "//p"))
    assert "of at most 40 tokens" in texts(page, "//dl[@class='totals']")[0]
    assert any(setting.startswith("transformers ") for setting in texts(page, "//dl[@class='settings']/div"))


def test_warnings_inputs_and_their_eras(tmp_path):
    (tmp_path / "a.jsonl").write_text("{broken\n" + json.dumps(share("q", "<p>HTML?</p>")))
    (tmp_path / "b.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "q"}] * 2}))
    clean([tmp_path / "a.jsonl", tmp_path / "b.jsonl"], tmp_path / "out")
    page = (tmp_path / "out/report.html").read_text()
    assert texts(page, "//h1") == ["The cleaning of 2 inputs"]
    warnings = texts(page, "//*[contains(@class, 'warning')]")
    assert warnings[0].startswith("a.jsonl: line 1: not JSON") and warnings[1].startswith("1 answers look like HTML")
    first, second = texts(page, "//article[@class='file']")
    assert (
        "a.jsonl 53 B" not in second and "2 records, 2 conversations What sharegpt.com had done to it (auto)" in first
    )
    assert second.endswith("Nothing in it looks as if it came from sharegpt.com.")


@pytest.mark.parametrize(
    ("records", "sentence"),
    [
        ([share("q", "a")], "No conversation was rejected."),
        ([share("q")], "No conversation is kept."),
        ([share("q", "a")], "No duplicates were found."),
        ([share("q", "a")], "No turn of a kept conversation was repaired."),
        ([share("q", "a")], "No benchmark was given"),
        (
            [share("q", "a")],
            "0 answers were HTML of ChatGPT's page and became markdown; 1 was text and left unchanged.",
        ),
        ([share("q", PAGE % "a")], "1 answer was HTML of ChatGPT's page"),
        ([share("q", "a")], "Of 1 conversation, 1 is kept."),
        ([], "Of 0 conversations, 0 are kept."),
    ],
)
def test_what_is_missing_becomes_a_sentence(tmp_path, records, sentence):
    assert sentence in " ".join(texts(run(tmp_path, records), "//p"))


def test_the_page_can_be_made_again(tmp_path):
    page = run(tmp_path, RECORDS, holdout=0.3)
    (tmp_path / "out/report.html").unlink()
    done = subprocess.run(
        [sys.executable, "-m", "cleaning.report", str(tmp_path / "out")], capture_output=True, text=True, cwd=ROOT
    )
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'out/report.html'}\n"), done.stderr
    assert (tmp_path / "out/report.html").read_text(encoding="utf-8") == page


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda out: (out / "report.json").unlink(), "report.json: no such file; name the -o directory"),
        (lambda out: (out / "report.json").write_text("{"), "report.json: is damaged"),
        (
            lambda out: (out / "report.json").write_text("{}"),
            "report.json: was written by another version of the cleaner",
        ),
        (lambda out: (out / "rejected.jsonl").unlink(), "rejected.jsonl: no such file"),
        (
            lambda out: (out / "rejected.jsonl").write_text('{"id": 1}\n'),
            "rejected.jsonl: line 1: is not a line that the cleaner wrote",
        ),
        (
            lambda out: (out / "conversations.jsonl").write_text("{}\n{"),
            "conversations.jsonl: line 1: was not written by the cleaner",
        ),
        (
            lambda out: (out / "conversations.jsonl").write_text("{"),
            "conversations.jsonl: line 1: was not written by the cleaner",
        ),
    ],
)
def test_a_directory_that_is_no_run_is_one_line_and_leaves_the_page(tmp_path, damage, complaint):
    page = run(tmp_path, RECORDS)
    damage(tmp_path / "out")
    with pytest.raises(UserError, match=re.escape(complaint)) as error:
        write_report(tmp_path / "out")
    assert "\n" not in str(error.value)
    assert (tmp_path / "out/report.html").read_text() == page


# --- safe -------------------------------------------------------------------------------------------------------------


def everywhere(tmp_path: Path, text: str) -> str:
    """The page of a run with `text` in every field that a dump or a user can fill."""
    chosen = repair_text(text)  # what the command line lets through
    name = chosen.replace("/", "∕").replace("\0", "")[:60]
    (tmp_path / "own.py").write_text(f"def own(c):\n    return {text!r} if 'go' in c.messages[0].content else None\n")
    (tmp_path / f"{name}.jsonl").write_text(json.dumps({"question_id": text, "question": LONG + text}))
    more = {"model": text, "lang": text}
    records = [
        share(text + "?", PAGE % f"<ul><li>{text}</li></ul>", text, text, id=text, **more),
        share(text + "!", CODE, id=text, **more),
        *(share(LONG + text, text, id=text, **more) for _ in range(3)),
        share("go " + text, text, id=text),
        share(text, "network error", text, text, id=text),
        {"id": text, "conversations": [{"from": text, "value": text}]},
        {text: text},
        text,
        {"conversation_id": text, "mapping": {"a": {"message": {"author": {"role": text}, "content": {}}}}},
    ]
    return run(
        tmp_path,
        records,
        name=f"{name}.json",
        against=[tmp_path / f"{name}.jsonl"],
        contaminated="flag",
        blocked_phrases=[chosen + " is never said"],
        settings=FilterSettings(own_filters=(f"{tmp_path / 'own.py'}:own",), models=(chosen, "*")),
    )


@pytest.mark.parametrize("text", HOSTILE)
def test_nothing_reaches_the_page_unescaped(tmp_path, text):
    page = everywhere(tmp_path, text)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ufeff]", page)
    (tmp_path / "plain").mkdir()
    plain, hostile = lxml_html.fromstring(everywhere(tmp_path / "plain", "plain")), lxml_html.fromstring(page)
    assert {e.tag for e in hostile.iter()} <= {e.tag for e in plain.iter()}
    assert len(hostile.xpath("//script")) == 1
    assert not [name for e in hostile.iter() for name in e.attrib if name.startswith("on") or name == "src"]
    assert all(link.startswith("#") for link in hostile.xpath("//a/@href"))
    shown = visible(repair_text(text).replace("\0", "")).strip()
    for place in (
        "//h1",
        "//*[@class='place']/b",
        "//*[@class='chart']//th",
        "//*[@class='case']",
        "//section[last()]//dd",
    ):
        place = place.replace("@class='chart'", "contains(@class, 'chart')")
        found = " ".join(e.text_content() for e in hostile.xpath(place)).replace("∕", "/").replace("\\x00", "")
        assert " ".join(shown.split())[:30] in " ".join(found.split()), place


SECRETS = ["AKIAQWERTYUIOPASDFGH", "jane.roe@gmail.com", "+1 (212) 736-5000", "sk-proj-Zq8Wm4Xn2Bv6Ty1Ru9Po3La7Ks5Jd"]


@pytest.mark.parametrize("secret", SECRETS)
def test_no_secret_reaches_the_page(tmp_path, secret):
    page = everywhere(tmp_path, f"ask {secret} about it")
    assert secret not in page and re.search(r"ask \[(KEY|EMAIL|PHONE)\] about it", page)
    assert secret not in orjson.loads((tmp_path / "out/report.json").read_bytes())["examples"][0]["after"]


def test_a_secret_that_is_clipped_is_masked_too():
    for start in range(60, 130):
        shown = excerpt("x" * start + " " + SECRETS[0] + " y" * 99, 100)
        assert "AKIA" not in shown and len(shown) <= 102


def test_the_page_loads_nothing(tmp_path):
    page = run(tmp_path, RECORDS)
    assert not re.search(r"https?://|//[a-z]+\.[a-z]|@import|url\(", page)
    root = lxml_html.fromstring(page)
    assert not root.xpath("//@src | //link[@href != 'data:,'] | //iframe | //object | //embed | //base | //form")
    (policy,) = root.xpath("//meta[@http-equiv='Content-Security-Policy']/@content")
    assert policy.startswith("default-src 'none'") and "script-src 'sha256-" in policy


@pytest.mark.skipif(
    CHROMIUM is None, reason="needs a Chromium: none of chromium, chromium-browser, google-chrome found"
)
def test_a_browser_shows_it_without_a_complaint(tmp_path):
    page = everywhere(tmp_path, HOSTILE[1])
    dom, complaints = browse(tmp_path, page)
    assert complaints == []
    assert " rounds: " in page and " rounds: " not in dom  # its own script ran: it took the titles
    # A link to a reason opens it.
    opens = re.compile(r'<details id="reason-1" open')
    assert not opens.search(dom) and opens.search(browse(tmp_path, page, "#reason-1")[0])


# --- examples of the conversion ---------------------------------------------------------------------------------------


def outcome(id: str, html: str, markdown: str) -> Outcome:
    record = orjson.dumps(share("q", PAGE % html, id=id))
    message = {"role": "assistant", "content": markdown}
    return Outcome(id, "d: 1", record=record, conversation=orjson.dumps({"messages": [message]}), html_answers=1)


def picked(*outcomes: Outcome, **fields) -> list[dict]:
    report = Report(**fields)
    for each in outcomes:
        pick_examples(report, each, Reading())
        report = Report(**orjson.loads(orjson.dumps(asdict(report))))  # as an interrupted run does
    return report.examples


TABLE = "<table><tr><th>h</th></tr><tr><td>%s</td></tr></table>"
MARKDOWN_TABLE = "| h |\n| --- |\n| %s |"
LARGE = "word " * LONGEST


def test_an_example_that_fits_is_preferred_then_the_first():
    large = outcome("large", TABLE % LARGE, MARKDOWN_TABLE % LARGE.strip())
    small, other = (outcome(id, TABLE % id, MARKDOWN_TABLE % id) for id in ("small", "other"))
    assert [e["id"] for e in picked(large, small, other)] == ["small"]
    assert [e["id"] for e in picked(other, large, small)] == ["other"]
    (clipped,) = picked(large, outcome("later", TABLE % LARGE, MARKDOWN_TABLE % LARGE.strip()))
    assert (
        clipped["clipped"] and clipped["id"] == "large" and len(clipped["before"]) == len(clipped["after"]) == LONGEST
    )
    assert picked(large, small, answers={"html": AMONG + 1, "as_is": 0}) == []


def test_what_was_changed_after_the_conversion_is_no_example():
    assert picked(outcome("a", TABLE % "x", "something else")) == []
    assert picked(outcome("a", "<p>nothing special</p>", "nothing special")) == []


def test_each_kind_once_in_their_order():
    html = "<ul><li>x</li></ul>", "<pre><code>x</code></pre>", TABLE % "x"
    markdown = "- x", "```\nx\n```", MARKDOWN_TABLE % "x"
    found = picked(*(outcome(str(i), *each) for i, each in enumerate(zip(html * 2, markdown * 2))))
    assert [(e["kind"], e["id"], e["turn"]) for e in found] == [("code", "1", 2), ("table", "2", 2), ("list", "0", 2)]


# --- many of everything -----------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 3_000_000), min_size=1, max_size=60), st.sampled_from([ROUND_EDGES, LENGTH_EDGES]))
def test_sizes_are_all_counted(values, edges):
    sizes = Sizes()
    sizes.add(values[:7])
    sizes.add(values[7:])
    plot = sizes.plot("t", "things", "units", edges)
    counts = [int(re.search(r": ([\d,]+) things", text)[1].replace(",", "")) for _, _, text in plot.hovers]
    assert sum(counts) == len(values) and sizes.total == sum(values)
    low = [max([edge for edge in edges if edge <= value], default=edges[0]) for value in values]
    names = [int(text.replace(",", "").split()[0]) for _, _, text in plot.hovers]
    assert counts == [low.count(name) for name in names]
    ordered = sorted(values)
    assert sizes.median() <= ordered[(len(values) - 1) // 2] <= sizes.median() * 1.1 + 1
    assert all(left >= 0 and left + width <= 100.01 for left, width, _ in plot.hovers)


def test_names_are_bounded(monkeypatch):
    monkeypatch.setattr(cleaning.report.figures, "MOST_NAMES", 20)
    names = Names()
    for piece in range(10):
        found = range(5 * piece, 5 * piece + 5)
        names.merge(Counter({f"model {i}": 2 if i < 3 else 1 for i in found}))
    rows = bars(names.counts, names.more)
    assert [row["count"] for row in rows[:3]] == [2, 2, 2] and len(rows) == 11
    assert sum(row["count"] for row in rows) == 53 and sum(row["share"] for row in rows) == pytest.approx(1)


def test_examples_are_drawn_from_all_of_a_reason(tmp_path):
    fields = {"where": "d: 1", "reason": "r", "detail": "", "round": None, "record": 1}
    rows = [orjson.dumps({"id": str(i), **fields}) for i in range(1000)]
    (tmp_path / "rejected.jsonl").write_bytes(b"\n".join(rows) + b"\n")
    (reason,) = Rejected(tmp_path).reasons(
        {"input": 2000, "files": [], "settings": {"format": None, "every_branch": False}}, False
    )
    ids = [int(example["id"]) for example in reason["examples"]]
    assert (reason["count"], reason["share"], len(set(ids))) == (1000, 0.5, 3)
    assert ids == sorted(ids) and ids[0] > 2 and all(row["turns"] == [("record", "1")] for row in reason["examples"])


def test_the_page_does_not_depend_on_pieces_or_who_counts_them(tmp_path, monkeypatch):
    share = {"source": "d.json", "lang": "en", "model": "m"}
    talk = [{"role": "user", "content": "q" * 40}, {"role": "assistant", "content": "a" * 90}]
    talk = [{**message, "train": message["role"] == "assistant", "ends": True} for message in talk]
    kept = [{**share, "id": str(i), "model": f"m{i % 4}", "parts": 1 + i % 5, "messages": talk} for i in range(40)]
    lines = [orjson.dumps({**each, "part": part}) for each in kept for part in range(each["parts"])]
    (tmp_path / "conversations.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    (tmp_path / "conversations.holdout.jsonl").write_bytes(b"\n".join(lines[:6]) + b"\n")
    monkeypatch.setattr(cleaning.report.figures, "MOST_NAMES", 3)

    def counted(size, pool=None):
        monkeypatch.setattr(cleaning.report.figures, "PIECE", size)
        kept = Kept(tmp_path, {"7"}, pool)
        sizes = {name: (each.counts, each.total) for name, each in kept.lengths.items()}
        return kept.models.counts, kept.models.more, kept.languages.counts, sizes, kept.beginnings

    whole = counted(1 << 20)
    assert whole[1] == 10 and whole[3]["conversations"][1] == 130 * 126 and whole[4] == {"7": "q" * 40}
    with ThreadPoolExecutor(2) as pool:
        pool.ahead = 4
        for size in (1, 100, len(lines[0]), len(lines[0]) + 1, 1000, 5000):
            assert counted(size) == counted(size, pool) == whole


def test_every_reason_that_the_cleaner_gives_is_explained_on_the_page():
    """A reason without a description would be called a filter of the user's own."""
    rooms = (Path(cleaning.__file__).parent, Path(fastft.data.dedup.__file__).parent)  # the second finds duplicates
    sources = [path.read_text() for room in rooms for path in room.rglob("*.py")]
    reasons = {reason for text in sources for reason in re.findall(r'Rejection\(\s*"(\w+)"', text)}
    reasons |= {reason for text in sources for reason in re.findall(r'Duplicate\("(\w+)"', text)}
    reasons |= {reason for text in sources for reason in re.findall(r'outcome\.reason, \S+ = "(\w+)"', text)}
    assert reasons >= {"broken_record", "unclear_loss_flag", "duplicate", "over_window", "moderation"}
    assert reasons <= DESCRIPTIONS.keys()
