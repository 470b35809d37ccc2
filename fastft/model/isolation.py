"""Proves, before the first step, that conversations in the same packed row do not see each other."""

import traceback

import torch

from fastft.errors import UserError, is_ours
from fastft.model import attention
from fastft.model.build import TrainedModel, uncompiled


@torch.no_grad()
def prove_isolation(model: TrainedModel, device: torch.device) -> None:
    """Run two conversations in one row, change the first, and require that the loss of the second does not change; collective.

    An architecture that passes a state from token to token, or ignores `cu_seqlens`, would silently be trained on a mixture of
    conversations. Raises UserError, which names the architecture.
    """
    name, words = model.causal_lm.config.model_type, model.causal_lm.config.vocab_size
    length = 8
    tokens = torch.arange(2 * length, device=device)
    arguments = {
        "position_ids": (tokens % length)[None],
        # Padded with the row's length, as in batches.
        "cu_seqlens": torch.tensor([0, length, *[2 * length] * 3], dtype=torch.int32, device=device),
        "max_seqlen": 2 * length,
        "loss_index": tokens[length:-1],
        "targets": tokens[length + 1 :] % words,
    }
    other = torch.where(tokens < length, tokens + length, tokens)
    model.eval()
    try:
        with uncompiled():
            loss, changed = (float(model(input_ids=(ids % words)[None], **arguments)[0]) for ids in (tokens, other))
    except (KeyError, AttributeError, TypeError, RuntimeError) as error:
        if not _is_architectures(error):
            raise
        raise UserError(f"{name}: models of this architecture cannot be trained on packed rows ({error!r})") from None
    model.train()
    model.reshard()  # otherwise a backward pass does it; the optimizer must not get the root's whole weights
    if abs(loss - changed) > 1e-5 * abs(loss):
        raise UserError(f"{name}: in models of this architecture, conversations that share a row see each other")


def _is_architectures(error: BaseException) -> bool:
    """Whether the code of the architecture is to blame for `error`, which the forward pass has raised, and not ours.

    It is, if that code has called a library or our attention with tensors that torch refuses.
    """
    if isinstance(error, torch.OutOfMemoryError):  # a RuntimeError, too
        return False
    modules = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    refused_by_torch = type(error) is RuntimeError and modules[-1] == attention.__name__
    return not is_ours(error) or refused_by_torch
