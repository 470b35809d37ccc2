"""A router learns from outcomes: the loss and its labels by definition, what is odd is named, the same seed gives the same."""

import json
import logging
import re
import sys

import numpy as np
import pytest

from fastft.cli import main
from fastft.compose.router.figures.measures import calibration_error
from fastft.compose.router.figures.verdict import signed, verdict
from fastft.compose.router.outcomes import Outcomes, read_outcomes
from fastft.compose.router.router import Router, choose_by
from fastft.compose.router.training.calibration import brier, fit_scale
from fastft.compose.router.training.fit import fit_heads, hard_labels, sigmoid, soft_labels, softmax
from fastft.compose.router.training.tags import enhance, known_mean
from fastft.compose.router.training.train import TrainSettings, train_router
from fastft.errors import UsageError, UserError
from fastft.judge.statistics.intervals import Interval

TOPICS = {
    "sum": ["What is {} plus {}?", "Add {} and {}, please.", "How much is {} apples and {} apples?"],
    "poem": ["Write a poem about {} and {}.", "Compose verses on {} and {}.", "Rhyme {} with {}."],
}
WORDS = "sea sun moon rain tree owl snow wind rose hill".split()


def outcomes(count=120, seed=0, tags=True, **changes):
    """Queries of two topics: the model `sums` is right about sums, `poems` about poems, each in 9 of 10 queries."""
    rng = np.random.default_rng(seed)
    queries, topics, rewards = [], [], []
    for number in range(count):
        topic = ("sum", "poem")[number % 2]
        words = rng.integers(2, 99, 2).tolist() if topic == "sum" else rng.choice(WORDS, 2).tolist()
        queries.append(TOPICS[topic][rng.integers(3)].format(*words) + f" ({number})")
        topics.append(topic)
        good, bad = float(rng.random() < 0.9), float(rng.random() < 0.2)
        rewards.append([good, bad] if topic == "sum" else [bad, good])
    made = {
        "ids": [f"q{number}" for number in range(count)],
        "queries": queries,
        "tags": [[topic] if tags else [] for topic in topics],
        "models": ["sums", "poems"],
        "rewards": np.array(rewards),
    }
    return Outcomes(**(made | changes))


def write(path, made, **more):
    """Write outcomes as a file; `more` replaces fields of every row."""
    rows = [
        {"id": i, "query": q, "tags": t, "rewards": dict(zip(made.models, map(float, r)))}
        for i, q, t, r in zip(made.ids, made.queries, made.tags, made.rewards)
    ]
    path.write_text("\n".join(json.dumps(row | more) for row in rows) + "\n")
    return path


@pytest.fixture(scope="module")
def trained():
    return train_router(outcomes(), TrainSettings())


# --- The loss and its labels ------------------------------------------------------------------------------------------


def test_soft_labels_are_the_softmax_of_the_rewards_that_there_are():
    labels = soft_labels(np.array([[1.0, 0.0, np.nan]]), 0.5)
    assert labels[0, :2] == pytest.approx(np.exp([2, 0]) / np.exp([2, 0]).sum()) and np.isnan(labels[0, 2])


def test_a_hard_label_is_the_first_of_the_best_models():
    labels = hard_labels(np.array([[0.5, 1.0, 1.0], [0.2, 0.1, np.nan]]))
    assert labels[0].tolist() == [0, 1, 0] and labels[1, :2].tolist() == [1, 0] and np.isnan(labels[1, 2])


def test_enhancement_mixes_a_label_with_the_mean_of_the_means_of_its_tags():
    """s* = beta s + (1 - beta) mean over the query's tags of the tag's mean (ZOOTER, equation 5)."""
    labels = np.array([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5], [0.9, 0.1]])
    enhanced = enhance(labels, [["a"], ["a", "b"], ["b"], []], beta=0.3)
    a, b = np.array([0.5, 0.5]), np.array([0.25, 0.75])
    assert enhanced[0] == pytest.approx(0.3 * labels[0] + 0.7 * a)
    assert enhanced[1] == pytest.approx(0.3 * labels[1] + 0.7 * (a + b) / 2)
    assert enhanced[3] == pytest.approx(labels[3]), "a query without a tag keeps its label"


def test_a_tag_seen_once_smooths_nothing_and_a_missing_score_stays_missing():
    labels = np.array([[1.0, np.nan], [0.0, 1.0]])
    enhanced = enhance(labels, [["once"], ["other"]], beta=0.3)
    np.testing.assert_allclose(enhanced, labels)
    shared = enhance(labels, [["both"], ["both"]], beta=0.0)
    assert np.isnan(shared[0, 1]) and shared[0, 0] == 0.5 and shared[1, 1] == 1.0


def test_both_heads_are_at_the_minimum_that_scikit_learn_finds():
    """The reference sees every query once for each model, weighed by its soft label, and each model's success alone."""
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(80, 6))
    labels = softmax(rng.normal(size=(80, 3)))
    success = rng.random((80, 3))
    heads = fit_heads(matrix, {"distribution": labels}, success, c=3.0)

    repeated, classes = np.repeat(matrix, 3, 0), np.tile(np.arange(3), 80)
    reference = LogisticRegression(C=3.0, tol=1e-8, max_iter=1000).fit(repeated, classes, labels.ravel())
    got, want = softmax(heads["distribution"].logits(matrix)), reference.predict_proba(matrix)
    assert np.abs(got - want).max() < 0.01
    for model in range(3):
        weights = np.column_stack([1 - success[:, model], success[:, model]]).ravel()
        reference = LogisticRegression(C=3.0, tol=1e-8, max_iter=1000)
        reference.fit(np.repeat(matrix, 2, 0), np.tile([0, 1], 80), weights)
        got, want = sigmoid(heads["success"].logits(matrix))[:, model], reference.predict_proba(matrix)[:, 1]
        assert np.abs(got - want).max() < 0.01


def test_dense_and_sparse_columns_give_the_same_heads():
    from scipy.sparse import csr_matrix

    rng = np.random.default_rng(1)
    matrix = rng.normal(size=(40, 5)) * (rng.random((40, 5)) < 0.5)
    labels, success = softmax(rng.normal(size=(40, 2))), rng.random((40, 2))
    dense = fit_heads(matrix, {"distribution": labels}, success, 1.0)
    sparse = fit_heads(csr_matrix(matrix), {"distribution": labels}, success, 1.0)
    for name, head in dense.items():
        np.testing.assert_allclose(head.weights, sparse[name].weights, atol=1e-4)


@pytest.mark.slow
def test_a_missing_score_teaches_nothing_about_its_model():
    """A model that is missing on every query of a topic keeps its mean there; read as 0, it would look bad at it."""
    made = outcomes(200)
    made.rewards[::2, 1] = np.where(np.arange(100) < 90, np.nan, made.rewards[::2, 1])  # `poems` on most sums
    router = train_router(made, TrainSettings(tags="none"), with_baselines=False)
    as_zero = train_router(
        outcomes(200, rewards=np.nan_to_num(made.rewards)), TrainSettings(tags="none"), with_baselines=False
    )
    sums = [made.queries[0], made.queries[2]]
    assert (router.scores(sums).success[:, 1] > as_zero.scores(sums).success[:, 1] + 0.05).all()


def test_calibration_recovers_the_slope_and_shift_that_made_the_outcomes():
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (20_000, 2))
    slope, shift = 0.5, -0.7
    happened = (rng.random(logits.shape) < sigmoid(logits * slope + shift)).astype(float)
    happened[:100, 0] = np.nan
    scale = fit_scale(logits, happened)
    assert scale.slope == pytest.approx(slope, abs=0.03) and scale.shift == pytest.approx(shift, abs=0.03)
    known = ~np.isnan(happened)
    assert calibration_error(sigmoid(scale(logits))[known], happened[known]) < 0.015
    assert calibration_error(sigmoid(logits)[known], happened[known]) > 0.03
    assert brier(sigmoid(scale(logits)), happened) < brier(sigmoid(logits), happened)


# --- The router -------------------------------------------------------------------------------------------------------


def test_each_topic_goes_to_the_model_that_is_good_at_it(trained):
    fresh = outcomes(60, seed=1)
    chosen = trained.choose(trained.scores(fresh.queries))
    assert (chosen == [0, 1] * 30).mean() > 0.95
    held = trained.report["held_out"]
    assert held["gain_over_best_single"][1] > 0, "the interval excludes 0"
    names = [row["name"] for row in held["table"]]
    assert names == [
        "router", "best single", "uniform blend", "hard label", "kNN 40", "MLP", "best per tag", "oracle",
    ]  # fmt: skip


def test_paper_mode_and_success_agree_on_clear_queries(trained):
    scores = trained.scores(outcomes(60, seed=2).queries)
    paper = trained.choose(scores, margin=0, rule="distribution")
    assert (paper == trained.choose(scores, margin=0)).mean() > 0.95
    assert scores.distribution.sum(1) == pytest.approx(1)


def test_the_default_is_left_only_for_the_margin():
    utility = np.array([[0.5, 0.54], [0.5, 0.6], [0.5, 0.5], [0.6, 0.5]])
    assert choose_by(utility, 0, 0.05).tolist() == [0, 1, 0, 0]
    assert choose_by(utility, 0, 0.0).tolist() == [1, 1, 0, 0]


def test_saved_and_loaded_a_router_decides_the_same_and_nothing_is_pickled(trained, tmp_path):
    trained.save(tmp_path / "router")
    assert sorted(path.name for path in (tmp_path / "router").iterdir()) == [
        "baselines.safetensors", "router.json", "router.safetensors",
    ]  # fmt: skip
    loaded, fresh = Router.load(tmp_path / "router", with_baselines=True), outcomes(30, seed=3)
    for name in ("distribution", "success"):
        np.testing.assert_array_equal(
            getattr(loaded.scores(fresh.queries), name), getattr(trained.scores(fresh.queries), name)
        )
    decision = loaded.decide("What is 3 plus 4?")
    assert decision.model == "sums" and set(decision.probabilities) == {"sums", "poems"}
    matrix = loaded.features.transform(fresh.queries)
    chosen = loaded.baselines.choose(matrix, loaded.features.dense(matrix), fresh.tags)
    assert set(chosen) == {"hard label", "kNN 40", "MLP", "best per tag"}
    assert all((own == [0, 1] * 15).mean() > 0.75 for own in chosen.values()), chosen


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bytes(tmp_path):
    for name in "ab":
        train_router(outcomes(60), TrainSettings(tags="clusters:3")).save(tmp_path / name)
    for file in ("router.json", "router.safetensors", "baselines.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file


def test_prices_lower_the_costs_among_margins_that_are_as_good():
    """Both models are right about everything, so the cheap one can answer whatever it is as good at as the default."""
    from fastft.compose.router.training.train import MARGINS, _best_margin

    rng = np.random.default_rng(0)
    success = np.column_stack([np.full(200, 0.8), 0.8 + rng.uniform(-0.1, 0.1, 200)])
    measure, usd = np.ones((200, 2)), np.tile([5.0, 1.0], (200, 1))
    rows, sets = np.full(200, True), [""] * 200
    assert _best_margin(success, measure, 0, sets, usd, rows) == 0
    assert _best_margin(success, measure, 0, sets, None, rows) == MARGINS[-1], "without prices, the default is kept"


def test_usd_weight_moves_questions_to_the_cheaper_model():
    usd = np.tile([0.01, 0.0], (120, 1))
    router = train_router(outcomes(usd=usd), TrainSettings(), with_baselines=False)
    scores = router.scores(["What is 3 plus 4?"])
    assert router.usd == {"sums": pytest.approx(0.01), "poems": 0.0}
    assert router.choose(scores)[0] == 0 and router.choose(scores, usd_weight=100)[0] == 1


def test_a_query_without_anything_that_was_seen_is_unlike_the_training_queries(trained):
    scores = trained.scores(["What is 12 plus 30? (7)", "", "Чем отличается хлеб от булки?"])
    assert scores.unlike.tolist() == [False, True, True]
    assert trained.decide("").why.endswith("unlike the training queries")


@pytest.mark.parametrize("query", ["", " \n", "\ud800", "x" * 100_000, "\0", "🙂" * 50])
def test_any_text_gets_a_decision(trained, query):
    decision = trained.decide(query)
    assert decision.model in trained.candidates and all(0 <= p <= 1 for p in decision.probabilities.values())


def test_a_router_that_gains_nothing_says_so(tmp_path, capsys):
    """One model is better on everything."""
    made = outcomes(rewards=np.random.default_rng(0).random((120, 2)) * 0.5 + [0.5, 0.0])
    assert main(["router", "train", str(write(tmp_path / "o.jsonl", made)), "-o", str(tmp_path / "r")]) == 0
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last.startswith("this router is not worth it: it cannot be told from the best single model, sums: ")


def test_one_verdict_for_training_and_evaluation():
    assert verdict(Interval(3, 1, 5), 100, "x", "points") == (
        "this router is worth it: it is better than the best single model, x, by +3.00 [+1.00, +5.00] points"
    )
    assert "it is worse than the best single model, x, by -3.00 [-5.00, -1.00]" in verdict(
        Interval(-3, -5, -1), 100, "x", "points"
    )
    assert "that interval holds 0" in verdict(Interval(1, -1, 3), 100, "x", "points")
    assert "1 query is too few" in verdict(Interval(1, 1, 1), 1, "x", "points")
    assert signed(Interval(0.004, 0.001, 0.01)) == "+0.004 [+0.001, +0.010]"


def test_a_lone_small_set_does_not_decide():
    """120 queries on which `sums` is better, and three of another set on which `poems` is."""
    made = outcomes(123, rewards=np.array([[0.8, 0.5]] * 120 + [[0.0, 1.0]] * 3))
    made.tags[:] = [["all"]] * 120 + [["few"]] * 3
    router = train_router(made, TrainSettings(), with_baselines=False)
    assert router.default == "sums" and router.report["held_out"]["sets"] == 1


def test_a_query_of_which_nothing_is_known_gets_the_means(trained):
    scores = trained.scores(["", "Чем хлеб", "What is 3 plus 4?"])
    assert scores.success[:2] == pytest.approx(np.array([list(trained.report["means"].values())] * 2))
    assert scores.distribution.sum(1) == pytest.approx(1, abs=1e-3)
    assert trained.knows(["", "What is 3?"]).tolist() == [False, True]


def test_clusters_serve_as_tags():
    router = train_router(outcomes(tags=False), TrainSettings(tags="clusters:4"), with_baselines=False)
    assert len(router.report["tags"]) == 4
    assert (router.choose(router.scores(outcomes(40, seed=4).queries)) == [0, 1] * 20).mean() > 0.9


# --- What is odd ------------------------------------------------------------------------------------------------------


def test_missing_scores_are_named_and_never_read_as_0(tmp_path, caplog):
    rows = [
        {"id": "1", "query": "a", "rewards": {"x": 1.0, "y": None}},
        {"id": "2", "query": "b", "rewards": {"x": 0.5}},
        {"id": "3", "query": "c", "rewards": {"x": float("nan"), "y": 0.25}},
    ]
    (tmp_path / "o.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with caplog.at_level(logging.WARNING, "fastft"):
        made = read_outcomes([tmp_path / "o.jsonl"])
    assert np.isnan(made.rewards).tolist() == [[False, True], [False, True], [True, False]]
    assert "3 of 6 rewards are missing (x 1, y 2): left out, not read as 0" in caplog.text


@pytest.mark.parametrize(
    "row, says",
    [
        ({"id": "1", "rewards": {"x": 1}}, '"query" is a text'),
        ({"id": "1", "query": "a"}, '"rewards" must be {model: score} with at least one model'),
        ({"id": "1", "query": "a", "rewards": {"x": "good"}}, "\"rewards\" of 'x' is 'good'; it must be a number"),
        ({"id": "1", "query": "a", "rewards": {"x": 1e999}}, "\"rewards\" of 'x' is infinite"),
        ({"id": "1", "query": "a", "rewards": {"x": 1}, "correct": {"x": 2}}, "it must be between 0 and 1"),
        ({"id": "1", "query": "a", "rewards": {"x": 1}, "usd": {"x": -1}}, "it must be at least 0"),
        ({"id": "1", "query": "a", "rewards": {"x": 1}, "usd": {"y": 1}}, "'y' is not among the models of \"rewards\""),
        ({"id": "1", "query": "a", "rewards": {"x": 1}, "tags": "t"}, '"tags" must be a list of texts'),
    ],
)
def test_what_is_no_outcome_is_named_with_its_line(tmp_path, row, says):
    good = {"id": "0", "query": "q", "rewards": {"x": 1, "y": 0}}
    (tmp_path / "o.jsonl").write_text(f"{json.dumps(good)}\n{json.dumps(row)}\n")
    with pytest.raises(UserError, match=re.escape(says)) as error:
        read_outcomes([tmp_path / "o.jsonl"])
    assert "o.jsonl: line 2" in str(error.value)


def test_one_model_only_is_refused():
    with pytest.raises(UserError, match=r"one model only \(sums\)"):
        train_router(outcomes(models=["sums"], rewards=np.ones((120, 1))), TrainSettings())


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"reward": "correct"}, 'have no "correct"'),
        ({"tags": "cluster:3"}, "must be tags, none or clusters:N"),
        ({"tags": "clusters:1"}, "N of at least 2"),
        ({"tags": "clusters:999"}, "there are only 120 queries"),
        ({"temperature": 0.0}, "--temperature 0: must be above 0"),
        ({"beta": 1.5}, "--beta 1.5: must be between 0 and 1"),
        ({"encoder": "nowhere"}, "nowhere: no such directory"),
    ],
)
def test_settings_that_cannot_be_are_refused_in_one_line(changes, says):
    with pytest.raises((UserError, UsageError), match=re.escape(says)) as error:
        train_router(outcomes(), TrainSettings(**changes))
    assert "\n" not in str(error.value)


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(UserError, match=r'needs sklearn, which is not installed: pip install "fastft\[compose\]"'):
        train_router(outcomes(), TrainSettings())


def test_equal_scores_and_a_model_without_scores_are_refused():
    with pytest.raises(UserError, match="nothing to learn"):
        train_router(outcomes(rewards=np.ones((120, 2))), TrainSettings())
    made = outcomes()
    made.rewards[:, 1] = np.nan
    with pytest.raises(UserError, match=r"poems: no query has a score \(rewards\)"):
        train_router(made, TrainSettings())


def test_rewards_on_another_scale_are_scaled_and_one_outlier_does_not_flatten_them(caplog):
    made = outcomes(rewards=20 * outcomes().rewards - 10)
    made.rewards[0, 0] = 1e6
    with caplog.at_level(logging.INFO, "fastft"):
        router = train_router(made, TrainSettings(), with_baselines=False)
    assert (
        "rewards are scaled from [-10, 10] to [0, 1]; what lies outside, such as -10 and 1e+06, is cut" in caplog.text
    )
    assert (router.choose(router.scores(outcomes(40, seed=5).queries)) == [0, 1] * 20).mean() > 0.9


def test_equal_queries_are_held_out_together(caplog):
    from fastft.compose.router.training.train import _folds

    fold = _folds([f"q{number % 50}" for number in range(100)], 0)
    assert (fold[:50] == fold[50:]).all() and np.bincount(fold).tolist() == [20] * 5
    made = outcomes()
    made.queries[1] = made.queries[0]
    with caplog.at_level(logging.INFO, "fastft"):
        train_router(made, TrainSettings(), with_baselines=False)
    assert "held out together with an equal one: 1 query" in caplog.text


@pytest.mark.parametrize("count", [1, 2, 8])
def test_few_queries_train_a_router_that_claims_nothing(count, caplog, tmp_path):
    made = outcomes(8).select(range(count))
    router = (
        train_router(made, TrainSettings())
        if count > 1
        else train_router(
            Outcomes(["1"], ["a question"], [["t"]], ["x", "y"], np.array([[1.0, 0.0]])),
            TrainSettings(),
        )
    )
    assert "held_out" not in router.report and router.margin > 0
    assert f"only {'1 query' if count == 1 else f'{count} queries'}: none" in caplog.text
    router.save(tmp_path / "r")
    assert Router.load(tmp_path / "r").decide("What is 1 plus 1?").model in router.candidates


@pytest.mark.slow
def test_a_candidate_that_is_never_the_best_is_named(tmp_path, capsys):
    base = outcomes()
    made = outcomes(models=["sums", "poems", "idle"], rewards=np.column_stack([base.rewards, np.zeros(120)]))
    router = train_router(made, TrainSettings(), with_baselines=False)
    assert router.report["held_out"]["never_best"] == ["idle"]
    assert (router.choose(router.scores(base.queries)) != 2).all()


def test_rows_that_lack_scores_are_used_where_they_can_be(caplog):
    made = outcomes()
    made.rewards[0] = np.nan
    made.rewards[1:40:3, 0] = np.nan
    with caplog.at_level(logging.WARNING, "fastft"):
        router = train_router(made, TrainSettings(), with_baselines=False)
    assert "left out without any score: 1 query" in caplog.text
    assert router.report["held_out"]["queries"] == 120 - 14
    assert known_mean(np.array([[np.nan, 1.0], [2.0, 3.0]])).tolist() == [2.0, 2.0]


def test_a_router_does_not_replace_its_outcomes(trained, tmp_path, capsys):
    trained.save(tmp_path / "r")
    path = write(tmp_path / "r" / "o.jsonl", outcomes(50))
    assert main(["router", "train", str(path), "-o", str(tmp_path / "r")]) == 1
    assert "holds the input" in capsys.readouterr().err and path.is_file()


def test_another_directory_is_not_overwritten(tmp_path, capsys):
    path = write(tmp_path / "o.jsonl", outcomes(50))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    assert main(["router", "train", str(path), "-o", str(tmp_path / "mine")]) == 1
    assert "holds files that are no router's" in capsys.readouterr().err
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("break_it, says", [
    (lambda d: (d / "router.json").unlink(), "holds no router.json"),
    (lambda d: (d / "router.json").write_text("{}"), "is not a router's"),
    (lambda d: (d / "router.safetensors").unlink(), "is missing"),
    (lambda d: (d / "router.safetensors").write_bytes(b"12345678"), "cannot be read"),
])  # fmt: skip
def test_a_broken_directory_is_one_line(trained, tmp_path, break_it, says):
    trained.save(tmp_path / "r")
    break_it(tmp_path / "r")
    with pytest.raises(UserError, match=re.escape(says)):
        Router.load(tmp_path / "r")
