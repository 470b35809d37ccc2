"""What an experiment would find is what experiments of that size find, tried out on the same activity."""

import math
import os
from pathlib import Path

import numpy as np
import pytest
from helpers.experiments import read_rows, visits, write_rows

from fastft.cli import main
from fastft.compose.abtest.activity import ColumnsConfig, read_activity
from fastft.compose.abtest.power import Baseline, PowerConfig, from_activity, z_of
from fastft.compose.abtest.simulate import Effects, TrialsConfig, simulate

DATA = Path(os.environ.get("FASTFT_DATA", "data")) / "ab"
real = pytest.mark.skipif(not DATA.is_dir(), reason="NOT CHECKED HERE: FASTFT_DATA has no ab/")


def test_users_and_effects_are_each_others_inverse():
    baseline = Baseline("retention", "q", 7, (1 - 0.4) / 0.4)
    z = z_of(0.05, 0.8)
    assert z == pytest.approx(2.8016, abs=1e-4)
    for difference in (0.01, 0.05, 0.2):
        users = baseline.needed(difference, z)
        assert baseline.detectable(users, z) <= difference < baseline.detectable(users - 1, z)


def test_a_retention_needs_the_users_of_the_textbook(capsys):
    """n = 2 (z / difference)^2 p (1 - p), here .40 against .42: 2 (2.80 / .02)^2 .24 = 9,418; on logs it is 9,892."""
    assert main(["abtest", "power", "--retention", "0.4", "--effect", "0.05"]) == 0
    said = capsys.readouterr().out
    assert "To find a change of 5 % with 80 % probability, each arm needs 9,892 users for retention of 0.4." in said
    assert 2 * (2.8016 / math.log(1.05)) ** 2 * 0.6 / 0.4 == pytest.approx(9_892, abs=1)


def test_power_needs_a_baseline(capsys, tmp_path):
    path = write_rows(tmp_path / "f.csv", "user,arm,day,amount", visits(0))
    nobody = write_rows(tmp_path / "n.csv", "user,retention_1", [[1, 0], [2, 0]])
    for words, said in (
        ([], "give a FILE of past activity"),
        ([str(path), "--retention", "0.4"], "give a FILE of past activity"),
        (["--retention", "1.4"], "--retention is 1.4; it must be between 0 and 1"),
        (["--retention", ".999", "--effect", "1e-300"], "--effect is 1e-300"),
        (["--retention", "1e-300", "--effect", ".1"], "--retention is 1e-300"),
        (["--retention", ".999", "--effect", ".05"], "cannot rise by 5 %"),
        (["--engagement", "1e-200", "--spread", "1e200"], "--spread must be from a millionth"),
        (["--engagement", "3"], "--engagement and --spread need each other"),
        ([str(path), "--days", "20"], "--days 20 is more than the 8 days in the file"),
        ([str(path), "--users", "1"], "--users is 1"),
        ([str(path), "--effect", "0"], "--effect is 0"),
        ([str(path), "--winsor", "0"], "--winsor is 0"),
        ([str(nobody)], "fewer than 5 users come back"),
    ):
        assert main(["abtest", "power", *words]) in (1, 2)
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1


def test_a_table_of_sizes_and_days_and_a_sentence(tmp_path, capsys):
    path = write_rows(
        tmp_path / "f.csv", "user,day,amount", [[u, d, a] for u, _, d, a in visits(1, days=15, users=300)]
    )
    assert main(["abtest", "power", str(path)]) == 0
    said = capsys.readouterr().out
    assert said.startswith("With 10,000 users in each arm over 14 days, a change of ")
    rows = [line.split()[:2] for line in said.splitlines() if line[1:2].isdigit()]
    assert [row[0] for row in rows].count("7") == [row[0] for row in rows].count("14") == 6


@pytest.mark.slow
def test_an_effect_of_the_detectable_size_is_found_four_times_of_five(tmp_path):
    activity = read_rows(tmp_path / "f.csv", visits(2, users=1200))
    z = z_of(0.05, 0.8)
    config = PowerConfig(file="f", days=8, winsor=0.99)
    needed = {each.figure: each for each in from_activity(activity, config)}
    effects = {name: needed[name].detectable(600, z) for name in ("dbeta", "dalpha")}
    tried, _ = simulate(activity, 8, TrialsConfig("f", users=600, experiments=300, winsor=0.99, **effects))
    for name, effect in effects.items():
        assert tried[name].value_T.mean() == pytest.approx(effect, rel=0.15)
        assert tried[name].significant_T.mean() == pytest.approx(0.8, abs=0.09)  # 4 standard errors
    assert tried["dzeta"].significant_T.mean() < 0.12, "what has no effect is found by chance only"


def test_an_effect_changes_retention_and_amounts_as_it_says(tmp_path):
    activity = read_rows(tmp_path / "f.csv", visits(3, users=400))
    both = TrialsConfig("f", dzeta=0.2, dbeta=-0.3, dalpha=0.5, dgamma=-0.1, experiments=1)
    effect, rng, days = Effects(activity, 8, both), np.random.default_rng(0), np.arange(9)
    visited, used = np.zeros((2, 2, 9)), np.zeros((2, 2, 9))
    for changed in (0, 1):
        for _ in range(100):
            drawn = activity.of(np.arange(400))
            drawn.arm_U = np.arange(400) % 2
            if changed:
                drawn = effect.put_into(drawn, rng)
            for arm in (0, 1):
                mine = drawn.arm_U[drawn.user_E] == arm
                visited[changed, arm] += np.bincount(drawn.day_E[mine], minlength=9)
                used[changed, arm] += np.bincount(drawn.day_E[mine], drawn.amount_E[mine], minlength=9)
    assert (visited[0, 0] == visited[1, 0]).all() and (used[0, 0] == used[1, 0]).all(), "the control is untouched"
    q = visited[1, 1, 1:] / visited[0, 1, 1:]
    r = used[1, 1, 1:] / visited[1, 1, 1:] / (used[0, 1, 1:] / visited[0, 1, 1:])
    # Added visits come from both arms' users, which differ by chance: the mean over days is near, each day roughly.
    assert q == pytest.approx(np.exp(0.2 - 0.3 * np.log(days[1:])), rel=0.2)
    assert np.log(q).mean() == pytest.approx((0.2 - 0.3 * np.log(days[1:])).mean(), abs=0.05)
    assert np.log(r).mean() == pytest.approx((0.5 - 0.1 * np.log(days[1:])).mean(), abs=0.1)


def test_experiments_without_an_effect_find_none(tmp_path, capsys):
    path = write_rows(tmp_path / "f.csv", "user,arm,day,amount", visits(4, users=400))
    words = ["abtest", "simulate", str(path), "--days", "8", "--experiments", "100"]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert main(words) == 0 and capsys.readouterr().out == said, "the seed decides"
    assert said.startswith("Of 100 experiments with the file's 400 users in two halves over 8 days and no effect, ")
    activity = read_activity(path, ColumnsConfig(), arms=False)
    tried, any_sure = simulate(activity, 8, TrialsConfig(str(path), experiments=100))
    assert any_sure < 0.14
    assert all(each.covered_T.mean() > 0.86 for each in tried.values())  # 4 standard errors


def test_what_cannot_be_tried_is_one_line(tmp_path, capsys):
    path = write_rows(tmp_path / "f.csv", "user,arm,day,amount", visits(5))
    wide = write_rows(tmp_path / "w.csv", "user,retention_1,retention_7", [[i, i % 2, 0] for i in range(9)])
    nobody = write_rows(tmp_path / "n.csv", "user,retention_1,retention_7", [[i, 0, 0] for i in range(9)])
    few = write_rows(tmp_path / "g.csv", "user,day", [["a", 0], ["b", 1], ["c", 1]])
    for words, said in (
        ([str(path), "--users", "1"], "--users is 1"),
        ([str(path), "--experiments", "0"], "--experiments is 0"),
        ([str(path), "--days", "30"], "--days 30 is more than the 8 days in the file"),
        ([str(path), "--dzeta", "2"], "of the users would come back on a day"),
        ([str(path), "--dzeta", "1000"], "--dzeta is 1000; it must be from -5 to 5"),
        ([str(nobody)], "nobody comes back or uses anything"),
        ([str(wide), "--dalpha", ".1"], "need amounts by day"),
        ([str(few)], "two arms of two users need four, and the file has 3"),
    ):
        assert main(["abtest", "simulate", *words]) in (1, 2)
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1


def test_the_verbs_are_listed(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["abtest", "--help"])
    said = capsys.readouterr().out
    assert all(word in said for word in ("figures", "power", "simulate"))
    assert main(["abtest", "figure"]) == 2
    assert "did you mean 'figures'?" in capsys.readouterr().err


@real
def test_the_baseline_of_college_messages(capsys):
    assert main(["abtest", "power", str(DATA / "collegemsg.csv.gz"), "--days", "30"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert (
        "Baseline: 1,328 users for whom day 30 has passed; 40.4 % come back on day 1, 10.5 % come back on day 30, "
        "R(k) = 0.471 k^-0.371 (R2 0.89), E(k) = 5.94 k^-0.087 (R2 0.43)." in said
    )


@real
@pytest.mark.slow
def test_splits_of_college_messages_by_the_command(capsys):
    assert main(["abtest", "simulate", str(DATA / "collegemsg.csv.gz"), "--seed", "18"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if " %" in line and "0.0000" in line]
    assert len(rows) == 5
    for row in rows:
        covered = float(row[row.index("%") - 1])
        assert 93 <= covered <= 97
