"""A trained router: a directory with router.safetensors (weights) and router.json (everything else); no pickle.

router = Router.load(directory)
decision = router.decide("What is 7 x 8?", usd_weight=10)      # Decision(model, probabilities, why)
scores = router.scores(queries)                                # Scores(distribution, success, unlike)
chosen = router.choose(scores)                                 # an index into router.candidates for each query
"""

import json
import math
import shutil
import tempfile
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fastft.common.files import publish_directory, require_place, room_for
from fastft.compose.router.training.baselines import Baselines
from fastft.compose.router.training.fit import Head, sigmoid, softmax
from fastft.compose.router.vectors.embeddings import EncoderFeatures, StaticFeatures
from fastft.compose.router.vectors.features import Features, HashedFeatures, require_packages
from fastft.compose.router.vectors.neighbours import Neighbours
from fastft.errors import UsageError, UserError

Rule = Literal["distribution", "success"]
WEIGHTS, SETTINGS, BASELINES = "router.safetensors", "router.json", "baselines.safetensors"
AGAIN = "train it again with fastft router train"


@dataclass(frozen=True)
class Scores:
    """What a router thinks of N queries and its M candidates."""

    distribution: np.ndarray
    """[N, M]: ZOOTER's distribution; rows sum to 1. It says which model is probably the best one."""
    success: np.ndarray
    """[N, M]: the probability that the model's answer is good, calibrated; rows do not sum to 1."""
    unlike: np.ndarray
    """[N] bool: the query resembles none that the router was trained on."""


@dataclass(frozen=True)
class Decision:
    model: str
    probabilities: dict[str, float]
    """By candidate: what the rule compares, before costs."""
    why: str
    """The reason in a few words, for the record."""


@dataclass
class Router:
    candidates: list[str]
    features: Features
    distribution: Head
    success: Head
    default: str
    """The best single model."""
    margin: float = 0.0
    """The default is left only for a model that is better by at least this much, in the units of the rule."""
    rule: Rule = "success"
    """What decides: the success, or the distribution, as in the paper."""
    usd: dict[str, float] | None = None
    """The mean dollars of one answer, by candidate, if the outcomes had them."""
    report: dict[str, Any] = field(default_factory=dict)
    """What training found: settings, data, figures on held-out queries."""
    neighbours: Neighbours | None = None
    """A sample of the training queries' vectors; without it, no query is unlike them."""
    runs: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))
    """Hashes of words in a row in the training queries, uint64[G], for the leak check of `fastft router evaluate`."""
    baselines: Baselines | None = None
    """Simpler ways to choose, trained on the same outcomes. `load` reads them only if asked to."""

    def scores(self, queries: list[str]) -> Scores:
        return self.scores_of(self.features.transform(queries))

    def scores_of(self, matrix: Any) -> Scores:
        """The scores of queries whose features are known: [N, D]."""
        known_N = self._knows(matrix)
        return Scores(
            self._or_means(softmax(self.distribution.logits(matrix)), known_N, "mean_distribution"),
            self._or_means(sigmoid(self.success.logits(matrix)), known_N, "means"),
            self.neighbours.unlike(self.features.dense(matrix)) if self.neighbours else np.zeros(len(known_N), bool),
        )

    def knows(self, queries: list[str]) -> np.ndarray:
        """Whether anything in each query was learned from [N]."""
        return self._knows(self.features.transform(queries))

    def _knows(self, matrix: Any) -> np.ndarray:
        return np.asarray(abs(matrix) @ self._learned).ravel() > 0

    @cached_property
    def _learned(self) -> np.ndarray:
        """1 for each column that has a weight, else 0: float32 [D]."""
        return ((self.success.weights != 0).any(1) | (self.distribution.weights != 0).any(1)).astype(np.float32)

    def _or_means(self, values_NM: np.ndarray, known_N: np.ndarray, means: str) -> np.ndarray:
        """The values, and the models' means in training for a query of which nothing is known.

        A head's bias alone is no mean: it is where the line through the training queries meets 0, which none of them is near.
        """
        mean_M = [self.report.get(means, {}).get(name) for name in self.candidates]
        if known_N.all() or any(mean is None or math.isnan(mean) for mean in mean_M):
            return values_NM
        return np.where(known_N[:, None], values_NM, np.array(mean_M, values_NM.dtype))

    def choose(
        self, scores: Scores, usd_weight: float = 0.0, margin: float | None = None, rule: Rule | None = None
    ) -> np.ndarray:
        """Return the index of the chosen candidate for each query.

        It is the one with the highest value - usd_weight x dollars, where value is the success or the distribution (`rule`),
        unless its lead over the default is smaller than `margin`. None takes the router's own margin or rule. Raises UserError
        for a weight without prices.
        """
        utility = self._utility(scores, usd_weight, rule or self.rule)
        return choose_by(utility, self.candidates.index(self.default), self.margin if margin is None else margin)

    def decide(self, query: str, usd_weight: float = 0.0, margin: float | None = None) -> Decision:
        """Choose a model for one query."""
        scores = self.scores([query])
        chosen = int(self.choose(scores, usd_weight, margin)[0])
        values = getattr(scores, self.rule)[0]
        best = int(self._utility(scores, usd_weight, self.rule)[0].argmax())
        default = self.candidates.index(self.default)
        if chosen != default:
            why = f"{self.rule} {values[chosen]:.2f} over {values[default]:.2f} of {self.default}"
        elif best == default:
            why = f"{self.rule} {values[chosen]:.2f}, the highest"
        else:
            why = f"default: {self.candidates[best]} leads by less than the margin"
        if bool(scores.unlike[0]):
            why += "; unlike the training queries"
        return Decision(self.candidates[chosen], dict(zip(self.candidates, map(float, values))), why)

    def _utility(self, scores: Scores, usd_weight: float, rule: Rule) -> np.ndarray:
        values = scores.distribution if rule == "distribution" else scores.success
        if not usd_weight:
            return values
        if self.usd is None:
            raise UserError("usd_weight: the outcomes that this router was trained on have no prices (usd)")
        return values - usd_weight * np.array([self.usd[name] for name in self.candidates])

    def save(self, directory: str | Path) -> None:
        """Write the directory whole; a router that is there is replaced. Raises UserError as `require_router_place`."""
        from safetensors.numpy import save_file

        directory = Path(directory).absolute()
        require_router_place(directory)
        settings, tensors = self.features.state()
        held = {f"features.{name}": tensor for name, tensor in tensors.items()}
        for name in ("distribution", "success"):
            head: Head = getattr(self, name)
            held |= {f"{name}.weights": head.weights, f"{name}.bias": head.bias}
        held["training.runs"] = self.runs
        if near := self.neighbours:
            held |= {
                "near.vectors": near.vectors.astype(np.float16),
                "near.mean": near.mean,
                "near.places": near.places,
            }
        names = ("candidates", "default", "margin", "rule", "usd", "report")
        content = {name: getattr(self, name) for name in names} | {"features": settings}
        content |= {"unlike_below": near.threshold if near else None}
        partial = Path(tempfile.mkdtemp(prefix=f"{directory.name}.", suffix=".tmp", dir=directory.parent))
        try:
            with room_for(directory, written=partial):
                save_file(held, partial / WEIGHTS)
                if self.baselines:
                    save_file(self.baselines.tensors(), partial / BASELINES)
                (partial / SETTINGS).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", "utf-8")
                for path in (*partial.iterdir(), partial):
                    path.chmod(0o755 if path.is_dir() else 0o644)
            publish_directory(partial, directory)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    @classmethod
    def load(cls, directory: str | Path, with_baselines: bool = False) -> "Router":
        """Raises UserError if the directory is not a router's, its encoder is not where it was, or packages are missing."""
        require_packages()
        directory = Path(directory)
        settings = _read_settings(directory)
        tensors = _read_tensors(directory / WEIGHTS)
        near = None
        try:
            features = _features(settings.pop("features"), tensors)
            threshold = settings.pop("unlike_below")
            if threshold is not None:
                vectors = tensors["near.vectors"].astype(np.float32)
                near = Neighbours(vectors, tensors["near.mean"], threshold, tensors["near.places"])
            heads = {
                name: Head(tensors[f"{name}.weights"], tensors[f"{name}.bias"]) for name in ("distribution", "success")
            }
            router = cls(features=features, **heads, neighbours=near, runs=tensors["training.runs"], **settings)
        except (KeyError, TypeError) as error:
            raise UserError(f"{directory}: is not whole ({error}); {AGAIN}") from None
        if with_baselines and (directory / BASELINES).is_file():
            router.baselines = Baselines.from_tensors(_read_tensors(directory / BASELINES))
        return router


def choose_by(utility: np.ndarray, default: int, margin: float) -> np.ndarray:
    """The index of the highest value in each row, or `default` where that leads the default by less than `margin`: [N]."""
    best = utility.argmax(1)
    lead = utility[np.arange(len(utility)), best] - utility[:, default]
    return np.where((lead > 0) & (lead >= margin), best, default)


def require_weights(usd_weight: float, margin: float | None) -> None:
    """Raise UsageError for a weight or a margin that cannot be served either."""
    for option, value in (("usd_weight", usd_weight), ("margin", margin)):
        if value is not None and not 0 <= value < math.inf:
            raise UsageError(f"--{option} {value:g}: must be 0 or more")


def require_router_place(directory: Path) -> None:
    """Raise UserError if the directory holds something else than a router, or cannot be made."""
    if directory.exists() and not directory.is_dir():
        raise UserError(f"{directory}: is a file; -o names a directory")
    if directory.is_dir() and any(directory.iterdir()) and not (directory / SETTINGS).is_file():
        raise UserError(f"{directory}: holds files that are no router's; name another directory")
    require_place(directory.absolute())


def _features(settings: dict[str, Any], tensors: dict[str, np.ndarray]) -> Features:
    if settings["kind"] == "hashed":
        return HashedFeatures(tensors["features.idf"])
    kind = StaticFeatures if settings["kind"] == "static" else EncoderFeatures
    return kind(settings["directory"], settings["digest"])


def _read_settings(directory: Path) -> dict[str, Any]:
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory; fastft router train -o writes one")
    path = directory / SETTINGS
    if not path.is_file():
        raise UserError(f"{directory}: holds no {SETTINGS}; fastft router train -o writes such a directory")
    try:
        settings = json.loads(path.read_text("utf-8"))
        whole = settings["default"] in settings["candidates"]
    except (ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        raise UserError(f"{path}: is not a router's; {AGAIN}")
    return settings


def _read_tensors(path: Path) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return load_file(path)
    except FileNotFoundError:
        raise UserError(f"{path}: is missing; {AGAIN}") from None
    except SafetensorError as error:
        raise UserError(f"{path}: cannot be read ({error}); {AGAIN}") from None
