"""Scores given answers by their likelihood: log P(answer | dialogue) for every dialogue and answer, without writing a text.

    scores_NA = answer_likelihoods(chat, dialogues, ["positive", "negative"])        # [dialogues, answers], natural logarithms

A long instruction that all dialogues begin with is computed once and kept as a key-value cache, and so is each dialogue for its
answers. Only dialogues of the same length share a batch, so nothing is padded and no score depends on the batch.
"""

import copy
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fastft.data.conversation import Message
from fastft.errors import UserError

if TYPE_CHECKING:
    from fastft.inference.engine import ChatModel

LEAST_SHARED = 16  # tokens; a shorter common beginning is not worth a cache of its own


def answer_likelihoods(
    chat: "ChatModel",
    dialogues: Sequence[Sequence[Message]],
    answers: Sequence[str],
    batch_size: int = 16,
    done: Callable[[list[int], np.ndarray], None] = lambda places, scores: None,
) -> np.ndarray:
    """Return log P(answer | dialogue), float64 [N, A]: the sum over the answer's tokens.

    The end of turn counts as a token of every answer if one answer's tokens begin another's ("no", "no idea"); otherwise
    shorter answers would always win against those that they begin. `done(places, scores)` is called for each batch as soon as
    it is computed. Raises UserError if a dialogue does not fit the model's context.
    """
    import torch

    answer_ids = tokens_of_answers(chat, answers)
    prompts = [chat.template.encode_prompt(list(messages)) for messages in dialogues]
    longest = max(map(len, prompts), default=0) + max(map(len, answer_ids))
    if longest > chat.context_length:
        raise UserError(
            f"a prompt with its answer is {longest} tokens long; the model's context is {chat.context_length}"
        )
    scores_NA = np.zeros((len(prompts), len(answers)))
    shared = _shared_beginning(prompts)
    with torch.inference_mode():
        prefix = _cache_of(chat, prompts[0][:shared]) if shared >= LEAST_SHARED else None
        begin = shared if prefix is not None else 0
        for places in _batches_of_one_length(prompts, batch_size):
            rest_BT = torch.tensor([prompts[place][begin:] for place in places], device=chat.device)
            scores_NA[places] = _score_batch(chat, prefix, rest_BT, answer_ids)
            done(places, scores_NA[places])
    return scores_NA


def tokens_of_answers(chat: "ChatModel", answers: Sequence[str]) -> list[list[int]]:
    """Return the tokens that the model is asked for, for each answer: those that training would learn, with or without the
    end of turn.
    """
    found = []
    for answer in answers:
        encoded = chat.template.encode([Message("user", "?"), Message("assistant", answer, True)])
        found.append([token for token, trained in zip(encoded.ids, encoded.trained) if trained])
    bare = [ids[:-1] if ids[-1] == chat.template.end_of_turn_id else ids for ids in found]
    begins_another = any(a != b and b[: len(a)] == a for a in bare for b in bare)
    return found if begins_another else bare


def _shared_beginning(prompts: list[list[int]]) -> int:
    """Return how many tokens all prompts begin with, at least one less than the shortest has."""
    if len(prompts) < 2:
        return 0
    first, last = min(prompts), max(prompts)  # in the order of lists, these two differ first
    limit = min(map(len, prompts)) - 1
    return next((i for i in range(limit) if first[i] != last[i]), max(limit, 0))


def _batches_of_one_length(prompts: list[list[int]], batch_size: int) -> list[list[int]]:
    places: dict[int, list[int]] = defaultdict(list)
    for place, ids in enumerate(prompts):
        places[len(ids)].append(place)
    return [
        same[begin : begin + batch_size]
        for _, same in sorted(places.items())
        for begin in range(0, len(same), batch_size)
    ]


def _cache_of(chat: "ChatModel", ids: list[int]) -> Any:
    import torch
    from transformers import DynamicCache

    cache = DynamicCache(config=chat.model.config)
    chat.model(
        input_ids=torch.tensor([ids], device=chat.device), past_key_values=cache, use_cache=True, logits_to_keep=1
    )
    return cache


def _score_batch(chat: "ChatModel", prefix: Any, rest_BT: Any, answer_ids: list[list[int]]) -> np.ndarray:
    """Return [B, A]. `prefix` is the cache of what every prompt begins with, `rest_BT` are the tokens after it."""
    import torch
    from transformers import DynamicCache

    size = len(rest_BT)
    cache = DynamicCache(config=chat.model.config) if prefix is None else copy.deepcopy(prefix)
    if prefix is not None and size > 1:
        cache.batch_repeat_interleave(size)
    out = chat.model(input_ids=rest_BT, past_key_values=cache, use_cache=True, logits_to_keep=1)
    first_BV = out.logits[:, -1].float().log_softmax(-1)
    scores_BA = np.zeros((size, len(answer_ids)))
    by_length: dict[int, list[int]] = defaultdict(list)
    for answer, ids in enumerate(answer_ids):
        by_length[len(ids)].append(answer)
    for length, group in sorted(by_length.items()):
        ids_GT = torch.tensor([answer_ids[answer] for answer in group], device=chat.device)
        scores_BG = first_BV[:, ids_GT[:, 0]]
        if length > 1:
            longer = copy.deepcopy(cache)
            longer.batch_repeat_interleave(len(group))  # row b * G + g is dialogue b with answer g
            given_RT = ids_GT[:, :-1].repeat(size, 1)
            out = chat.model(input_ids=given_RT, past_key_values=longer, use_cache=True)
            logits_RTV = out.logits.float().log_softmax(-1)
            wanted_RT1 = ids_GT[:, 1:].repeat(size, 1)[..., None]
            scores_BG = scores_BG + logits_RTV.gather(-1, wanted_RT1)[..., 0].sum(-1).view(size, len(group))
        scores_BA[:, group] = scores_BG.double().cpu().numpy()
    return scores_BA
