"""The chunked loss and its gradients, made together, against plain fp64 arithmetic and PyTorch's own operator."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fastft.model.loss import CHUNK_BYTES, chunk_positions, summed_cross_entropy


def plain(hidden, targets, head, scale, softcap, z_weight):
    """The definition: all logits at once."""
    logits = head(hidden)
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    z_loss = scale * z_weight * logits.logsumexp(1).square().sum()
    return scale * F.cross_entropy(logits, targets, reduction="sum") + z_loss, z_loss


def example(positions: int, bias: bool, dtype: torch.dtype = torch.float64, width: int = 8, words: int = 50):
    torch.manual_seed(positions)
    head = nn.Linear(width, words, bias=bias, dtype=dtype)
    hidden = torch.randn(positions, width, dtype=dtype).mul_(3).requires_grad_()
    return hidden, torch.randint(0, words, (positions,)), head


@given(
    positions=st.integers(0, 40),
    chunk=st.integers(1, 50),
    bias=st.booleans(),
    scale=st.floats(1e-6, 2.0),
    softcap=st.none() | st.floats(1.0, 30.0),
    z_weight=st.just(0.0) | st.floats(1e-5, 0.1),
)
def test_loss_and_gradients_are_those_of_the_definition(positions, chunk, bias, scale, softcap, z_weight):
    hidden, targets, head = example(positions, bias)
    inputs = [hidden, *head.parameters()]
    loss, z_loss = summed_cross_entropy(hidden, targets, head, scale, softcap, z_weight, chunk)
    wanted, wanted_z = plain(hidden, targets, head, scale, softcap, z_weight)
    torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(z_loss, wanted_z, rtol=1e-12, atol=1e-12)
    found, expected = torch.autograd.grad(3 * loss, inputs), torch.autograd.grad(3 * wanted, inputs)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="torch < 2.13")
def test_it_agrees_with_pytorchs_own_operator():
    hidden, targets, head = example(300, bias=False, dtype=torch.float32, width=32, words=200)
    options = torch.nn.LinearCrossEntropyOptions()
    theirs = F.linear_cross_entropy(hidden, head.weight, targets, reduction="sum", options=options)
    loss, z_loss = summed_cross_entropy(hidden, targets, head, chunk=64)
    torch.testing.assert_close(loss, theirs)
    assert z_loss == 0
    inputs = [hidden, head.weight]
    torch.testing.assert_close(torch.autograd.grad(loss, inputs), torch.autograd.grad(theirs, inputs))


def test_only_what_is_trained_gets_a_gradient():
    hidden, targets, head = example(20, bias=True)
    head.requires_grad_(False)  # as under adapters
    loss, z_loss = summed_cross_entropy(hidden, targets, head, z_weight=1e-3, chunk=7)
    assert not z_loss.requires_grad
    loss.backward()
    wanted = torch.autograd.grad(plain(hidden, targets, head, 1.0, None, 1e-3)[0], hidden)[0]
    torch.testing.assert_close(hidden.grad, wanted)
    assert head.weight.grad is None and head.bias.grad is None
    with torch.no_grad():
        assert summed_cross_entropy(hidden, targets, head, z_weight=1e-3, chunk=7)[0] == loss


def test_bf16_is_summed_in_fp32():
    """The loss has fp32's precision; gradients are rounded once, however small the scale."""
    hidden, targets, head = example(300, bias=False, dtype=torch.bfloat16, width=32, words=200)
    exact = nn.Linear(32, 200, bias=False, dtype=torch.float64)
    exact.weight.data = head.weight.data.double()
    wide = hidden.detach().double().requires_grad_()
    wanted, _ = plain(wide, targets, exact, 1 / 3000, None, 0.0)
    loss, _ = summed_cross_entropy(hidden, targets, head, 1 / 3000)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(wanted.item(), rel=1e-3)
    found, expected = torch.autograd.grad(loss, hidden)[0].double(), torch.autograd.grad(wanted, wide)[0]
    assert (found - expected).norm() < 4e-3 * expected.norm()


@given(st.integers(1, 1 << 20))
def test_a_chunk_of_logits_takes_256_mib_at_most(vocabulary):
    positions = chunk_positions(vocabulary)
    assert 128 <= positions <= 8192 and positions % 128 == 0
    assert positions == 128 or positions * vocabulary * 4 <= CHUNK_BYTES
    assert chunk_positions(vocabulary + 1) <= positions
