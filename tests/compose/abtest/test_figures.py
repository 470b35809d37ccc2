"""`fastft abtest figures`: the verdict, what comes before it, the file for scripts, and the page."""

import json
import math
import os
import random
from pathlib import Path

import pytest
from helpers.experiments import visits, write_rows
from helpers.pages import CHROMIUM, HOSTILE, browse, texts

from fastft.cli import main
from fastft.common.html import visible
from fastft.compose.abtest.estimates import FIGURES

DATA = Path(os.environ.get("FASTFT_DATA", "data")) / "ab"
real = pytest.mark.skipif(not DATA.is_dir(), reason="NOT CHECKED HERE: FASTFT_DATA has no ab/")
COLUMNS = "user,arm,day,amount"


def run(tmp_path: Path, rows, *words: str, header: str = COLUMNS, control: str = "control") -> tuple[int, dict]:
    """(exit code, figures.json)"""
    path = write_rows(tmp_path / "visits.csv", header, rows)
    code = main(["abtest", "figures", str(path), "--control", control, "-o", str(tmp_path / "out"), *words])
    file = tmp_path / "out/figures.json"
    return code, json.loads(file.read_text()) if file.is_file() else {}


def numbers(value) -> list[float]:
    if isinstance(value, dict):
        return [each for key in sorted(value) for each in numbers(value[key])]
    return [each for part in value for each in numbers(part)] if isinstance(value, list) else [value]


def test_an_arm_that_keeps_its_users_is_called_so(tmp_path, capsys):
    code, made = run(tmp_path, visits(0, users=2000, lift=1.4), "--days", "8")
    found = made["arms"]["test"]
    assert code == 0 and found["retention_ratio"]["1"] == pytest.approx(1.4, abs=0.1)
    for name in FIGURES:
        value, low, high = found[name]
        assert low < value < high
        assert found["p"][name] <= found["p_holm"][name] <= 1
    assert found["dzeta"][0] == pytest.approx(math.log(1.4), abs=0.1)
    assert (
        made["verdict"].startswith("test differs from control: ")
        and "more users come back at the start (+" in made["verdict"]
    )
    assert made["horizon"] == {"planned": 8, "reached": 8} and made["sample_ratio"]["verdict"] == "ok"
    said = capsys.readouterr().out
    assert made["verdict"] in " ".join(said.split()) and "dzeta" in said and str(tmp_path / "out/report.html") in said


def test_no_difference_is_said_with_the_size_that_would_be_missed(tmp_path):
    _, made = run(tmp_path, visits(1, users=600), "--days", "8")
    assert made["verdict"].startswith(
        "No difference between control and test can be told from chance: retention at the start "
    )
    test = made["arms"]["test"]
    retention = 100 * math.expm1(2.8 * (test["dzeta"][2] - test["dzeta"][0]) / 1.96)
    use = 100 * math.expm1(2.8 * math.log(test["engagement_ratio"][2] / test["engagement_ratio"][0]) / 1.96)
    missed = f"differences below {retention:.0f} % in retention at the start and {use:.0f} % in amount per user"
    assert f"; {missed} would usually be missed." in made["verdict"]


def test_three_arms_are_compared_with_the_control(tmp_path):
    arms = ("control", "a", "b")
    _, made = run(tmp_path, visits(2, users=1500, arms=arms, lift=1.5), "--days", "8")
    assert set(made["arms"]) == {"a", "b"} and set(made["curves"]) == set(arms)
    assert (
        made["verdict"].startswith("b differs from control: ")
        and "; no difference between control and a" in made["verdict"]
    )
    raw, holm = ([each[key][name] for each in made["arms"].values() for name in FIGURES] for key in ("p", "p_holm"))
    assert min(holm) == pytest.approx(min(1, 10 * min(raw))), "over two arms of five figures"


def test_arms_of_the_wrong_size_stop_the_reading(tmp_path, capsys):
    rows = [row for row in visits(3, users=1000) if row[1] == "test" or int(row[0][1:]) % 8]
    code, made = run(tmp_path, rows)
    said = capsys.readouterr()
    assert code == 1 and made["sample_ratio"]["verdict"] == "stop" and made["arms"] == {}
    assert "no figure of this experiment can be trusted" in said.err and "dzeta" not in said.out
    assert "dzeta" not in (tmp_path / "out/report.html").read_text().split("<body>")[1]
    code, made = run(tmp_path, rows, "--shares", "control=0.43", "test=0.57")
    assert code == 0 and made["sample_ratio"]["verdict"] == "ok" and made["arms"]


def test_arms_of_doubtful_sizes_are_named_before_anything_else(tmp_path, capsys):
    users = {"control": 1_000, "test": 1_122}
    rows = [(f"{arm}{i}", arm, int(i % 9 < 4), int(i % 5 < 1)) for arm, count in users.items() for i in range(count)]
    code, made = run(tmp_path, rows, header="user,arm,retention_1,retention_7")
    said = capsys.readouterr().out
    assert code == 0 and 0.001 < made["sample_ratio"]["p"] < 0.01
    assert said.startswith("warning: The arms have control 1,000, test 1,122 users")
    assert made["verdict"].startswith("With doubt, because the sizes of the arms are off: ")


def test_an_experiment_that_is_not_over_says_so(tmp_path, capsys):
    code, made = run(tmp_path, visits(4), "--days", "30")
    assert code == 0 and made["horizon"] == {"planned": 30, "reached": 8}
    assert made["verdict"].startswith("So far, after 8 of 30 days: ") and "8 of the 30 days" in made["warnings"][0]
    assert capsys.readouterr().out.startswith("warning: The file has 8 of the 30 days")


def test_only_users_with_all_days_count_if_asked_for(tmp_path):
    rows = [[user, arm, day, amount, 8 if int(user[1:]) % 3 else 4] for user, arm, day, amount in visits(5)]
    rows = [row for row in rows if row[2] <= row[4]]
    _, made = run(tmp_path, rows, "--days", "8", header=f"{COLUMNS},followed")
    assert made["curves"]["control"]["users"] == 30 and made["curves"]["control"]["complete"] == 20
    _, made = run(tmp_path, rows, "--days", "8", "--complete", header=f"{COLUMNS},followed")
    assert made["curves"]["control"]["users"] == 20


def test_a_curve_that_is_no_power_law_is_warned_about(tmp_path):
    rows = [
        [f"u{u}", "ab"[u % 2], d, 1 + (u + d) % 5]
        for u in range(200)
        for d in range(9)
        if d in (0, 2, 8) or u % 9 < d % 4
    ]
    _, made = run(tmp_path, rows, "--days", "8", control="a")
    assert made["curves"]["a"]["retention_law"]["r2"] < 0.8
    assert any("explains little of how retention runs" in line for line in made["warnings"])


def test_the_order_of_the_rows_changes_no_figure(tmp_path):
    rows = visits(6, arms=("control", "a", "b"))
    _, one = run(tmp_path, rows)
    random.Random(0).shuffle(rows)
    _, other = run(tmp_path, rows)
    assert numbers(one["arms"]) == pytest.approx(numbers(other["arms"]))


def test_heavy_users_are_named_and_their_raw_figures_stand_beside(tmp_path, capsys):
    _, made = run(tmp_path, [*visits(7), ["whale", "test", 0, 1], ["whale", "test", 1, 1e6]])
    assert made["outliers"]["largest"][0] == {"user": "whale", "arm": "test", "day": 1, "amount": 1e6}
    found = made["arms"]["test"]
    assert found["raw"]["engagement_ratio"][0] > 100 > found["engagement_ratio"][0] > 0
    assert "whale (test, day 1): 1,000,000" in " ".join(capsys.readouterr().out.split())
    _, made = run(tmp_path, [*visits(7), ["whale", "test", 0, 1], ["whale", "test", 1, 1e6]], "--winsor", "1")
    found = made["arms"]["test"]
    assert found["raw"]["engagement_ratio"] == found["engagement_ratio"]


ONE_ROW = [["a", "control", 0, 1]]
WRONG = {
    "control": ([], ("--control", "contrl"), "there is no arm 'contrl'; did you mean 'control'?"),
    "arm": ([], ("--shares", "control=1", "test=1", "tset=1"), "the arm 'tset' has no users; did you mean 'test'?"),
    "share": ([], ("--shares", "control=1"), "the arm 'test' is in the file, but has no share"),
    "shares": ([], ("--shares", "control=x"), "write ARM=SHARE"),
    "twice": ([], ("--shares", "control=1", "test=1", "test=2"), "--shares names the arm 'test' twice"),
    "days": ([], ("--days", "0"), "--days is 0; it must be 1 or more"),
    "winsor": ([], ("--winsor", "2"), "--winsor is 2; it must be from 0.5 to 1"),
    "one user": (ONE_ROW, (), "all users are in one arm (control)"),
    "one each": ([*ONE_ROW, ["b", "test", 0, 1]], (), "the arm 'control' has one user only"),
    "both": ([*ONE_ROW, ["b", "control", 0, 1], ["c", "test", 0, 1], ["c", "control", 1, 1]], (),
             "the arm 'test' has no user who is in no other arm"),
    "no day": ([["a", "control", 0, 1], ["b", "control", 0, 1], ["c", "test", 0, 1], ["d", "test", 0, 1]], (),
               "no day up to day 30 can be compared"),
}  # fmt: skip


@pytest.mark.parametrize("rows, words, said", WRONG.values(), ids=WRONG)
def test_a_mistake_is_one_line(tmp_path, capsys, rows, words, said):
    code, _ = run(tmp_path, rows or visits(0), *words)
    error = capsys.readouterr().err
    assert code in (1, 2) and said in error and error.count("\n") == 1


def test_two_arms_without_a_common_day_are_said_to_be_incomparable(tmp_path):
    rows = [
        [f"u{i}", ("control", "test")[i % 2], day, 0 if day and i % 2 == day % 2 else 1]
        for i in range(20)
        for day in (0, 1)
    ]
    code, made = run(tmp_path, rows, "--days", "1")
    assert code == 0 and made["arms"]["test"]["days_left_out"] == {"retention": [1]}
    assert made["arms"]["test"]["dzeta"] is None


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_the_page_shows_everything_and_runs_nothing_of_others(tmp_path):
    arms = ("control", HOSTILE[0], HOSTILE[1])
    run(tmp_path, [*visits(8, users=300, arms=arms, lift=1.5), [HOSTILE[2], "control", 1, 9e9]], "--days", "9")
    page = (tmp_path / "out/report.html").read_text()
    dom, complaints = browse(tmp_path, page)
    assert not complaints and HOSTILE[0] not in dom.split("<body>")[1]
    assert texts(dom, "//h1") == [visible(f"{HOSTILE[1]}, {HOSTILE[0]} against control")]
    made = json.loads((tmp_path / "out/figures.json").read_text())
    assert texts(dom, "//p[contains(@class, 'lede')]") == [" ".join(visible(made["verdict"]).split())]
    assert texts(dom, "//section[@id='fits']//span[@class='name']") == [
        "log q(k)", "Residuals of log q(k)", "log r(k)", "Residuals of log r(k)"
    ] * 2  # fmt: skip
    assert len(texts(dom, "//section[@id='figures']//tbody/tr")) == 10
    assert texts(dom, "//ul[contains(@class, 'warnings')]/li") == [
        " ".join(visible(each).split()) for each in made["warnings"]
    ]


@real
def test_cookie_cats_by_the_command(tmp_path, capsys):
    words = ["abtest", "figures", str(DATA / "cookie_cats_even.csv.gz"), "--control", "gate_30", "-o", str(tmp_path)]
    assert main(words) == 0
    found = json.loads((tmp_path / "figures.json").read_text())["arms"]["gate_40"]
    assert found["retention_ratio"] == pytest.approx({"1": 0.98288, "7": 0.96429}, abs=5e-6)
    assert found["dzeta"] == pytest.approx([-0.01727, -0.03784, 0.00330], abs=5e-6)
    assert found["dbeta"] == pytest.approx([-0.00981, -0.02900, 0.00938], abs=5e-6)
    assert found["dalpha"] is None and found["dgamma"] is None, "use is not known by day"
    assert capsys.readouterr().out.startswith("No difference between gate_30 and gate_40 can be told from chance")
