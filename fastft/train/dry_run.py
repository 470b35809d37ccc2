"""Take two optimizer steps with the fullest rows of a run, to measure its peak memory and time, and to estimate its price.

    fastft train … --dry_run true

The second step is the one that is reported, because the first also compiles and creates the optimizer's moments. Nothing but
the token cache is written.
"""

import logging
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from fastft.config import TrainConfig
from fastft.data.step_plan import Curriculum, Step, fullest_step
from fastft.train.report.metrics import peak_memory_gib

logger = logging.getLogger(__name__)


def dry_run_steps(
    take_step: Callable[[Step], dict],
    curriculum: Curriculum,
    config: TrainConfig,
    device: torch.device,
) -> None:
    """Take two steps, and log their memory and time; collective. `take_step` takes one as the trainer does."""
    step = fullest_step(curriculum, config.global_batch_size)
    for number in (1, 2):
        began = time.perf_counter()
        numbers = take_step(step)
        loss = float(numbers["measured"][0])  # this waits for the device
        seconds = time.perf_counter() - began
        logger.info(
            f"dry run: step {number} of 2, the {len(step.rows)} fullest rows: {numbers['tokens']:,} tokens, "
            f"{numbers['trained_tokens']:,} trained, loss {loss:.4f}, {seconds:.2f} s"
        )
    memory = torch.tensor(peak_memory_gib(device), device=device)
    dist.all_reduce(memory, dist.ReduceOp.MAX)
    hours = curriculum.total * seconds / 3600
    money = "" if config.price_per_hour is None else f", ${hours * config.price_per_hour:,.2f}"
    logger.info(
        f"dry run: peak memory of a process {float(memory):.2f} GiB; {curriculum.total} steps like the second take "
        f"{hours:.2f} hours{money}; nothing was written"
    )
