"""A router as a policy: by which question it decides, when a conversation changes its model, and what the record is told."""

import json

import pytest
from helpers import routers

from fastft.compose.router.policy import LONGEST, RoutePolicy
from fastft.data.conversation import Conversation, Message
from fastft.errors import UserError

SUM, POEM = "What is 4 plus 9? Add the numbers.", "Write a merry poem about the sea."


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return routers.train(tmp_path_factory.mktemp("router") / "expert")


def route(directory, **options) -> RoutePolicy:
    policy = RoutePolicy("expert", directory, **options)
    policy.load()
    return policy


def conversation(*questions: str) -> Conversation:
    messages = [Message("system", "Be kind.")]
    for question in questions:
        messages += [Message("user", question), Message("assistant", "An answer.")]
    return Conversation("c", messages[:-1])


def chosen(policy: RoutePolicy, *questions: str) -> str:
    return policy.choose(conversation(*questions), len(questions), ["a", "b"]).model


def test_each_question_goes_to_the_model_that_is_good_at_it(directory):
    policy = route(directory)
    assert (chosen(policy, SUM), chosen(policy, POEM)) == ("a", "b")


def test_the_choice_says_what_was_compared_and_who_is_next(directory):
    choice = route(directory).choose(conversation(POEM), 1, ["a", "b"])
    assert choice.probabilities == {"a": 0.0, "b": 1.0} and choice.next == ("a",)
    assert choice.scores["b"] > choice.scores["a"] and f"b {choice.scores['b']:.2f} over" in choice.why


def test_the_first_question_decides_for_the_conversation_or_each_one_does(directory):
    first, every = route(directory), route(directory, decide_on="every")
    assert chosen(first, SUM, POEM, POEM) == "a"
    assert chosen(every, SUM, POEM) == "b" and chosen(every, SUM, POEM, SUM) == "a"


def test_a_conversation_stays_unless_the_gain_is_worth_the_switch(directory):
    policy = route(directory, decide_on="every", switch_margin=2.0)
    choice = policy.choose(conversation(POEM, SUM), 2, ["a", "b"])
    assert choice.model == "b" and "stays with b: a leads by" in choice.why and "less than 2" in choice.why


def test_all_questions_so_far_decide_together(directory):
    policy = route(directory, decide_on="conversation", switch_margin=0.0)
    assert chosen(policy, POEM, *["And why?"] * 2) == "b", "what follows says nothing about sums or poems"
    assert chosen(policy, SUM, *routers.POEMS[:6]) == "b", "one sum and six poems"


@pytest.mark.parametrize("decide_on", ["every", "conversation"])
def test_a_long_conversation_does_not_change_by_its_length(directory, decide_on):
    policy = route(directory, decide_on=decide_on, switch_margin=1.0)
    questions = [POEM, *(f"{SUM} {number}" for number in range(199))]
    assert {chosen(policy, *questions[:turns]) for turns in (1, 64, 65, 66, 80, 199, 200)} == {"b"}
    assert not policy.is_quick(conversation(*questions[:80])) and policy.is_quick(conversation(*questions[:40]))


def test_what_was_chosen_before_follows_from_the_questions_alone(directory):
    questions = [SUM, POEM, "And then?", SUM, "Why?", POEM]
    known = route(directory, decide_on="every")
    step_by_step = [chosen(known, *questions[:end]) for end in range(1, len(questions) + 1)]
    anew = [chosen(route(directory, decide_on="every"), *questions[:end]) for end in range(1, len(questions) + 1)]
    assert step_by_step == anew


def test_the_default_is_left_for_the_margin_only_and_can_be_named(directory):
    assert chosen(route(directory, margin=5.0), POEM) == "a"
    assert chosen(route(directory, margin=5.0, default="b"), SUM) == "b"


def test_candidates_may_have_other_names_here(directory):
    policy = route(directory, of={"a": "math-7b", "b": "chai"})
    assert policy.models == ["math-7b", "chai"] and chosen(policy, POEM) == "chai"
    policy.require_served(["chai", "math-7b", "other"])


def test_a_dollar_has_the_worth_that_was_given(tmp_path):
    directory = routers.train(tmp_path / "priced", usd={"a": 0.001, "b": 0.1})
    assert chosen(route(directory), POEM) == "b" and chosen(route(directory, usd_weight=20), POEM) == "a"


def test_without_a_question_the_default_answers(directory):
    choice = route(directory).choose(Conversation("c", []), 0, ["a", "b"])
    assert choice.model == "a" and choice.scores is None and "no question" in choice.why


def test_long_questions_and_conversations_cost_no_more_than_the_limits(directory, monkeypatch):
    monkeypatch.setattr("fastft.compose.router.policy.MOST_TURNS", 12)
    policy = route(directory, decide_on="conversation")
    asked = []
    scores = policy.router.scores
    policy.router.scores = lambda texts: asked.append(texts) or scores(texts)
    assert chosen(policy, *[f"{n} {POEM}" * 900 for n in range(12 + 9)]) == "b"
    assert len(asked[0]) <= 12 and max(map(len, asked[0])) <= LONGEST
    assert len(policy.remembered) == len(asked[0])


def test_one_question_is_quick_and_many_new_ones_or_an_encoder_are_not(directory, tmp_path):
    policy = route(directory, decide_on="every")
    assert policy.is_quick(conversation(SUM)) and not policy.is_quick(conversation(*routers.SUMS))
    policy.choose(conversation(*routers.SUMS), len(routers.SUMS), ["a", "b"])
    assert policy.is_quick(conversation(*routers.SUMS, POEM)), "only one of them is new"
    settings = json.loads((directory / "router.json").read_text())
    (tmp_path / "router.json").write_text(json.dumps(settings | {"features": {"kind": "encoder"}}))
    assert not RoutePolicy("expert", tmp_path).is_quick(conversation(SUM))


@pytest.mark.parametrize(
    "options, words",
    [
        ({"of": {"c": "x"}}, "knows no 'c'; it was trained for a, b"),
        ({"default": "c"}, "default: c is none of the router's models: a, b"),
        ({"margin": -1.0}, "margin is -1"),
        ({"switch_margin": float("nan")}, "switch_margin is nan"),
        ({"usd_weight": 1.0}, "knows no prices"),
    ],
)
def test_what_does_not_fit_the_router_is_one_line(directory, options, words):
    with pytest.raises(UserError, match=words):
        RoutePolicy("expert", directory, **options)


def test_a_router_for_other_models_is_named_with_what_to_do(directory):
    with pytest.raises(UserError) as error:
        RoutePolicy("expert", directory, of={"a": "math"}).require_served(["math", "c"])
    assert "was trained for a, b, and nothing here is called 'b'; of: {b: NAME}" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["{}", "[1]", "no JSON", json.dumps({"candidates": ["a"], "default": "b"})])
def test_a_directory_without_a_router_is_one_line(tmp_path, content):
    with pytest.raises(UserError, match="holds no router"):
        RoutePolicy("expert", tmp_path)
    (tmp_path / "router.json").write_text(content)
    with pytest.raises(UserError, match="is not a router's"):
        RoutePolicy("expert", tmp_path)
