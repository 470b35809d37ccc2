"""The proof of isolation blames an architecture for what its code does, and never for a bug of ours."""

import pytest
import torch
from helpers.bugs import bug
from torch import nn

from fastft.errors import UserError
from fastft.model import attention, build, loss
from fastft.model.isolation import prove_isolation

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("module", "function"),
    [(build, "summed_cross_entropy"), (loss, "_softmax_loss"), (attention, "_document"), (attention, "_boundaries")],
)
@pytest.mark.parametrize(("fails", "error"), [("{}['injected']", KeyError), ("None.injected", AttributeError)])
def test_a_bug_of_ours_is_not_the_architectures(trained_model, monkeypatch, module, function, fails, error):
    assert hasattr(module, function)
    monkeypatch.setattr(module, function, bug(module, fails))
    with pytest.raises(error, match="injected"):
        prove_isolation(trained_model, CPU)


def test_a_shape_that_torch_refuses_in_the_loss_is_a_bug(trained_model, monkeypatch):
    monkeypatch.setattr(build, "summed_cross_entropy", bug(build, "torch.ones(2) @ torch.ones(3)"))
    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        prove_isolation(trained_model, CPU)


def test_an_architecture_that_fails_is_one_line(trained_model, monkeypatch):
    def forward(**_):
        raise KeyError("whatever it is in transformers")

    monkeypatch.setattr(trained_model.causal_lm.base_model, "forward", forward)
    with pytest.raises(UserError, match="models of this architecture cannot be trained on packed rows"):
        prove_isolation(trained_model, CPU)


def test_shapes_that_torch_refuses_in_the_attention_are_the_architectures(trained_model):
    trained_model.blocks[0].self_attn.q_proj = nn.Linear(32, 40, bias=False)  # heads that no key's head divides
    trained_model.blocks[0].self_attn.o_proj = nn.Linear(40, 32, bias=False)
    with pytest.raises(UserError, match="models of this architecture cannot be trained on packed rows"):
        prove_isolation(trained_model, CPU)


def test_an_architecture_that_keeps_the_boundaries_from_its_attention_is_one_line(trained_model, monkeypatch):
    base = trained_model.causal_lm.base_model
    forward = base.forward
    monkeypatch.setattr(base, "forward", lambda **given: forward(**given | {"cu_seqlens": None}))
    with pytest.raises(UserError, match="does not tell its attention where conversations begin"):
        prove_isolation(trained_model, CPU)
