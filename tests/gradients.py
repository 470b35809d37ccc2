"""Run under torchrun by test_train.py: the gradients of a run's first step, whole, from any number of ranks.

torchrun --nproc-per-node 2 tests/gradients.py OUT.pt --model M --data D --output_dir O ...
"""

import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from fastft.attention import choose_attention
from fastft.cli import leave
from fastft.config import parse_config
from fastft.data import Schedule, tokenized
from fastft.model import load_model, shard
from fastft.template import load_template
from fastft.train import accumulate_gradients, join_ranks


def first_gradients(argv: list[str]) -> dict[str, torch.Tensor]:
    """Parameter name -> gradient, and "loss" -> the step's loss, after the first step's backward passes."""
    config, device = parse_config(argv), join_ranks()
    data = tokenized(config.data, load_template(config.model, config.template))
    schedule = Schedule(data, config.window, config.seed, 1, config.global_batch_size, None)
    model = load_model(config.model, choose_attention(config.attention, device)[0], config.gradient_checkpointing)
    model.z_loss = config.z_loss
    model = shard(model, init_device_mesh("cpu", (dist.get_world_size(),)), config.compile)
    step = schedule.step(1)
    trained = int(sum(data.trained_counts[c] for row in step.rows for c in row))
    loss, _ = accumulate_gradients(model, data, step, trained, config, device)
    dist.all_reduce(loss)
    gradients = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
    return {"loss": loss, **gradients}


if __name__ == "__main__":
    result = first_gradients(sys.argv[2:])
    if dist.get_rank() == 0:
        torch.save(result, sys.argv[1])
    dist.destroy_process_group()
    leave(0)
