"""Gradient checkpointing: a block keeps less for its backward pass, which computes the rest again.

    recompute(block, "selective")        # then the block is compiled, then sharded

The block's `forward` is replaced, so that torch.compile sees the checkpoint as a part of its graph, and FSDP2's hooks stay
outside of it.
"""

from functools import partial
from typing import Literal

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

_ATTENTION = (
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "torch_attn::_varlen_attn",
    "flash_attn::_flash_attn_varlen_forward",
)
_MATMULS = ("aten::mm", "aten::addmm")


def recompute(block: nn.Module, mode: Literal["none", "selective", "full"]) -> None:
    """Change `block` in place, so that it keeps only its input for the backward pass ("full"), or a little more ("selective").

    "selective" also keeps the outputs of attention and of every second matrix product, which are cheap to keep and expensive
    to compute (torchtitan's choice). Without gradients the block runs as before.
    """
    if mode == "none":
        return
    plain = block.forward
    options = {"context_fn": _selective} if mode == "selective" else {}

    def forward(*args, **kwargs):
        if not torch.is_grad_enabled():
            return plain(*args, **kwargs)
        return checkpoint(plain, *args, use_reentrant=False, **options, **kwargs)

    block.forward = forward


def _selective():
    """The contexts of a block's forward pass and of its recomputation, in each of which matrix products are counted."""
    return create_selective_checkpoint_contexts(partial(_policy, {False: 0, True: 0}))


def _policy(matmuls: dict[bool, int], context, operation, *args, **kwargs) -> CheckpointPolicy:
    """Decide whether an operation's output is kept. `matmuls` counts matrix products, by whether it is the recomputation."""
    name = operation.name().split(".")[0]
    if name in _MATMULS:
        matmuls[context.is_recompute] += 1
        return CheckpointPolicy.MUST_SAVE if matmuls[context.is_recompute] % 2 else CheckpointPolicy.PREFER_RECOMPUTE
    return CheckpointPolicy.MUST_SAVE if name in _ATTENTION else CheckpointPolicy.PREFER_RECOMPUTE
