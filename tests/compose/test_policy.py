"""Policies choose a model for a turn: always the same one for the same turn, with probabilities that are true."""

import subprocess
import sys
from collections import Counter

from fastft.compose.policy import FixedPolicy, draw
from fastft.data.conversation import Conversation, Message


def test_a_fixed_policy_chooses_its_model_and_says_so():
    conversation = Conversation("c", [Message("user", "hello")])
    choice = FixedPolicy("b").choose(conversation, 1, ["a", "b"])
    assert choice.model == "b" and choice.probabilities == {"a": 0.0, "b": 1.0} and choice.why == "fixed"


def test_a_draw_is_a_function_of_its_four_parts_in_every_process():
    value = draw("seed", "blend", "c1", 2)
    code = "from fastft.compose.policy import draw; print(draw('seed', 'blend', 'c1', 2))"
    elsewhere = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert float(elsewhere) == value
    others = {
        draw("seed2", "blend", "c1", 2),
        draw("seed", "blend2", "c1", 2),
        draw("seed", "blend", "c2", 2),
        draw("seed", "blend", "c1", 3),
    }
    assert len(others | {value}) == 5


def test_parts_that_join_to_the_same_text_draw_different_numbers():
    assert draw("a", "bc", "d", 1) != draw("ab", "c", "d", 1)
    assert draw("a", "b", "c1", 1) != draw("a", "b", "c", 11)


def test_draws_are_uniform_over_conversations_and_turns():
    counts = Counter(int(10 * draw("s", "p", f"c{c}", t)) for c in range(2500) for t in range(1, 5))
    assert set(counts) == set(range(10))
    assert sum((n - 1000) ** 2 / 1000 for n in counts.values()) < 27.9  # chi-square, 9 degrees, p = 0.001
