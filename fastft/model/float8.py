"""Matrix products in 8-bit floats for the blocks' linear layers: torchao's float8 training, row by row.

Every row of activations (a token), of weights and of gradients gets a scale of its own. torchao's other recipe, one scale
for a whole tensor, is faster but breaks a promise: the scale is taken over all tokens in a packed row, so that one
conversation's numbers would depend on which others share its row. Row by row they do not, and the proof of isolation
before the first step (fastft.model.isolation) holds. The head, the embeddings and the norms stay in bf16, the weights and
the optimizer's state in fp32. Checkpoints and the exported model are the same with and without it.
"""

from dataclasses import replace

import torch
from torch import nn

from fastft.errors import UserError

CAPABILITY = (9, 0)  # Hopper's, the first that multiplies rows with a scale each


def use_float8(blocks: nn.ModuleList, device: torch.device) -> str:
    """Convert the linear layers of `blocks` in place, before they are compiled and sharded. Returns a line that says how many.

    Raises UserError when `device` or the installation cannot do it.
    """
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < CAPABILITY:
        raise UserError(
            "float8: needs an NVIDIA GPU of compute capability 9.0 or more (H100, H200, B200); leave it out"
        )
    return convert(blocks)


def convert(blocks: nn.ModuleList, emulate: bool = False) -> str:
    """Convert on any device: `emulate` computes in fp32 with rounded numbers where there are no 8-bit products."""
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError:
        raise UserError(
            'float8: needs torchao, which is not installed (pip install "fastft[torchao]"); leave it out'
        ) from None
    config = replace(Float8LinearConfig.from_recipe_name("rowwise"), emulate=emulate)
    linears = [m for m in blocks.modules() if isinstance(m, nn.Linear)]
    # The kernels take sizes that are multiples of 16.
    fits = lambda linear: linear.in_features % 16 == 0 == linear.out_features % 16  # noqa: E731
    convert_to_float8_training(blocks, config=config, module_filter_fn=lambda module, name: fits(module))
    return f"float8: {sum(map(fits, linears))} of {len(linears)} linear layers in the blocks, scaled row by row"
