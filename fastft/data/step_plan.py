"""TODO docstring of fastft.data.step_plan."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache

import numpy as np

from fastft.common.distributed import world_size
from fastft.config import TrainConfig, sources_of
from fastft.data.dataset import Source, TokenizedData, load_data, mixed
from fastft.data.packing import lower_bound, pack
from fastft.data.template.chat_template import ChatTemplate

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Step:
    """One optimiser step: the rows of its global batch, the same for every number of ranks."""

    number: int  # from 1, in its stage
    epoch: int  # from 0, in its stage
    rows: list[np.ndarray]
    data: TokenizedData
    stage: int = 0


class StepPlan:
    """The packing plans of all epochs, cut into optimiser steps of `global_batch_size` rows.

    The last step of an epoch may hold fewer rows; every conversation is seen once per epoch, or as its source says.
    """

    def __init__(
        self, data: TokenizedData, seq_len: int, seed: int, epochs: int, global_batch_size: int, max_steps: int | None
    ):
        self.data, self.lengths, self.seq_len, self.seed, self.batch = (
            data,
            data.lengths,
            seq_len,
            seed,
            global_batch_size,
        )
        self.most_in_a_row = 0  # conversations
        self.starts = [0]  # number of steps before each epoch
        for epoch in range(epochs):
            plan = self.plan(epoch)
            self.most_in_a_row = max([self.most_in_a_row, *map(len, plan)])
            self.starts.append(self.starts[-1] + -(-len(plan) // global_batch_size))
            if max_steps and self.starts[-1] >= max_steps:
                break
        self.total = min(self.starts[-1], max_steps or self.starts[-1])
        assert self.total, "every file has a conversation, and every weight takes one of them in the first epoch"

    @lru_cache(maxsize=2)  # noqa: B019  one schedule per stage
    def plan(self, epoch: int) -> list[np.ndarray]:
        chosen = self.chosen(epoch)
        return [chosen[row] for row in pack(self.lengths[chosen], self.seq_len, self.seed, epoch)]

    def chosen(self, epoch: int) -> np.ndarray:
        """The conversations of an epoch (int64), some several times or not at all where sources have weights."""
        first, found = 0, []
        for number, source in enumerate(self.data.sources):
            if source.epochs is None or epoch < source.epochs:
                found.append(first + _times(source, np.random.default_rng([self.seed, number]), epoch))
            first += source.count
        return np.concatenate([*found, np.zeros(0, np.int64)])

    def step(self, number: int) -> Step:
        """Step `number` in 1..total."""
        epoch = max(e for e, start in enumerate(self.starts) if start < number)
        first = (number - self.starts[epoch] - 1) * self.batch
        return Step(number, epoch, self.plan(epoch)[first : first + self.batch], self.data)

    def describe(self) -> dict[str, float]:
        """Rows of the first epoch, the lower bound for its lengths, and how full the rows are."""
        rows, lengths = len(self.plan(0)), self.lengths[self.chosen(0)]
        fill = float(lengths.sum() / (rows * self.seq_len))
        return {"rows": rows, "lower_bound": lower_bound(lengths, self.seq_len), "fill": fill, "steps": self.total}


def _times(source: Source, random: np.random.Generator, epoch: int) -> np.ndarray:
    """Positions in a source, each as often as its weight says. What a fraction leaves out has its turn in a later epoch.

    Fractions of a conversation add up over the epochs, rounded up: however small the weight, something is trained on.
    """
    whole, part = divmod(Fraction(str(source.weight)), 1)  # the decimal that was written: 10 x 0.1 is 1 and no more
    first, end = (math.ceil(epochs * part * source.count) for epochs in (epoch, epoch + 1))
    turns = random.permutation(source.count)[np.arange(first, end) % source.count]
    return np.concatenate([np.tile(np.arange(source.count), whole), np.sort(turns)])


class Curriculum:
    """The stages of a run one behind the other, their steps numbered through."""

    def __init__(self, stages: Sequence[StepPlan]):
        self.stages = stages
        self.ends = np.cumsum([stage.total for stage in stages]).tolist()

    @property
    def total(self) -> int:
        return self.ends[-1]

    @property
    def most_in_a_row(self) -> int:
        return max(stage.most_in_a_row for stage in self.stages)

    def step(self, number: int) -> Step:
        """Step `number` in 1..total of the run."""
        stage = next(i for i, end in enumerate(self.ends) if number <= end)
        return replace(self.stages[stage].step(number - (self.ends[stage - 1] if stage else 0)), stage=stage)


def plan_stage(stage: TrainConfig, template: ChatTemplate) -> StepPlan:
    """The steps of one stage, from all its files. Raises UserError as `load_data` does."""
    sources = sources_of(stage.data)
    parts = [load_data(source.path, template, stage) for source in sources]
    data = mixed(parts, [source.weight for source in sources], [source.epochs for source in sources])
    schedule = StepPlan(data, stage.seq_len, stage.seed, stage.epochs, stage.global_batch_size, stage.max_steps)
    plan, world = schedule.describe(), world_size()
    logger.info(
        f"plan: {plan['rows']} rows of {stage.seq_len} tokens (lower bound {plan['lower_bound']}), {plan['fill']:.1%} full; "
        f"{schedule.total} steps of {stage.global_batch_size} rows on {world} process{'es' if world > 1 else ''}"
    )
    return schedule


def fullest_step(curriculum: Curriculum, rows: int) -> Step:
    """A step of the `rows` rows that hold the most tokens in a stage's first epoch, of the stage where that is most."""
    best, most = None, -1
    for number, stage in enumerate(curriculum.stages):
        trained = stage.data.trained_counts
        plan = sorted(stage.plan(0), key=lambda row: (-stage.lengths[row].sum(), -trained[row].sum()))[:rows]
        tokens = sum(int(stage.lengths[row].sum()) for row in plan)
        if tokens > most:
            best, most = Step(1, 0, plan, stage.data, number), tokens
    return best
