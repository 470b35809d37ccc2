"""A trained router: a directory with router.safetensors (weights) and router.json (everything else); no pickle.

router = Router.load(directory)
decision = router.decide("What is 7 x 8?", usd_weight=10)      # Decision(model, probabilities, why)
scores = router.scores(queries)                                # Scores(distribution, success, unlike)
chosen = router.choose(scores)                                 # an index into router.candidates for each query
"""

import json
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fastft.common.files import make_directory, publish_directory
from fastft.compose.router.features import HashedFeatures
from fastft.compose.router.fit import Heads, sigmoid, softmax
from fastft.errors import UserError

Rule = Literal["distribution", "success"]
WEIGHTS, SETTINGS = "router.safetensors", "router.json"


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
    features: HashedFeatures
    heads: Heads
    default: str
    """The best single model."""
    margin: float = 0.0
    """The default is left only for a model that is better by at least this much, in the units of the rule."""
    rule: Rule = "distribution"
    """What decides: the distribution, as in the paper, or the success."""
    usd: dict[str, float] | None = None
    """The mean dollars of one answer, by candidate, if the outcomes had them."""
    report: dict[str, Any] = field(default_factory=dict)
    """What training found: settings, data, figures on held-out queries."""
    runs: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))
    """Hashes of words in a row in the training queries, uint64[G], for the leak check of `fastft router evaluate`."""

    def scores(self, queries: list[str]) -> Scores:
        matrix, heads = self.features.transform(queries), self.heads
        return Scores(
            softmax(matrix @ heads.distribution + heads.distribution_bias),
            sigmoid(matrix @ heads.success + heads.success_bias),
            np.zeros(len(queries), dtype=bool),
        )

    def choose(
        self, scores: Scores, usd_weight: float = 0.0, margin: float | None = None, rule: Rule | None = None
    ) -> np.ndarray:
        """Return the index of the chosen candidate for each query.

        It is the one with the highest value - usd_weight x dollars, where value is the success or the distribution (`rule`),
        unless its lead over the default is smaller than `margin`. None takes the router's own margin or rule.
        """
        utility = self._utility(scores, usd_weight, rule or self.rule)
        rows, default = np.arange(len(utility)), self.candidates.index(self.default)
        best = utility.argmax(1)
        lead = utility[rows, best] - utility[:, default]
        return np.where((lead > 0) & (lead >= (self.margin if margin is None else margin)), best, default)

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
        """Write the directory whole; one that is there is replaced."""
        from safetensors.numpy import save_file

        directory = Path(directory)
        make_directory(directory.parent)
        partial = Path(tempfile.mkdtemp(prefix=f"{directory.name}.", suffix=".tmp", dir=directory.parent))
        tensors = {"features.idf": self.features.idf, **{f"heads.{k}": v for k, v in vars(self.heads).items()}}
        tensors["training.runs"] = self.runs
        save_file(tensors, partial / WEIGHTS)
        names = ("candidates", "default", "margin", "rule", "usd", "report")
        (partial / SETTINGS).write_text(json.dumps({name: getattr(self, name) for name in names}, indent=1))
        partial.chmod(0o755)
        publish_directory(partial, directory)

    @classmethod
    def load(cls, directory: str | Path) -> "Router":
        """Raises UserError if the directory is not a router's."""
        from safetensors.numpy import load_file

        directory = Path(directory)
        if not (directory / SETTINGS).is_file():
            raise UserError(f"{directory}: holds no {SETTINGS}; fastft router train -o writes such a directory")
        settings = json.loads((directory / SETTINGS).read_text())
        tensors = load_file(directory / WEIGHTS)
        heads = Heads(**{k.removeprefix("heads."): v for k, v in tensors.items() if k.startswith("heads.")})
        features = HashedFeatures(tensors["features.idf"])
        return cls(features=features, heads=heads, runs=tensors["training.runs"], **settings)
