"""Judgments of others are read by their rows' keys, whatever their files are called; what is not read is counted."""

import json

import pytest
from helpers.judging import error_of, run_judge

from fastft.judge.judgment import read_judgments, write_rows
from fastft.judge.replies.forms import file_of
from fastft.judge.replies.importers import read_reviews
from fastft.judge.statistics.stats import compute


def write(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


PAIR = {
    "question_id": 81,
    "model_1": "old",
    "model_2": "new",
    "g1_winner": "model_2",
    "g2_winner": "tie",
    "judge": ["gpt-4", "pair-math-v1-multi-turn"],
    "g1_judgment": "Better: [[B]]",
    "g2_judgment": "Equal. [[C]]",
    "turn": 2,
}
SINGLE = {
    "question_id": 81,
    "model": "old",
    "judge": ["gpt-4", "single-v1"],
    "judgment": "[[7]]",
    "score": 7,
    "turn": 1,
}
GAMES = {
    "uid": "q",
    "category": "coding",
    "judge": "gpt-4.1",
    "model": "new",
    "baseline": "old",
    "games": [
        {"score": "B>>A", "judgment": {"answer": "So [[B>>A]]"}},
        {"score": "A=B", "judgment": {"answer": "So [[A=B]]"}},
    ],
}
ALPACA = {
    "instruction": "Hi?",
    "output_1": "Hi.",
    "generator_1": "old",
    "output_2": "Hello!",
    "generator_2": "new",
    "dataset": "koala",
    "annotator": "weighted",
    "preference": 1.75,
    "raw_completion": {"message": {"content": "m"}},
}
BATTLE = {
    "question_id": "f00",
    "model_a": "old",
    "model_b": "new",
    "winner": "model_b",
    "judge": "arena_user_12",
    "conversation_a": [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hi."}],
    "conversation_b": [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hello!"}],
    "turn": 1,
    "anony": True,
}
REVIEW = {"question_id": 1, "text": "8 9\nBoth are fine.", "score": [8, 9], "answer1_id": "x", "answer2_id": "y"}
CLASS = {"message_id": "m-1", "text": "2/5 and 4/5.\n\n2", "score": 2, "answer1_id": "x", "answer2_id": "y"}
READ = {  # question, first, second, judge, turn, referenced, scores or verdict
    "fastchat pair": (
        PAIR,
        [("81", "old", "new", "gpt-4", 2, True, "b"), ("81", "new", "old", "gpt-4", 2, True, "tie")],
    ),
    "fastchat single": (SINGLE, [("81", "old", None, "gpt-4", 1, False, (7.0, None))]),
    "arena-hard": (
        GAMES,
        [("q", "old", "new", "gpt-4.1", 1, False, "b"), ("q", "new", "old", "gpt-4.1", 1, False, "tie")],
    ),
    "alpaca": (ALPACA, [(None, "old", "new", "weighted", 1, False, (0.25, 0.75))]),
    "battle": (BATTLE, [("f00", "old", "new", "people", 1, False, "b")]),
    "kaggle": (
        {"id": 7, "model_a": "old", "model_b": "new", "winner_model_a": 0, "winner_model_b": 0, "winner_tie": 1},
        [("7", "old", "new", "people", 1, False, "tie")],
    ),
    "review": (REVIEW, [("1", "old", "new", "gpt-4", 1, False, (8.0, 9.0))]),
    "three classes": (CLASS, [("m-1", "old", "new", "gpt-4", 1, False, "b")]),
}


@pytest.mark.parametrize("scores", ["text", "field"])
@pytest.mark.parametrize("form", READ)
def test_every_form_is_read_by_its_keys(tmp_path, form, scores):
    row, expected = READ[form]
    path = write(tmp_path / "old-vs-new-gpt-4-reviewer-threeclass.jsonl", row)
    judgments, remarks, _, _ = read_reviews([path], scores)
    by_name = [
        f"unchecked: 1 reviews in {path.name}: no answers have their ids (--answers), so the file's name alone says which"
    ]
    assert [line.removesuffix(" was shown first") for line in remarks] == (by_name if "answer1_id" in row else [])
    assert [
        (
            j.question_id if want[0] else None,
            j.model_a,
            j.model_b,
            j.judge,
            j.turn,
            j.referenced,
            j.verdict or (j.score_a, j.score_b),
        )
        for j, want in zip(judgments, expected, strict=True)
    ] == expected


def test_texts_in_the_rows_become_questions_and_answers(tmp_path):
    for name, row in (("a", ALPACA), ("b", BATTLE)):
        judgments, _, questions, answers = read_reviews([write(tmp_path / f"{name}.json", row)], "text")
        assert [question.turns for question in questions] == [("Hi?",)]
        assert {(each.question_id, each.model, each.turns) for each in answers} == {
            (judgments[0].question_id, "old", ("Hi.",)),
            (judgments[0].question_id, "new", ("Hello!",)),
        }


def test_the_layouts_of_others_are_known(tmp_path):
    """Questions and answers lie where FastChat and Arena-Hard put them, and a turn's text may stand in an object."""
    bench = tmp_path / "bench"
    write(bench / "question.jsonl", {"uid": "q", "category": "math", "prompt": "1?"})
    write(bench / "model_answer/new.jsonl", {"question_id": "q", "choices": [{"turns": [{"content": "One."}]}]})
    write(bench / "model_judgment/gpt-4.1/new.jsonl", GAMES | {"category": None})
    judgments, _, questions, answers = read_reviews([bench / "model_judgment/gpt-4.1"], "text")
    assert {j.category for j in judgments} == {"math"} and questions[0].turns == ("1?",)
    assert [(each.model, each.turns) for each in answers] == [("new", ("One.",))]


def test_questions_and_answers_may_be_given(tmp_path, capsys):
    """The answers' ids say whose they are, even where the file's name says nothing."""
    questions = write(tmp_path / "q.jsonl", {"id": "1", "category": "one", "turns": ["?"]})
    answers = [
        write(tmp_path / f"{name}.jsonl", {"question_id": 1, "answer_id": key, "model_id": name, "text": "A."})
        for name, key in (("old", "x"), ("new", "y"))
    ]
    reviews = write(tmp_path / "r/anything.jsonl", REVIEW)
    out = tmp_path / "judged"
    options = [
        "--reviews",
        str(reviews),
        "--questions",
        str(questions),
        "--answers",
        *map(str, answers),
        "-o",
        str(out),
    ]
    assert run_judge(options) == 0
    own = read_judgments(out / "judgments.jsonl")
    assert [(j.model_a, j.model_b, j.category) for j in own] == [("old", "new", "one")]
    assert "old : new" in capsys.readouterr().out
    assert run_judge(["--reviews", str(out / "judgments.jsonl")]) == 0, "our own file is one, too"
    assert "models: give the answers with their ids (--answers)" in error_of(capsys, ["--reviews", str(reviews)])


def test_a_models_name_in_another_spelling_is_known(tmp_path):
    """QLoRA's files of scores name the models in one order and show them in the other; Vicuna's answers say so."""
    answer = {"question_id": 1, "answer_id": "x", "model_id": "gpt-3.5-turbo:20230327", "text": "A."}
    beside = write(tmp_path / "answer_gpt35.jsonl", answer)
    other = write(tmp_path / "7b-flan.jsonl", {"question_id": "1", "text": "The question?", "generation": "B."})
    path = write(tmp_path / "r/7b-flan-vs-gpt-3.5-gpt4-reviewer.jsonl", REVIEW)
    judgments, remarks, _, given = read_reviews([path], "text", answers=[beside, other])
    assert [(j.model_a, j.winner) for j in judgments] == [("gpt-3.5", "7b-flan")]
    assert [(each.model, each.turns) for each in given] == [("gpt-3.5", ("A.",)), ("7b-flan", ("B.",))]
    assert remarks == [
        f"contradiction: {path.name}: the ids of 1 answers say that gpt-3.5 was shown first; they are believed"
    ]


def test_what_is_not_read_is_counted_with_its_reason(tmp_path, capsys):
    rows = [
        BATTLE,
        {**BATTLE, "winner": "tie (bothbad)"},
        {**BATTLE, "winner": None},
        {**BATTLE, "anony": False},
        {**BATTLE, "model_b": None},
        {"question_id": 1},
        {**SINGLE, "judgment": "It depends.", "score": -1},
        {**SINGLE, "judgment": "I cannot judge this.", "score": -1},
        {**SINGLE, "judgment": "$ERROR$", "score": -1},
        {**SINGLE, "judgment": "Rating: [[8]]", "score": 5},
    ]
    path = write(tmp_path / "x.jsonl", *rows)
    path.write_text(path.read_text() + "{broken\n")
    judgments, remarks, _, _ = read_reviews([path], "text")
    assert [j.parsed for j in judgments] == [True, True, False, False, False, False, True]
    assert judgments[1].flags == ("both_bad",) and judgments[1].winner == "tie"
    assert judgments[6].flags == ("contradiction",) and judgments[6].score_a == 8
    said = "\n".join(remarks)
    for line in (
        "contradiction: x.jsonl, question 81: the text says 8, the field 5",
        "left out: x.jsonl: 1 rows, votes of people who knew the models' names (first: x.jsonl: line 4)",
        "left out: x.jsonl: 1 rows, without a model's name under model_b (first: x.jsonl: line 5)",
        "left out: x.jsonl: 1 rows, no judgment, by their keys (first: x.jsonl: line 6)",
        "left out: x.jsonl: 1 rows, not JSON",
        "unparsed: x.jsonl: 1, because there is no result in the field (first: question f00)",
        "unparsed: x.jsonl: 1, because the words give no score or verdict that can be read in one way only (first: question 81: “…It depends.”)",  # noqa: E501
        "unparsed: x.jsonl: 1, because its authors got no reply (first: question 81: “…$ERROR$”)",
        "unparsed: x.jsonl: 1, because the judge refused (first: question 81: “…I cannot judge this.”)",
    ):
        assert line in said
    unread = write(tmp_path / "y.jsonl", *rows[6:8])
    assert "none of 2 judgments could be read" in error_of(capsys, ["--reviews", str(unread)])
    assert "holds no judgments: no judgment, by their keys" in error_of(
        capsys, ["--reviews", str(write(tmp_path / "z.jsonl", {"id": 1}))]
    )


def test_the_second_ones_total_is_alpaca_evals_win_rate(tmp_path):
    rows = [{**ALPACA, "instruction": str(i), "preference": p} for i, p in enumerate((1.0, 1.75, 2.0, 0, None))]
    figures = compute(read_reviews([write(tmp_path / "annotations.json", *rows)], "text")[0])
    total = figures.pairs[0].total
    assert (total.second_total, total.wins, total.ties, total.losses, total.unparsed) == (2.25, 2, 1, 1, 1)


@pytest.mark.parametrize(
    "name, named, judge",
    [
        ("review_a_b.jsonl", ("a", "b"), "review"),
        ("7b-x-topp0.9-temp0.7-vs-gpt-3.5-gpt4-reviewer.jsonl", ("7b-x-topp0.9-temp0.7", "gpt-3.5"), "gpt4"),
        ("answer-bard-vs-gpt-4-oa-gpt-4-reviewer-threeclass.jsonl", ("bard", "gpt-4-oa"), "gpt-4"),
        ("answer_a_vs_answer_b_gpt-4_reviewer_threeclass.jsonl", ("a", "b"), "gpt-4"),
        ("annotations.json", None, "review"),
    ],
)
def test_the_models_in_a_files_name(tmp_path, name, named, judge):
    found = file_of(tmp_path / name, set(), {}, None)
    assert (found.named, found.judge) == (named, judge)


@pytest.mark.parametrize("form", READ)
def test_a_row_with_odd_values_is_read_or_left_out(tmp_path, form):
    """Other people's rows hold anything; none of them is a bug of ours."""
    row, _ = READ[form]
    odd = (None, True, 5, -1.5, float("nan"), "", "?", [], [1, None], {}, {"content": [{"text": 5}]})
    rows = [{**row, key: value} for key in row for value in odd]
    path = write(tmp_path / "old-vs-new.jsonl", row, *rows)
    for scores in ("text", "field"):
        judgments = read_reviews([path], scores)[0]
        assert judgments and compute(judgments).judgments == len(judgments)
        write_rows(tmp_path / "judgments.jsonl", judgments)
        assert read_judgments(tmp_path / "judgments.jsonl") == judgments
