"""Products in 8-bit floats, emulated: what they are off by, and that conversations in a row still do not see each other.

The tests that convert a model need torchao and say so when it is missing: pip install "fastft[torchao]".
"""

import sys
from dataclasses import replace

import pytest
import torch
from helpers.training import fails, train_here
from torch import nn

from fastft.errors import UserError
from fastft.model.build import TrainedModel
from fastft.model.float8 import convert
from fastft.model.isolation import prove_isolation

CPU = torch.device("cpu")


def needs_torchao():
    return pytest.importorskip("torchao.float8", reason='torchao is not installed: pip install "fastft[torchao]"')


def gradients(model: TrainedModel) -> dict[str, torch.Tensor]:
    """Of the summed loss over two conversations in one row."""
    torch.manual_seed(0)
    ids, at = torch.randint(16, 500, (1, 64)), torch.arange(64)
    loss, _ = model(
        ids, (at % 32)[None], torch.tensor([0, 32, 64], dtype=torch.int32), 64, at[:-1], ids[0, 1:], scale=1 / 63
    )
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad.clone() for name, p in model.named_parameters()}}


def test_rounded_products_change_gradients_little_and_names_not(trained_model):
    needs_torchao()
    exact = gradients(trained_model)
    trained_model.zero_grad()
    assert (
        convert(trained_model.blocks, emulate=True) == "float8: 14 of 14 linear layers in the blocks, scaled row by row"
    )
    assert type(trained_model.causal_lm.get_output_embeddings()) is nn.Linear
    rounded = gradients(trained_model)
    assert rounded.keys() == exact.keys()
    assert rounded["loss"] != exact["loss"] and rounded["loss"] == pytest.approx(exact["loss"].item(), rel=0.01)
    for name, gradient in exact.items():
        assert (rounded[name] - gradient).norm() < 0.2 * gradient.norm(), name


def test_layers_that_the_kernels_cannot_do_stay_as_they_are(trained_model):
    needs_torchao()
    trained_model.blocks[0].mlp.up_proj = nn.Linear(32, 72, bias=False)
    trained_model.blocks[0].mlp.gate_proj = nn.Linear(32, 72, bias=False)
    trained_model.blocks[0].mlp.down_proj = nn.Linear(72, 32, bias=False)
    assert convert(trained_model.blocks, emulate=True).startswith("float8: 11 of 14")


def test_conversations_in_a_row_do_not_see_each_other(trained_model):
    """One scale for a row keeps the proof of isolation; one for a whole tensor, the faster recipe, would break it."""
    float8 = needs_torchao()
    blocks = {name: tensor.clone() for name, tensor in trained_model.state_dict().items()}
    convert(trained_model.blocks, emulate=True)
    prove_isolation(trained_model, CPU)
    assert all(torch.equal(tensor, trained_model.state_dict()[name]) for name, tensor in blocks.items())
    tensorwise = replace(float8.Float8LinearConfig.from_recipe_name("tensorwise"), emulate=True)
    for block in trained_model.blocks:
        for linear in (m for m in block.modules() if isinstance(m, nn.Linear)):
            linear.config = tensorwise
    with pytest.raises(UserError, match="see each other"):
        prove_isolation(trained_model, CPU)


def test_without_the_hardware_one_line_says_so(ground, tmp_path):
    fails(
        train_here(ground, tmp_path / "out", "--float8", "true", "--compile", "true"),
        "float8: needs an NVIDIA GPU of compute capability 9.0 or more",
    )


def test_without_torchao_one_line_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.float8", None)
    with pytest.raises(UserError, match="float8: needs torchao, which is not installed"):
        convert(nn.ModuleList([nn.Linear(16, 16)]))
