"""A blend draws a model for each turn: by weight, the same for the same turn, in runs and stages as asked."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastft.compose.blend import BlendPolicy
from fastft.data.conversation import Conversation
from fastft.errors import UserError


def choices(policy: BlendPolicy, conversations: int = 1, turns: int = 1) -> list:
    served = policy.models
    return [
        policy.choose(Conversation(f"c{c}", []), t, served) for c in range(conversations) for t in range(1, turns + 1)
    ]


def test_models_are_drawn_in_proportion_to_their_weights():
    policy = BlendPolicy("chai", {"a": 1, "b": 2, "c": 1})
    drawn = choices(policy, 1500, 4)
    counts = Counter(each.model for each in drawn)
    expected = {"a": 1500, "b": 3000, "c": 1500}
    assert sum((counts[m] - n) ** 2 / n for m, n in expected.items()) < 13.8  # chi-square, 2 degrees, p = 0.001
    assert drawn[0].probabilities == {"a": 0.25, "b": 0.5, "c": 0.25}


def test_turns_of_a_conversation_are_drawn_independently():
    models = [each.model for each in choices(BlendPolicy("chai", {"a": 1, "b": 1}), 1, 4000)]
    assert abs(sum(x == y for x, y in zip(models, models[1:])) - 2000) < 105  # 3.3 standard deviations


@given(st.dictionaries(st.sampled_from("abcdef"), st.floats(0.01, 100), min_size=1), st.text(), st.integers(1, 50))
def test_the_same_turn_asks_the_same_models_in_the_same_order(weights, conversation, turn):
    asked = Conversation(conversation, [])
    first = BlendPolicy("chai", weights).choose(asked, turn, [])
    again = BlendPolicy("chai", dict(reversed(weights.items()))).choose(asked, turn, list(weights))
    assert (first.model, first.next) == (again.model, again.next), "the order in the file does not matter"
    assert sorted([first.model, *first.next]) == sorted(weights)
    assert sum(first.probabilities.values()) == pytest.approx(1)


def test_another_seed_or_name_draws_other_models():
    weights = {"a": 1, "b": 1}
    first, *others = (
        [each.model for each in choices(policy, 1, 64)]
        for policy in (BlendPolicy("x", weights), BlendPolicy("x", weights, seed="1"), BlendPolicy("y", weights))
    )
    assert first not in others and others[0] != others[1]


def test_a_model_without_weight_is_never_asked():
    assert {(each.model, each.next) for each in choices(BlendPolicy("x", {"a": 1, "b": 0}), 50)} == {("a", ())}


def test_a_run_keeps_its_model():
    models = [each.model for each in choices(BlendPolicy("x", {"a": 1, "b": 1, "c": 1}, min_run=3), 1, 300)]
    runs = [models[i : i + 3] for i in range(0, 300, 3)]
    assert all(len(set(run)) == 1 for run in runs) and len({run[0] for run in runs}) == 3


def test_a_schedule_has_other_weights_from_a_turn_on():
    policy = BlendPolicy("x", {"a": 1}, schedule={3: {"b": 1}, 5: {"c": 1, "a": 1}})
    models = [each.model for each in choices(policy, 1, 40)]
    assert models[:4] == ["a", "a", "b", "b"] and set(models[4:]) == {"a", "c"}
    assert policy.models == ["a", "b", "c"]


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: BlendPolicy("x", {"a": 0, "b": 0}), "its weights sum to 0"),
        (lambda: BlendPolicy("x", {}), "its weights sum to 0"),
        (lambda: BlendPolicy("x", {"a": -1}), "the weight of a is -1"),
        (lambda: BlendPolicy("x", {"a": float("nan")}), "the weight of a is nan"),
        (lambda: BlendPolicy("x", {"a": float("inf")}), "the weight of a is inf"),
        (lambda: BlendPolicy("x", {"a": 1}, min_run=0), "min_run is 0"),
        (lambda: BlendPolicy("x", {"a": 1}, schedule={0: {"b": 1}}), "turns count from 1"),
        (lambda: BlendPolicy("x", {"a": 1}, schedule={1: {"b": 1}}), "begins at turn 1, which is decided by models"),
        (lambda: BlendPolicy("x", {"a": 1}, schedule={4: {"b": 0}}), "from turn 4: its weights sum to 0"),
    ],
)
def test_what_nothing_can_be_drawn_by_is_refused(make, words):
    with pytest.raises(UserError, match="blend x") as refusal:
        make()
    assert words in str(refusal.value)
