"""Evaluating a router: measures that can be computed by hand, intervals that hold, leaks, prices, and the page."""

import gzip
import json
import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers.browser import browser
from helpers.pages import CHROMIUM, HOSTILE, browse, texts

from fastft.cli import main
from fastft.compose.router.figures.evaluation import evaluate, read_with_sets, to_json
from fastft.compose.router.figures.leaks import fingerprints, shared_runs
from fastft.compose.router.figures.measures import (
    SetMeans,
    area_under,
    calibration_error,
    calls_for_half,
    confusion,
    pooled,
    rank_and_uplift,
    rank_and_uplift_of_model,
    strong_calls,
    weights_of,
)
from fastft.compose.router.figures.page import remarks, verdict, write_evaluation_page
from fastft.compose.router.router import Router

DATA = Path(os.environ.get("FASTFT_DATA", "data")) / "router"
MODELS = ("sums", "poems", "fair")
ASKS = {
    "sums": "What is {a} plus {b}? Add the numbers and give the total.",
    "poems": "Write a merry poem of {a} lines about {b} ships at sea.",
}


def rows(count: int, seed: int, first: int = 0, usd: bool = False, noise: bool = False) -> list[dict]:
    """Questions of two sets; one model is good at sums, one at poems, and one is fair at both."""
    rng, made = np.random.default_rng(seed), []
    for i in range(count):
        kind = ("sums", "poems")[i % 2]
        chances = {"sums": 0.9, "poems": 0.9, "fair": 0.6} if noise else {kind: 0.9, "fair": 0.6}
        query = ASKS[kind].format(a=first + i, b=first + 2 * i)
        correct = {model: float(rng.random() < chances.get(model, 0.2)) for model in MODELS}
        row = {"id": f"{kind}{first + i}", "query": query, "tags": [kind], "rewards": correct, "correct": correct}
        made.append(row | ({"usd": {"sums": 0.002, "poems": 0.002, "fair": 0.0001}} if usd else {}))
    return made


def write(path: Path, content: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in content))
    return path


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    """A router with prices, its training outcomes and 200 test outcomes."""
    directory = tmp_path_factory.mktemp("evaluate")
    write(directory / "train.jsonl", rows(100, 0, usd=True))
    write(directory / "test.jsonl", rows(200, 1, first=1000, usd=True))
    assert main(["router", "train", str(directory / "train.jsonl"), "-o", str(directory / "router")]) == 0
    return directory


def evaluated(ground: Path, content: list[dict], tmp_path: Path):
    outcomes, sets = read_with_sets([str(write(tmp_path / "outcomes.jsonl", content))])
    return evaluate(Router.load(ground / "router"), outcomes, sets)


# Measures ------------------------------------------------------------------------------------------------------------------


def test_every_set_counts_the_same():
    scores_NK = np.array([[1.0, 0], [1, 0], [1, 0], [0, 1]])
    sets = ["a", "a", "a", "b"]
    means = SetMeans(scores_NK, sets, list("pqrs"))
    assert means.mean_K.tolist() == [0.5, 0.5] and means.by_set_SK.tolist() == [[1, 0], [0, 1]]
    assert (weights_of(sets) @ scores_NK).tolist() == [0.5, 0.5] and weights_of(sets).sum() == pytest.approx(1)


def test_small_sets_have_no_weight_of_their_own():
    """A set of one query has no variance: with half of the weight it would decide, and no interval would say so."""
    queries = [str(number) for number in range(400)]
    assert pooled(["a"] * 397 + ["b"] * 3, queries) == ["a"] * 400, "the pool is small, too: into the largest set"
    many = pooled(["a"] * 370 + [f"s{number}" for number in range(30)], queries)
    assert many == ["a"] * 370 + ["small sets"] * 30
    assert pooled(queries, queries) == ["small sets"] * 400 and pooled(["a"] * 3, queries[:3]) == ["a"] * 3
    assert pooled(["a"] * 30 + ["b"] * 25, queries[:30] + ["same"] * 25) == ["a"] * 55, "25 times one query"
    assert pooled(["a"] * 380 + ["b"] * 20, queries) == ["a"] * 380 + ["b"] * 20


@pytest.mark.parametrize("tags", [lambda row: str(row), lambda row: "lone" if row == 59 else "all"])
def test_an_interval_of_small_sets_does_not_collapse(ground, tmp_path, tags):
    content = rows(60, 5, first=5000, noise=True)
    whole = evaluated(ground, [row | {"tags": ["all"]} for row in content], tmp_path)
    made = evaluated(ground, [row | {"tags": [tags(number)]} for number, row in enumerate(content)], tmp_path)
    assert made.gain == whole.gain and made.gain.low < made.gain.value < made.gain.high
    assert not made.worth_it and json.loads(to_json(made))["worth_it"] is False and len(made.sets) == 1
    assert any("have no weight of their own" in line for line in remarks(made))


@pytest.mark.slow
def test_the_interval_of_a_difference_holds_the_truth_in_95_percent():
    rng, held, paired, alone = np.random.default_rng(3), 0, 0.0, 0.0
    for _ in range(100):
        hard_N = rng.normal(0, 1, 120)  # both systems find the same queries hard
        scores_NK = np.column_stack([hard_N + rng.normal(0.3, 0.5, 120), hard_N + rng.normal(0, 0.5, 120)])
        means = SetMeans(scores_NK, ["a"] * 40 + ["b"] * 80, [str(i) for i in range(120)])
        found, mean = means.difference(0, 1), means.mean(0)
        held += found.low <= 0.3 <= found.high
        paired, alone = paired + found.high - found.low, alone + mean.high - mean.low
    assert 89 <= held <= 99
    assert paired < alone, "pairs: what is hard for both does not widen the interval"


def test_the_same_text_is_one_query():
    """Rows with the same text are drawn together: to repeat every row adds no certainty."""
    scores_NK = np.random.default_rng(0).normal(0, 1, (50, 2))
    queries = [str(i) for i in range(50)]
    once = SetMeans(scores_NK, ["a"] * 50, queries)
    twice = SetMeans(np.repeat(scores_NK, 2, 0), ["a"] * 100, np.repeat(queries, 2).tolist())
    assert twice.difference(0, 1) == pytest.approx(once.difference(0, 1)) or (
        twice.difference(0, 1).low == pytest.approx(once.difference(0, 1).low)
    )


def test_the_share_of_a_gap():
    scores_NK = np.array([[0.5, 0.0, 1.0]] * 20) + np.random.default_rng(0).normal(0, 0.01, (20, 1))
    means = SetMeans(scores_NK, ["a"] * 20, [str(i) for i in range(20)])
    assert means.share(0, 1, 2).value == pytest.approx(0.5) and means.share(1, 1, 2).value == 0
    assert means.share(0, 2, 1) is None, "no gap, no share of it"
    assert means.ratio(0, 2).value == pytest.approx(0.5, abs=0.01)


def test_mean_task_rank_and_uplift_by_hand():
    models_SM = np.array([[3.0, 2, 1], [3, 2, 1], [1, 2, 3]])
    assert rank_and_uplift(np.array([4.0, 2.5, 3]), models_SM) == (
        pytest.approx((1 + 2 + 1.5) / 3),
        pytest.approx(2 / 3),
    )
    assert rank_and_uplift_of_model(0, models_SM) == (pytest.approx((1 + 1 + 3) / 3), pytest.approx(2 / 3))


def test_an_area_is_that_of_the_line_through_the_points():
    assert area_under([0.2, 0.5, 0.9]) @ [1.0, 3, 2] == pytest.approx(0.2 * 1 + 0.3 * 2 + 0.4 * 2.5 + 0.1 * 2)
    assert area_under([0.0, 2.0]) @ [0.0, 4] == pytest.approx(1), "what lies beyond 1 counts by the line to it"
    assert area_under([0.3]).tolist() == [1.0]


@pytest.mark.parametrize("ties", [False, True])
def test_apgr_is_the_mean_over_all_shares_of_calls(ties):
    """Against the definition: PGR at every threshold, and among equal preferences the mean over random orders."""
    rng = np.random.default_rng(1)
    preference_N = rng.integers(0, 4, 60).astype(float) if ties else rng.normal(0, 1, 60)
    gain_N = rng.integers(-1, 3, 60).astype(float)
    weights_N = np.full(60, 1 / 60)
    wanted = []
    for seed in range(400 if ties else 1):
        order = np.lexsort((np.random.default_rng(seed).random(60), -preference_N))
        recovered = np.concatenate([[0], np.cumsum(gain_N[order])]) / gain_N.sum()
        wanted.append((recovered[1:] + recovered[:-1]).mean() / 2)
    found = (strong_calls(preference_N, weights_N) * gain_N) @ weights_N / (gain_N @ weights_N)
    assert found == pytest.approx(np.mean(wanted), abs=0.02 if ties else 1e-9)
    assert strong_calls(np.zeros(60), weights_N).tolist() == pytest.approx([0.5] * 60), (
        "no preference is a random order"
    )


def test_calls_for_half_of_the_gap():
    weights_N = np.full(4, 0.25)
    assert calls_for_half(np.array([4.0, 3, 2, 1]), np.array([1.0, 0, 0, 1]), weights_N) == 0.25
    assert calls_for_half(np.array([1.0, 2, 3, 4]), np.array([1.0, 0, 0, 0]), weights_N) == 1.0
    assert calls_for_half(np.array([1.0, 2]), np.array([0.0, -1]), np.full(2, 0.5)) is None


def test_who_was_chosen_and_who_was_best():
    scores_NM = np.array([[1.0, 0, 0], [1, 1, 0], [1, 1, 1], [0, 0, 1]])
    table = confusion(np.array([0, 0, 1, 1]), scores_NM)
    assert table.tolist() == [[1.5, 0.5, 0, 0], [0, 0, 1, 1], [0, 0, 0, 0]] and table.sum() == 4


def test_the_calibration_error_by_hand():
    predicted_N, happened_N = np.array([0.9, 0.9, 0.1, 0.1, 1.0]), np.array([1.0, 0, 0, 0, 1])
    assert calibration_error(predicted_N, happened_N) == pytest.approx((abs(2.8 - 2) + 0.2) / 5)


# Evaluations ---------------------------------------------------------------------------------------------------------------


def test_the_command_writes_figures_a_page_and_the_verdict(ground, tmp_path, capsys):
    command = ["router", "evaluate", str(ground / "router"), str(ground / "test.jsonl"), "-o", str(tmp_path / "out")]
    assert main(command) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1].startswith("This router is worth it: it is better than ") and "% of" not in printed[-1]
    found = json.loads((tmp_path / "out/evaluation.json").read_text())
    outcomes, sets = read_with_sets([str(ground / "test.jsonl")])
    router = Router.load(ground / "router")
    chosen = router.choose(router.scores(outcomes.queries))
    scores = 100 * outcomes.correct[np.arange(200), chosen]
    by_set = {name: scores[[each == name for each in sets]].mean() for name in ("sums", "poems")}
    assert found["accuracy"] == pytest.approx(by_set) and found["mean"] == pytest.approx(np.mean([*by_set.values()]))
    single = 100 * outcomes.correct[:, outcomes.models.index(router.default)]
    assert found["best_single"]["model"] == router.default
    assert found["best_single"]["mean"] == pytest.approx(single.mean())  # both sets have 100 queries
    value, low, high = found["gain_over_best_single"]
    assert value == pytest.approx(found["mean"] - found["best_single"]["mean"]) and 0 < low < value < high
    assert found["worth_it"] is True and found["unit"] == "points of 100" and found["measure"] == "correct"
    assert found["baselines"]["uniform_blend"]["mean"] == pytest.approx(100 * outcomes.correct.mean())
    assert found["baselines"]["oracle"]["mean"] == pytest.approx(100 * outcomes.correct.max(1).mean())
    baselines = {"best_single", "uniform_blend", "hard_label", "kNN_40", "MLP", "best_per_tag", "oracle"}
    assert baselines == {name for name in found["baselines"] if not name.endswith("_alone")}
    assert sum(map(sum, found["confusion"])) == pytest.approx(200)
    assert (tmp_path / "out/evaluation.html").is_file()


def test_a_router_that_gains_nothing_is_not_worth_it(ground, tmp_path):
    made = evaluated(ground, rows(60, 5, first=5000, noise=True), tmp_path)
    assert made.gain.low <= 0 <= made.gain.high
    assert verdict(made).startswith("This router is not worth it: ") and "holds 0" in verdict(made)


def test_few_queries_are_no_proof(ground, tmp_path):
    content = rows(24, 1, first=2000)
    for row in content:
        row["correct"] = dict.fromkeys(MODELS, 1.0) | {Router.load(ground / "router").default: 0.0}
    made = evaluated(ground, content, tmp_path)
    assert made.gain.low > 0 and not made.worth_it
    assert verdict(made).startswith("Whether this router is worth it is not known: 24 queries are too few")


def test_a_router_that_harms_is_called_worse(ground, tmp_path):
    content = rows(100, 1, first=2000)
    for row in content:
        row["correct"] = {"sums": 0.0, "poems": 0.0, "fair": 0.0} | {Router.load(ground / "router").default: 1.0}
    assert "This router is not worth it: it is worse than the best single model" in verdict(
        evaluated(ground, content, tmp_path)
    )


def test_missing_scores_are_left_out_and_named(ground, tmp_path, capsys):
    content = rows(80, 2, first=3000)
    whole = evaluated(ground, content[4:], tmp_path)
    for row, gone in zip(content[:4], ("sums", "sums", "poems", "fair")):
        row["correct"] = {name: score for name, score in row["correct"].items() if name != gone}
    made = evaluated(ground, content, tmp_path)
    assert made.queries == 76 and made.gain == whole.gain and made.router.mean == whole.router.mean
    [line] = [line for line in remarks(made) if "left out" in line]
    assert "4 of 80 queries" in line and "sums 2, poems 1, fair 1" in line and content[0]["id"] in line


def test_scores_outside_0_to_1_stay_what_they_are(ground, tmp_path):
    content = rows(60, 2, first=3000)
    for row in content:
        del row["correct"]
        row["rewards"] = {name: 10 * score - 5 for name, score in row["rewards"].items()}
    made = evaluated(ground, content, tmp_path)
    assert made.measure == "rewards" and made.unit == "points of the rewards" and -5 <= made.router.mean.value <= 5
    assert made.calibration_error is None


def test_a_set_is_the_first_tag_or_the_file(ground, tmp_path):
    content = rows(6, 2)
    tagged = write(tmp_path / "tagged.jsonl", [row | {"tags": [row["tags"][0], "more"]} for row in content])
    bare = write(tmp_path / "bare.set.jsonl", [row | {"tags": []} for row in content])
    assert read_with_sets([str(tagged)])[1] == ["sums", "poems"] * 3
    assert read_with_sets([str(bare), str(tagged)])[1] == ["bare"] * 6 + ["sums", "poems"] * 3


def test_missing_scores_of_files_without_tags_are_named_once(ground, tmp_path, caplog):
    bare = [row | {"tags": []} for row in rows(6, 2)]
    bare[0]["rewards"] = bare[0]["rewards"] | {"fair": None}
    read_with_sets([str(write(tmp_path / f"{name}.jsonl", bare)) for name in "ab"])
    said = [record.getMessage() for record in caplog.records if "rewards are missing" in record.getMessage()]
    assert said == ["outcomes: 2 of 36 rewards are missing (fair 2): left out, not read as 0"]


def test_a_model_may_have_any_name(ground, tmp_path):
    router, made = Router.load(ground / "router"), evaluated(ground, rows(40, 2, first=3000), tmp_path)
    named = {name: f"{name}, 7B" for name in MODELS}
    router.candidates, router.default = [named[name] for name in router.candidates], named[router.default]
    router.usd = {named[name]: usd for name, usd in router.usd.items()}
    content = [
        row | {key: {named[name]: score for name, score in row[key].items()} for key in ("rewards", "correct")}
        for row in rows(40, 2, first=3000)
    ]
    outcomes, sets = read_with_sets([str(write(tmp_path / "named.jsonl", content))])
    assert evaluate(router, outcomes, sets).system("best single").uplift == made.system("best single").uplift


def test_a_tag_that_is_no_set_has_a_row_of_its_own(ground, tmp_path):
    content = rows(60, 2, first=3000)
    for row in content[::3]:
        row["tags"].append("hard")
    made = evaluated(ground, content, tmp_path)
    assert {tag.name: tag.queries for tag in made.by_tag} == {"sums": 30, "poems": 30, "hard": 20}


def test_prices_give_a_curve_whose_cost_falls(ground, tmp_path):
    made = evaluated(ground, rows(200, 1, first=1000, usd=True), tmp_path)
    assert made.curve.by == "usd_weight" and made.curve.x == sorted(made.curve.x)
    by_weight = sorted(zip(made.curve.settings, made.curve.x))
    assert [cost for _, cost in by_weight] == sorted((cost for _, cost in by_weight), reverse=True)
    assert by_weight[0][0] == 0 and by_weight[0][1] == pytest.approx(made.router.usd)
    assert by_weight[-1][1] == pytest.approx(0.1), "in the end, everything goes to the cheapest: $0.1 per 1,000"
    assert made.pair is None, "sums, the best single model of the training, is not surely better here than the cheapest"


def test_a_strong_and_a_weak_model_have_routellms_figures(ground, tmp_path):
    """Where no question is better for one of the two than another, any order is as good as a random one: 0.5."""
    made = evaluated(ground, rows(200, 1, first=1000, usd=True, noise=True), tmp_path)
    assert (made.pair.strong, made.pair.weak) == ("sums", "fair")
    assert made.pair.apgr.low < 0.5 < made.pair.apgr.high and 0 < made.pair.calls_for_half < 1


def test_without_prices_the_curve_is_by_margin(ground, tmp_path):
    router = Router.load(ground / "router")
    router.usd = None
    outcomes, sets = read_with_sets([str(write(tmp_path / "o.jsonl", rows(200, 1, first=1000)))])
    made = evaluate(router, outcomes, sets)
    assert made.curve.by == "margin" and made.curve.x[0] == 0 and made.router.usd is None
    assert made.curve.score[0].value == pytest.approx(made.system("best single").mean.value)
    assert 0 < made.curve.area.value < 1


def test_queries_that_share_text_with_the_training_are_counted_and_the_rest_is_evaluated_alone(ground, tmp_path):
    content = rows(100, 4, first=7000)
    clean = evaluated(ground, content, tmp_path)
    words = "the quick brown fox jumps over the lazy dog while seven wizards quietly mix potions"
    router = Router.load(ground / "router")
    router.runs = fingerprints([words])
    leaked = [row | {"query": f"{row['query']} {words.upper()}!"} for row in rows(20, 9, first=9000)]
    outcomes, sets = read_with_sets([str(write(tmp_path / "both.jsonl", content + leaked))])
    made = evaluate(router, outcomes, sets)
    assert clean.leaks == {"queries": 0, "by_set": {}, "runs": {}, "ids": []}
    assert made.leaks["queries"] == 20 and made.leaks["by_set"] == {"sums": 10, "poems": 10}
    assert made.leaks["ids"] == [row["id"] for row in leaked]
    assert made.without_leaks["mean"] == pytest.approx(clean.router.mean.value)
    assert made.without_leaks["gain_over_best_single"][0] == pytest.approx(clean.gain.value)
    [line] = [line for line in remarks(made) if line.startswith("Leak check: ")]
    assert made.judged == (clean.gain, 100) and "without the 20 that share text" in verdict(made)
    assert "20 of 120 test queries" in line and "the quick brown fox jumps over" in line


def test_the_training_queries_themselves_all_leak(ground, tmp_path):
    outcomes, sets = read_with_sets([str(ground / "train.jsonl")])
    router = Router.load(ground / "router")
    queries = [f"Question {query} is unlike the others." for query in "abcdefghijkl"]
    router.runs = fingerprints(queries)
    made = evaluate(router, replace(outcomes.select(range(12)), queries=queries), sets[:12])
    assert made.leaks["queries"] == 12 and made.without_leaks is None and made.worth_it is None
    assert verdict(made).startswith("Whether this router is worth it is not known: all of these queries share text")
    assert any("say nothing about new queries" in line for line in remarks(made))


def test_runs_of_words_that_many_training_queries_share_are_a_template():
    template = "Which of the following statements about the economy of the country is the most likely to be true?"
    own = "A long question with quite a few words that nobody else has ever asked anywhere before, is it?"
    runs = fingerprints([*(f"{template} Number {i}." for i in range(11)), own])
    assert shared_runs([f"{template} Another one."], runs) == [None]
    assert shared_runs([own.upper()], runs)[0].startswith("a long question with")
    assert shared_runs(["Short.", "", "问题" * 3], runs) == [None] * 3 and shared_runs([own], fingerprints([])) == [
        None
    ]
    assert shared_runs(["What is two?", "What is two now?"], fingerprints(["what is TWO"])) == ["what is two", None]
    chinese = "下列关于中国古代历史的说法中正确的一项是哪一个请选择"
    assert shared_runs([f"问{chinese}吗"], fingerprints([chinese]))[0] == chinese[:20]


def test_a_set_is_left_out_of_the_training(ground, tmp_path, capsys):
    command = ["router", "evaluate", str(ground / "router"), str(ground / "test.jsonl"), "-o", str(tmp_path)]
    assert main([*command, "--leave_one_out", str(ground / "train.jsonl")]) == 0
    found = json.loads((tmp_path / "evaluation.json").read_text())
    assert [(each["set"], each["trained_on"], each["queries"]) for each in found["left_out"]] == [
        ("sums", 50, 100),
        ("poems", 50, 100),
    ]
    assert found["left_out"][0]["best_single"] == "poems", "nothing else was seen in training"
    assert found["left_out"][0]["router"] < found["accuracy"]["sums"], "in training the set had been learned"
    assert "Sets left out of the training" in capsys.readouterr().out


# Bad input -----------------------------------------------------------------------------------------------------------------


def one_line(capsys, *command: str) -> str:
    assert main(["router", "evaluate", *command]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "Traceback" not in said
    return said


def test_bad_input_is_one_line(ground, tmp_path, capsys):
    router, out = str(ground / "router"), ["-o", str(tmp_path / "out")]
    others = [row | {"rewards": {"x": 1, "sums": 0}, "correct": None} for row in rows(4, 0)]
    said = one_line(capsys, router, str(write(tmp_path / "a.jsonl", others)), *out)
    assert "chooses among sums, poems, fair" in said and "no scores of poems, fair" in said

    halves = [row | {"correct": {"sums": 1.0}} for row in rows(4, 0)]
    capsys.readouterr()
    assert main(["router", "evaluate", router, str(write(tmp_path / "b.jsonl", halves)), *out]) == 1
    assert "error: no query has correct of every candidate (missing: poems 4, fair 4)" in capsys.readouterr().err

    (tmp_path / "empty.jsonl").write_text("\n")
    assert "is empty" in one_line(capsys, router, str(tmp_path / "empty.jsonl"), *out)
    assert main(["router", "evaluate", router, *out]) == 2 and "name at least one file" in capsys.readouterr().err
    assert "no such file" in one_line(capsys, router, str(tmp_path / "none.jsonl"), *out)
    assert "holds no router.json" in one_line(capsys, str(tmp_path), str(ground / "test.jsonl"), *out)

    unknown = write(tmp_path / "u.jsonl", [row | {"tags": ["other"]} for row in rows(4, 0)])
    said = one_line(capsys, router, str(ground / "test.jsonl"), *out, "--leave_one_out", str(unknown))
    assert "have none of the sets sums, poems; theirs are other" in said
    assert not (tmp_path / "out").exists(), "nothing half-written"
    said = one_line(capsys, router, str(ground / "test.jsonl"), "-o", str(ground / "test.jsonl"))
    assert "is a file; -o names a directory" in said


@pytest.mark.parametrize("option", ["--margin", "--usd_weight"])
def test_what_cannot_be_served_is_not_evaluated(ground, tmp_path, capsys, option):
    command = ["router", "evaluate", str(ground / "router"), str(ground / "test.jsonl"), "-o", str(tmp_path / "out")]
    assert main([*command, option, "-1"]) == 2
    assert f"{option} -1: must be 0 or more" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_an_input_is_not_overwritten(ground, tmp_path, capsys):
    content = write(tmp_path / "evaluation.json", rows(40, 1)).read_bytes()
    (tmp_path / "link").symlink_to(tmp_path)
    said = one_line(capsys, str(ground / "router"), str(tmp_path / "evaluation.json"), "-o", str(tmp_path / "link"))
    assert "is the input" in said and (tmp_path / "evaluation.json").read_bytes() == content


def test_models_that_the_router_does_not_know_are_left_out_and_named(ground, tmp_path):
    content = rows(40, 2, first=3000)
    whole = evaluated(ground, content, tmp_path)
    for row in content:
        row["rewards"] = row["correct"] = {"new": 1.0, **row["correct"]}
    made = evaluated(ground, content, tmp_path)
    assert made.gain == whole.gain and "Left out, because the router cannot choose them: new." in remarks(made)


# The page ------------------------------------------------------------------------------------------------------------------


def test_everything_on_the_page_is_escaped(ground, tmp_path):
    content = rows(200, 1, first=1000)
    for row, hostile in zip(content, HOSTILE * 25):
        row["query"] += hostile
        row["tags"] = [row["tags"][0] + hostile, hostile]
    made = evaluated(ground, content, tmp_path)
    router = Router.load(ground / "router")
    names = dict(zip(MODELS, HOSTILE))
    text = tmp_path / "page.html"
    made.candidates = [names[name] for name in router.candidates]
    for system in made.systems:
        system.says += HOSTILE[1]
        for name, hostile in names.items():
            system.name = f"{hostile} alone" if system.name == f"{name} alone" else system.name
    made.examples["better"][0].query = HOSTILE[0] * 2000
    write_evaluation_page(text, made)
    page = text.read_text()
    assert "<script>alert" not in page and "<img src=x" not in page and "<svg/onload" not in page
    assert "\u202e" not in page and "&lt;script&gt;alert(1)" in page and "more characters]" in page
    assert re.search(r"\{\{ 7 \* 7 \}\}", page) and json.loads(to_json(made))


@pytest.mark.slow
@pytest.mark.skipif(
    CHROMIUM is None, reason="needs a Chromium: none of chromium, chromium-browser, google-chrome found"
)
def test_the_page_in_a_browser(ground, tmp_path):
    made = evaluated(ground, rows(200, 1, first=1000, usd=True), tmp_path)
    write_evaluation_page(tmp_path / "evaluation.html", made)
    page = (tmp_path / "evaluation.html").read_text()
    dom, complaints = browse(tmp_path, page)
    assert complaints == []
    assert texts(dom, "//p[@class='lede']") == [verdict(made)]
    assert len(texts(dom, "//section[@id='confusion']//tbody/tr")) == 3
    assert all(f"{name} (" in texts(dom, "//section[@id='curve']//p")[0] for name in MODELS), "the dots have names"
    assert texts(dom, "//section[@id='figures']//table[1]//tbody/tr/td[1]")[0] == "router"
    assert len(texts(dom, "//article")) == sum(map(len, made.examples.values())) >= 5
    assert len(texts(dom, "//figure//*[name()='rect']")) == len(made.curve.x)


@pytest.mark.slow
@pytest.mark.skipif(
    CHROMIUM is None, reason="needs a Chromium: none of chromium, chromium-browser, google-chrome found"
)
def test_the_page_is_no_wider_than_a_phone(ground, tmp_path):
    made = evaluated(ground, rows(200, 1, first=1000, usd=True), tmp_path)
    write_evaluation_page(tmp_path / "evaluation.html", made)
    with browser() as running:
        page = running.new_page(viewport={"width": 360, "height": 700})
        page.goto((tmp_path / "evaluation.html").as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        mean = page.locator(".systems tbody tr:nth-child(4) td:nth-child(2)").bounding_box()
        assert mean["x"] + mean["width"] <= 360, "the mean and its interval are seen whole"
        page.set_viewport_size({"width": 1280, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") <= 1280
        cut = "[...document.querySelectorAll('.wide')].filter(each => each.scrollWidth > each.clientWidth).length"
        assert page.evaluate(cut) == 0, "no column is cut on a desk"


# Real outcomes -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(not DATA.is_dir(), reason="NOT CHECKED HERE: FASTFT_DATA has no router/")
def test_the_fixed_figures_of_real_outcomes(tmp_path):
    """What does not depend on the router: the models alone, the blend, and the oracle, on three whole test sets."""
    train = tmp_path / "few.jsonl"
    with gzip.open(DATA / "train_arc.jsonl.gz") as file:
        train.write_bytes(b"".join(file.readlines()[:60]))
    assert main(["router", "train", str(train), "-o", str(tmp_path / "router")]) == 0
    outcomes, sets = read_with_sets([str(DATA / f"test_{name}.jsonl.gz") for name in ("mmlu", "gsm8k", "arc")])
    made = evaluate(Router.load(tmp_path / "router"), outcomes, sets)
    assert made.sets == {"MMLU": 4213, "GSM8K": 1319, "ARC": 352}
    assert made.system("uniform blend").mean.value == pytest.approx(53.56, abs=0.005)
    assert made.system("oracle").mean.value == pytest.approx(80.34, abs=0.005)
    dolphin = made.system("dolphin-2.9-llama3-8b alone")
    assert dolphin.mean.value == pytest.approx(59.57, abs=0.005)
    assert [round(dolphin.by_set[name], 2) for name in made.sets] == [59.46, 69.81, 49.43]
    blend = made.drawn_blend
    assert blend["standard_error"] == pytest.approx(0.60, abs=0.02)
    assert abs(blend["drawn"] - blend["mean_of_models"]) < 3 * blend["standard_error"]
