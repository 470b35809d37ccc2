"""A setting is chosen only if it is surely better than zero-shot, and answers are read as a careful person would."""

import os
from pathlib import Path

import numpy as np
import pytest

from fastft.compose.grimoire.answering.answers import WeakAnswer, calibrated, label_means, read_choice, read_label
from fastft.compose.grimoire.check import replay
from fastft.compose.grimoire.choosing.choose import chosen, compare, outcomes_of
from fastft.compose.grimoire.choosing.rank import Ranker, cross_chosen, nearest

DATA = Path(os.environ.get("FASTFT_DATA", "data")) / "grimoire"


def outcomes(shares: dict[str, float], questions: int = 100, seed: int = 0) -> dict[str, dict[str, float]]:
    rng = np.random.default_rng(seed)
    return {name: {str(q): float(rng.random() < share) for q in range(questions)} for name, share in shares.items()}


def test_what_is_surely_better_is_chosen():
    assert chosen(compare(outcomes({"zero-shot": 0.3, "a": 0.35, "b": 0.8}))) == "b"


def test_luck_among_many_settings_is_not_chosen():
    """Twelve settings that are as good as zero-shot. By intervals of their own, one is chosen again and again."""
    shares = {"zero-shot": 0.5, **{f"s{n}": 0.5 for n in range(12)}}
    lists = [outcomes(shares, 50, seed) for seed in range(6)]
    together = [chosen(compare(each)) for each in lists]
    alone = [chosen(compare(each, together=False)) for each in lists]
    assert together.count("zero-shot") >= 5
    assert alone.count("zero-shot") < together.count("zero-shot")


@pytest.mark.parametrize(
    ("text", "labels", "label"),
    [
        ("No hate.", ("hate", "noHate"), "noHate"),
        ("This is not hate.", ("hate", "noHate"), None),
        ("no-hate", ("hate", "noHate"), "noHate"),
        ("It is hate.", ("hate", "noHate"), "hate"),
        ("not true", ("true", "untrue"), None),
        ("un-true", ("true", "untrue"), "untrue"),
        ("Not entailment", ("entailment", "not_entailment"), "not_entailment"),
        ("The answer is: very_negative", ("negative", "very negative"), "very negative"),
        ("неверно", ("верно", "ложно"), None),
        ("это верно", ("верно", "неверно"), "верно"),
        ("c'est négatif", ("positif", "négatif"), "négatif"),
        ("ใช่ครับ", ("ใช่", "ไม่ใช่"), "ใช่"),
        ("다음은 긍정입니다", ("긍정", "부정"), "긍정"),
        ("ab", ("a b", "ab"), "ab"),
    ],
)
def test_a_label_is_read_in_spellings_of_its_own_and_never_as_its_contrary(text, labels, label):
    assert read_label(text, labels) == label


def test_failed_calls_are_no_answers():
    answers = [
        WeakAnswer("zero-shot", "q1", "a", "b"),
        WeakAnswer("zero-shot", "q2", "a", error="no reply"),
        WeakAnswer("s", "q1", "a", "a"),
        WeakAnswer("s", "q2", "a", "a"),
    ]
    found = outcomes_of(answers)
    assert found == {"zero-shot": {"q1": 0.0}, "s": {"q1": 1.0, "q2": 1.0}}
    gain = compare(found)[1]
    assert gain.gain.value == 1.0 and gain.questions == 2


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("true", "true"),
        ("Untrue.", "untrue"),
        ("The answer is TRUE", "true"),
        ("It is untrue", "untrue"),
        ("reasons … Answer: true, of course\nAnswer: untrue", "untrue"),
        ("true or untrue?", None),
        ("wahr", None),
        ("", None),
        ("trueish", None),
        ("very good", "very good"),
        ("good", "good"),
        ("It was very good!", "very good"),
        ("答案是真的", "真"),
    ],
)
def test_a_label_is_read_as_whole_words_the_longest_first(text, label):
    assert read_label(text, ["true", "untrue", "good", "very good", "真"]) == label


@pytest.mark.parametrize("text", ['{"answer": "maybe"}', '["true"]', "true", "", '{"answer": ["true"]}', "{"])
def test_a_choice_is_only_what_has_its_form(text):
    assert read_choice(text, ["true", "untrue"]) is None


def test_calibration_takes_a_taste_for_one_label_away():
    scores = [{"a": -1.0, "b": -5.0}, {"a": -1.5, "b": -4.0}, {"a": -1.0, "b": -6.0}]
    answers = [WeakAnswer("s", str(n), "a", "a", scores=row) for n, row in enumerate(scores)]
    assert [each.answer for each in calibrated(answers, label_means(answers))] == ["a", "b", "a"]


def test_the_ranker_learns_which_grimoire_is_for_which_question(tmp_path):
    """Questions of two kinds, and two grimoires that each help with one kind."""
    rng = np.random.default_rng(0)
    kinds = rng.integers(0, 2, 120)
    questions = rng.normal(0, 0.3, (120, 6)) + np.eye(6)[kinds]
    questions /= np.linalg.norm(questions, axis=1, keepdims=True)
    grimoires = np.eye(6)[[3, 4]]
    right_NG = np.stack([kinds == 0, kinds == 1], 1).astype(float)
    right_NG[:5, 0] = np.nan
    places = cross_chosen(questions, grimoires, right_NG, np.arange(120) % 5, seed=22)
    assert (places == kinds).mean() > 0.9
    ranker = Ranker.train(questions, grimoires, right_NG, seed=22)
    ranker.save(tmp_path / "r.safetensors")
    np.testing.assert_array_equal(Ranker.load(tmp_path / "r.safetensors").scores(questions), ranker.scores(questions))
    assert nearest(questions, np.eye(6)[:2]).tolist() == questions[:, :2].argmax(1).tolist()


@pytest.mark.skipif(not DATA.is_dir(), reason="NOT CHECKED HERE: FASTFT_DATA has no grimoire/")
def test_recorded_runs_of_two_small_models_choose_no_grimoire():
    found = replay(DATA / "weak_runs.jsonl.gz")
    by_likelihood = {key: name for key, (name, _) in found.items() if key[2] in ("likelihood", "calibrated")}
    assert len(by_likelihood) == 8
    assert set(by_likelihood.values()) <= {"zero-shot", "few-shot-4"}
    # By text the model's format is counted, too: zero-shot names no label at all.
    assert found["gemma-3-270m", "Subj", "text"][0] == "few-shot-4"
