"""Rope scaling, for rows that are longer than the positions that a model knows.

The scaling is written into the config before the model is built, because the rotary modules read it when they are made. It
must keep the config's `rope_theta`, for which transformers would otherwise take 10,000.

Linear scaling is position interpolation (Chen et al., 2023), with which LongChat and Vicuna-16k were made: it divides all
frequencies by the factor. YaRN (Peng et al., 2023) divides only the low ones, and needs fewer steps of training.
"""

import copy

import torch
from torch import nn

from fastft.errors import UserError


def fit_seq_len(model_config, seq_len: int, extend: str, model: str):
    """The config to build and export: the model's own if it has `seq_len` positions, else a copy scaled as `extend` says.

    Raises UserError, which names `model`, if there are too few positions and they must not or cannot be scaled.
    """
    longest = getattr(model_config, "max_position_embeddings", None)
    for rope in _scaled_layers(model_config):
        short = rope.get("original_max_position_embeddings", longest)
        if rope.get("rope_type") == "longrope" and seq_len > short:
            raise UserError(
                f"seq_len {seq_len}: {model} chooses its positions (longrope) by the longest conversation of a row; "
                f"packed rows are exact up to {short} tokens"
            )
    if not longest or seq_len <= longest:
        return model_config
    too_long = f"seq_len {seq_len} is longer than the {longest} positions that {model} knows"
    if extend == "none":
        raise UserError(f"{too_long}; --extend yarn or --extend linear scales them to fit")
    config = copy.deepcopy(model_config)
    layers = _scaled_layers(config)
    if not layers:
        raise UserError(f"{too_long}, and they are not rotary: they cannot be scaled")
    for rope in layers:
        _scale(rope, extend, seq_len / longest, longest, too_long)
    config.max_position_embeddings = seq_len
    config.validate_rope()
    return config


def _scaled_layers(config) -> list[dict]:
    """The rotary parameters of the layers that attend to the whole row; those with a sliding window need no scaling."""
    rope = getattr(config, "rope_parameters", None) or {}
    nested = [layer for layer in rope.values() if isinstance(layer, dict)]
    if not nested:
        return [rope] if rope else []
    return [rope["full_attention"]] if rope.get("full_attention") else nested


def _scale(rope: dict, extend: str, factor: float, longest: int, too_long: str) -> None:
    """Write the scaling into the rotary parameters `rope`. Raises UserError if they are scaled in another way already."""
    earlier = rope.get("rope_type", "default")
    if earlier == "linear" and extend == "linear":
        rope["factor"] *= factor
    elif earlier == "default":
        rope.update(rope_type=extend, factor=factor)
        if extend == "yarn":
            rope["original_max_position_embeddings"] = longest
    else:
        raise UserError(f"{too_long}, and {earlier} scales them already: {extend} cannot be put on top")


@torch.no_grad()
def require_scaled(causal_lm: nn.Module, plain_config) -> None:
    """Assert that the model's rotary frequencies are those of `plain_config`, some of them divided by up to the factor."""
    factor = causal_lm.config.max_position_embeddings / plain_config.max_position_embeddings
    if factor == 1:
        return
    slower = {1.0}
    for module in causal_lm.modules():
        if "RotaryEmbedding" in type(module).__name__:
            plain = dict(type(module)(config=plain_config).named_buffers())
            for name, scaled in module.named_buffers():
                slower.update((plain[name] / scaled).flatten().tolist())
    slowest = max(slower)
    assert min(slower) > 1 - 1e-5 and 1 + 1e-5 < slowest < factor * (1 + 1e-5), f"not scaled: {slower}"
