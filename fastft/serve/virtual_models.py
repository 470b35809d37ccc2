"""Virtual models as a configuration file gives them, checked, and turned into policies and experiments.

virtual_models([VirtualModel("chai", policy="blend", models={"vicuna": 1, "spring": 1})], served=["vicuna", "spring"])
"""

import datetime
import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

from fastft.compose.abtest.policy import Experiment
from fastft.compose.blend import BlendPolicy, BlendStage, stages_of
from fastft.compose.policy import FixedPolicy, Policy
from fastft.compose.router.policy import DecideOn, RoutePolicy
from fastft.compose.virtual import VirtualModels
from fastft.errors import UserError


@dataclass
class Arm:
    """One of the things that an experiment compares."""

    model: str
    """A model or a virtual model."""
    share: float
    """Its share of the experiment's users; the shares of all arms sum to 1."""


@dataclass
class Namespace:
    """Users who are divided among experiments, so that none is in two of them."""

    name: str
    """The same for all of those experiments."""
    range: list[float]
    """This experiment's part of the namespace, such as [0, 0.5]."""


@dataclass
class VirtualModel:
    """A name that is served by a policy, which chooses among models."""

    name: str
    policy: Literal["fixed", "blend", "route", "ab", "grimoire"] = "fixed"
    """How the model is chosen. fixed: always the same one; blend: each turn draws one; route: a trained router chooses the one
    that will probably answer best; ab: each user gets one of several arms, for good; grimoire: always the same one, which is
    told first what helps it."""
    model: str | None = None
    """fixed: the model that answers; it may be a virtual one. grimoire: the weak model."""
    models: dict[str, float] = field(default_factory=dict)
    """blend: models with their weights; the paper uses equal weights."""
    seed: str | None = None
    """blend: the seed of the draws (0). ab: the seed of the hash that assigns users (the experiment's name)."""
    min_run: int = 1
    """blend: turns in a row that a drawn model answers."""
    schedule: list[BlendStage] = field(default_factory=list)
    """blend: new weights from some turn on."""
    router: str | None = None
    """route: the directory that fastft router train has written."""
    of: dict[str, str] = field(default_factory=dict)
    """route: names here of the router's candidates, where they differ."""
    usd_weight: float = 0.0
    """route: how much probability of a good answer a dollar is worth; 0 ignores prices."""
    margin: float | None = None
    """route: the default is left only for a model that is better by this much (the router's own margin)."""
    default: str | None = None
    """route: the model that answers unless another one is better by the margin (the router's best single model)."""
    decide_on: DecideOn = "first"
    """route: first: the first question decides for the whole conversation; every: each question; conversation: all questions
    so far."""
    switch_margin: float = 0.1
    """route: a conversation changes its model only for one that is better by this much."""
    grimoire: str | None = None
    """grimoire: the directory that fastft grimoire build has written."""
    arms: dict[str, Arm] = field(default_factory=dict)
    """ab: the arms by name."""
    control: str = "control"
    """ab: the arm for users who are not in the experiment, and with which the others are compared."""
    coverage: float = 1.0
    """ab: the share of users who are in the experiment."""
    namespace: Namespace | None = None
    """ab: for experiments that must not share users."""
    hash_version: int = 2
    """ab: GrowthBook's; 1 for an experiment that began with it."""
    until: str | None = None
    """ab: the last day, YYYY-MM-DD (UTC); from the next one on, everybody gets the control."""


KEYS = {
    "fixed": ("model",),
    "blend": ("models", "seed", "min_run", "schedule"),
    "route": ("router", "of", "usd_weight", "margin", "default", "decide_on", "switch_margin"),
    "ab": ("arms", "control", "seed", "coverage", "namespace", "hash_version", "until"),
    "grimoire": ("grimoire", "model"),
}
"""What each policy reads."""
NEEDS = {
    "fixed": ("model", "the policy fixed needs one model: model: NAME"),
    "blend": ("models", "a blend needs models with their weights: models: {a: 1, b: 1}"),
    "route": ("router", "a route needs a trained router: router: DIRECTORY"),
    "grimoire": ("grimoire", "a grimoire needs what fastft grimoire build has written: grimoire: DIRECTORY"),
    "ab": ("arms", "an experiment needs arms: arms: {control: {model: a, share: 0.5}, new: {model: b, share: 0.5}}"),
}


def virtual_models(virtual: Sequence[VirtualModel], served: Sequence[str]) -> VirtualModels:
    """The policies and experiments by name. `served` are the models.

    Raises UserError, which names the virtual model, for what cannot be served as asked.
    """
    found = VirtualModels()
    for each in virtual:
        if each.name in (*served, *found):
            raise UserError(f"virtual: two models are called {each.name!r}; give one another name")
        found[each.name] = policy_of(each)
    for name, policy in found.items():
        _require_known(name, policy, [*served, *found])
    found.check()
    return found


def _require_known(name: str, policy: Policy | Experiment, known: list[str]) -> None:
    if isinstance(policy, RoutePolicy):
        policy.require_served(known)
    if missing := [model for model in policy.models if model not in known]:
        others = [each for each in known if each != name]
        near = difflib.get_close_matches(missing[0], others, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"served: {', '.join(others)}"
        raise UserError(f"virtual: {name}: there is no model {missing[0]!r}; {hint}")


def policy_of(virtual: VirtualModel) -> Policy | Experiment:
    """The policy or experiment of a virtual model. Raises UserError."""
    where = f"virtual: {virtual.name}"
    needed, what = NEEDS[virtual.policy]
    if not getattr(virtual, needed):
        raise UserError(f"{where}: {what}")
    _require_own_keys(where, virtual)
    if virtual.policy == "blend":
        stages = stages_of(virtual.schedule, where)
        return BlendPolicy(virtual.name, virtual.models, virtual.seed or "0", virtual.min_run, stages)
    if virtual.policy == "route":
        names = ("of", "usd_weight", "margin", "default", "decide_on", "switch_margin")
        return RoutePolicy(virtual.name, Path(virtual.router or ""), **{name: getattr(virtual, name) for name in names})
    if virtual.policy == "grimoire":
        if not virtual.model:
            raise UserError(f"{where}: a grimoire needs the weak model: model: NAME")
        from fastft.compose.grimoire.policy import GrimoirePolicy  # needs numpy, which most gateways do without

        return GrimoirePolicy(virtual.name, Path(virtual.grimoire or ""), virtual.model)
    if virtual.policy == "ab":
        return _experiment(where, virtual)
    return FixedPolicy(virtual.model or "")


def _require_own_keys(where: str, virtual: VirtualModel) -> None:
    """Raise UserError for a key that the policy does not read."""
    usual = VirtualModel(virtual.name)
    own = ("name", "policy", *KEYS[virtual.policy])
    given = [each.name for each in fields(virtual) if getattr(virtual, each.name) != getattr(usual, each.name)]
    if wrong := [name for name in given if name not in own]:
        readers = " and ".join(policy for policy, keys in KEYS.items() if wrong[0] in keys)
        reads = ", ".join(KEYS[virtual.policy])
        raise UserError(f"{where}: {wrong[0]} is for the policy {readers}; the policy {virtual.policy} reads {reads}")


def _experiment(where: str, virtual: VirtualModel) -> Experiment:
    until = None
    if virtual.until is not None:
        try:
            until = datetime.date.fromisoformat(virtual.until)
        except ValueError:
            raise UserError(f"{where}: until: {virtual.until} is no day; write 2027-01-31") from None
    namespace = None
    if virtual.namespace:
        if len(virtual.namespace.range) != 2:
            raise UserError(f"{where}: namespace: the range must be two numbers from 0 to 1, the first one smaller")
        namespace = (virtual.namespace.name, (virtual.namespace.range[0], virtual.namespace.range[1]))
    return Experiment(
        virtual.name,
        {arm: (each.model, each.share) for arm, each in virtual.arms.items()},
        virtual.control,
        virtual.seed,
        virtual.coverage,
        namespace,
        virtual.hash_version,
        until,
    )
