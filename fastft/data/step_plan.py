"""Turn tokenised data into optimizer steps: a pure function of (data, seed, epoch, step), with no state to save.

plan = plan_stage(stage, template)       # StepPlan: the packed rows of every epoch, cut into steps
curriculum = Curriculum([plan, later])   # the stages of a run one after the other, steps numbered 1..total
step = curriculum.step(17)               # the rows of its global batch, whatever the number of ranks
"""

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
    """One optimizer step: the rows of its global batch, the same for every number of ranks."""

    number: int  # from 1, in its stage
    epoch: int  # from 0, in its stage
    rows: list[np.ndarray]  # each the numbers of the conversations in it, int64
    data: TokenizedData
    stage: int = 0


class StepPlan:
    """The packed rows of all epochs, cut into optimizer steps of `global_batch_size` rows.

    The last step of an epoch may hold fewer rows. Every conversation is seen once per epoch, or as often as its source says.
    """

    def __init__(
        self, data: TokenizedData, seq_len: int, seed: int, epochs: int, global_batch_size: int, max_steps: int | None
    ):
        self.data, self.lengths = data, data.lengths
        self.seq_len, self.seed, self.batch = seq_len, seed, global_batch_size
        self.max_per_row = 0  # the most conversations that any row holds
        self.starts = [0]  # number of steps before each epoch
        for epoch in range(epochs):
            rows = self.rows(epoch)
            self.max_per_row = max([self.max_per_row, *map(len, rows)])
            self.starts.append(self.starts[-1] + -(-len(rows) // global_batch_size))
            if max_steps and self.starts[-1] >= max_steps:
                break
        self.total = min(self.starts[-1], max_steps or self.starts[-1])
        assert self.total, "every file has a conversation, and every weight takes one of them in the first epoch"

    @lru_cache(maxsize=2)  # noqa: B019  there is one StepPlan per stage, and it lives as long as the run
    def rows(self, epoch: int) -> list[np.ndarray]:
        """The rows of an epoch in the order in which they are trained on: each the numbers of its conversations (int64)."""
        chosen = self.chosen(epoch)
        return [chosen[row] for row in pack(self.lengths[chosen], self.seq_len, self.seed, epoch)]

    def chosen(self, epoch: int) -> np.ndarray:
        """The numbers of an epoch's conversations (int64): where sources have weights, some several times or not at all."""
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
        return Step(number, epoch, self.rows(epoch)[first : first + self.batch], self.data)

    def describe(self) -> dict[str, float]:
        """Rows of the first epoch, the fewest that any packing could need, how full they are (0..1), and steps in all."""
        rows, lengths = len(self.rows(0)), self.lengths[self.chosen(0)]
        fill = float(lengths.sum() / (rows * self.seq_len))
        return {"rows": rows, "lower_bound": lower_bound(lengths, self.seq_len), "fill": fill, "steps": self.total}


def _times(source: Source, random: np.random.Generator, epoch: int) -> np.ndarray:
    """Positions in a source (int64), each as often as its weight says. Conversations that a fractional weight leaves out
    come in a later epoch.

    Fractions of a conversation add up over the epochs and are rounded up, so that even the smallest weight trains one.
    """
    # The decimal number as written, so that ten epochs with a weight of 0.1 are exactly one pass.
    whole, part = divmod(Fraction(str(source.weight)), 1)
    first, end = (math.ceil(epochs * part * source.count) for epochs in (epoch, epoch + 1))
    turns = random.permutation(source.count)[np.arange(first, end) % source.count]
    return np.concatenate([np.tile(np.arange(source.count), whole), np.sort(turns)])


class Curriculum:
    """The stages of a run one after the other, with their steps numbered from 1 to `total`."""

    def __init__(self, stages: Sequence[StepPlan]):
        self.stages = stages
        self.ends = np.cumsum([stage.total for stage in stages]).tolist()

    @property
    def total(self) -> int:
        """Steps of the whole run."""
        return self.ends[-1]

    @property
    def max_per_row(self) -> int:
        """The most conversations that any row of the run holds."""
        return max(stage.max_per_row for stage in self.stages)

    def step(self, number: int) -> Step:
        """Step `number` in 1..total of the run."""
        stage = next(i for i, end in enumerate(self.ends) if number <= end)
        return replace(self.stages[stage].step(number - (self.ends[stage - 1] if stage else 0)), stage=stage)


def plan_stage(stage: TrainConfig, template: ChatTemplate) -> StepPlan:
    """The steps of one stage, from all its files. Logs how many steps there are and how full their rows are. Raises
    UserError as `load_data` does.

    Collective where a process group has been joined, as `load_data` is; estimating a run's price joins none.
    """
    sources = sources_of(stage.data)
    parts = [load_data(source.path, template, stage) for source in sources]
    data = mixed(parts, [source.weight for source in sources], [source.epochs for source in sources])
    plan = StepPlan(data, stage.seq_len, stage.seed, stage.epochs, stage.global_batch_size, stage.max_steps)
    found, world = plan.describe(), world_size()
    logger.info(
        f"plan: {found['rows']} rows of {stage.seq_len} tokens (lower bound {found['lower_bound']}), {found['fill']:.1%} full; "
        f"{plan.total} steps of {stage.global_batch_size} rows" + (f" on {world} processes" if world > 1 else "")
    )
    return plan


def fullest_step(curriculum: Curriculum, rows: int) -> Step:
    """A step of the fullest `rows` rows: those with the most tokens in any one stage's first epoch."""
    best, most = None, -1
    for number, stage in enumerate(curriculum.stages):
        trained = stage.data.trained_counts
        fullest = sorted(stage.rows(0), key=lambda row: (-stage.lengths[row].sum(), -trained[row].sum()))[:rows]
        tokens = sum(int(stage.lengths[row].sum()) for row in fullest)
        if tokens > most:
            best, most = Step(1, 0, fullest, stage.data, number), tokens
    return best
