"""A checkpoint's directory, and the logits that the trainer has there."""

from pathlib import Path

import torch

from fastft.config import parse_config
from fastft.data.template.chat_template import load_template
from fastft.model.build import prepare_model
from fastft.model.pretrained import fit_config, load_config
from fastft.train.checkpoint import local
from fastft.train.export import single_process
from fastft.train.optim import build_optimizer


def step(run: Path, number: int) -> Path:
    return run / "checkpoints" / f"step-{number:08d}"


def trainers_logits(run: Path, number: int, ids: torch.Tensor) -> torch.Tensor:
    """[L, V] of the checkpoint as the trainer resumes it: sharded, with packed attention."""
    from fastft.model.attention import choose_attention

    config, cpu = parse_config(["--config", str(run / "config.yaml")]), torch.device("cpu")
    with single_process():
        words = len(load_template(config.model).tokenizer)
        fitted = fit_config(load_config(config.model), config, words)
        model = prepare_model(config, fitted, choose_attention("auto", cpu)[0], cpu)
        local.load(step(run, number), model, build_optimizer(model, config))
        every, edges = torch.arange(len(ids)), torch.tensor([0, len(ids)], dtype=torch.int32)
        heard = []
        model.causal_lm.get_output_embeddings().register_forward_hook(lambda module, args, out: heard.append(out))
        with torch.no_grad():
            model.eval().likeliest(every, ids[None], every[None], edges, len(ids))
        return heard[0].clone()
