"""The proof, before the first step, that conversations which share a packed row do not see each other."""

import torch

from fastft.errors import UserError
from fastft.model.build import TrainedModel, uncompiled


@torch.no_grad()
def prove_isolation(model: TrainedModel, device: torch.device) -> None:
    """Run two conversations in one row, change the first, and require that the second's loss stays as it is; collective.

    An architecture that carries a state from token to token, or ignores `cu_seqlens`, would silently train on a mixture of
    conversations. Raises UserError that names it.
    """
    name, words = model.causal_lm.config.model_type, model.causal_lm.config.vocab_size
    length = 8
    tokens = torch.arange(2 * length, device=device)
    arguments = {
        "position_ids": (tokens % length)[None],
        "cu_seqlens": torch.tensor(
            [0, length, *[2 * length] * 3], dtype=torch.int32, device=device
        ),  # padded, as in batches
        "max_seqlen": 2 * length,
        "loss_index": tokens[length:-1],
        "targets": tokens[length + 1 :] % words,
    }
    other = torch.where(tokens < length, tokens + length, tokens)
    model.eval()
    try:
        with uncompiled():
            loss, changed = (float(model(input_ids=(ids % words)[None], **arguments)[0]) for ids in (tokens, other))
    except torch.OutOfMemoryError:  # is a RuntimeError as well, and says nothing about the architecture
        raise
    except (KeyError, AttributeError, TypeError, RuntimeError) as error:
        raise UserError(f"{name}: models of this architecture cannot be trained on packed rows ({error!r})") from None
    model.train()
    model.reshard()  # no backward pass has done it, and the optimizer must not be given the root's whole weights
    if abs(loss - changed) > 1e-5 * abs(loss):
        raise UserError(f"{name}: in models of this architecture, conversations that share a row see each other")
