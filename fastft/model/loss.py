"""Token-exact cross entropy over the trained positions, without ever holding [tokens, vocabulary].

The head, the softmax and their gradients are computed together in the forward pass, some positions at a time. Logits are
made once and never outlive their chunk; making them again in the backward pass would cost a fourth matrix product beside
the three that are needed. On a CPU this takes two thirds of the time of checkpointed chunks, with equal errors
(benchmarks/loss.py). The weight's gradient is summed over the chunks in the model's data type: in bf16 its error grows from
1.7e-3 for one chunk to 5.0e-3 for 16 and 1.0e-2 for 64. A sum in fp32 would take another GiB for an 8B model, and twice the
memory traffic.

Why not a library's loss: `torch.nn.functional.linear_cross_entropy` (torch 2.13) works the same way, but sums the loss of a
bf16 model in bf16 (wrong by 1 % in that benchmark), and has neither logit soft-capping nor the z-loss; the tests use it as
a second opinion. Liger's fused kernel (0.8.5) waits for the device in every call to count ignored rows. There are none
here, because only trained positions get this far; for the same reason its fault with ignored rows under torch.compile (its
pull request 1338) would not matter.
"""

import torch
from torch import Tensor, nn

CHUNK_BYTES = 256 << 20


def chunk_positions(vocabulary: int) -> int:
    """How many positions have logits at a time: 256 MiB in fp32, in whole tiles of 128 rows, and at most 8,192 positions.

    A vocabulary of 32k gives 2,048 positions, 128k 512, and 256k 256. Products of so many rows keep a GPU busy, and with the
    bf16 copies before and after the softmax a chunk takes half a GiB (three quarters with soft-capping). All logits of
    4,096 positions and a vocabulary of 128k would take 2 GiB for each copy in fp32.
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
    """(loss, z-loss): scalars in fp32 (fp64 for fp64 input), both times `scale`. Only the first has gradients.

    The loss is the sum over N of the cross entropy of `head(hidden)` against `targets` (int64), plus the z-loss, the sum
    of `z_weight` x logsumexp(logits)^2 (PaLM, Chowdhery et al. 2022, section 5: 1e-4). With `softcap` c, logits are
    c tanh(logits / c) (Gemma 2). `scale` is applied before gradients are rounded to the data type of the model, so that
    1 / (trained tokens) costs no precision. `chunk` is the number of positions at a time, by default `chunk_positions`.

    N may be 0: then the sum is 0 and its gradients are zeros, so that a rank without trained tokens joins every collective.
    """
    chunk = chunk or chunk_positions(head.out_features)
    options = (scale, softcap, z_weight, chunk, torch.is_grad_enabled())
    return _SummedCrossEntropy.apply(hidden_ND, targets_N, head.weight, head.bias, *options)


class _SummedCrossEntropy(torch.autograd.Function):
    """`summed_cross_entropy` for autograd: the forward pass computes the gradients, too, and the backward pass scales them."""

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
        loss, z_loss = sums[0].clone(), sums[1].clone()  # copies: in-place operations on views would lose FSDP's hooks
        ctx.mark_non_differentiable(z_loss)
        return loss, z_loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_loss, _):
        gradients, ctx.gradients = ctx.gradients, None  # they are scaled in place, and cannot be used again
        d_hidden_ND, d_weight_VD, d_bias_V = (None if g is None else g.mul_(d_loss) for g in gradients)
        return d_hidden_ND, None, d_weight_VD, d_bias_V, None, None, None, None, None


def _softmax_loss(
    logits_nV: Tensor, targets_n: Tensor, scale: float, softcap: float | None, z_weight: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, z-loss, d loss / d logits [n, V]); `logits` are overwritten."""
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
