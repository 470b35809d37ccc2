"""The verdict says what matters most, and does not say what is not so: lost retention, single days, noise, failures."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from helpers.experiments import visits, write_rows
from scipy.stats import fisher_exact

from fastft.cli import main
from fastft.compose.abtest.activity import ColumnsConfig, read_activity
from fastft.compose.abtest.estimates import Effect, compare
from fastft.compose.abtest.shares import compare_shares
from fastft.compose.abtest.verdict import percent_change, size

T0 = 1_700_000_000
DAY = 86_400


def figures(tmp_path: Path, capsys, header: str, rows, *words: str, control: str = "control") -> tuple[dict, str]:
    """(figures.json, what was printed, in one line)"""
    path = write_rows(tmp_path / "f.csv", header, rows)
    assert main(["abtest", "figures", str(path), "--control", control, "-o", str(tmp_path / "out"), *words]) in (0, 1)
    return json.loads((tmp_path / "out/figures.json").read_text()), " ".join(capsys.readouterr().out.split())


def wide(shares: dict[str, list[float]], users: int = 200) -> list[list]:
    """Rows of user, arm, and one cell a day: 1 for the first users of the arm, as many as its share says."""
    return [
        [f"{arm}{u}", arm, *(int(u < round(users * share)) for share in of_days)]
        for arm, of_days in shares.items()
        for u in range(users)
    ]


def test_nobody_on_day_7_leads_the_verdict(tmp_path, capsys):
    rows = wide({"control": [0.5, 0.31], "test": [0.5, 0]})
    made, said = figures(tmp_path, capsys, "user,arm,retention_1,retention_7", rows)
    assert made["verdict"] == (
        "test differs from control: nobody comes back against 31.0 % (-31.0 points [-37.7, -24.7]) on day 7."
    )
    found = made["arms"]["test"]["retention_difference"]["7"]
    assert found["difference"] == pytest.approx([-0.31, -0.377, -0.247], abs=5e-4) and found["p_holm"] < 1e-15
    assert found["p"] == pytest.approx(2 * fisher_exact([[0, 200], [62, 138]])[1]), "for two days that were looked at"
    assert made["arms"]["test"]["days_left_out"] == {"retention": [7]}
    assert "test retention share on day 7 -31.0 points [-37.7, -24.7] <.001 <.001" in said


def test_nobody_on_any_day_leads_the_verdict(tmp_path, capsys):
    rows = wide({"control": [0.45, 0.2], "test": [0, 0]})
    made, said = figures(tmp_path, capsys, "user,arm,retention_1,retention_7", rows)
    assert "intervals hold the truth in" not in said, "there is no line"
    assert made["verdict"].startswith("test differs from control: nobody comes back against 45.0 % (-45.0 points ")
    assert "on day 1 (2 such days: 1, 7)" in made["verdict"]
    nobody = wide({"control": [0, 0], "test": [0, 0]})
    made, _ = figures(tmp_path, capsys, "user,arm,retention_1,retention_7", nobody)
    assert made["verdict"] == "test cannot be compared with control: nobody comes back."


def test_an_arm_that_loses_everybody_after_day_3_is_said_first(tmp_path, capsys):
    rows = [row for row in visits(0, users=300) if row[1] == "control" or row[2] <= 3]
    made, said = figures(tmp_path, capsys, "user,arm,day,amount", rows, "--days", "8")
    assert made["verdict"].startswith("test differs from control: nobody comes back against ")
    assert "4 to 8)" in made["verdict"] and "on no line, because" in said


def test_few_users_on_a_day_are_compared_like_nobody(tmp_path, capsys):
    rows = wide({"control": [0.5, 0.31], "test": [0.5, 0.01]})
    made, _ = figures(tmp_path, capsys, "user,arm,retention_1,retention_7", rows)
    assert made["verdict"].startswith("test differs from control: 1.0 % come back against 31.0 % (-30.0 points ")


@pytest.mark.parametrize("share, begins", [(0.3, "test differs from control: 30.0 % come back against 50.0 %"),
                                           (0.5, "No difference between control and test can be told from chance: "
                                                 "retention on day 1 +0.0 points [-9.7, +9.7], amount per user ")])  # fmt: skip
def test_a_single_day_counts_beside_amounts(tmp_path, capsys, share, begins):
    rows = [[*row, 1 + i % 7] for i, row in enumerate(wide({"control": [0.5], "test": [share]}))]
    made, _ = figures(tmp_path, capsys, "user,arm,retention_1,amount", rows)
    assert made["verdict"].startswith(begins), made["verdict"]


def test_trials_on_a_single_day_have_its_retention(tmp_path, capsys):
    path = write_rows(tmp_path / "f.csv", "user,retention_1,amount", [[u, u % 2, 1 + u % 7] for u in range(400)])
    assert main(["abtest", "simulate", str(path), "--experiments", "100", "--dzeta", "-0.5"]) == 0
    said = capsys.readouterr().out
    line = next(line for line in said.splitlines() if line.strip().startswith("retention"))
    assert "-0.1967" in line and re.search(r"\d\d % retention", " ".join(said.split())), said


@pytest.mark.parametrize("counts", [(0, 20, 5, 22), (3, 40, 12, 45), (1, 9, 0, 9), (7, 7, 3, 8), (5, 30, 5, 30)])
def test_few_users_are_compared_by_fishers_test(counts):
    a, n, c, m = counts
    assert compare_shares(*counts).p == pytest.approx(fisher_exact([[a, n - a], [c, m - c]])[1])
    assert compare_shares(*counts).low <= a / n - c / m <= compare_shares(*counts).high


def test_the_interval_of_a_difference_is_newcombes():
    """56/70 and 48/80: .0524 to .3339 (Newcombe 1998, table II, method 10)."""
    found = compare_shares(56, 70, 48, 80)
    assert (found.low, found.high) == pytest.approx((0.0524, 0.3339), abs=5e-5)


def test_few_active_users_give_no_false_alarms(tmp_path, capsys):
    """Half of the days have no visitor of an arm. With such days on the lines, 30 % of these experiments found something."""
    rng = np.random.default_rng(0)
    rows = [[u, 0, 1 + int(rng.integers(9))] for u in range(400)]
    rows += [
        [u, k, 1 + int(rng.pareto(2) * 5)] for u in range(400) for k in range(1, 15) if rng.random() < 0.02 * k**-0.5
    ]
    path = write_rows(tmp_path / "f.csv", "user,day,amount", rows)
    assert main(["abtest", "simulate", str(path), "--days", "14", "--experiments", "200", "--users", "30"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    alarms = float(re.search(r"no effect, ([\d.]+) %", said)[1])
    assert alarms < 10, said


def test_rounding_is_no_difference(tmp_path, capsys):
    assert Effect(1e-17, 0.0).p == Effect(0.0, 0.0).p == Effect(1e-13, 1e-17).p == 1
    assert Effect(0.1, 0.0).p == 0
    rows = [[user, arm, day, 0.1] for user, arm, day, _ in visits(1, users=300)]
    made, _ = figures(tmp_path, capsys, "user,arm,day,amount", rows, "--days", "8")
    assert made["arms"]["test"]["p"]["dalpha"] == made["arms"]["test"]["p"]["dgamma"] == 1
    assert made["verdict"].startswith("No difference")
    made, _ = figures(
        tmp_path, capsys, "user,arm,retention_1,rounds", [[*row, 3] for row in wide({"control": [0.5], "test": [0.5]})]
    )
    assert "missed" not in made["verdict"], "all users' amounts are equal: nothing was missed"


def test_few_active_users_are_a_remark(tmp_path, capsys):
    for users, remarks in ((180, 1), (900, 0)):
        _, said = figures(tmp_path, capsys, "user,arm,day,amount", visits(8, users=users), "--days", "8")
        assert said.count("intervals hold the truth in 91 to 100 %") == remarks


def test_one_heavy_user_on_every_day_does_not_decide(tmp_path, capsys):
    rows = [row for row in visits(2, users=1000, days=12) if row[0] != "u1"]
    whale = [["u1", "test", day, 1662] for day in range(13)]
    made, said = figures(tmp_path, capsys, "user,arm,day,amount", rows + whale, "--days", "12")
    path = write_rows(tmp_path / "g.csv", "user,arm,day,amount", rows)
    [without], _, _ = compare(read_activity(path, ColumnsConfig()), 0, 12, 0.999)
    found = made["arms"]["test"]
    assert found["dalpha"][0] == pytest.approx(without.figures["dalpha"].value, abs=0.1)
    assert found["raw"]["dalpha"][0] > without.figures["dalpha"].value + 0.4
    assert "Outliers are made smaller" in said and "u1 (test, day 1): 1,662" in said


def test_sizes_are_written_as_people_write_them():
    assert [size(each) for each in (0, 1e-9, 3e-4, 0.03, 0.2, 0.95, 4, 1e9)] == [
        "0.001 %", "0.001 %", "0.03 %", "3.0 %", "22 %", "159 %", "5,360 %", "1,000,000 %"
    ]  # fmt: skip
    assert percent_change(Effect(3, 0)) == "+1,908.6 % [+1,908.6, +1,908.6]".replace("1,908.6", "1,909")


def test_amounts_that_are_all_0_are_said(tmp_path, capsys):
    rows = [[*row, 0] for row in wide({"control": [0.5, 0.3], "test": [0.5, 0.3]})]
    made, said = figures(tmp_path, capsys, "user,arm,retention_1,retention_7,rounds", rows)
    assert "warning: test: nobody has any rounds: all 200 users' amounts are 0." in said
    assert made["arms"]["test"]["engagement_ratio"] is None


def test_totals_of_users_whose_days_have_not_passed_do_not_count(tmp_path, capsys):
    rows = [[*row, 5 + i % 3] for i, row in enumerate(wide({"control": [0.5, 0.3], "test": [0.5, 0.3]}))]
    late = [[f"late{i}", "test", 1, "", 1] for i in range(20)]
    header = "user,arm,retention_1,retention_7,rounds"
    before, _ = figures(tmp_path, capsys, header, rows)
    after, _ = figures(tmp_path, capsys, header, rows + late)
    assert after["arms"]["test"]["engagement_ratio"] == before["arms"]["test"]["engagement_ratio"]


def test_many_users_in_two_arms_are_a_doubt(tmp_path, capsys):
    rows = visits(3, users=300)
    moved = [[f"u{u}", "control" if u % 2 else "test", 9, 1] for u in range(20)]
    made, said = figures(tmp_path, capsys, "user,arm,day,amount", rows + moved, "--days", "8")
    assert said.startswith("warning: 20 users (6.7 %) have rows in two arms")
    assert made["verdict"].startswith("With doubt, because 6.")
    made, said = figures(tmp_path, capsys, "user,arm,day,amount", rows + moved[:2], "--days", "8")
    assert "With doubt" not in made["verdict"] and "Left out: users with rows in two arms: 2." in said


def turns(failing: dict[str, float]) -> list[dict]:
    """Events of 200 users over 9 days: each user has a turn on every second day at least; some of the arm's turns fail."""
    rng, events = np.random.default_rng(0), []
    for user in range(200):
        arm = ("control", "test")[user % 2]
        for day in range(9):
            if day == 0 or rng.random() < 0.5:
                outcome, status = ("failed", 503) if rng.random() < failing[arm] else ("answered", 200)
                events.append({
                    "id": f"{user}-{day}", "at": T0 + day * DAY + user, "unit": f"u{user}", "arm": arm, "experiment": "spring",
                    "exposed": True, "share": 0.5, "outcome": outcome, "status": status,
                })  # fmt: skip
    return events


def test_turns_that_failed_expose_but_are_no_use(tmp_path, capsys):
    path = tmp_path / "e.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in turns({"control": 0, "test": 0.5})))
    activity = read_activity(path, ColumnsConfig())
    assert len(activity.users) == 200, "whoever was only answered by failures has been exposed, too"
    words = ["abtest", "figures", str(path), "--control", "control", "-o", str(tmp_path / "out"), "--days", "7"]
    assert main(words) == 0
    made, said = json.loads((tmp_path / "out/figures.json").read_text()), capsys.readouterr().out
    turned = made["failed_turns"]["test"]
    assert made["failed_turns"]["control"]["failed"] == 0 and 0.4 < turned["failed"] / turned["turns"] < 0.6
    assert 0.4 < made["arms"]["test"]["engagement_ratio"][0] < 0.6 and made["arms"]["test"]["dzeta"][2] < 0
    assert said.startswith("warning: Turns that failed show a user to be in the arm, but are no use of it: control 0 (")


def test_a_horizon_that_nobody_gave_is_not_said_to_have_been_fixed(tmp_path, capsys):
    _, said = figures(tmp_path, capsys, "user,arm,day,amount", visits(4, users=200))
    assert "by default; fix yours with --days before the start" in said and "which --days says" not in said
    _, said = figures(tmp_path, capsys, "user,arm,day,amount", visits(4, users=200), "--days", "8")
    assert "which --days says was fixed before the start" in said


def test_many_arms_have_a_short_verdict(tmp_path, capsys):
    arms = ("control", *(f"arm-number-{i}" for i in range(8)))
    made, _ = figures(tmp_path, capsys, "user,arm,day,amount", visits(5, users=900, arms=arms), "--days", "8")
    assert made["verdict"].startswith(
        "No difference between control and any of the other 8 arms can be told from chance: "
    )
    assert len(made["verdict"]) < 400


def test_tables_in_a_pipe_keep_their_numbers_beside_long_names(tmp_path, capsys):
    arms = ("control", "an-arm-with-a-name-that-is-longer-than-most-" + "x" * 60)
    made, said = figures(tmp_path, capsys, "user,arm,day,amount", visits(6, users=200, arms=arms), "--days", "8")
    low, high = made["arms"][arms[1]]["engagement_ratio"][1:]
    assert f"[{low:.4f}, {high:.4f}]" in said and "…" not in said


def test_a_stopped_page_has_no_empty_section(tmp_path, capsys):
    rows = [row for row in visits(7, users=1000) if row[1] == "test" or int(row[0][1:]) % 8]
    figures(tmp_path, capsys, "user,arm,day,amount", rows)
    page = (tmp_path / "out/report.html").read_text()
    assert "no figure of this experiment can be trusted" in page and "How to read it" not in page
