"""Blend: another model may answer each turn, over the history that all of them share.

    BlendPolicy("chai", {"vicuna": 1, "spring": 1}, seed="7").choose(conversation, turn, candidates)

Each turn draws one of the models, in proportion to its weight: Algorithm 1 of Blended (arXiv 2401.02994), which draws
uniformly. Every model reads the whole conversation as if it had said all of it, in its own chat template. On single
questions a blend scores the mean of its models. Only over several turns can it be better than the best of them.
"""

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fastft.compose.policy import Choice, draw
from fastft.data.conversation import Conversation
from fastft.errors import UserError


@dataclass
class BlendStage:
    """New weights of a blend from some turn on, as a configuration file gives them."""

    from_turn: int
    """The first turn with these weights; a conversation's first question is turn 1."""
    models: dict[str, float]
    """Models with their weights."""


def stages_of(schedule: Sequence[BlendStage], where: str) -> dict[int, dict[str, float]]:
    """The weights by the turn from which they hold. Raises UserError, which begins with `where`, if two begin at one turn."""
    stages = {each.from_turn: each.models for each in schedule}
    if len(stages) < len(schedule):
        raise UserError(f"{where}: two parts of the schedule begin at the same turn")
    return stages


class BlendPolicy:
    """Draws one of several models for each turn."""

    kind = "blend"

    def __init__(
        self,
        name: str,
        weights: Mapping[str, float],
        seed: str = "0",
        min_run: int = 1,
        schedule: Mapping[int, Mapping[str, float]] | None = None,
    ):
        """`min_run` is the number of turns in a row that one draw decides. `schedule` maps a turn to the weights from that
        turn on. Raises UserError for weights that are negative or all zero.
        """
        if min_run < 1:
            raise UserError(f"blend {name}: min_run is {min_run}; it must be 1 or more")
        self.name, self.seed, self.min_run = name, seed, min_run
        if 1 in (schedule or {}):
            raise UserError(
                f"blend {name}: the schedule begins at turn 1, which is decided by models; begin it at turn 2 or later, or write "
                "these weights as models"
            )
        stages = {1: weights, **(schedule or {})}
        for turn, each in stages.items():
            _check(f"blend {name}" if turn == 1 else f"blend {name}, from turn {turn}", turn, each)
        self.from_turn = sorted(stages)
        self.weights = [stages[turn] for turn in self.from_turn]

    @property
    def models(self) -> list[str]:
        """All models that may answer at some turn."""
        return list(dict.fromkeys(model for weights in self.weights for model in weights))

    def choose(self, conversation: Conversation, turn: int, candidates: Sequence[str]) -> Choice:
        """The model for a turn, and the order in which the others are asked if it cannot answer."""
        turn = max(1, turn)
        weights = self.weights[bisect.bisect_right(self.from_turn, turn) - 1]
        run = (turn - 1) // self.min_run
        # The first draw decides the first place, the next draw the second place among the rest, and so on.
        left, order = {model: float(weight) for model, weight in weights.items() if weight > 0}, []
        while left:
            place = self.name if not order else f"{self.name} {len(order) + 1}"
            order.append(_pick(left, draw(self.seed, place, conversation.id, run)))
            del left[order[-1]]
        total = sum(weights.values())
        probabilities = {model: weight / total for model, weight in weights.items()}
        why = f"drawn for turn {run * self.min_run + 1}" if self.min_run > 1 else f"drawn for turn {turn}"
        return Choice(order[0], probabilities, why, tuple(order[1:]))


def _check(name: str, turn: int, weights: Mapping[str, float]) -> None:
    if turn < 1:
        raise UserError(f"{name}: turns count from 1")
    if wrong := [model for model, weight in weights.items() if not 0 <= weight < float("inf")]:
        raise UserError(f"{name}: the weight of {wrong[0]} is {weights[wrong[0]]:g}; it must be 0 or more")
    if not any(weights.values()):
        raise UserError(f"{name}: its weights sum to 0; at least one model must have a weight")


def _pick(weights: Mapping[str, float], number: float) -> str:
    """Draw a model by `number`, from [0, 1): the weights, in the order of the models' names, divide that interval."""
    at = number * sum(weights.values())
    for model in sorted(weights):
        at -= weights[model]
        if at < 0:
            return model
    return max(weights)  # only reached if rounding makes the sum of the shares less than 1
