"""Samplers draw the same questions from the same data, whatever its order, and cope with small and equal data."""

import gzip
import json
import os
from collections import Counter
from pathlib import Path

import pytest
from helpers.grimoires import LABELS, rows

from fastft.compose.grimoire.task import TaskQuestion, read_questions
from fastft.compose.grimoire.writing.embed import embedder
from fastft.compose.grimoire.writing.samplers import SAMPLERS, draw_samples, strata
from fastft.errors import UserError

DATA = Path(os.environ.get("FASTFT_DATA", "data")) / "grimoire"
real = pytest.mark.skipif(not DATA.is_dir(), reason="NOT CHECKED HERE: FASTFT_DATA has no grimoire/")


def questions(count: int = 40) -> list[TaskQuestion]:
    return [TaskQuestion(row["id"], row["text"], row["label"]) for row in rows(count)]


def drawn(sampler: str, those: list[TaskQuestion], count: int = 4, seed: int = 22) -> list[str]:
    embed = embedder("tfidf", [each.text for each in those])
    features = embed([each.text for each in those])
    right = {each.id: int(each.id[1:]) % 3 == 0 for each in those}
    return [each.id for each in draw_samples(those, LABELS, sampler, count, features, right, seed)]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_draw_depends_on_the_seed_and_not_on_the_order(sampler):
    those = questions()
    found = drawn(sampler, those)
    labels = Counter(each.label for each in those if each.id in found)
    assert labels == ({} if sampler == "none" else {"even": 4, "odd": 4})
    # Rows of features are sums of floats in another order, so clusters are compared on the same order.
    assert drawn(sampler, those) == found
    if sampler in ("random", "hard", "half-hard"):
        assert drawn(sampler, list(reversed(those))) == found
        assert drawn(sampler, those, seed=23) != found


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_label_with_too_few_questions_gives_what_it_has(sampler):
    those = [each for each in questions(40) if each.label == "odd" or each.id == "q1"]
    found = drawn(sampler, those)
    assert len(found) == len(set(found)) == (0 if sampler == "none" else 5)
    assert drawn(sampler, []) == []


@pytest.mark.parametrize("sampler", ["kmeans", "hierarchical"])
def test_texts_without_words_and_equal_texts_leave_no_cluster_empty(sampler):
    those = [TaskQuestion(f"q{n}", "the same" if n < 8 else "?!", LABELS[n % 2]) for n in range(16)]
    assert len(set(drawn(sampler, those))) == 8


def test_hard_samples_are_wrong_ones_and_what_is_missing_comes_from_the_others():
    those = questions(40)
    right = {each.id: int(each.id[1:]) % 3 == 0 for each in those}
    assert not any(right[each] for each in drawn("hard", those))
    half = [right[each] for each in drawn("half-hard", those)]
    assert half.count(True) == half.count(False) == 4
    only_easy = {each.id: True for each in those}
    found = draw_samples(those, LABELS, "hard", 4, None, only_easy)
    assert len(found) == 8
    few_easy = {each.id: each.id in ("q0", "q1") for each in those}
    assert len(draw_samples(those, LABELS, "half-hard", 4, None, few_easy)) == 8
    assert strata(those, right) == (14, 26)


def test_an_unknown_sampler_is_named():
    with pytest.raises(UserError, match="--samplers best: there are kmeans"):
        draw_samples([], LABELS, "best")


@real
@pytest.mark.parametrize(
    ("name", "right", "wrong"), [("Subj", 66, 934), ("TREC", 372, 128), ("AgNews", 842, 158), ("RTE", 755, 162)]
)
def test_strata_of_the_published_zero_shot_runs(tmp_path, name, right, wrong):
    """The repository counts 161 for RTE: the archive marks RTE.train.1654 as well, whose text is RTE.train.347's."""
    labels = json.loads((DATA / "tasks.json").read_text())[name]["labels"]
    path = tmp_path / f"{name}.jsonl"
    path.write_bytes(gzip.decompress((DATA / f"{name}_train.jsonl.gz").read_bytes()))
    those = [each for each in read_questions(path, labels) if "gpt-3.5-turbo" in each.zero_shot]
    known = {each.id: each.zero_shot["gpt-3.5-turbo"] for each in those}
    assert strata(those, known) == (right, wrong)
    if name == "RTE":
        known.pop("RTE.train.1654")
        assert strata(those, known) == (755, 161)
