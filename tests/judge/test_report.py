"""The page of judgments: everything is escaped, and its filters work in a real browser. Also what a notebook shows."""

import json
import re

import pytest
from helpers import openai_server
from helpers.judging import longer_wins, run_judge, write_ground
from helpers.pages import CHROMIUM, browse

from fastft.cli import main
from fastft.common.html import sha256
from fastft.errors import UserError
from fastft.judge import compare
from fastft.judge.judgment import Judgment, read_judgments, write_rows
from fastft.judge.questions import Answer, Question, load_questions, read_answers
from fastft.judge.report import report_again, write_all
from fastft.judge.statistics.stats import compute

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


LINE = {
    "question_id": "q1", "category": "x", "mode": "pairwise", "judge": "j", "model_a": "a", "model_b": "b",
    "score_a": 8, "score_b": 6.5, "parsed": True, "text": "",
}  # fmt: skip


@pytest.mark.parametrize(
    "change, says",
    [
        ({"score_a": "8"}, 'its score_a is "8" and must be a number or null'),
        ({"score_b": True}, "its score_b is true and must be a number or null"),
        ({"score_b": None}, "a score is null although parsed is true"),
        ({"question_id": None}, "its question_id is null and must be a text"),
        ({"question_id": 1}, "its question_id is 1 and must be a text"),
        ({"judge": ["j"]}, 'its judge is ["j"] and must be a text'),
        ({"model_b": None}, "model_b must name the other model"),
        ({"model_b": 5}, "its model_b is 5 and must be a text or null"),
        ({"mode": ["pairwise"]}, 'must be "pairwise" or "single"'),
        ({"parsed": "yes"}, 'its parsed is "yes" and must be true or false'),
        ({"flags": None}, "its flags is null and must be a list of texts"),
        ({"flags": "cut"}, 'its flags is "cut" and must be a list of texts'),
        ({"usd": {}}, "its usd is {} and must be a number or null"),
        ({"turn": "1"}, 'its turn is "1" and must be a whole number'),
        ({"words": "x"}, "it has an unknown key 'words'"),
    ],
)
def test_a_line_that_is_no_judgment_is_one_line(tmp_path, capsys, change, says):
    """Other people's tools write these files, too."""
    (tmp_path / "judgments.jsonl").write_text(json.dumps(LINE) + "\n" + json.dumps(LINE | change) + "\n")
    assert main(["report", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: judgments.jsonl: line 2: is not a judgment: ") and says in said
    assert said.count("\n") == 1


def test_what_a_judgment_needs_is_named(tmp_path):
    for key in LINE:
        (tmp_path / "judgments.jsonl").write_text(json.dumps({k: v for k, v in LINE.items() if k != key}) + "\n")
        with pytest.raises(UserError, match=f"line 1: is not a judgment: it has no {key}$"):
            read_judgments(tmp_path / "judgments.jsonl")
    (tmp_path / "judgments.jsonl").write_text(json.dumps(LINE) + "\n")
    assert read_judgments(tmp_path / "judgments.jsonl")[0].flags == ()


@pytest.mark.parametrize("line", ['{"question_id": NaN}', "[1]", "null", "{", '"a"', "\udcff{}"])
def test_a_line_that_is_no_object_is_one_line(tmp_path, line):
    path = tmp_path / "judgments.jsonl"
    path.write_bytes((json.dumps(LINE) + "\n" + line + "\n").encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=r"judgments\.jsonl: line 2: "):
        read_judgments(path)


def test_half_characters_in_judgments_and_answers_become_a_mark(tmp_path):
    """Half of an emoji, as JSON can write it and UTF-8 cannot."""
    broken = {"text": "\ud83d", "judge": "j\ud83d", "model_a": "a\ud83d"}
    (tmp_path / "judgments.jsonl").write_text(json.dumps(LINE | broken) + "\n")
    answer = {"question_id": "q1", "model": "a\ud83d", "turns": ["half \ud83d"]}
    (tmp_path / "answers.jsonl").write_text(json.dumps(answer) + "\n")
    assert "half \ufffd" in report_again(tmp_path).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "change, says",
    [
        ({"question_id": None}, "needs question_id"),
        ({"question_id": ["q0"]}, "needs question_id"),
        ({"model": ["b"]}, "needs question_id, model"),
        ({"turns": [None]}, "and turns"),
        ({"seconds": "2"}, 'its seconds is "2" and must be a number or null'),
        ({"prompt_tokens": 1.5}, "its prompt_tokens is 1.5 and must be a whole number or null"),
        ({"finish_reason": 5}, "its finish_reason is 5 and must be a text or null"),
        ({"parameters": [1]}, "its parameters is [1] and must be an object or null"),
        ({"error": {"code": 5}}, 'its error is {"code": 5} and must be a text or null'),
    ],
)
def test_an_answer_of_other_types_is_one_line(tmp_path, change, says):
    row = {"question_id": "q0", "model": "b", "turns": ["x"]}
    (tmp_path / "b.jsonl").write_text(json.dumps(row | {"question_id": "q1"}) + "\n" + json.dumps(row | change) + "\n")
    with pytest.raises(UserError) as caught:
        read_answers(tmp_path / "b.jsonl")
    assert str(caught.value).startswith("b.jsonl: line 2: is not an answer") and says in str(caught.value)


def test_a_question_of_other_types_is_one_line(tmp_path):
    for change in ({"id": None}, {"id": {}}, {"id": True}, {"category": 5}, {"turns": [""]}):
        (tmp_path / "q.jsonl").write_text(json.dumps({"id": "q0", "turns": ["x"]} | change) + "\n")
        with pytest.raises(UserError, match="line 1: is not a question"):
            load_questions(tmp_path / "q.jsonl")


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
