"""Take one optimizer step, and compute the held-out loss: the arithmetic of training, the same for any number of ranks.

The loss of a step is the sum over its trained tokens divided by their global number. So it does not depend on the ranks, the
micro-batches or the packing.
"""

from typing import Any

import torch
import torch.distributed as dist

from fastft.config import TrainConfig
from fastft.cost.flops import attended_squares, attention_windows
from fastft.data.batch import Batch, rank_batches
from fastft.data.dataset import TokenizedData
from fastft.data.step_plan import Curriculum, Step, StepPlan
from fastft.model.build import TrainedModel
from fastft.train.optim import clip_gradients, update


def train_step(
    model: TrainedModel,
    optimizer: torch.optim.Optimizer,
    step: Step,
    batches: list[Batch],
    config: TrainConfig,
    number: int,
    lr: float,
    device: torch.device,
) -> dict[str, Any]:
    """Take optimizer step `number` of the run; if its loss or gradient is not finite, the weights stay as they are.

    Returns the numbers of the step. Among them, `measured` holds the loss, the z-loss and the norm of the gradient, the same
    on every rank. They stay on the device, because reading them would wait for it.
    """
    # Every rank knows every row, so the global number of trained tokens needs no communication.
    conversations = [c for row in step.rows for c in row]
    trained = int(step.data.trained_counts[conversations].sum())
    torch.manual_seed(step_seed(config.seed, number, dist.get_rank()))  # so that dropout, if any, survives a resume
    losses = accumulate_gradients(model, batches, trained, device)
    dist.all_reduce(losses)
    measured = torch.cat([losses, clip_gradients(model, config.max_grad_norm).to(device)[None]])
    update(optimizer, lr, measured.isfinite().all())
    lengths = step.data.lengths[conversations]
    tokens = int(lengths.sum())
    return {
        "measured": measured,
        "lr": lr,
        "tokens": tokens,
        "trained_tokens": trained,
        "padding_tokens": len(step.rows) * config.seq_len - tokens,
        "squared_lengths": attended_squares(lengths, attention_windows(model.causal_lm.config)),
    }


def accumulate_gradients(model: TrainedModel, batches: list[Batch], trained: int, device: torch.device) -> torch.Tensor:
    """Run forward and backward passes over this rank's micro-batches of a step.

    `trained` is the number of the step's trained tokens on all ranks together. Returns this rank's share of (loss, z-loss),
    fp32 [2].
    """
    losses = torch.zeros(2, device=device)
    for batch in batches:
        loss, z_loss = model(**batch.to(device), scale=1 / trained)
        loss.backward()
        losses += torch.stack([loss.detach() - z_loss, z_loss])
    return losses


def build_batches(curriculum: Curriculum, config: TrainConfig, device: torch.device, step: Step) -> list[Batch]:
    """This rank's micro-batches of a step, in pinned memory where the device is a GPU."""
    rank, world = dist.get_rank(), dist.get_world_size()
    batches = rank_batches(step, rank, world, config.micro_batch_size, config.seq_len, curriculum.max_per_row)
    return [batch.pinned() if device.type == "cuda" else batch for batch in batches]


def plan_held_out(data: TokenizedData, config: TrainConfig) -> Curriculum:
    """The rows of the held-out conversations, for `evaluate`: each step is one micro-batch of every rank."""
    rows = dist.get_world_size() * config.micro_batch_size
    return Curriculum([StepPlan(data, config.seq_len, config.seed, 1, rows, None)])


@torch.no_grad()
def evaluate(model: TrainedModel, held_out: Curriculum, config: TrainConfig, device: torch.device) -> float:
    """Compute the mean loss per trained token of the held-out conversations; collective."""
    total = torch.zeros((), device=device, dtype=torch.float64)
    model.eval()
    for number in range(1, held_out.total + 1):
        for batch in build_batches(held_out, config, device, held_out.step(number)):
            total += model(**batch.to(device))[0]
    model.train()
    model.reshard()
    dist.all_reduce(total)
    return float(total) / sum(int(stage.data.trained_counts.sum()) for stage in held_out.stages)


def step_seed(seed: int, number: int, rank: int) -> int:
    """A different seed for each step and rank."""
    return ((seed * 1_000_003 + number) * 1_000_003 + rank) % 2**63
