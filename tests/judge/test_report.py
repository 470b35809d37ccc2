"""The page of judgments: everything is escaped, and its filters work in a real browser. Also what a notebook shows."""

import json
import re

import pytest
from helpers import openai_server
from helpers.judging import longer_wins, run_judge, write_ground
from helpers.pages import CHROMIUM, browse

from fastft.common.html import sha256
from fastft.errors import UserError
from fastft.judge import compare
from fastft.judge.judgment import Judgment, read_judgments, write_rows
from fastft.judge.questions import Answer, Question
from fastft.judge.report import report_again, write_all
from fastft.judge.stats import compute

HOSTILE = "</div></article><script>alert(1)</script><img src=x onerror=alert(1)>\"'{{ 7 * 7 }}\u202e\u2028\u0085\x0c"


def judgments(hostile: str = "fine") -> list[Judgment]:
    """Six questions of two categories: one flips with the order, one is a tie, one cannot be read; two judges."""
    found = []
    scores = [((8, 6), (6, 8)), ((8, 6), (8, 6)), ((7, 7), (7, 7)), ((8, 6), None), ((5, 9), (9, 5)), ((8, 6), (6, 8))]
    for i, orders in enumerate(scores):
        for pair, names in zip(orders, (("a", "b"), ("b", "a"))):
            pair = pair or (None, None)
            parsed, flags = pair[0] is not None, ("refusal",) if pair[0] is None else ()
            category = ("one", "two")[i % 2]
            found.append(Judgment(f"q{i}", category, "pairwise", "judge", *names, *pair, parsed, hostile, flags=flags))
    return [*found, Judgment("q5", "two", "pairwise", "other", "a", "b", 8, 6, True, hostile)]


def write_page(directory, hostile: str = "fine") -> str:
    questions = [Question(f"q{i}", ("one", "two")[i % 2], (f"{hostile} {i}",), (hostile,)) for i in range(6)]
    answers = [Answer(f"q{i}", model, (hostile,)) for i in range(6) for model in "ab"]
    write_all(directory, judgments(hostile), questions, answers)
    return (directory / "report.html").read_text()


def test_all_that_models_wrote_is_escaped(tmp_path):
    page = write_page(tmp_path, HOSTILE)
    assert "<script>alert" not in page and "<img src=x" not in page and "\u202e" not in page
    assert "{{ 7 * 7 }}" in page, "text, not a template"
    assert page.count("&lt;script&gt;alert(1)") >= 6 * 4 + 11


@pytest.mark.skipif(
    CHROMIUM is None, reason="needs a Chromium: none of chromium, chromium-browser, google-chrome found"
)
@pytest.mark.parametrize(
    "choices, questions, judgments",
    [
        ({}, 6, 13),
        ({"kind": "flip"}, 1, 2),
        ({"kind": "tie"}, 1, 2),
        ({"kind": "unparsed", "category": "two"}, 1, 1),
        ({"category": "one"}, 3, 13),
        ({"words": "fine 3"}, 1, 13),
        ({"judge": "other", "models": "a : b"}, 1, 1),
        ({"models": "a : b", "kind": "flagged"}, 1, 1),
    ],
)
def test_the_filters_in_a_browser(tmp_path, choices, questions, judgments):
    page = write_page(tmp_path)
    probe = "".join(
        f"document.querySelector('#{name}').value = {json.dumps(value)};" for name, value in choices.items()
    )
    probe += "document.querySelector('#kind').dispatchEvent(new Event('input'));"
    page = page.replace("script-src ", f"script-src 'sha256-{sha256(probe)}' ").replace(
        "</body>", f"<script>{probe}</script></body>"
    )
    dom, complaints = browse(tmp_path, page)
    assert complaints == []
    assert re.search(r'id="shown"[^>]*>([^<]*)<', dom)[1] == f"{questions} of 6 questions"
    assert len(re.findall(r'<div class="judgment"(?![^>]*hidden)', dom)) == judgments


def test_the_report_is_made_again_from_its_files(tmp_path, capsys):
    with openai_server.endpoint(longer_wins) as server:
        assert run_judge([*write_ground(tmp_path, 6), "--judge", f"{server.url}#judge"]) == 0
    answers = tmp_path / "judged/answers.jsonl"
    whole = answers.read_bytes()
    answers.write_bytes(whole[whole.index(b"\n") + 1 :])
    report_again(tmp_path / "judged")  # a lost row costs an answer's length, but not the report
    answers.write_bytes(whole)
    report_again(tmp_path / "judged")
    made = {name: (tmp_path / "judged" / name).read_bytes() for name in ("report.html", "results.json", "results.md")}
    for name in made:
        (tmp_path / "judged" / name).unlink()
    assert report_again(tmp_path / "judged").read_bytes() == made["report.html"]
    assert {name: (tmp_path / "judged" / name).read_bytes() for name in made} == made


@pytest.mark.parametrize("names", [("gpt-4.1", "Qwen2.5-7B"), ("Qwen2.5-7B", "gpt-4.1"), ("a", "A"), ("b\n", "a\nc")])
def test_names_that_python_and_a_template_would_sort_differently(tmp_path, names):
    """The filter calls a pair by one name in both orders; names and categories that differ in case alone are two."""
    games = [
        Judgment("q1", category, "pairwise", "judge", *order, 8, 6, True, "")
        for category in ("Math", "math")
        for order in (names, names[::-1])
    ]
    write_rows(tmp_path / "judgments.jsonl", games)
    page = report_again(tmp_path).read_text()
    pair = " : ".join(names)
    assert re.findall(r'data-models="([^"]*)"', page) == [pair] * 4
    assert re.search(r'<select id="models">.*?</select>', page, re.DOTALL)[0].count("<option") == 2
    assert "<option>Math</option><option>math</option>" in page


def test_alone_and_in_pairs_on_one_page(tmp_path):
    alone = [Judgment("q1", "one", "single", "judge", name, None, 5, None, True, "") for name in "ab"]
    write_all(tmp_path, [*judgments(), *alone], [], [])
    page = (tmp_path / "report.html").read_text()
    assert "<option>a : b</option><option>a</option><option>b</option>" in page


def test_a_page_that_cannot_be_written_loses_nothing(tmp_path, capsys):
    (tmp_path / "judged/report.html").mkdir(parents=True)
    with openai_server.endpoint(longer_wins) as server:
        assert run_judge([*write_ground(tmp_path, 3), "--judge", f"{server.url}#judge"]) == 1
    said = capsys.readouterr()
    assert "report.html" in said.err and "won" in said.out
    assert len(read_judgments(tmp_path / "judged/judgments.jsonl")) == 6
    assert json.loads((tmp_path / "judged/results.json").read_text())["judgments"] == 6
    assert (tmp_path / "judged/results.md").read_text().startswith("**Pairs**")


def test_where_nothing_was_parsed_the_report_says_so(tmp_path):
    pairs = [("a", "b"), ("b", "a"), ("a", "c"), ("c", "a")]
    nothing = [Judgment("q", "x", "pairwise", "judge", *pair, None, None, False, "no idea") for pair in pairs]
    figures = write_all(tmp_path, nothing, [], [])
    for name in ("report.html", "results.md", "results.json"):
        text = (tmp_path / name).read_text()
        assert "nan" not in text.lower().replace("not", "") and "Only one order" not in text, name
    assert "None of the judgments could be read" in (tmp_path / "report.html").read_text()
    assert figures.unparsed == 4 and not figures.position["judge"].one_order


def test_three_questions_are_no_proof(tmp_path):
    """All six judgments agree; for equal models that happens by chance in one of four cases (p = 0.25)."""
    swept = [
        Judgment(f"q{i}", "x", "pairwise", "judge", *names, *scores, True, "")
        for i in range(3)
        for names, scores in ((("a", "b"), (6, 8)), (("b", "a"), (8, 6)))
    ]
    (pair,) = write_all(tmp_path, swept, [], []).pairs
    assert pair.win_rate.value == 1 and pair.win_rate.low < 0.6 and pair.p_value == pytest.approx(0.25, abs=0.02)
    assert "That may be chance." in (tmp_path / "report.html").read_text()


def test_judgments_survive_their_file(tmp_path):
    write_rows(tmp_path / "judgments.jsonl", judgments(HOSTILE))
    assert read_judgments(tmp_path / "judgments.jsonl") == judgments(HOSTILE)
    (tmp_path / "judgments.jsonl").write_text('{"question_id": 1}\n')
    with pytest.raises(UserError, match="line 1: is not a judgment"):
        read_judgments(tmp_path / "judgments.jsonl")


def test_compare_is_called_from_python():
    questions = [Question(f"q{i}", "x", ("What?",)) for i in range(10)]
    answers = {"short": {q.id: "no" for q in questions}, "long<": {q.id: "no, because" for q in questions[:9]}}
    with openai_server.endpoint(longer_wins) as server:
        comparison = compare(answers, f"{server.url}#judge", questions)
    (pair,) = comparison.figures.pairs
    assert (pair.first, pair.second, pair.questions, pair.total.wins) == ("short", "long<", 9, 18)
    assert "long&lt;" in comparison._repr_html_() and "long<" not in comparison._repr_html_()
    with pytest.raises(UserError, match="that all models have answered"):
        compare({"a": {}, "b": {}}, "http://x/v1#j")


def test_figures_of_one_model_judged_alone():
    single = [Judgment(f"q{i}", "x", "single", "judge", "a", None, 4 + i, None, True, "") for i in range(4)]
    figures = compute([*single, Judgment("q9", "x", "single", "judge", "a", None, None, None, False, "")])
    assert figures.singles[0].score.value == 5.5 and figures.singles[0].unparsed == figures.unparsed == 1
