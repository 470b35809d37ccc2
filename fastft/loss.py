"""Token-exact cross entropy over the trained positions, without ever holding [tokens, vocabulary] in fp32.

The sum is returned, not a mean: the trainer divides by the step's trained tokens over all ranks and micro-batches, so
the loss does not depend on how a step is cut up.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK = 1024  # positions whose logits exist at a time: 128k words x 1024 x fp32 = 0.5 GiB


def summed_cross_entropy(hidden_ND: Tensor, targets_N: Tensor, head: Callable[[Tensor], Tensor]) -> Tensor:
    """Sum over N of the cross entropy of `head(hidden)` against `targets`, a scalar in fp32 (fp64 for fp64 input).

    `head` maps [n, D] to logits [n, V]. Logits are made again in the backward pass, chunk by chunk. N may be 0: the sum
    is then 0 and still has a gradient of zeros, so that a rank without trained tokens takes part in every collective.
    """
    if not len(targets_N):
        return head(hidden_ND.sum(0, keepdim=True)).sum() * 0.0
    parts = [
        checkpoint(_chunk, hidden_nD, targets_n, head, use_reentrant=False)
        for hidden_nD, targets_n in zip(hidden_ND.split(CHUNK), targets_N.split(CHUNK))
    ]
    return torch.stack(parts).sum()


def _chunk(hidden_nD: Tensor, targets_n: Tensor, head: Callable[[Tensor], Tensor]) -> Tensor:
    logits_nV = head(hidden_nD)
    wide = torch.float64 if logits_nV.dtype == torch.float64 else torch.float32
    return F.cross_entropy(logits_nV.to(wide), targets_n, reduction="sum")
