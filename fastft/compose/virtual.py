"""Virtual models: names that stand for policies and experiments, which may name each other.

    virtual = VirtualModels({"chai": BlendPolicy(…), "spring": Experiment(…)})
    found = virtual.resolve("spring", Asked(conversation, turn, user, now, candidates))
    found.choice.model, found.assignment, found.through      # "vicuna", Assignment(arm="blend", …), ("chai",)

`resolve` follows the names to a model. The probabilities of its choice are those of the models, over all random steps on the
way: in an experiment of two equal arms, of which one is a blend of a and b and the other one is a, they are .75 and .25.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from fastft.compose.abtest.policy import Assignment, Experiment
from fastft.compose.policy import Choice, Policy
from fastft.data.conversation import Conversation
from fastft.errors import UserError


@dataclass(frozen=True)
class Asked:
    """A turn for which a model is to be chosen."""

    conversation: Conversation
    turn: int
    user: str | None
    """The user's name, for experiments; None if none is known."""
    now: float
    """Seconds since 1970."""
    candidates: Sequence[str]
    """All models that are served, whether or not one can answer now."""


@dataclass(frozen=True)
class Resolved:
    """The model that a virtual model stands for, at one turn."""

    choice: Choice
    assignment: Assignment | None = None
    """The user's arm, if there is an experiment on the way."""
    through: tuple[str, ...] = ()
    """The virtual models between the name that was asked for and the model."""


class VirtualModels(dict[str, "Policy | Experiment"]):
    """Policies and experiments by name."""

    def resolve(self, name: str, asked: Asked) -> Resolved:
        """Choose the model that answers for a virtual model."""
        return self._resolve(name, asked, {})

    def reached(self, name: str) -> Iterator["Policy | Experiment"]:
        """All policies and experiments on the way from a name to its models."""
        if policy := self.get(name):
            yield policy
            for each in policy.models:
                yield from self.reached(each)

    def check(self) -> None:
        """Raise UserError if names go round in a circle, or if an experiment cannot be where it is."""
        for name in self:
            self._follow(name, [])
        for name, policy in self.items():
            inside = [model for model in policy.models if isinstance(self.get(model), Experiment)]
            if inside and policy.kind != "fixed":
                what = "an arm of an experiment" if isinstance(policy, Experiment) else f"a part of a {policy.kind}"
                raise UserError(
                    f"virtual: {name}: {inside[0]} is an experiment, which cannot be {what}; ask for it by name"
                )

    def _follow(self, name: str, trail: list[str]) -> None:
        if name in trail:
            raise UserError(f"virtual: {' -> '.join([*trail[trail.index(name) :], name])}: goes round")
        for each in self[name].models if name in self else ():
            self._follow(each, [*trail, name])

    def _resolve(self, name: str, asked: Asked, known: dict[str, Resolved]) -> Resolved:
        """`known` holds what has been resolved for this turn."""
        if name not in self:
            return Resolved(Choice(name, {name: 1.0}, "asked by name"))
        if name not in known:
            known[name] = self._step(self[name], asked, known)
        return known[name]

    def _step(self, policy: "Policy | Experiment", asked: Asked, known: dict[str, Resolved]) -> Resolved:
        assignment = None
        if isinstance(policy, Experiment):
            assignment = policy.assign(asked.user, asked.now)
            shares = policy.shares if assignment.counted else {assignment.model: 1.0}
            choice = Choice(assignment.model, shares, assignment.why)
        else:
            choice = policy.choose(asked.conversation, asked.turn, asked.candidates)
        if not any(model in self for model in choice.probabilities):
            return Resolved(choice, assignment)
        inner = self._resolve(choice.model, asked, known)
        through = (choice.model, *inner.through) if choice.model in self else ()
        why = f"{choice.why}; {choice.model}: {inner.choice.why}" if through else choice.why
        order = [*inner.choice.next, *(model for each in choice.next for model in self._order(each, asked, known))]
        whole = replace(
            choice,
            model=inner.choice.model,
            probabilities=self._probabilities(choice, asked, known),
            why=why,
            next=tuple(model for model in dict.fromkeys(order) if model != inner.choice.model),
            scores=choice.scores or inner.choice.scores,
        )
        return Resolved(whole, assignment or inner.assignment, through)

    def _order(self, name: str, asked: Asked, known: dict[str, Resolved]) -> list[str]:
        choice = self._resolve(name, asked, known).choice
        return [choice.model, *choice.next]

    def _probabilities(self, choice: Choice, asked: Asked, known: dict[str, Resolved]) -> Mapping[str, float]:
        """The probabilities of models, where some names of a choice are virtual."""
        total: dict[str, float] = {}
        for name, probability in choice.probabilities.items():
            inside = (
                self._resolve(name, asked, known).choice.probabilities if probability and name in self else {name: 1.0}
            )
            for model, share in inside.items():
                if model not in self:
                    total[model] = total.get(model, 0.0) + probability * share
        return total
