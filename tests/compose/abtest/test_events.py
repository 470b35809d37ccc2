"""From the gateway's record to the figures: `fastft record export --as events`, then `fastft abtest figures`."""

import json
from pathlib import Path

import numpy as np

from fastft.cli import main
from fastft.compose.abtest.policy import Experiment
from fastft.serve.gateway.events import EventLog, ServedTurn

DAY = 86_400
START = 1_700_000_000.0
ARMS = {"control": ("vicuna", 0.8), "blend": ("chai", 0.2)}


def record_experiment(directory: Path, users: int) -> dict[str, str]:
    """Serve turns of `users` over 9 days: users of the blend come back every day, others every second. Returns the arms."""
    experiment, log, arms = Experiment("spring", ARMS, control="control"), EventLog(directory), {}
    rng = np.random.default_rng(0)
    for user in map(str, range(users)):
        for day in range(9):
            assigned = experiment.assign(user, START)
            arms[user] = assigned.arm
            visits = day == 0 or rng.random() < (0.9 if assigned.arm == "blend" else 0.5)
            for turn in range(int(visits) * (1 + int(rng.integers(4)))):
                log.add(served(user, START + day * DAY + turn, assigned))
    log.add(served("0", START + 9 * DAY + 99, experiment.assign("0", START)))
    # After the experiment the record goes on. These days have not passed for the experiment, though they have for the file.
    log.add(served(None, START + 40 * DAY, experiment.assign(None, START)))
    log.close()
    return arms


def served(user: str | None, at: float, assigned) -> ServedTurn:
    body = json.dumps({"model": "spring", "messages": [{"role": "user", "content": "hi"}]}).encode()
    return ServedTurn(
        path="/v1/chat/completions", asked="spring", body=body, streamed=False, key=None, conversation=user,
        conversation_from="header", turn=1, policy="ab", chosen=assigned.model, probabilities={assigned.model: 1.0},
        why=assigned.why, at=at, answered=assigned.model, status=200, outcome="answered", total_s=0.5,
        sent=[b'{"choices": [{"index": 0, "message": {"content": "hello"}}]}'], assignment=assigned, unit=user,
    )  # fmt: skip


def test_figures_come_from_the_record_with_its_own_shares(tmp_path, capsys):
    arms = record_experiment(tmp_path / "record", users=250)
    events, out = tmp_path / "events.jsonl", tmp_path / "out"
    assert main(["record", "export", str(tmp_path / "record"), "-o", str(events)]) == 0
    assert main(["abtest", "figures", str(events), "--control", "control", "-o", str(out), "--days", "30"]) == 0
    made = json.loads((out / "figures.json").read_text())
    assert made["sample_ratio"]["users"] == {arm: list(arms.values()).count(arm) for arm in sorted(ARMS)}
    assert made["sample_ratio"]["expected"] == {"blend": 50, "control": 200}, "the shares of the experiment, 80 : 20"
    found = made["arms"]["blend"]
    assert found["retention_ratio"]["1"] > 1.5 and found["dzeta"][1] > 0
    assert made["horizon"]["reached"] == 8
    assert made["unit"] == "turns" and made["verdict"].startswith(
        "So far, after 8 of 30 days: blend differs from control: "
    )
    assert "Left out: turns that exposed nobody to an arm: 1." in made["remarks"]
    capsys.readouterr()


def test_shares_that_changed_on_the_way_are_refused(tmp_path, capsys):
    record_experiment(tmp_path / "record", users=50)
    events, out = tmp_path / "events.jsonl", tmp_path / "out"
    assert main(["record", "export", str(tmp_path / "record"), "-o", str(events)]) == 0
    rows = [json.loads(line) for line in events.read_text().splitlines()]
    for row in rows[len(rows) // 2 :]:
        row["share"] = 0.5
    events.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["abtest", "figures", str(events), "--control", "control", "-o", str(out)]
    assert main(words) == 1
    assert "the shares of the arms changed during the experiment" in capsys.readouterr().err
    assert main([*words, "--shares", "control=0.8", "blend=0.2"]) == 0
