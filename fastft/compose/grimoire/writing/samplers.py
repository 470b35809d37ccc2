"""Choose the training questions that a strong model sees, the same number of each label: five samplers, and none.

    samples = draw_samples(questions, labels, "kmeans", count=4, features=matrix, seed=22)     # questions, grouped by label

- kmeans, hierarchical: the most typical question of each of `count` clusters (needs `features`, a matrix with a row of length 1
  for each question)
- hard, half-hard: all, or half, of them are questions that the weak model got wrong without help (needs `right`)
- random; none: no questions at all, the strong model knows the task's description only

Every draw depends on (seed, sampler, label) and not on the order of the file or of the labels. A label with too few questions
of a kind gives what it has.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fastft.compose.grimoire.task import TaskQuestion
from fastft.errors import UserError

SAMPLERS = ("kmeans", "hierarchical", "hard", "half-hard", "random", "none")
HARD_SHARE = {"hard": 1.0, "half-hard": 0.5}
CLUSTERED = ("kmeans", "hierarchical")
MOST_CLUSTERED = 2000  # questions of a label; hierarchical clustering takes their number squared in memory


def draw_samples(
    questions: Sequence[TaskQuestion],
    labels: Sequence[str],
    sampler: str,
    count: int = 4,
    features: Any = None,
    right: Mapping[str, bool] | None = None,
    seed: int = 22,
) -> list[TaskQuestion]:
    """Return up to `count` questions of each label, in the order of `labels`. Raises UserError for an unknown sampler."""
    if sampler not in SAMPLERS:
        raise UserError(f"--samplers {sampler}: there are {', '.join(SAMPLERS)}")
    if sampler == "none":
        return []
    drawn = []
    for label in labels:
        rng = _generator(seed, sampler, label)
        # By id, so that neither the order of the file nor that of the labels matters.
        places = sorted((i for i, each in enumerate(questions) if each.label == label), key=lambda i: questions[i].id)
        if sampler in CLUSTERED:
            chosen = _typical(places, features, sampler, count, rng)
        elif sampler in HARD_SHARE:
            chosen = _hard(places, questions, right or {}, HARD_SHARE[sampler], count, rng)
        else:
            chosen = _some(places, count, rng)
        drawn += [questions[i] for i in chosen]
    return drawn


def strata(questions: Sequence[TaskQuestion], right: Mapping[str, bool]) -> tuple[int, int]:
    """Return how many of the questions a model got right and wrong. Those that it was not asked are in neither."""
    known = [right[each.id] for each in questions if each.id in right]
    return sum(known), len(known) - sum(known)


def _generator(seed: int, sampler: str, label: str) -> np.random.Generator:
    digest = hashlib.blake2b(f"{seed}:{sampler}:{label}".encode(), digest_size=8).digest()
    return np.random.default_rng(int.from_bytes(digest, "big"))


def _some(places: list[int], count: int, rng: np.random.Generator) -> list[int]:
    return [places[i] for i in rng.permutation(len(places))[:count]]


def _hard(
    places: list[int],
    questions: Sequence[TaskQuestion],
    right: Mapping[str, bool],
    share: float,
    count: int,
    rng: np.random.Generator,
) -> list[int]:
    """Return int(share x count) questions that the model got wrong, and the rest from those that it got right. What one kind
    lacks, the other gives.
    """
    hard = _some([i for i in places if right.get(questions[i].id) is False], len(places), rng)
    easy = _some([i for i in places if right.get(questions[i].id) is True], len(places), rng)
    wanted = int(share * count)
    taken = hard[:wanted] + easy[: count - min(wanted, len(hard))]
    return taken + hard[wanted : wanted + count - len(taken)]


def _typical(places: list[int], features: Any, sampler: str, count: int, rng: np.random.Generator) -> list[int]:
    """Return the question nearest to the middle of each cluster, by cosine; the largest cluster first."""
    if len(places) > MOST_CLUSTERED:
        places = sorted(_some(places, MOST_CLUSTERED, rng))
    if len(places) <= count:
        return places
    rows = features[places]
    clusters = _clusters(rows, sampler, count, int(rng.integers(1 << 31)))
    chosen = []
    for cluster in sorted(set(clusters), key=lambda each: (-(clusters == each).sum(), each)):
        inside = np.flatnonzero(clusters == cluster)
        centre_D = np.asarray(rows[inside].mean(0)).ravel()
        cosines = np.asarray(rows[inside] @ centre_D).ravel()
        chosen.append(places[inside[int(cosines.argmax())]])
    # Fewer distinct texts than clusters: some are empty, and the rest is drawn.
    rest = [place for place in places if place not in chosen]
    return chosen + _some(rest, count - len(chosen), rng)


def _clusters(rows: Any, sampler: str, count: int, seed: int) -> np.ndarray:
    """Return the cluster of each row, 0 to count - 1; a cluster may be empty."""
    import warnings

    from sklearn.cluster import AgglomerativeClustering, KMeans
    from sklearn.exceptions import ConvergenceWarning

    if sampler == "kmeans":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct rows than clusters
            return KMeans(count, n_init=4, random_state=seed).fit_predict(rows)
    cosines = rows @ rows.T
    distances_NN = np.clip(1 - np.asarray(cosines.todense() if hasattr(cosines, "todense") else cosines, float), 0, 2)
    np.fill_diagonal(distances_NN, 0)
    return AgglomerativeClustering(count, metric="precomputed", linkage="average").fit_predict(distances_NN)
