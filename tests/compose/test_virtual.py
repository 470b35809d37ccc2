"""Names that stand for names: the way to a model, its true probabilities, and what cannot be."""

from collections import Counter

import pytest

from fastft.compose.abtest.policy import Experiment
from fastft.compose.blend import BlendPolicy
from fastft.compose.policy import FixedPolicy
from fastft.compose.virtual import Asked, VirtualModels
from fastft.data.conversation import Conversation
from fastft.errors import UserError

NOW = 1.8e9


def models(**more) -> VirtualModels:
    blend = BlendPolicy("chai", {"a": 1, "b": 1})
    spring = Experiment("spring", {"control": ("a", 0.5), "blend": ("chai", 0.5)}, "control")
    return VirtualModels({"chai": blend, "spring": spring, "best": FixedPolicy("spring"), **more})


def asked(conversation: str = "c", turn: int = 1, user: str | None = None) -> Asked:
    return Asked(Conversation(conversation, []), turn, user, NOW, ["a", "b"])


def test_an_arm_may_be_a_blend_and_an_alias_may_be_an_experiment():
    virtual = models()
    users = [f"u{n}" for n in range(4000)]
    found = [virtual.resolve("best", asked(f"c{n}", user=user)) for n, user in enumerate(users)]
    assert all(each.choice.probabilities == {"a": 0.75, "b": 0.25} for each in found)
    counts = Counter((each.assignment.arm, each.choice.model) for each in found)
    assert set(counts) == {("control", "a"), ("blend", "a"), ("blend", "b")}
    expected = {("control", "a"): 2000, ("blend", "a"): 1000, ("blend", "b"): 1000}
    assert sum((counts[each] - n) ** 2 / n for each, n in expected.items()) < 13.8  # 2 degrees, p = .001
    blended = next(each for each in found if each.assignment.arm == "blend")
    assert blended.through == ("spring", "chai") and "arm blend; chai: drawn for turn 1" in blended.choice.why
    assert {blended.choice.model, *blended.choice.next} == {"a", "b"}, "the other one can stand in"


def test_who_is_not_counted_has_the_probabilities_of_the_control():
    found = models().resolve("spring", asked())
    assert found.choice.model == "a" and found.choice.probabilities == {"a": 1.0} and not found.assignment.counted


def test_a_blend_of_blends_draws_each_with_its_probability():
    virtual = models(mixed=BlendPolicy("mixed", {"chai": 1, "c": 3}))
    found = [virtual.resolve("mixed", asked(f"c{n}")) for n in range(4000)]
    assert all(each.choice.probabilities == {"a": 0.125, "b": 0.125, "c": 0.75} for each in found)
    counts = Counter(each.choice.model for each in found)
    assert (
        sum((counts[name] - 4000 * share) ** 2 / (4000 * share) for name, share in zip("abc", (0.125, 0.125, 0.75)))
        < 13.8
    )
    assert all({each.choice.model, *each.choice.next} == {"a", "b", "c"} for each in found), "all can stand in"


def test_names_that_go_round_are_named():
    virtual = models(chai=BlendPolicy("chai", {"spring": 1}))
    with pytest.raises(UserError, match="chai -> spring -> chai: goes round"):
        virtual.check()
    with pytest.raises(UserError, match="x -> x: goes round"):
        models(x=FixedPolicy("x")).check()


def test_an_experiment_is_no_part_of_a_blend_and_no_arm_of_another():
    with pytest.raises(UserError, match="spring is an experiment, which cannot be a part of a blend"):
        models(mixed=BlendPolicy("mixed", {"spring": 1, "a": 1})).check()
    with pytest.raises(UserError, match="spring is an experiment, which cannot be an arm of an experiment"):
        models(two=Experiment("two", {"x": ("spring", 0.5), "y": ("a", 0.5)}, "y")).check()
    models().check()
