"""`fastft router explain`: what weighs adds up to what was decided."""

import numpy as np
import pytest
from helpers import routers

from fastft.cli import main
from fastft.compose.router.explain import pushes, strongest
from fastft.compose.router.router import Router

QUESTION = "What is 9 plus 8? Write no poem."


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return routers.train(tmp_path_factory.mktemp("router") / "r")


def test_the_pushes_of_all_words_are_the_logits_but_for_bias_and_mean(directory):
    router = Router.load(directory)
    grams, added = pushes(router, QUESTION)
    head = getattr(router, router.rule)
    logits = head.logits(router.features.transform([QUESTION]))[0] - head.bias
    assert len(grams) == len(added) and added.sum(0) == pytest.approx(logits - logits.mean(), abs=1e-4)


def test_words_of_sums_speak_for_the_model_that_is_good_at_sums(directory):
    router = Router.load(directory)
    speak_for, against = strongest(router, QUESTION, "a")
    assert any("plus" in push.gram or "what is" in push.gram for push in speak_for)
    assert any("poem" in push.gram or "write" in push.gram or "a" in push.gram for push in against)
    assert all(push.weight > 0 for push in speak_for) and all(push.weight < 0 for push in against)
    other = strongest(router, QUESTION, "b")
    np.testing.assert_allclose([p.weight for p in other[1]], [-p.weight for p in speak_for], rtol=1e-4)


def test_the_command_names_values_words_neighbours_tags_and_the_decision(directory, capsys):
    assert main(["router", "explain", str(directory), "What is 9 plus 8?"]) == 0
    said = capsys.readouterr().out
    for expected in (
        "▶ a",
        "For a: ",
        "against: ",
        "Most similar training queries:",
        "Best on sum (30 queries): a 1.000",
    ):
        assert expected in said
    assert said.strip().splitlines()[-1].startswith("a: success ")


def test_a_question_from_elsewhere_is_said_to_be_unlike(directory, capsys):
    assert main(["router", "explain", str(directory), "Чем отличается хлеб?"]) == 0
    assert "unlike the training queries" in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv, code, says",
    [
        (["nowhere", "q"], 1, "nowhere: no such directory"),
        (["DIR", "q", "--usd_weight", "1"], 1, "have no prices (usd)"),
        (["DIR"], 2, "question"),
    ],
)
def test_mistakes_are_one_line(directory, capsys, argv, code, says):
    argv = [str(directory) if word == "DIR" else word for word in argv]
    assert main(["router", "explain", *argv]) == code
    said = capsys.readouterr().err.strip()
    assert says in said and len(said.splitlines()) == 1
