"""TODO docstring of fastft.cost.flops."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import nn

from fastft.model.build import TrainedModel

if TYPE_CHECKING:
    import numpy as np

    from fastft.model.build import TrainedModel


def matrix_flops(model: TrainedModel) -> tuple[float, float]:
    """FLOPs of (the blocks' matrices for a token, the output head for a trained token), forward and backward, whole, whatever
    the sharding. Frozen weights have no gradient of their own; of experts count as many as a token is sent to.
    """
    chosen = getattr(model.causal_lm.config, "num_experts_per_tok", None) or 1

    def flops(name: str, parameter: nn.Parameter) -> float:
        size = parameter.quant_state.shape if hasattr(parameter, "quant_state") else parameter.shape
        share = chosen / size[0] if "experts." in name and len(size) == 3 else 1  # all experts in one tensor
        return (TRAINED if parameter.requires_grad else FROZEN) * share * math.prod(size)

    head = model.causal_lm.get_output_embeddings().weight
    return sum(flops(name, p) for name, p in model.blocks.named_parameters()), flops("head", head)


# A multiply-add is 2 FLOPs: one for the forward pass, one for the gradient of the input, one for that of the weight.
TRAINED, FROZEN = 6, 4  # FLOPs of a matrix's entry for a token


def training_flops(
    tokens: int, trained: int, squared_lengths: float, body: float, head: float, layers: int, width: int
) -> float:
    """FLOPs that a step needs, nothing credited for padding, recomputation or untrained positions' logits.

    Forward and backward: `body` a token in the blocks' matrices, `head` a trained token in the output head
    (fastft.cost.flops.matrix_flops), and causal attention within each conversation, 6 x layers x width x length^2 (half of the
    full square), `width` being heads x head size and `squared_lengths` what `seen_squares` makes of the lengths.
    """
    return body * tokens + head * trained + 6.0 * layers * width * squared_lengths


def attention_windows(model_config) -> list[int | None]:
    """The sliding window of each layer in tokens, None for one that sees everything; one entry where all are alike."""
    window = getattr(model_config, "sliding_window", None)
    kinds = getattr(model_config, "layer_types", None) or ["sliding_attention"]
    return [window if kind == "sliding_attention" else None for kind in kinds]


def seen_squares(lengths: "np.ndarray", windows: Sequence[int | None]) -> float:
    """The sum of length^2 over conversations, less the (length - window)^2 out of a sliding window's sight: the mean over
    the layers, whose `windows` are `attention_windows`'.
    """
    hidden = sum(((lengths - window).clip(0) ** 2).sum() for window in windows if window is not None)
    return float((lengths**2).sum() - hidden / len(windows))
