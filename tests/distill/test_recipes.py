"""Recipes: queries that are made, with their prompts, what eliminates them, and nothing paid twice."""

import json
from collections import Counter

import pytest
from helpers import openai_server
from helpers.distilling import distill, ledger, plan, rows, settings, write_lines
from helpers.openai_server import Failure

from fastft.distill.queries.recipes import Rules, load_recipe
from fastft.distill.settings import QuerySource
from fastft.errors import UserError


@pytest.mark.parametrize(
    "text, why",
    [
        ("Which tool cuts the hardest stones?", None),
        ("", "says too little"),
        ("?! ...", "says too little"),
        ("What is it to you?", "says too little"),
        ("Sorry, I cannot rewrite that text about tools.", "an apology"),
        ("Rewritten  Request: which tool cuts stones?", "repeats words of the instruction"),
        ("stone " * 1001, "too long"),
    ],
)
def test_what_says_nothing_or_speaks_of_the_instruction_is_eliminated(text, why):
    assert load_recipe(QuerySource("seeds.jsonl", recipe="evolve")).rules.against(text) == why


def evolving(tmp_path, url: str, **more) -> dict:
    write_lines(
        tmp_path / "seeds.jsonl", [{"id": f"s{n}", "query": f"How is iron made, number {n}?"} for n in range(12)]
    )
    source = {"recipe": "evolve", "path": str(tmp_path / "seeds.jsonl"), "teacher": "first", "rounds": 2, **more}
    return settings(tmp_path, url, queries=[source], teacher_usd_per_million=[1000, 1000], verify={"near": 0})


def rewriting(body: dict, number: int):
    """What the endpoint says: to the question whether two are equal, to a request for a rewriting, and to a query."""
    said = body["messages"][-1]["content"]
    if "equal or different" in said:
        return "Equal." if "number 3?" in said else "different"
    if not said.startswith(("Rewrite", "Write")):
        return f"Iron is made by heat. {said}"
    before = said.partition("Request:\n")[2].strip()
    if "number 1?" in said:
        return "Sorry, I cannot."
    if "number 2?" in said:
        return Failure(400, "no")
    return before.replace("How is iron made", "How is iron made in Sweden") + " Name each step."


def test_seeds_are_rewritten_on_top_of_each_other(tmp_path):
    with openai_server.endpoint(rewriting) as server:
        given = evolving(tmp_path, server.url)
        assert distill(tmp_path, **given) == 0
        asked = len(server.requests)
        made = rows(tmp_path / "run/queries/evolve.jsonl")
        account = json.loads((tmp_path / "run/queries/evolve.json").read_text())
        assert account["eliminated"] == {"an apology": 2, "not answered": 2, "no information gained": 2}
        assert len(made) == account["made"] == 18 and account["usd"] > 0
        by_id = {row["id"]: row for row in made}
        assert by_id["s0.evolved2"]["query"] == (
            "How is iron made in Sweden in Sweden, number 0? Name each step. Name each step."
        )
        assert by_id["s0.evolved2"]["parent"] == "s0" and len(Counter(row["task"] for row in made)) > 2
        assert {row["collection"] for row in plan(tmp_path)} == {"evolve"} and len(plan(tmp_path)) == 18
        assert distill(tmp_path, **given) == 0
        assert len(server.requests) == asked, "what is made is made once"
    assert ledger(tmp_path)["teachers"][0]["kept"] == 18


@pytest.mark.slow
def test_a_recipe_that_was_stopped_by_money_goes_on(tmp_path):
    with openai_server.endpoint(rewriting) as server:
        given = evolving(tmp_path, server.url)
        with pytest.raises(
            UserError, match=r"evolve: stopped before \$1.00 would be exceeded.*; the same command goes on"
        ):
            distill(tmp_path, "--max_usd", "1", **given)
        cheap = len(server.requests)
        assert distill(tmp_path, "--max_usd", "1000", **given) == 0
        paid = [json.dumps(body) for body in server.requests]
        again = [each for each, count in Counter(paid).items() if count > 1 and "number 2?" not in each]
        assert not again and 0 < cheap < len(paid)


@pytest.mark.slow
def test_a_recipe_counts_what_answers_have_cost_and_new_seeds_are_rewritten(tmp_path):
    with openai_server.endpoint(rewriting) as server:
        given = evolving(tmp_path, server.url)
        assert distill(tmp_path, **given) == 0
        asked = Counter(json.dumps(body) for body in server.requests)
        given["queries"][0]["rounds"] = 3
        with pytest.raises(UserError, match=r"evolve: stopped before .* would be exceeded"):
            distill(tmp_path, "--max_usd", str(ledger(tmp_path)["usd"]), **given)
        assert len(server.requests) == asked.total()
        given["queries"][0]["rounds"] = 2
        with (tmp_path / "seeds.jsonl").open("a") as file:
            file.write(json.dumps({"id": "s12", "query": "How is iron made, number 12?"}) + "\n")
        assert distill(tmp_path, **given) == 0
        assert {row["parent"] for row in rows(tmp_path / "run/queries/evolve.jsonl")} >= {"s0", "s12"}
        again = Counter(json.dumps(body) for body in server.requests) - asked
        assert all("number 12?" in body or "number 2?" in body for body in again), "number 2 has never been answered"


def test_a_dry_run_says_what_a_recipe_would_ask(tmp_path, capsys):
    given = evolving(tmp_path, "http://127.0.0.1:9/v1")
    assert distill(tmp_path, "--dry_run", **given) == 0
    said = capsys.readouterr().out
    assert "evolve: is made by the first run" in said and "12 seeds x 2 rounds, at most 48 calls of first" in said


@pytest.mark.slow
def test_magpie_has_a_model_write_what_a_user_would_say(tmp_path, ground):
    """The tiny model writes noise, so the rules are loosened; what counts is the prompt, the end and the ids."""
    own = {"eliminate": {"least_words": 0}}
    (tmp_path / "own.yaml").write_text(json.dumps(own))
    source = {
        "recipe": "magpie",
        "model": str(ground / "model"),
        "count": 24,
        "prompts": str(tmp_path / "own.yaml"),
        "max_tokens": 24,
    }
    with openai_server.endpoint(lambda body, number: "So be it.") as server:
        given = settings(tmp_path, server.url, queries=[source], verify={"near": 0})
        assert distill(tmp_path, **given) == 0
    made, account = (
        rows(tmp_path / "run/queries/magpie.jsonl"),
        json.loads((tmp_path / "run/queries/magpie.json").read_text()),
    )
    assert len(made) + sum(account["eliminated"].values()) == 24 and made
    assert all(row["query"] for row in made) and len({row["query"] for row in made}) == len(made)
    assert len(plan(tmp_path)) == len(made)


@pytest.mark.parametrize(
    "content, line",
    [
        ("steps: [", "is no recipe"),
        ("steps: {deeper: go on}", "steps must be names with prompts, each of which holds {query}"),
        ("eliminate: {least_wrods: 3}", "it has steps, and eliminate with least_words, most_words, phrases"),
    ],
)
def test_a_recipe_that_is_wrong_is_one_line(tmp_path, content, line):
    (tmp_path / "own.yaml").write_text(content)
    with pytest.raises(UserError) as caught:
        load_recipe(QuerySource("seeds.jsonl", recipe="evolve", prompts=str(tmp_path / "own.yaml")))
    assert line in str(caught.value) and "\n" not in str(caught.value)


def test_rules_may_be_left_out():
    assert Rules().against("x") is None and Rules().against("") == "says too little"
