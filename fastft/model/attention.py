"""Attention over packed rows, in which every conversation attends to itself alone, without a mask of [T, T].

`choose_attention` chooses one of three backends, says why, and registers it with transformers as "fastft_NAME":

- flash_attn: the flash-attn package (variable-length FlashAttention-2), where it is installed;
- varlen: torch.nn.attention.varlen, PyTorch's own variable-length flash attention (CUDA, torch >= 2.11): FlashAttention-2, and
  through PyTorch's switch FlashAttention-3 or 4 where their packages are installed;
- documents: PyTorch's scaled_dot_product_attention, one call per conversation; runs everywhere, and is the only one on a CPU.

A micro-batch is one flat row of N tokens. `cu_seqlens` (int32, on the same device) holds the position where each conversation
begins, and then N, repeated so that its size stays the same. transformers makes no mask for backends that are registered
without a mask function, and passes `cu_seqlens` and `max_seqlen` on to the functions below.
"""

import importlib.util
import inspect
from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.attention
import torch.nn.functional as F
from torch import Tensor

from fastft.errors import UserError

# Arguments of some architectures that the functions below do not implement. Ignoring them would silently give wrong results.
_UNKNOWN = ("s_aux", "position_bias", "alibi", "head_mask")


def choose_attention(requested: str, device: torch.device) -> tuple[str, str]:
    """Register a backend, and return its name in transformers, and a line for the log that says what was chosen and why.

    `requested` is auto, flash_attn, varlen or documents. Raises UserError if it cannot work on `device`.
    """
    from transformers import AttentionInterface

    backend, why = _choose(requested, device)
    functions = {"flash_attn": _flash_attn, "varlen": _varlen, "documents": _documents}
    AttentionInterface.register(f"fastft_{backend}", _refusing_unknown(functions[backend]))
    return f"fastft_{backend}", f"attention: {backend} ({why})"


# Kernels for newer GPUs to which PyTorch's varlen can be switched: (PyTorch's name, their module, major compute capabilities,
# the first torch that trains with them). FlashAttention-2, made for Ampere (8), reaches 35 % of an H100's peak, version 3
# reaches 75 % (Shah et al., 2024). With version 4, torch 2.11 refuses the backward pass of varlen, and 2.13 does not.
_NEWER = (("FA3", "flash_attn_interface", (9,), (2, 11)), ("FA4", "flash_attn.cute", (9, 10), (2, 13)))


def _choose(requested: str, device: torch.device) -> tuple[str, str]:
    """(the backend, why it was chosen). Switches PyTorch to newer kernels for varlen where it can."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    if capability < (8, 0):
        if requested == "auto":
            return "documents", f"exact per conversation; no flash attention on {device.type}"
        if requested != "documents":
            raise UserError(
                f"attention: {requested} needs an NVIDIA GPU of compute capability 8.0 or more; use documents"
            )
    has_package = _installed("flash_attn.flash_attn_interface")
    if requested == "flash_attn" and not has_package:
        raise UserError(
            "attention: flash_attn is not installed (pip install flash-attn --no-build-isolation); use varlen"
        )
    if requested in ("auto", "varlen") and (kernel := _switch(capability[0])):
        return "varlen", f"PyTorch's own variable-length attention, with the kernels of {kernel}"
    if requested != "auto":
        return requested, "as requested"
    if has_package:
        return "flash_attn", "the flash-attn package is installed"
    return "varlen", "PyTorch's own variable-length flash attention; no flash-attn package that loads"


def torch_version() -> tuple[int, int]:
    """The version of torch, (2, 13) for 2.13.1+cu130."""
    major, minor, *_ = torch.__version__.split(".")
    return int(major), int(minor)


def _switch(major: int) -> str | None:
    """Switch PyTorch to the newer kernels for this GPU, if they are installed, and return their name, else None."""
    for name, module, majors, first in _NEWER:
        if major in majors and torch_version() >= first and _installed(module):
            torch.nn.attention.activate_flash_attention_impl(name)
            return name
    return None


def _installed(module: str) -> bool:
    """Whether a module can be found, and the packages around it can be imported."""
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:  # the package around the module is missing, or was built for another torch
        return False


def _refusing_unknown(function: Callable) -> Callable:
    """Wrap `function`, so that an argument that it does not implement raises UserError."""

    def attention(module, query, key, value, attention_mask, **kwargs):
        for name in _UNKNOWN:
            if kwargs.get(name) is not None:
                raise UserError(f"{type(module).__name__} uses {name!r} in its attention, which is not supported")
        return function(module, query, key, value, attention_mask, **kwargs)

    return attention


def _boundaries(module, kwargs: dict) -> tuple[Tensor, int]:
    """(cu_seqlens, max_seqlen) of the row. Raises UserError if the architecture does not pass them on to its attention."""
    if kwargs.get("cu_seqlens") is None:
        raise UserError(
            f"{type(module).__name__} does not tell its attention where conversations begin; models of this architecture "
            "cannot be trained on packed rows"
        )
    return kwargs["cu_seqlens"], kwargs["max_seqlen"]


def _flash_attn(
    module, query, key, value, attention_mask, dropout=0.0, scaling=None, sliding_window=None, softcap=None, **kwargs
):
    from flash_attn import flash_attn_varlen_func

    cu_seqlens, max_seqlen = _boundaries(module, kwargs)
    out_NHD = flash_attn_varlen_func(
        *(_flat(t) for t in (query, key, value)),
        cu_seqlens,
        cu_seqlens,
        max_seqlen,
        max_seqlen,
        dropout_p=dropout,
        softmax_scale=scaling,
        causal=True,
        window_size=_window(sliding_window),
        softcap=softcap or 0.0,
    )
    return out_NHD.unsqueeze(0), None


def _varlen(
    module, query, key, value, attention_mask, dropout=0.0, scaling=None, sliding_window=None, softcap=None, **kwargs
):
    from torch.nn.attention.varlen import varlen_attn

    if softcap or dropout:
        what = "logit soft-capping" if softcap else "dropout"
        raise UserError(f"attention: varlen has no {what}, which this model needs; use flash_attn or documents")
    grouped = {}
    if query.shape[1] != key.shape[1]:
        if varlen_repeats():
            groups = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        else:
            grouped = {"enable_gqa": True}
    cu_seqlens, max_seqlen = _boundaries(module, kwargs)
    out_NHD = varlen_attn(
        *(_flat(t) for t in (query, key, value)),
        cu_seqlens,
        cu_seqlens,
        max_seqlen,
        max_seqlen,
        scale=scaling,
        window_size=_window(sliding_window),
        **grouped,
    )
    return out_NHD.unsqueeze(0), None


@lru_cache
def varlen_repeats() -> bool:
    """Whether keys and values must be repeated for each query head: before torch 2.12 varlen takes no grouped heads."""
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" not in inspect.signature(varlen_attn).parameters


def _documents(
    module, query, key, value, attention_mask, dropout=0.0, scaling=None, sliding_window=None, softcap=None, **kwargs
):
    edges = _boundaries(module, kwargs)[0].tolist()
    outputs = [
        _document(*(t[:, :, begin:end] for t in (query, key, value)), dropout, scaling, sliding_window, softcap)
        for begin, end in zip(edges, edges[1:])
        if begin < end
    ]
    return torch.cat(outputs, dim=2).transpose(1, 2), None


def _document(query: Tensor, key: Tensor, value: Tensor, dropout, scaling, sliding_window, softcap) -> Tensor:
    """Causal attention of one conversation: [1, H, L, D] queries over [1, K, L, D] keys and values."""
    length = query.shape[2]
    windowed = sliding_window is not None and sliding_window < length
    options = {"dropout_p": dropout, "scale": scaling, "enable_gqa": True}
    if not windowed and softcap is None:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, **options)
    distance_LL = torch.arange(length, device=query.device)[:, None] - torch.arange(length, device=query.device)[None]
    visible_LL = (distance_LL >= 0) & (distance_LL < (sliding_window if windowed else length))
    if softcap is None:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=visible_LL, **options)
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores_HLL = query @ key.transpose(2, 3) * (scaling or query.shape[-1] ** -0.5)
    scores_HLL = softcap * torch.tanh(scores_HLL / softcap)
    weights_HLL = scores_HLL.masked_fill(~visible_LL, float("-inf")).softmax(-1, dtype=torch.float32)
    return F.dropout(weights_HLL.to(value.dtype), dropout) @ value


def _flat(heads_1HND: Tensor) -> Tensor:
    """[1, H, N, D] -> [N, H, D], the layout of flash attention."""
    return heads_1HND.squeeze(0).transpose(0, 1)


def _window(sliding_window: int | None) -> tuple[int, int]:
    """A sliding window as flash attention counts it: (tokens before the token itself, or -1 for all; tokens after it)."""
    return (-1, 0) if sliding_window is None else (sliding_window - 1, 0)
