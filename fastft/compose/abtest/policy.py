"""An experiment in the gateway: each user is served one of several arms, for good.

    experiment = Experiment("spring", {"control": ("vicuna", 0.5), "blend": ("chai", 0.5)}, control="control")
    experiment.assign("user-7", now)       # Assignment(arm="blend", model="chai", share=.5, counted=True, why="…")

An arm is a model or a virtual model. Who is not in the experiment is served the control and not counted: no user is known,
the coverage or the namespace leaves the user out, or the experiment is over.
"""

import datetime
from collections.abc import Mapping
from dataclasses import dataclass

from fastft.compose.abtest.assignment import Range, arm_of, bucket, bucket_ranges, in_namespace
from fastft.errors import UserError

TOLERANCE = 0.01
"""How far the shares may be from 1 in sum, which is GrowthBook's rule; three thirds are written .333."""
LONGEST_USER = 256
"""Characters of a user's name. A longer one is none: its hash is computed between two requests of others."""


@dataclass(frozen=True)
class Assignment:
    """What a user is served."""

    experiment: str
    arm: str
    model: str
    share: float
    """The arm's share of the experiment's users."""
    counted: bool
    """Whether this turn exposes a user of the experiment to the arm."""
    why: str


class Experiment:
    """Assigns users to arms."""

    kind = "ab"

    def __init__(
        self,
        name: str,
        arms: Mapping[str, tuple[str, float]],
        control: str,
        seed: str | None = None,
        coverage: float = 1.0,
        namespace: tuple[str, Range] | None = None,
        hash_version: int = 2,
        until: datetime.date | None = None,
    ):
        """`arms`: (model, share) by name. `seed` is the experiment's name if none is given. `until` is the last day (UTC).

        Raises UserError for shares that do not sum to 1, and for what no user could be assigned by.
        """
        where = f"virtual: {name}"
        if len(arms) < 2:
            raise UserError(
                f"{where}: an experiment needs two arms or more: arms: {{control: {{model: a, share: 0.5}}, …}}"
            )
        if control not in arms:
            raise UserError(f"{where}: control: there is no arm {control!r}; the arms are {', '.join(arms)}")
        if wrong := [arm for arm, (_, share) in arms.items() if not 0 < share <= 1]:
            raise UserError(
                f"{where}: the share of {wrong[0]} is {arms[wrong[0]][1]:g}; it must be above 0 and at most 1"
            )
        total = sum(share for _, share in arms.values())
        if abs(total - 1) > TOLERANCE:
            raise UserError(f"{where}: the shares sum to {total:g}; they must sum to 1 (coverage leaves users out)")
        if not 0 < coverage <= 1:
            raise UserError(f"{where}: coverage is {coverage:g}; it must be above 0 and at most 1")
        if namespace and not 0 <= namespace[1][0] < namespace[1][1] <= 1:
            raise UserError(f"{where}: namespace: the range must be two numbers from 0 to 1, the first one smaller")
        if hash_version not in (1, 2):
            raise UserError(f"{where}: hash_version is {hash_version}; there are 1 and 2")
        self.name, self.arms, self.control, self.seed = name, dict(arms), control, seed or name
        self.coverage, self.namespace, self.hash_version, self.until = coverage, namespace, hash_version, until
        self.ranges = bucket_ranges([share for _, share in arms.values()], coverage)

    @property
    def models(self) -> list[str]:
        """The arms' models and virtual models."""
        return list(dict.fromkeys(model for model, _ in self.arms.values()))

    @property
    def shares(self) -> dict[str, float]:
        """The probability of each of `models` for a user of the experiment."""
        total = sum(share for _, share in self.arms.values())
        shares = dict.fromkeys(self.models, 0.0)
        for model, share in self.arms.values():
            shares[model] += share / total
        return shares

    def over(self, now: float) -> bool:
        """Whether its last day has passed at `now`, in seconds since 1970."""
        return (
            self.until is not None and datetime.datetime.fromtimestamp(now, datetime.timezone.utc).date() > self.until
        )

    def assign(self, user: str | None, now: float) -> Assignment:
        """The arm for a user at a time in seconds since 1970; `user` is None if none is known."""
        if left_out := self._left_out(user, now):
            return self._assignment(self.control, counted=False, why=f"control: {left_out}")
        index = arm_of(bucket(user or "", self.seed, self.hash_version), self.ranges)
        if index is None:
            return self._assignment(self.control, counted=False, why="control: not covered")
        arm = list(self.arms)[index]
        return self._assignment(arm, counted=True, why=f"arm {arm}")

    def _left_out(self, user: str | None, now: float) -> str | None:
        if self.over(now):
            return "the experiment is over"
        if not user:
            return "no user is known"
        if self.namespace and not in_namespace(user, *self.namespace):
            return "not in the namespace"
        return None

    def _assignment(self, arm: str, counted: bool, why: str) -> Assignment:
        model, share = self.arms[arm]
        return Assignment(self.name, arm, model, share, counted, why)
