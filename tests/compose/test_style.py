"""What differs between models' styles is found with its numbers, and models that write alike are left alone."""

import random

import pytest

from fastft.compose.style import compare_styles

WORDS = (
    "when the train has left the city you can see fields, a river and some hills behind it, until it is dark".split()
)
GERMAN = "wenn der Zug die Stadt verlassen hat, sieht man Felder, einen Fluss und dahinter die Berge, bis es dunkel ist"


def prose(seed: int, words: int = 60) -> str:
    source = random.Random(seed)
    return " ".join(source.choices(WORDS, k=round(words * source.uniform(0.5, 1.5))))


def answers(count: int, seed: int = 0, words: int = 60) -> list[str]:
    return [prose(seed * 1000 + i, words) for i in range(count)]


@pytest.mark.parametrize("seed", range(20))
def test_models_that_write_alike_are_left_alone(seed):
    assert compare_styles({"a": answers(30, seed), "b": answers(30, seed + 100), "c": answers(30, seed + 200)}) == []


def test_twice_the_length_is_noticed_and_half_as_much_again_is_not():
    (line,) = compare_styles({"a": answers(30), "b": answers(30, 1, words=60 * 3)})
    assert line.startswith("length: b's answers are 2.8 times as long as a's (typically ") and "characters)" in line
    assert not compare_styles({"a": answers(30), "b": answers(30, 1, words=90)})


def test_one_very_long_answer_does_not_make_a_model_long():
    assert not compare_styles({"a": answers(30), "b": [*answers(29, 1), prose(7, 100_000)]})


@pytest.mark.parametrize(
    ("kind", "add"),
    [
        ("lists", "\n- a field\n- a river"),
        ("lists", "\n1. a field\n\n2. a river"),
        ("headings", "\n## The river"),
        ("code", "\n```python\nprint(1)\n```"),
        ("emphasis", " It is **dark** there."),
        ("emphasis", " *smiles at you*"),
    ],
)
def test_each_kind_of_formatting_is_found(kind, add):
    a, b = answers(30), answers(30, 1)
    half = [text + add if i % 2 else text for i, text in enumerate(b)]
    assert compare_styles({"a": a, "b": half}) == [f"{kind}: in 50 % of b's answers and in 0 % of a's"]
    few = [text + add if i % 5 == 0 else text for i, text in enumerate(b)]
    assert compare_styles({"a": a, "b": few}) == [], "a fifth is no other style"


@pytest.mark.parametrize(
    "add", [" 2 * 3 * 4", " a_b_c__d", "\n- one thing", " #1", " -1\n -2", "\n```\n# x\n- a\n- b\n**c**\n```"]
)
def test_what_only_looks_like_formatting_is_none(add):
    code = "\n```\nx\n```" if "```" in add else ""
    assert (
        compare_styles({"a": [text + code for text in answers(30)], "b": [text + add for text in answers(30, 1)]}) == []
    )


def test_a_language_that_only_one_model_uses_is_noticed():
    pytest.importorskip("pycld2")
    mixed = [GERMAN * 2 if i % 5 < 2 else text for i, text in enumerate(answers(40, 1))]
    lines = compare_styles({"a": answers(40), "b": mixed})
    assert lines == ["language: 100 % of a's answers are in en, 60 % of b's"]


def test_what_chance_explains_is_no_warning():
    a, b = answers(10), answers(10, 1)
    assert compare_styles({"a": a, "b": [text + "\n# Title" if i < 4 else text for i, text in enumerate(b)]}) == []


def test_too_few_answers_are_said_to_be_too_few():
    assert compare_styles({"a": answers(30), "b": [*answers(3), " ", ""]}) == [
        "style: b's is not compared: 3 answers are too few (10)"
    ]
    assert compare_styles({"a": answers(3)}) == compare_styles({}) == []
