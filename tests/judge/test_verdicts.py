"""Verdicts are read in every form in which judges give them, and what can be read in two ways is not read."""

import json

import pytest
from helpers import openai_server
from helpers.judging import judged, longer_wins, run_judge, write_ground

from fastft.errors import UserError
from fastft.judge.judgment import Judgment, held, read_judgments, write_rows
from fastft.judge.pairwise import load_prompts
from fastft.judge.replies.verdicts import asked_by, parse_number, parse_verdict, read_pair
from fastft.judge.statistics.stats import compute
from fastft.judge.tables import pair_row

VERDICTS = {
    "Both are good. [[A]]": "a",
    "Final Verdict: [[B]]": "b",
    "**[[B]]**\n\nIt is more exact.": "b",
    "My final verdict is that Assistant A is significantly better: [[A>>B]].": "a",
    "[[A<B]]": "b",
    "[[B>A]]": "b",
    "My final verdict is tie: [[A=B]]": "tie",
    "[[C]]": "tie",
    "[[Tie]]": "tie",
    "[[Assistant B]]": "b",
    "Hm, is it [[A]]?\n</think>\n[[B]]": "b",
    "<think>[[A]]</think>[[B]]": "b",
    '<think>unfinished, [[A]] or\n{"verdict": "B"}': "b",
    '```json\n{"explanation": "[[A]] is what it asks for", "verdict": "B"}\n```': "b",
    '{"winner": "Assistant 2"}': "b",
    '{"verdict": "tie"}': "tie",
    "They differ in one step.\n**Final verdict:** Assistant 2": "b",
    "The better answer is A.": "a",
    "Winner: tie": "tie",
    "<verdict>A</verdict>": "a",
    "So it is\n\\boxed{A>B}": "a",
    "A>>B": "a",
    "[[A]] or [[B]]? [[A]]": None,
    'The second answer says "[[B]]"': None,
    "It writes [[A]] at its end, which earns it nothing.": None,
    "<think>unfinished, [[A]]": None,
    '{"verdict": "A", "winner": "B"}': None,
    "[[8]]": None,
    "3": None,
    "": None,
}


@pytest.mark.parametrize("text", VERDICTS)
def test_a_verdict_is_read_in_every_form(text):
    assert parse_verdict(text) == VERDICTS[text]


@pytest.mark.parametrize(
    "text, verdict",
    [("Equal.\n\n3", "tie"), ("**1**", "a"), ("Both scored 2/5.\nAnswer: 2.", "b"), ("1 or 2", None), ("4", None)],
)
def test_a_number_is_a_verdict_only_where_it_was_asked_for(text, verdict):
    assert parse_number(text) == verdict == read_pair(text, "number")
    assert read_pair(text, "scores") is None


def test_scores_and_a_verdict_that_contradict_each_other_are_not_read():
    assert read_pair("8 6\n[[A]]") == (8, 6)
    assert read_pair("8 6\n[[B]]") is None
    assert read_pair("Rating: [[2]] [[2]]") == (2, 2), "a digit in brackets is a rating"
    assert read_pair("Assistant 1: 8/10\nAssistant 2: 8/10\n[[B]]", "verdict") == "b"


def test_a_prompt_says_what_it_asks_for():
    assert {asked_by(prompt) for prompt in load_prompts().values()} == {"scores"}
    assert asked_by('Output your verdict strictly as "[[A]]", "[[B]]", or "[[C]]" for a tie.') == "verdict"
    assert asked_by("Assistant A is significantly better: [[A>>B]]") == "verdict"
    assert asked_by('Reply with {"explanation": "...", "verdict": "A, B or tie"}') == "verdict"
    assert asked_by("Choose by outputting the number 1 or 2 respectively,\nor choose 3 if they are equal.") == "number"


def verdict(question: str, first: str, second: str, said: str | None) -> Judgment:
    return Judgment(question, "all", "pairwise", "j", first, second, text="…", **held(said))


def test_verdicts_are_counted_like_scores_and_have_no_totals(tmp_path):
    own = [
        verdict("1", "x", "y", "b"),
        verdict("1", "y", "x", "a"),
        verdict("2", "x", "y", "a"),
        verdict("2", "y", "x", "tie"),
        verdict("3", "x", "y", None),
    ]
    write_rows(tmp_path / "judgments.jsonl", own)
    assert read_judgments(tmp_path / "judgments.jsonl") == own
    figures = compute(own)
    total = figures.pairs[0].total
    assert (total.wins, total.ties, total.losses, total.unparsed) == (2, 1, 1, 1)
    assert figures.pairs[0].win_rate.value == pytest.approx(0.625)
    assert (figures.position["j"].consistent, figures.position["j"].half_flips) == (1, 1)
    assert pair_row(figures.pairs[0])[1:3] == ["–", "–"]
    assert own[0].marks == ("lost", "won") and own[4].marks == ("unparsed", "unparsed")


def test_a_row_with_scores_and_a_verdict_is_refused(tmp_path):
    row = {**json.loads(json.dumps(verdict("1", "x", "y", "b").__dict__)), "score_a": 8.0}
    (tmp_path / "judgments.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match="line 1: is not a judgment: verdict is for two answers without scores"):
        read_judgments(tmp_path / "judgments.jsonl")


@pytest.mark.parametrize(
    "ask", ['Output "[[A]]", "[[B]]" or "[[C]]".', "Output the number 1 or 2, or 3 if they are equal."]
)
def test_a_prompt_may_ask_for_a_verdict(tmp_path, ask):
    """It is asked for without a schema of scores, asked again in its own words, and judged like any other."""
    prompt = load_prompts()["pairwise"].split("Then give each assistant")[0] + ask
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts/pairwise.txt").write_text(prompt)

    def reply(body, number):
        if number == 0:
            return "Well."
        scores = json.loads(longer_wins(body))
        first = scores["score_1"] > scores["score_2"]
        return f"{'1' if first else '2'}" if "number" in ask else f"[[{'A' if first else 'B'}]]"

    with openai_server.endpoint(reply) as server:
        ground = [*write_ground(tmp_path, 2), "--prompts", str(tmp_path / "prompts")]
        assert run_judge([*ground, "--judge", f"{server.url}#judge", "--concurrency", "1"]) == 0
        assert not any("response_format" in request for request in server.requests)
        again = [request["messages"][-1]["content"] for request in server.requests if len(request["messages"]) > 1]
        assert len(again) == 1 and "Reply with the verdict alone" in again[0]
    assert [(j.verdict, j.winner, j.score_a) for j in judged(tmp_path)] == [("b", "b", None), ("a", "b", None)] * 2
    assert "lost" in (tmp_path / "judged/report.html").read_text()
