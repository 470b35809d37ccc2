"""A finished run for the tests of exports, and the logits that the trainer has at a checkpoint."""

from pathlib import Path

import pytest
import torch
from helpers import training as runs

from fastft.config import parse_config
from fastft.data.template.chat_template import load_template
from fastft.model.build import prepare_model
from fastft.model.pretrained import fit_config, load_config
from fastft.train.checkpoint import local
from fastft.train.export import single_process
from fastft.train.optim import build_optimizer


@pytest.fixture(scope="module")
def run(ground, tmp_path_factory):
    """A finished run with all its checkpoints and a held-out loss at each of them."""
    out = tmp_path_factory.mktemp("runs") / "first"
    more = ["--checkpoint.every", "4", "--checkpoint.keep", "9", "--eval_every", "4", "--price_per_hour", "3600"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTFT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        done = runs._main(ground, out, "--eval_data", str(ground / "data.jsonl"), *more)
    assert done.returncode == 0, done.stderr
    return out


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
