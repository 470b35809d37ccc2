"""An answer is compared with the gold answer by what it names; what names nothing, or two things, is wrong."""

import pytest

from fastft.judge.exams.gold import is_right, kind_of_gold

LETTERS = "What is 2 + 2?\nOptions:\n(A) 3\n(B) 4\n(C) 22"
BULLETS = "Which is this about?\n\nOPTIONS:\n- World\n- Sports\n- Business"
FEELINGS = "The sentiment?\nOptions:\n- very negative\n- negative\n- very positive"
SENTENCES = 'Which makes no sense?\nOptions:\n- Sentence A: "I run in the air"\n- Sentence B: "I run outside"'


@pytest.mark.parametrize(
    "answer, gold, query, right",
    [
        ("The answer is (B).", "(B)", LETTERS, True),
        ("B", "B", LETTERS, True),
        ("4", "(B)", LETTERS, True),  # the option's text
        ("22", "(B)", LETTERS, False),
        ("A banana", "(B)", LETTERS, False),
        ("It is about Sports.", "Sports", BULLETS, True),
        ("sports", "Sports", BULLETS, True),
        ("World or Sports", "Sports", BULLETS, False),
        ("Transports", "Sports", BULLETS, False),
        ("", "Sports", BULLETS, False),
        ("very negative", "negative", FEELINGS, False),
        ("It is negative", "negative", FEELINGS, True),
        ("It is very negative.", "very negative", FEELINGS, True),
        ("Sentence A", "Sentence A", SENTENCES, True),
        ("Sentence B", "Sentence A", SENTENCES, False),
        ("No, because dogs hear better.", "no", "Would a dog hear it?", True),
        ("Yes or no", "no", "Would a dog hear it?", False),
        ("3 + 4 = 7, so she has 1,234 apples.", "#### 1234", "How many?", True),
        ("12.50 dollars", "12.5", "How much?", True),
        ("It costs $-3", "-3", "How much?", True),
        ("many", "7", "How many?", False),
        ("The Eiffel tower!", "eiffel tower", "Where?", True),
        ("It stands beside the Eiffel tower.", "eiffel tower", "Where?", True),
        ("Paris", "eiffel tower", "Where?", False),
        ("a b c d e", "a b c d e", "Translate it.", False),  # too long to be compared, unless that is asked for
    ],
)
def test_answers_are_right_or_wrong(answer, gold, query, right):
    assert is_right(answer, gold, query) is right


def test_what_is_asked_for_can_be_named_instead_of_guessed():
    assert kind_of_gold("4", []) == "number" and kind_of_gold("four", []) == "text"
    assert is_right("about 4 or so", "4", "How many?", "text") and not is_right("4 of 5", "4", "How many?", "number")
    assert is_right("He said: a b c d e.", "a b c d e", "Translate it.", "text")
