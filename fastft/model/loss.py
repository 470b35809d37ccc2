"""Cross entropy summed over the trained positions, without the logits of all positions in memory at once.

The logits, their softmax and the gradients of both are computed in the forward pass, for some positions at a time, after
which the logits are dropped. Computing them again in the backward pass would cost a fourth matrix product, besides the three
that are needed. On a CPU this takes two thirds of the time of checkpointed chunks, with equal errors (benchmarks/loss.py).
The weight's gradient is summed over the chunks in the model's data type: in bf16 its error grows from 1.7e-3 for one chunk
to 5.0e-3 for 16 and 1.0e-2 for 64. A sum in fp32 would take another GiB for an 8B model, and twice the memory traffic.

Why not a library's loss: `torch.nn.functional.linear_cross_entropy` (torch 2.13) works in the same way, but sums the loss of a
bf16 model in bf16 (wrong by 1 % in that benchmark), and has neither logit soft-capping nor the z-loss; the tests compare ours
with it. Liger's fused kernel (0.8.5) waits for the device in every call to count ignored rows, which do not exist here, because
only trained positions are passed on.
"""

import torch
from torch import Tensor, nn

CHUNK_BYTES = 256 << 20


def chunk_positions(vocabulary: int) -> int:
    """The number of positions in a chunk: their logits take 256 MiB in fp32; a multiple of 128, and at most 8,192.

    That is 2,048 positions for a vocabulary of 32k, 512 for 128k, and 256 for 256k. Products of so many rows keep a GPU busy.
    With the bf16 copies before and after the softmax, a chunk takes half a GiB (three quarters with soft-capping). The logits
    of 4,096 positions and a vocabulary of 128k would take 2 GiB for each copy in fp32.
    """
    return min(max(CHUNK_BYTES // (4 * vocabulary * 128), 1), 64) * 128


def summed_cross_entropy(
    hidden_ND: Tensor,
    targets_N: Tensor,
    head: nn.Linear,
    scale: float = 1.0,
    softcap: float | None = None,
    z_weight: float = 0.0,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (loss, z-loss): scalars in fp32 (fp64 for fp64 input), multiplied by `scale`. Only the loss has gradients.

    The loss is the sum over N positions of the cross entropy of `head(hidden)` against `targets` (int64), plus the z-loss, the
    sum of `z_weight` x logsumexp(logits)^2 (PaLM, Chowdhery et al. 2022, section 5: 1e-4). With `softcap` c, logits become
    c tanh(logits / c) (Gemma 2). `scale` is applied before gradients are rounded to the model's data type, so that a factor of
    1 / (trained tokens) costs no precision. `chunk` is the number of positions at a time, by default `chunk_positions`.

    If N is 0, the loss is 0 and its gradients are zeros, so that a rank without trained tokens joins every collective.
    """
    chunk = chunk or chunk_positions(head.out_features)
    options = (scale, softcap, z_weight, chunk, torch.is_grad_enabled())
    return _SummedCrossEntropy.apply(hidden_ND, targets_N, head.weight, head.bias, *options)


class _SummedCrossEntropy(torch.autograd.Function):
    """`summed_cross_entropy` for autograd. The forward pass computes the gradients, too; the backward pass scales them."""

    @staticmethod
    def forward(ctx, hidden_ND, targets_N, weight_VD, bias_V, scale, softcap, z_weight, chunk, differentiable):
        needed = ctx.needs_input_grad
        zeros = lambda tensor, wanted: torch.zeros_like(tensor) if wanted and differentiable else None  # noqa: E731
        d_hidden_ND, d_weight_VD = zeros(hidden_ND, needed[0]), zeros(weight_VD, needed[2])
        d_bias_V = zeros(bias_V, needed[3])
        wide = torch.float64 if hidden_ND.dtype == torch.float64 else torch.float32
        sums = torch.zeros(2, dtype=wide, device=hidden_ND.device)  # loss, z-loss
        for start in range(0, len(targets_N), chunk):
            hidden_nD = hidden_ND[start : start + chunk]
            logits_nV = nn.functional.linear(hidden_nD, weight_VD, bias_V)
            *parts, d_logits_nV = _softmax_loss(
                logits_nV.to(wide), targets_N[start : start + chunk], scale, softcap, z_weight
            )
            sums += torch.stack(parts)
            d_logits_nV = d_logits_nV.to(hidden_ND.dtype)
            if d_hidden_ND is not None:
                torch.mm(d_logits_nV, weight_VD, out=d_hidden_ND[start : start + chunk])
            if d_weight_VD is not None:
                d_weight_VD.addmm_(d_logits_nV.T, hidden_nD)
            if d_bias_V is not None:
                d_bias_V += d_logits_nV.sum(0)
        ctx.gradients = (d_hidden_ND, d_weight_VD, d_bias_V)
        # Copies, because in-place operations on views would lose FSDP's hooks.
        loss, z_loss = sums[0].clone(), sums[1].clone()
        ctx.mark_non_differentiable(z_loss)
        return loss, z_loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_loss, _):
        gradients, ctx.gradients = ctx.gradients, None  # scaled in place below, so they cannot be used twice
        d_hidden_ND, d_weight_VD, d_bias_V = (None if g is None else g.mul_(d_loss) for g in gradients)
        return d_hidden_ND, None, d_weight_VD, d_bias_V, None, None, None, None, None


def _softmax_loss(
    logits_nV: Tensor, targets_n: Tensor, scale: float, softcap: float | None, z_weight: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (loss, z-loss, gradient of the loss with respect to the logits [n, V]). Overwrites the logits."""
    if softcap:
        tanh_nV = logits_nV.div_(softcap).tanh_()
        logits_nV = tanh_nV * softcap
    largest_n1 = logits_nV.amax(1, keepdim=True)
    target_n1 = logits_nV.sub_(largest_n1).gather(1, targets_n[:, None])
    total_n1 = logits_nV.exp_().sum(1, keepdim=True)
    log_total_n1 = total_n1.log()
    logsumexp_n1 = log_total_n1 + largest_n1
    z_loss = logsumexp_n1.square().sum() * (z_weight * scale)
    loss = (log_total_n1 - target_n1).sum() * scale + z_loss
    d_logits_nV = logits_nV.mul_(scale * (1 + 2 * z_weight * logsumexp_n1) / total_n1)
    d_logits_nV.scatter_add_(1, targets_n[:, None], torch.full_like(target_n1, -scale))
    if softcap:
        d_logits_nV.mul_(tanh_nV.square_().neg_().add_(1))
    return loss, z_loss, d_logits_nV
