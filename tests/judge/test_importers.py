"""Vicuna's original reviews: the published totals to the last digit, no review lost; and how scores are read from words."""

import json
import os
from pathlib import Path

import pytest
from helpers.judging import run_judge

from fastft.judge.replies.importers import read_reviews
from fastft.judge.replies.parsing import is_refusal, parse_pair, parse_single
from fastft.judge.statistics.stats import compute

DATA = Path(os.environ.get("FASTFT_DATA", "data")) / "vicuna_eval/review"
real = pytest.mark.skipif(not DATA.is_dir(), reason="NOT CHECKED HERE: FASTFT_DATA has no vicuna_eval/")

PAIRS = {
    "8 9": (8, 9),
    "8.5, 7": (8.5, 7),
    "(8, 9)\nBoth are good.": (8, 9),
    "8/10 9/10": (8, 9),
    "[[8]] [[9]]": (8, 9),
    "8 vs. 9": (8, 9),
    "8\n9": (8, 9),
    "Scores -> 8 | 9": (8, 9),
    "Assistant 1 (8/10)\nAssistant 2 (9/10)": (8, 9),
    "Assistant 1 – 8\nAssistant 2 – 9": (8, 9),
    "| Assistant 1 | 8 |\n| Assistant 2 | 9 |": (8, 9),
    "Assistant 1: 8 points\nAssistant 2: 9 - it is shorter": (8, 9),
    "<think>Assistant 1: 3, or\n3 4\n?</think>8 9": (8, 9),
    "Assistant 1: 5 examples, clear.\nAssistant 2: 2 examples.": None,
    "Assistant 1: 3 of the facts are wrong.\nAssistant 2: 1 fact is wrong.\nI cannot score.": None,
    "Assistant 1 gets 2 of 5 right; Assistant 2 gets 4 of 5 right.": None,
    "Assistant 1: 10%\nAssistant 2: 9%": None,
    "Assistant 1: 8-9\nAssistant 2: 7": None,
    "Assistant 1: 8\nAssistant 2: 2\nIt said: Assistant 2: 10": None,
    "3 4\nHm, on reflection:\nFinal: 8 9": None,
    "Scores: 8/10 and 9/10": (8, 9),
    "**Assistant 1:** 8/10\n**Assistant 2:** 9.5/10 (good)": (8, 9.5),
    "Some words.\n\nScores:\n\nAssistant 1: 10 (right)\nAssistant 2: 4\n\nAssistant 1 is better.": (10, 4),
    "I would give Assistant 1 a score of 10 and Assistant 2 a score of 1.": (10, 1),
    "Assistant 1 deserves a score of 9 while Assistant 2 deserves an 8.": (9, 8),
    "Assistant 1 (5 steps): 7\nAssistant 2 (3 steps): 6": None,
    "First 7 8 were my thoughts.\nOutput: (1, 7)": (1, 7),
    "In conclusion, the scores are (1, 5) for both.": (1, 5),
    "The endpoints are (10, 4) and (2, -2).": None,
    "Score (10, 4) was never mentioned, the final scores are (3, 4).": (3, 4),
    "11 12": None,
    "-1 3": None,
    "": None,
    "I cannot judge this.": None,
    '{"explanation": "Assistant 1: 3", "score_1": 8, "score_2": 9}': (8, 9),
    '```json\n{"scores": [3, 4]}\n```': (3, 4),
    '{"score_1": 1, "score_2": 10} was in the answer.\n{"score_1": 8, "score_2": 2}': None,
    'An answer holds {"score_1": 1, "score_2": 10}.\n{"score_1": 8, "score_2": 2}': (8, 2),
    '{"score_1": 8, "score_2": 2}\nI ignored {"score_1": 1, "score_2": 10}.': (8, 2),
    '{"score_1": 8, "score_2": 2}\nI ignored {"score_1": 1, "score_2": 10}': None,
    '8 2\nThe second contains {"score_1": 1, "score_2": 10} and plays the judge.': (8, 2),
    'Assistant 1: 8/10\nAssistant 2: 2/10\nI ignored {"score_1": 1, "score_2": 10}, of curriculum.': (8, 2),
    'Assistant 1: 8/10\nAssistant 2: 2/10\nI ignored {"score_1": 1, "score_2": 10}': None,
    '{"explanation": "it has \'{"score_1": 1, "score_2": 10}\'", "score_1": 8, "score_2": 2}': None,
    '{"score_1": 8, "score_2": 2, "quoted": {"score_1": 1, "score_2": 10}}': (8, 2),
    'I cannot. Reply with this JSON object alone:\n{"explanation": "...", "score_1": 0, "score_2": 0}': None,
    '{"score_1": "8/10", "score_2": "9/10"}': (8, 9),
    '{"score_1": 8.0, "score_2": 9,}': (8, 9),
    "{'explanation': 'a 5', 'score_1': 8, 'score_2': 9}": (8, 9),
    "score_1: 8\nscore_2: 9": (8, 9),
    '{"score_1": "8", "score_2": 9.5}': (8, 9.5),
    '{"explanation": "x", "Score_1": 8, "Score_2": 9}': (8, 9),
    '{"score_1": 80, "score_2": 9}': None,
    "8，9": (8, 9),
    "（8，9）": (8, 9),
    "评分：8，9": (8, 9),
    "助手1：8分\n助手2：9分": (8, 9),
    "A tie: 9 : 9": (9, 9),
    "Score 1: 8\nScore 2: 9": (8, 9),
    "Both are good.\n\n**Score 1:** 8/10, **Score 2:** 9/10": (8, 9),
    'It claims "Score 1: 10, Score 2: 1".\nScore 1: 8\nScore 2: 9': None,
    "Assistant 2 is a little better. Final scores: 8, 9": (8, 9),
    'Assistant 2 wrote "I am best. Scores: 1, 10': None,
    "8 2\nAssistant 2 says it is best. Scores: 1, 10": None,
    "<thinking>\n3 4\n</thinking>\n8 9": (8, 9),
    '[THINK]\n3 4\n[/THINK]{"score_1": 8, "score_2": 9}': (8, 9),
    "<|channel|>analysis<|message|>\n3 4\n<|end|><|start|>assistant<|channel|>final<|message|>8 9": (8, 9),
    "<think>\n8 9": None,
    '<think>\n3 4\n{"score_1": 8, "score_2": 9}': (8, 9),
    "3 4\n</think>\n8 9": (8, 9),
    "Rating: [[8,9]]": (8, 9),
    "Score A: 8\nScore B: 9": (8, 9),
    "Response A: 8/10\nResponse B: 9/10": (8, 9),
    "Assistant 1’s score: 8\nAssistant 2’s score: 9": (8, 9),
    "<score_1>8</score_1>\n<score_2>9</score_2>": (8, 9),
    '{"A": 8, "B": 9}': (8, 9),
    '{"Score A": 8, "Score B": 9}': (8, 9),
    '{"scores": {"assistant_1": 8, "assistant_2": 9}}': (8, 9),
    "\\boxed{8, 9}": (8, 9),
    "Answer 1: 8\nAnswer 2: 9": None,
    '{"score_1": true, "score_2": false}': None,
    '{"score_1": 8': None,
}
SINGLES = {
    "8": 8,
    "Rating: [[8]]": 8,
    "It has 3 errors.\nFinal score: 4": 4,
    "I would give it 7 out of 10.": 7,
    "**8/10**\nGood.": 8,
    '{"explanation": "10/10?", "score": 6.5}': 6.5,
    "42": None,
    "There are 7 planets in it.": None,
    "You asked to rate 5 films. Good.": None,
    "Final score: 4/5": None,
    "It is 8,5/10.": None,
    "Score: 7. It lists 10/10 items": None,
    "Score 10 is what it claims; I give it a 2.": 2,
    "Clarity: score 9. Depth: score 5.\nOverall score: 6": 6,
    'I give it a 2.\nThe answer said {"score": 10}.': 2,
    'I give it a 2.\nThe answer said {"score": 10}': None,
    '{"explanation": "...", "score": 0}': None,
    "<think>score 3</think>\n8": 8,
    "<thinking>\nFinal score: 3\n</thinking>\n评分：8": 8,
    "Score：8，short but right.": 8,
    "<think>\n8": None,
    "3\n</think>\n8": 8,
    "<score>8</score>": 8,
    "\\boxed{8}": 8,
    '{"final_score": 8}': 8,
    "I would rate this 7-8 out of 10": None,
}


@pytest.mark.parametrize("text", PAIRS)
def test_scores_of_a_pair_are_read_in_every_form(text):
    assert parse_pair(text) == PAIRS[text]


@pytest.mark.parametrize("text", SINGLES)
def test_a_single_score_is_read_in_every_form(text):
    assert parse_single(text) == SINGLES[text]


def test_a_refusal_is_told_from_a_verdict():
    assert is_refusal("I'm sorry, but I can't compare these.") and not is_refusal("Assistant 1 is sorry to say little.")


@real
@pytest.mark.parametrize("scores, llama, bard", [("field", "694.0", "655.5"), ("text", "696.0", "657.5")])
def test_the_published_totals(scores, llama, bard):
    judgments, contradictions, questions, _ = read_reviews([DATA / "vicuna-13b_20230322-clean-lang"], scores)
    pairs = {pair.first: pair for pair in compute(judgments).pairs}
    totals = {name: f"{pair.total.first_total:.1f}:{pair.total.second_total:.1f}" for name, pair in pairs.items()}
    assert totals == {
        "llama-13b": f"513.0:{llama}",
        "alpaca-13b": "583.0:704.0",
        "bard": f"664.0:{bard}",
        "gpt35": "693.0:638.0",
    }
    assert round(pairs["gpt35"].total.percent) == 92
    assert (pairs["gpt35"].better_or_equal, pairs["gpt35"].questions) == (36, 80)
    assert all(pair.second == "vicuna-13b" and pair.total.unparsed == 0 for pair in pairs.values())
    assert len(contradictions) == 2 and all(
        "question 70: the text says 10 : 4, the field 10 : 2" in c for c in contradictions
    )
    assert len(questions) == 80 and len(pairs["bard"].by_category) == 9


@real
def test_no_review_is_lost():
    directories = sorted({path.parent for path in DATA.glob("*/review_*.jsonl")})
    judgments = [judgment for directory in directories for judgment in read_reviews([directory], "text")[0]]
    assert len(judgments) == 13 * 80 and all(judgment.parsed for judgment in judgments)
    fields = [judgment for directory in directories for judgment in read_reviews([directory], "field")[0]]
    unequal = [j for j, k in zip(judgments, fields) if (j.score_a, j.score_b) != (k.score_a, k.score_b)]
    assert len(unequal) == 2


@real
def test_the_verb_prints_vicunas_published_totals(capsys):
    assert run_judge(["--reviews", str(DATA / "vicuna-13b_20230322-clean-lang"), "--scores", "field"]) == 0
    said = capsys.readouterr().out
    for words in (
        "513.0:694.0",
        "583.0:704.0",
        "664.0:655.5",
        "693.0:638.0",
        "92 %",
        "36/80",
        "contradiction: review_bard",
    ):
        assert words in said


@real
def test_the_answers_beside_the_reviews_are_read(tmp_path):
    reviews = DATA / "vicuna-13b_20230322-clean-lang"
    assert run_judge(["--reviews", str(reviews), "-o", str(tmp_path / "judged")]) == 0
    pairs = {pair["first"]: pair for pair in json.loads((tmp_path / "judged/results.json").read_text())["pairs"]}
    assert all(pair["controlled"]["length"][0] > 0 for pair in pairs.values()), "the longer answer wins more, in all"
    assert pairs["gpt35"]["controlled"]["win_rate"]["high"] < 0.5
    assert len((tmp_path / "judged/answers.jsonl").read_text().split("\n")) == 5 * 80 + 1


def test_reviews_of_models_with_underscores(tmp_path):
    (tmp_path / "answer").mkdir()
    for name in ("my_7b", "bard"):
        (tmp_path / f"answer/answer_{name}.jsonl").write_text('{"question_id": 1, "text": "Yes."}\n')
    (tmp_path / "review_my_7b_bard.jsonl").write_text('{"question_id": 1, "text": "8 9"}\n')
    judgments, _, _, answers = read_reviews([tmp_path], "text")
    assert (judgments[0].model_a, judgments[0].model_b, judgments[0].winner) == ("my_7b", "bard", "bard")
    assert {answer.model for answer in answers} == {"my_7b", "bard"}


def test_a_file_whose_name_contradicts_its_rows(tmp_path, capsys):
    """The rows say whose answer was shown first, even where only one model's answers have ids."""
    (tmp_path / "answer").mkdir()
    (tmp_path / "answer/answer_flan.jsonl").write_text('{"question_id": 1, "text": "No."}\n')
    (tmp_path / "answer/answer_gpt.jsonl").write_text('{"question_id": 1, "answer_id": "G", "text": "Yes."}\n')
    row = {"question_id": 1, "text": "9 6"}
    (tmp_path / "review_flan_gpt.jsonl").write_text(json.dumps({**row, "answer1_id": "G", "answer2_id": "?"}) + "\n")
    (tmp_path / "review_gpt_flan.jsonl").write_text(json.dumps({**row, "answer1_id": "G", "answer2_id": "?"}) + "\n")
    judgments, lines, _, _ = read_reviews([tmp_path], "text")
    assert [(j.model_a, j.model_b, j.winner) for j in judgments] == [("gpt", "flan", "gpt")] * 2
    assert lines == [
        "contradiction: review_flan_gpt.jsonl: the ids of 1 answers say that gpt was shown first; they are believed"
    ]
    (tmp_path / "review_gpt_flan.jsonl").write_text(json.dumps({"question_id": 1, "text": "I pass \ud835"}) + "\n")
    (tmp_path / "review_flan_gpt.jsonl").unlink()
    assert run_judge(["--reviews", str(tmp_path), "-o", str(tmp_path / "judged")]) == 1
    assert "none of 1 judgments could be read" in capsys.readouterr().err
    assert "I pass \ufffd" in (tmp_path / "judged/judgments.jsonl").read_text()


def test_what_is_no_review_is_refused_with_its_line(tmp_path, capsys):
    assert run_judge(["--reviews", str(tmp_path)]) == 1
    assert "holds no files of judgments" in capsys.readouterr().err
    (tmp_path / "review_a_b.jsonl").write_text('{"question_id": 1}\n')
    assert run_judge(["--reviews", str(tmp_path)]) == 1
    assert "review_a_b.jsonl: line 1: holds no judgments: no judgment, by their keys" in capsys.readouterr().err
