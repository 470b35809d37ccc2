"""Judging a policy before it is served: estimators that agree with the truth, a record of the real writer, refusals."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import orjson
import pytest
from helpers import routers

from fastft.cli import main
from fastft.compose.blend import BlendPolicy
from fastft.compose.router.replay.propensity import (
    LoggedTurns,
    clustered_mean,
    doubly_robust,
    effective_turns,
    inverse_propensity,
    mean_rewards,
    require_overlap,
    robust_rewards,
    self_normalised,
)
from fastft.compose.router.replay.simulate import read_rewards
from fastft.data.conversation import Conversation
from fastft.errors import UserError
from fastft.serve.gateway.events import EventLog, ServedTurn

CONVERSATIONS, TURNS, MODELS = 150, 3, 3


def population(rng: np.random.Generator) -> np.ndarray:
    """What each model would earn on every turn [N, M], 0 or 1; the turns of a conversation depend on each other."""
    liking_C11 = rng.normal(0, 0.2, (CONVERSATIONS, 1, 1))
    chances = 0.5 + np.array([0.0, 0.1, -0.2]) + liking_C11 + rng.normal(0, 0.1, (CONVERSATIONS, TURNS, MODELS))
    return (rng.random(chances.shape) < chances).astype(float).reshape(-1, MODELS)


def logged(rng: np.random.Generator, rewards_NM: np.ndarray, wanted_NM: np.ndarray) -> LoggedTurns:
    """Turns as a policy would have left them that chooses with random probabilities, none below 0.05."""
    logged_NM = 0.05 + 0.85 * rng.dirichlet([4] * MODELS, len(rewards_NM))
    chosen_N = (rng.random((len(rewards_NM), 1)) > logged_NM.cumsum(1)).sum(1)
    conversations = [str(turn // TURNS) for turn in range(len(rewards_NM))]
    return LoggedTurns(rewards_NM[np.arange(len(rewards_NM)), chosen_N], chosen_N, logged_NM, wanted_NM, conversations)


@pytest.mark.parametrize(
    ("simulations", "low", "high"), [(60, 0.86, 1.0), pytest.param(1000, 0.92, 0.97, marks=pytest.mark.slow)]
)
def test_the_estimates_agree_with_the_truth_within_their_intervals(simulations, low, high):
    """95 % of the intervals hold the truth, and the doubly robust one is right with a wrong model of rewards, too."""
    rng = np.random.default_rng(0)
    truth = float(np.array([0.2, 0.7, 0.1]) @ np.array([0.5, 0.6, 0.3]))
    held: dict[str, list[bool]] = {}
    errors: dict[str, list[float]] = {}
    for _ in range(simulations):
        rewards_NM = population(rng)
        wanted_NM = np.eye(MODELS)[rng.choice(MODELS, len(rewards_NM), p=[0.2, 0.7, 0.1])]
        turns = logged(rng, rewards_NM, wanted_NM)
        wrong_NM = np.tile([0.9, 0.0, 0.8], (len(rewards_NM), 1))
        found = {
            "ips": inverse_propensity(turns),
            "snips": self_normalised(turns),
            "dr": doubly_robust(turns, mean_rewards(turns)),
            "wrong": doubly_robust(turns, wrong_NM),
        }
        for name, estimate in found.items():
            held.setdefault(name, []).append(estimate.low <= truth <= estimate.high)
            errors.setdefault(name, []).append(estimate.value - truth)
    for name in held:
        assert low <= np.mean(held[name]) <= high, name
        assert abs(np.mean(errors[name])) < 3 * np.std(errors[name]) / np.sqrt(simulations), f"{name} is biased"
    direct = float(np.array([0.2, 0.7, 0.1]) @ np.array([0.9, 0.0, 0.8]))
    assert abs(direct - truth) > 0.2, "the wrong model alone would be far off"
    assert np.std(errors["dr"]) < np.std(errors["ips"]), "a model of rewards takes variance away"


def test_the_estimates_by_hand():
    turns = LoggedTurns(
        rewards_N=np.array([1.0, 0.0, 1.0]),
        chosen_N=np.array([0, 1, 1]),
        logged_NM=np.array([[0.5, 0.5], [0.8, 0.2], [0.5, 0.5]]),
        wanted_NM=np.array([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]),
        conversations=["a", "b", "c"],
    )
    assert turns.weights_N.tolist() == [2, 5, 2]
    assert inverse_propensity(turns).value == pytest.approx(4 / 3)
    assert self_normalised(turns).value == pytest.approx(4 / 9)
    predicted_NM = np.array([[0.5, 0.5]] * 3)
    assert robust_rewards(turns, predicted_NM).tolist() == pytest.approx([1.5, -2.0, 1.5])
    assert effective_turns(turns) == pytest.approx(81 / 33)


def test_a_policy_that_was_served_is_worth_what_it_earned():
    rng = np.random.default_rng(1)
    turns = logged(rng, population(rng), np.empty(0))
    turns = replace(turns, wanted_NM=turns.logged_NM)
    served = clustered_mean(turns.rewards_N, turns.conversations)
    assert inverse_propensity(turns) == served and self_normalised(turns).value == pytest.approx(served.value)
    assert effective_turns(turns) == pytest.approx(len(turns.rewards_N))


def test_turns_of_one_conversation_are_one_draw():
    values = np.random.default_rng(0).normal(0, 1, 200)
    alone = clustered_mean(values, [str(i) for i in range(200)])
    doubled = clustered_mean(np.repeat(values, 4), np.repeat(np.arange(200), 4).astype(str).tolist())
    assert doubled.low == pytest.approx(alone.low) and doubled.high == pytest.approx(alone.high)
    with pytest.raises(UserError, match="of one conversation"):
        clustered_mean(values, ["a"] * 200)


def test_a_model_of_rewards_does_not_see_the_turn_that_it_predicts():
    rng = np.random.default_rng(2)
    turns = logged(rng, population(rng), np.empty(0))
    before = mean_rewards(turns)
    changed = replace(turns, rewards_N=np.where(np.array(turns.conversations) == "7", 100.0, turns.rewards_N))
    own = np.flatnonzero(np.array(turns.conversations) == "7")
    assert (mean_rewards(changed)[own] == before[own]).all() and (mean_rewards(changed) != before).any()


def test_no_overlap_is_said_with_numbers():
    turns = LoggedTurns(
        np.ones(4), np.zeros(4, int), np.array([[1.0, 0], [1, 0], [0.5, 0.5], [1, 0]]), np.array([[0.0, 1]] * 3 + [[1, 0]]),
        list("abcd"),
    )  # fmt: skip
    with pytest.raises(UserError, match=r"no overlap: on 2 of 4 turns \(50\.0% of its choices\).*\(large on 2\)"):
        require_overlap(turns, ["small", "large"])
    require_overlap(replace(turns, wanted_NM=turns.logged_NM), ["small", "large"])


# A record ------------------------------------------------------------------------------------------------------------------


def turn(conversation: str, number: int, question: str, blend: BlendPolicy | None, **more) -> ServedTurn:
    messages = [{"role": "user", "content": question}]
    choice = blend.choose(Conversation(conversation, []), number, ["a", "b"]) if blend else None
    model = choice.model if choice else "b"
    sent = [orjson.dumps({"choices": [{"index": 0, "message": {"content": "yes"}, "finish_reason": "stop"}]})]
    fields = {
        "path": "/v1/chat/completions",
        "asked": "chat" if blend else "b",
        "body": orjson.dumps({"model": "chat", "messages": messages}),
        "streamed": False,
        "key": None,
        "conversation": conversation,
        "conversation_from": "header",
        "turn": number,
        "policy": "blend" if blend else None,
        "chosen": model,
        "probabilities": choice.probabilities if choice else {"b": 1.0},
        "why": "drawn",
        "answered": model,
        "status": 200,
        "outcome": "answered",
        "sent": sent,
    }
    return ServedTurn(**(fields | more))


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    """120 conversations of two turns that a blend answered, and what these were worth: a is good at sums, b at poems."""
    directory = tmp_path_factory.mktemp("simulate")
    blend, rng = BlendPolicy("chat", {"a": 1, "b": 1}, seed="3"), np.random.default_rng(0)
    rewards, turns = [], []
    for conversation in range(120):
        asks, good = (routers.SUMS, "a") if conversation % 2 else (routers.POEMS, "b")
        for number in (1, 2):
            made = turn(f"c{conversation}", number, asks[conversation % len(asks)], blend)
            turns.append(made)
            rewards.append({"id": made.id, "reward": float(rng.random() < (0.9 if made.chosen == good else 0.3))})
    turns.append(turn("c-failed", 1, "?", blend, answered=None, outcome="failed", sent=[]))
    turns.append(turn("c-failover", 1, "?", BlendPolicy("chat", {"a": 1, "b": 0}), answered="b"))
    turns.append(turn("c-titles", 1, "?", blend, conversation_from="background"))
    turns.append(turn("c-unscored", 1, "?", blend))
    turns.append(turn("c-direct", 1, "?", None))
    rewards.append({"id": turns[-1].id, "reward": 1.0})
    for name, texts in (("texts", True), ("hashes", False)):
        log = EventLog(directory / name, texts)
        for each in turns:
            log.add(each)
        log.close()
        assert log.lost == 0
        assert main(["record", "export", str(directory / name), "-o", str(directory / f"{name}.jsonl")]) == 0
    (directory / "rewards.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rewards))
    lines = ["id,reward", *(f"{row['id']},{row['reward']}" for row in rewards)]
    (directory / "rewards.csv").write_text("\n".join(lines) + "\n")
    routers.train(directory / "router")
    return directory


def simulated(record: Path, tmp_path: Path, *more: str, rewards: str = "rewards.jsonl") -> dict:
    command = [
        "router",
        "simulate",
        str(record / "texts.jsonl"),
        "--rewards",
        str(record / rewards),
        "-o",
        str(tmp_path),
    ]
    assert main([*command, *more]) == 0
    return json.loads((tmp_path / "simulation.json").read_text())


def test_a_router_is_judged_by_the_record_of_a_blend(record, tmp_path, capsys):
    found = simulated(record, tmp_path, "--policy", str(record / "router"), "--name", "chat")
    assert (found["turns"], found["conversations"]) == (240, 120)
    assert found["left_out"] == {
        "without an answer": 1,
        "answered by another model than the chosen one (failover)": 1,
        "no turn of a conversation": 1,
        "without a reward": 1,
        "asked for b, not for chat": 1,
    }
    assert found["choices"] == {"a": 0.5, "b": 0.5}
    for value, low, high in found["estimates"].values():
        assert low <= 0.9 <= high and value > found["served"][2], "what a router that knows both would earn"
    assert found["gain"][1] > 0 and 90 < found["effective_turns"] < 150 and found["largest_weight"] == 2
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1].startswith(f"{record / 'router'} would earn more than what was served: ")


def test_the_blend_itself_would_earn_what_it_earned(record, tmp_path, capsys):
    found = simulated(record, tmp_path, "--policy", "blend:a,b=1", "--name", "chat", rewards="rewards.csv")
    assert found["estimates"]["IPS"] == pytest.approx(found["served"]) and found["effective_turns"] == pytest.approx(
        240
    )
    assert "cannot be told from what was served" in capsys.readouterr().out.splitlines()[-1]


def test_a_fixed_model_and_too_few_turns(record, tmp_path, capsys):
    few = tmp_path / "few.jsonl"
    few.write_bytes(b"".join((record / "texts.jsonl").read_bytes().splitlines(keepends=True)[:12]))
    command = ["router", "simulate", str(few), "--rewards", str(record / "rewards.jsonl"), "--policy", "a"]
    assert main(command) == 0
    assert "effective turns of 12: too few to trust the intervals" in " ".join(capsys.readouterr().out.split())


def test_the_users_of_an_experiment_are_drawn_once(record, tmp_path):
    """All conversations of a user have the same arm, so a user is one draw, however many conversations there are."""
    events = [json.loads(line) for line in (record / "texts.jsonl").read_text().splitlines()]
    wide = tmp_path / "units.jsonl"
    lines = [json.dumps(event | {"unit": f"u{number // 24}"}) for number, event in enumerate(events)]
    wide.write_text("\n".join(lines) + "\n")
    command = ["router", "simulate", str(wide), "--rewards", str(record / "rewards.jsonl"), "--name", "chat"]
    assert main([*command, "--policy", "a", "-o", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "simulation.json").read_text())["conversations"] == 10


def test_votes_judge_a_model_by_the_battles_that_drew_it(record, tmp_path, capsys):
    """The arena draws both sides from all models alike: a model's value is its share of wins against a drawn opponent."""
    rng, turns, votes = np.random.default_rng(0), [], []
    for number in range(200):
        models = dict(zip("ab", rng.permutation(["x", "y", "z"])[:2].tolist()))
        ids = {}
        for side, model in models.items():
            battle = {"id": str(number), "side": side, "anonymous": True, "drawn_from": ["x", "y", "z"]}
            more = {"asked": model, "chosen": model, "answered": model, "probabilities": {model: 1.0}, "battle": battle}
            made = turn(f"battle-{number}-{side}", 1, "?", None, conversation_from="battle", **more)
            turns.append(made)
            ids[side] = [made.id]
        strength = {"x": 3, "y": 2, "z": 1}
        winner = max("ab", key=lambda side: strength[models[side]])
        votes.append({"battle": str(number), "winner": winner, "counted": True, "models": models, "turns": ids})
    gone = {"counted": False, "why_not": "it was taken back", "turns": {"a": [turns[0].id], "b": []}}
    votes.append({"battle": "gone", "winner": "b", **gone})
    log = EventLog(tmp_path / "record")
    for each in turns:
        log.add(each)
    for vote in votes:
        log.add_vote(vote)
    log.close()
    for form in ("events", "votes"):
        out = str(tmp_path / f"{form}.jsonl")
        assert main(["record", "export", str(tmp_path / "record"), "--as", form, "-o", out]) == 0
    command = ["router", "simulate", str(tmp_path / "events.jsonl"), "--rewards", str(tmp_path / "votes.jsonl")]
    found = {}
    for model in "xyz":
        assert main([*command, "--policy", model, "-o", str(tmp_path)]) == 0
        found[model] = json.loads((tmp_path / "simulation.json").read_text())
    assert found["x"]["turns"] == 400 and found["x"]["conversations"] == 200
    for model, wins in (("x", 1.0), ("y", 0.5), ("z", 0.0)):
        value, low, high = found[model]["estimates"]["SNIPS"]
        assert value == pytest.approx(wins, abs=0.1) and low <= wins <= high


def test_a_vote_is_a_reward_for_the_turns_of_both_sides(tmp_path):
    votes = [
        {"battle": "1", "winner": "a", "counted": True, "turns": {"a": ["x1", "x2"], "b": ["y1"]}},
        {"battle": "2", "winner": "tie", "counted": True, "turns": {"a": ["x3"], "b": ["y3"]}},
        {"battle": "3", "winner": "b", "counted": False, "turns": {"a": ["x4"], "b": ["y4"]}},
    ]
    (tmp_path / "votes.jsonl").write_text("".join(json.dumps(vote) + "\n" for vote in votes))
    assert read_rewards(tmp_path / "votes.jsonl") == {"x1": 1, "x2": 1, "y1": 0, "x3": 0.5, "y3": 0.5}


# Outcomes ------------------------------------------------------------------------------------------------------------------


def test_over_outcomes_the_value_is_exact_and_the_estimates_agree(tmp_path, capsys):
    rng = np.random.default_rng(0)
    scores_NM = (rng.random((600, 3)) < [0.3, 0.5, 0.8]).astype(float)
    rows = [
        {"id": str(i), "query": f"question {i}", "tags": [], "rewards": dict(zip("abc", scores))}
        for i, scores in enumerate(scores_NM.tolist())
    ]
    (tmp_path / "o.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["router", "simulate", str(tmp_path / "o.jsonl"), "-o", str(tmp_path)]
    assert main([*command, "--policy", "blend:a=1,c=3"]) == 0
    found = json.loads((tmp_path / "simulation.json").read_text())
    value = float(scores_NM[:, 0].mean() / 4 + 3 * scores_NM[:, 2].mean() / 4)
    assert found["exact"][0] == pytest.approx(value) and found["served"][0] == pytest.approx(scores_NM.mean())
    assert (
        found["exact"][2] - found["exact"][1] < found["estimates"]["doubly robust"][2] - found["estimates"]["SNIPS"][1]
    )
    for _, low, high in found["estimates"].values():
        assert low <= value <= high
    assert "blend:a=1,c=3 would earn more than a uniform blend" in capsys.readouterr().out


# Bad input -----------------------------------------------------------------------------------------------------------------


def refused(capsys, *command: str, code: int = 1) -> str:
    capsys.readouterr()
    assert main(["router", "simulate", *command]) == code
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "Traceback" not in said
    return said


def test_what_cannot_be_judged_is_refused_in_one_line(record, tmp_path, capsys):
    texts, rewards = str(record / "texts.jsonl"), ["--rewards", str(record / "rewards.jsonl")]
    said = refused(capsys, texts, *rewards, "--policy", "a")
    assert "no overlap: on 1 of 241 turns" in said and "(a on 1)" in said and "--name" in said
    said = refused(capsys, texts, *rewards, "--policy", "aa")
    assert "aa is not a model or a router's directory here" in said and "did you mean a?" in said
    assert "c is not a model here" in refused(capsys, texts, *rewards, "--policy", "blend:a=1,c=1")
    assert "sum to 0" in refused(capsys, texts, *rewards, "--policy", "blend:a=0,b=0")
    assert "NAME=WEIGHT" in refused(capsys, texts, *rewards, "--policy", "blend:a=x", code=2)
    assert "--rewards FILE" in refused(capsys, texts, "--policy", "a", code=2)
    hashes = str(record / "hashes.jsonl")
    assert "needs the questions themselves" in refused(capsys, hashes, *rewards, "--policy", str(record / "router"))
    assert main(["router", "simulate", hashes, *rewards, "--policy", "blend:a,b", "--name", "chat"]) == 0
    said = refused(capsys, texts, *rewards, "--policy", "a", "--name", "chart")
    assert "asked for it; they asked for b, chat; did you mean chat?" in said
    assert "--margin -1: must be 0 or more" in refused(capsys, texts, "--policy", "a", "--margin", "-1", code=2)
    simulation = tmp_path / "simulation.json"
    simulation.write_text((record / "rewards.jsonl").read_text())
    said = refused(capsys, texts, "--rewards", str(simulation), "--policy", "blend:a,b", "-o", str(tmp_path))
    assert "would be overwritten" in said
    assert "fastft record export" in refused(capsys, str(record / "texts"), *rewards, "--policy", "a")


def test_wrong_files_are_refused_in_one_line(record, tmp_path, capsys):
    def written(name: str, *rows: object) -> str:
        (tmp_path / name).write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
        return str(tmp_path / name)

    event = json.loads((record / "texts.jsonl").read_text().splitlines()[0])
    good = written("good.jsonl", {"id": event["id"], "reward": 1})
    half = written("half.jsonl", event | {"probabilities": {"a": 0.3, "b": 0.3}})
    assert "sum to 0.600, not to 1" in refused(capsys, half, "--rewards", good, "--policy", "a")
    never = written("never.jsonl", event | {"probabilities": {event["chosen"]: 0, "z": 1}})
    assert "give no chance" in refused(capsys, never, "--rewards", good, "--policy", "z")
    assert "neither an event" in refused(capsys, written("x.jsonl", {"id": 1}), "--rewards", good, "--policy", "a")
    texts = str(record / "texts.jsonl")
    for number, broken in enumerate(({"id": 3}, {"chosen": None}, {"probabilities": {"a": None}})):
        broken = written(f"broken{number}.jsonl", event, event | broken)
        assert "line 2: is no event of a record" in refused(capsys, broken, "--rewards", good, "--policy", "a")
    vote = written("vote.jsonl", {"battle": "1", "winner": "a", "counted": True, "turns": {"a": ["x"]}})
    assert "is no vote of a record" in refused(capsys, texts, "--rewards", vote, "--policy", "a")
    twice = written("twice.jsonl", {"id": "x", "reward": 1}, {"id": "x", "reward": 0})
    assert "second reward" in refused(capsys, texts, "--rewards", twice, "--policy", "a")
    infinite = written("infinite.jsonl", '{"id": "x", "reward": NaN}')
    assert "not a finite number" in refused(capsys, texts, "--rewards", infinite, "--policy", "a")
    words = written("words.csv", "id,reward", "x,good")
    assert "words.csv: line 2: a reward is" in refused(capsys, texts, "--rewards", words, "--policy", "a")
    assert "no such file" in refused(capsys, texts, "--rewards", str(tmp_path / "no.csv"), "--policy", "a")
