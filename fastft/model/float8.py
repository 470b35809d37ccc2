"""Matrix products in 8-bit floats for the blocks' linear layers: torchao's float8 training with a scale for each row.

A row is a token's activations, or a row of the weights or of the gradients. torchao's other recipe, one scale for a whole
tensor, is faster. But that scale is computed over all tokens of a packed row, so a conversation's results would depend on
the others in its row. fastft.model.isolation proves before the first step that they do not. The head, the embeddings and the
norms stay in bf16, the weights and the optimizer's state in fp32. Checkpoints and the exported model have the same format
with and without float8.
"""

from dataclasses import replace

import torch
from torch import nn

from fastft.errors import UserError

CAPABILITY = (9, 0)  # Hopper's, the first with products that take a scale for each row


def use_float8(blocks: nn.ModuleList, device: torch.device) -> str:
    """Convert the linear layers of `blocks` in place, before they are compiled and sharded, and return a line for the log.

    Raises UserError if the device has no such products, or torchao is missing.
    """
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < CAPABILITY:
        raise UserError(
            "float8: needs an NVIDIA GPU of compute capability 9.0 or more (H100, H200, B200); leave it out"
        )
    return convert(blocks)


def convert(blocks: nn.ModuleList, emulate: bool = False) -> str:
    """Convert the layers on any device. With `emulate`, rounded numbers are multiplied in fp32, for devices without float8."""
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError:
        raise UserError(
            'float8: needs torchao, which is not installed (pip install "fastft[torchao]"); leave it out'
        ) from None
    config = replace(Float8LinearConfig.from_recipe_name("rowwise"), emulate=emulate)
    linears = [m for m in blocks.modules() if isinstance(m, nn.Linear)]
    # The kernels need sizes that are multiples of 16; other layers stay as they are.
    fits = lambda linear: linear.in_features % 16 == 0 == linear.out_features % 16  # noqa: E731
    convert_to_float8_training(blocks, config=config, module_filter_fn=lambda module, name: fits(module))
    return f"float8: {sum(map(fits, linears))} of {len(linears)} linear layers in the blocks, scaled row by row"
