"""Outcomes: every candidate answers every query, the answers are scored, and nothing is asked or paid for twice."""

import json
import re

import pytest
from helpers.openai_server import Failure, endpoint

from fastft import cli
from fastft.compose.router.outcomes import read_outcomes

QUERIES = [
    {"id": f"q{n}", "query": f"What is {n} plus {n}?", "tags": ["sum"], "gold": 2 * n} for n in range(1, 6)
]  # fmt: skip


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(tmp_path, *candidates: str, queries=QUERIES, **options) -> int:
    arguments = [str(write(tmp_path / "queries.jsonl", queries)), "--candidates", *candidates]
    for name, value in options.items():
        arguments += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return cli.main(["router", "outcomes", *arguments, "-o", str(tmp_path / "outcomes.jsonl")])


def rows(tmp_path) -> list[dict]:
    return [json.loads(line) for line in (tmp_path / "outcomes.jsonl").read_text().splitlines()]


def calculator(body: dict, number: int = 0) -> str:
    """The model "good" adds, "bad" says 7."""
    n = int(re.search(r"What is (\d+)", body["messages"][0]["content"])[1])
    return f"It is {2 * n}." if body["model"] == "good" else "7"


def error_of(capsys) -> str:
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: "), last
    return last


def test_gold_answers_score_the_candidates_and_a_second_run_asks_nothing(tmp_path, capsys):
    with endpoint(calculator) as server:
        candidates = [f"{server.url}#good", f"weak={server.url}#bad"]
        assert run(tmp_path, *candidates, usd_per_million="1000,2000") == 0
        found = read_outcomes([tmp_path / "outcomes.jsonl"])
        assert found.models == ["good", "weak"] and found.queries == [row["query"] for row in QUERIES]
        assert found.correct.tolist() == found.rewards.tolist() == [[1.0, 0.0]] * 5
        assert found.tags == [["sum"]] * 5 and (found.usd > 0).all()
        said = capsys.readouterr().out
        assert "good: would ask 5 turns" in said and "at most $" in said and "5 queries, 2 models, $" in said
        asked = len(server.requests)
        assert asked == 10 and run(tmp_path, *candidates, usd_per_million="1000,2000") == 0
        assert len(server.requests) == asked and "would ask 0 turns" in capsys.readouterr().out


@pytest.mark.slow
def test_new_and_changed_queries_alone_are_asked(tmp_path):
    with endpoint(calculator) as server:
        candidates = [f"{server.url}#good", f"{server.url}#bad"]
        assert run(tmp_path, *candidates, queries=QUERIES[:3]) == 0
        assert run(tmp_path, *candidates) == 0 and len(server.requests) == 10
        changed = [*QUERIES[:4], QUERIES[4] | {"query": "What is 6 plus 6?", "gold": "12"}]
        assert run(tmp_path, *candidates, queries=changed) == 0 and len(server.requests) == 12
        assert rows(tmp_path)[4]["correct"] == {"good": 1.0, "bad": 0.0}


def test_a_dry_run_says_the_cost_and_asks_nothing(tmp_path, capsys):
    with endpoint(calculator) as server:
        options = {"judge": f"{server.url}#judge", "usd_per_million": "1,2", "dry_run": True}
        assert run(tmp_path, f"{server.url}#good", f"{server.url}#bad", **options) == 0
        assert not server.requests and not (tmp_path / "outcomes.jsonl").exists() and not list(tmp_path.glob("*.work"))
    said = capsys.readouterr().out
    assert said.count("would ask 5 turns") == 2 and "judge: would grade 10 answers" in said and said.count("$") == 3


def test_what_one_candidate_never_answers_is_missing_and_not_0(tmp_path, capsys):
    def reply(body, number):
        refused = body["model"] == "bad" and "What is 3" in body["messages"][0]["content"]
        return Failure(400, "no threes") if refused else calculator(body)

    with endpoint(reply) as server:
        candidates = [f"{server.url}#good", f"{server.url}#bad"]
        assert run(tmp_path, *candidates) == 1 and "1 of 5 questions are not answered" in error_of(capsys)
        assert run(tmp_path, *candidates, allow_missing=True) == 0
        assert "1 score is missing (bad 1)" in capsys.readouterr().err
    assert rows(tmp_path)[2]["rewards"] == {"good": 1.0, "bad": None} == rows(tmp_path)[2]["correct"]
    assert read_outcomes([tmp_path / "outcomes.jsonl"]).missing() == {"bad": 1}


def test_a_judge_grades_and_an_unreadable_grade_is_missing(tmp_path, capsys):
    def reply(body, number):
        if body["model"] != "judge":
            return calculator(body)
        prompt = body["messages"][0]["content"]
        if "What is 2" in prompt and "\n7\n" in prompt:
            return "I cannot say."
        return json.dumps({"explanation": "x", "score": 3 if "\n7\n" in prompt else 9})

    with endpoint(reply) as server:
        candidates, judge = [f"{server.url}#good", f"{server.url}#bad"], f"{server.url}#judge"
        assert run(tmp_path, *candidates, judge=judge, allow_missing=True) == 0
        assert [row["rewards"]["good"] for row in rows(tmp_path)] == [9.0] * 5
        assert [row["rewards"]["bad"] for row in rows(tmp_path)] == [3.0, None, 3.0, 3.0, 3.0]
        assert rows(tmp_path)[0]["correct"] == {"good": 1.0, "bad": 0.0}, "gold answers make correct all the same"
        asked = len(server.requests)
        assert run(tmp_path, *candidates, judge=judge) == 1 and len(server.requests) == asked, "no grade is paid twice"
        assert "1 score is missing (bad 1)" in error_of(capsys)


def test_the_budget_holds_over_all_candidates_and_the_next_run_goes_on(tmp_path, capsys):
    with endpoint(calculator) as server:
        candidates = [f"{server.url}#good", f"{server.url}#bad"]
        options = {"usd_per_million": "0,100000", "max_tokens": 10, "concurrency": 1}  # a dollar is reserved for each
        assert run(tmp_path, *candidates, max_usd=1.15, **options) == 1
        assert "stopped before $1.15 would be exceeded" in error_of(capsys), (
            "the limit that was given, not what is left"
        )
        asked = len(server.requests)
        assert 0 < asked < 10 and run(tmp_path, *candidates, max_usd=9.0, **options) == 0
        assert len(server.requests) == 10


@pytest.mark.slow
def test_directories_answer_and_a_reward_model_scores(tmp_path, capsys):
    import torch
    from helpers import models
    from transformers import AutoConfig, AutoModelForSequenceClassification

    for name in ("one", "two"):
        models.make_model(tmp_path / name, hidden_size=32 if name == "one" else 64)
    models.make_model(tmp_path / "reward")
    config = AutoConfig.from_pretrained(tmp_path / "reward", num_labels=1)
    torch.manual_seed(1)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "reward")
    queries = [{"query": f"hello {'x' * n}"} for n in range(4)]
    options = {"reward_model": tmp_path / "reward", "max_tokens": 4, "queries": queries}
    assert run(tmp_path, str(tmp_path / "one"), f"second={tmp_path / 'two'}", **options) == 0
    first = rows(tmp_path)
    assert (
        all(isinstance(score, float) for row in first for score in row["rewards"].values())
        and "correct" not in first[0]
    )
    (tmp_path / "outcomes.jsonl").unlink()
    assert run(tmp_path, str(tmp_path / "one"), f"second={tmp_path / 'two'}", **options) == 0
    assert rows(tmp_path) == first, "the kept scores, or the same ones again"
    kept = [json.loads(line) for line in (tmp_path / "outcomes.work/rewards.jsonl").read_text().splitlines()]
    assert len({row["key"] for row in kept}) == len(kept)


@pytest.mark.slow
@pytest.mark.parametrize("pad", ["none", "end of turn"])
def test_a_reward_does_not_depend_on_its_batch(tmp_path, pad):
    import torch
    from helpers import models, tiny
    from transformers import AutoConfig, AutoModelForSequenceClassification

    from fastft.compose.router.scoring.reward_model import RewardModel

    models.make_model(tmp_path / "reward")
    config = AutoConfig.from_pretrained(tmp_path / "reward", num_labels=1)
    config.pad_token_id = None if pad == "none" else tiny.byte_level().convert_tokens_to_ids("<|im_end|>")
    torch.manual_seed(1)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "reward")
    pairs = [("Hello", "Hi"), ("What is it?", "It is a long story about many things."), ("a", "b")]
    together = RewardModel(str(tmp_path / "reward")).score(pairs)
    alone = RewardModel(str(tmp_path / "reward"), batch_size=1).score(pairs)
    assert together == pytest.approx(alone, abs=1e-5) and len(set(together)) == 3


@pytest.mark.slow
def test_what_is_no_reward_model_is_one_line(tmp_path):
    from helpers import models

    from fastft.compose.router.scoring.reward_model import RewardModel
    from fastft.errors import UserError

    models.make_model(tmp_path / "classes", num_labels=3)
    with pytest.raises(UserError, match="has 3 outputs; a reward model has one"):
        RewardModel(str(tmp_path / "classes"))
    models.make_model(tmp_path / "chat", num_labels=1)
    with pytest.raises(UserError, match="is no reward model: its weights have no score"):
        RewardModel(str(tmp_path / "chat"))
    with pytest.raises(UserError, match="holds no model"):
        RewardModel(str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    "queries, options, words",
    [
        ([{"id": "a"}], {}, "is no query"),
        ([{"id": "a", "query": "x", "gold": "1"}] * 2, {}, "the id a is used twice"),
        ([{"query": "x", "gold": ["1"]}], {}, '"gold" must be a text or a number'),
        ([{"query": "x", "tags": "one"}], {}, '"tags" must be a list of texts'),
        ([{"query": "x"}], {}, "have no gold answer, the first is"),
        (QUERIES, {"gold": "none"}, "nothing scores the answers"),
        (QUERIES, {"reward_model": "a", "judge": "http://h/v1#j"}, "give one of them"),
        (QUERIES, {"reward_model": "nowhere"}, "nowhere: the directory holds no model"),
        (QUERIES, {"candidates": ["http://h/v1#a"]}, "name two models or more"),
        (QUERIES, {"candidates": ["http://h/v1#a", "http://i/v1#a"]}, "two are called 'a'"),
        (QUERIES, {"candidates": ["http://h/v1#a", "nowhere"]}, "nowhere: holds no model"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_asked(tmp_path, capsys, queries, options, words):
    candidates = options.pop("candidates", ["http://h/v1#a", "http://h/v1#b"])
    assert run(tmp_path, *candidates, queries=queries, **options) in (1, 2)
    assert words in error_of(capsys)


def test_the_queries_are_not_overwritten(tmp_path, capsys):
    queries = tmp_path / "q.jsonl"
    queries.write_text(json.dumps({"query": "2 + 2?", "gold": "4"}) + "\n")
    (tmp_path / "link.jsonl").symlink_to(queries)
    with endpoint(calculator) as server:
        command = ["router", "outcomes", str(queries), "--candidates", f"{server.url}#a", f"{server.url}#b", "-o"]
        for output in (queries, tmp_path / "link.jsonl"):
            assert cli.main([*command, str(output)]) == 1 and "would be overwritten" in error_of(capsys)
        assert not server.requests and queries.read_text().count("query") == 1
