"""The gradients of a run's first step, gathered from any number of ranks. test_train.py runs it under ranks.py.

torchrun --nproc-per-node 2 tests/helpers/gradients.py OUT.pt --model M --data D --output_dir O ...
"""

import sys

import torch
import torch.distributed as dist

from fastft.common.command_line import leave
from fastft.common.distributed import join_ranks
from fastft.config import parse_config
from fastft.data.dataset import tokenized
from fastft.data.step_plan import Curriculum, StepPlan
from fastft.data.template.chat_template import load_template
from fastft.model.attention import choose_attention
from fastft.model.build import prepare_model
from fastft.model.pretrained import fit_config, load_config
from fastft.train.step import accumulate_gradients, build_batches


def first_gradients(argv: list[str]) -> dict[str, torch.Tensor]:
    """Parameter name -> gradient, and "loss" -> the step's loss, after the first step's backward passes."""
    config, device = parse_config(argv), join_ranks()
    template = load_template(config.model, config.template)
    data = tokenized(config.data, template)
    plan = StepPlan(data, config.seq_len, config.seed, 1, config.global_batch_size, None)
    model_config = fit_config(load_config(config.model), config, len(template.tokenizer))
    attention, _ = choose_attention(config.attention, device)
    model = prepare_model(config, model_config, attention, device)
    step = plan.step(1)
    trained = int(sum(data.trained_counts[c] for row in step.rows for c in row))
    loss, _ = accumulate_gradients(model, build_batches(Curriculum([plan]), config, device, step), trained, device)
    dist.all_reduce(loss)
    gradients = {name: p.grad.full_tensor() for name, p in model.named_parameters() if p.requires_grad}
    return {"loss": loss, **gradients}


if __name__ == "__main__":
    result = first_gradients(sys.argv[2:])
    if dist.get_rank() == 0:
        torch.save(result, sys.argv[1])
    dist.destroy_process_group()
    leave(0)
