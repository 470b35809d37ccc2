"""The floating-point operations of training: counted from a model's matrices and from the lengths of conversations."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

    from fastft.model.build import TrainedModel

# FLOPs of one entry of a matrix for one token. A multiply-add is 2 FLOPs. It is needed for the forward pass, for the gradient
# of the input and, in a trained matrix, for the gradient of the weight.
TRAINED, FROZEN = 6, 4


def matrix_flops(model: "TrainedModel") -> tuple[float, float]:
    """FLOPs of (the blocks' matrices for a token, the output head for a trained token), in forward and backward pass.

    They count the whole model, however it is sharded, and of its experts as many as a token is routed to.
    """
    chosen = getattr(model.causal_lm.config, "num_experts_per_tok", None) or 1

    def flops(name: str, parameter: "nn.Parameter") -> float:
        size = parameter.quant_state.shape if hasattr(parameter, "quant_state") else parameter.shape
        share = chosen / size[0] if "experts." in name and len(size) == 3 else 1  # all experts in one tensor
        return (TRAINED if parameter.requires_grad else FROZEN) * share * math.prod(size)

    head = model.causal_lm.get_output_embeddings().weight
    return sum(flops(name, p) for name, p in model.blocks.named_parameters()), flops("head", head)


def training_flops(
    tokens: int, trained: int, squared_lengths: float, body: float, head: float, layers: int, width: int
) -> float:
    """FLOPs that training on `tokens` needs, without those for padding, recomputation and logits of untrained positions.

    Forward and backward pass together take, as `matrix_flops` returns them, `body` for each token in the blocks' matrices and
    `head` for each trained token in the output head. The causal attention of a conversation takes 6 x layers x width x
    length^2, half of the full square, where `width` is heads x head size. `squared_lengths` is the result of
    `attended_squares` for the lengths.
    """
    return body * tokens + head * trained + 6.0 * layers * width * squared_lengths


def attention_windows(model_config) -> list[int | None]:
    """The sliding window of each layer in tokens, None for a layer without one.

    One entry represents all layers that are alike.
    """
    window = getattr(model_config, "sliding_window", None)
    kinds = getattr(model_config, "layer_types", None) or ["sliding_attention"]
    return [window if kind == "sliding_attention" else None for kind in kinds]


def attended_squares(lengths: "np.ndarray", windows: Sequence[int | None]) -> float:
    """The sum of length^2 over conversations, less (length - window)^2 for what a sliding window hides; the mean of the layers.

    The layers' `windows` come from `attention_windows`.
    """
    hidden = sum(((lengths - window).clip(0) ** 2).sum() for window in windows if window is not None)
    return float((lengths**2).sum() - hidden / len(windows))
