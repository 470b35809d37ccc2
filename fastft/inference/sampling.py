"""Choose the next token of every row of a batch, each row with settings and random numbers of its own.

    samplings = [Sampling(temperature=0), Sampling(temperature=0.7, top_p=0.9, seed=1)]
    draws = [draw.random() for draw in draws]                     # one number from [0, 1) a row
    ids = sample(logits_BV, samplings, draws)

A row uses one random number for each token, whatever its place in the batch and whatever other rows do. So with the same
seed and the same logits, it gets the same answer alone and in a batch. The number is looked up in the cumulative sum of the
probabilities in the vocabulary's order. If they were sorted by probability, a rounding error could swap two tokens of nearly
equal probability and change the answer.
"""

import random
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import torch

# Below this temperature, divided logits leave fp32's range, and the likeliest token has all of the probability anyway.
LOWEST_TEMPERATURE = 1e-4
CANDIDATES = 256
"""top_k and top_p first try with this many of the likeliest tokens, because sorting a vocabulary of 150,000 takes as long
as a layer."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; the defaults are OpenAI's. The filters apply in transformers' order."""

    temperature: float = 1.0
    """0 takes the likeliest token."""
    top_k: int = 0
    """0 keeps all tokens."""
    top_p: float = 1.0
    min_p: float = 0.0
    """Drops tokens less likely than this times the likeliest."""
    repetition_penalty: float = 1.0
    """Repetition penalty on tokens of the prompt and the answer so far; 1 has no effect (CTRL, arXiv 1909.05858)."""
    seed: int | None = None

    @property
    def greedy(self) -> bool:
        return self.temperature < LOWEST_TEMPERATURE

    def draws(self, choice: int = 0) -> random.Random:
        """The random numbers for the answer with index `choice`; the first answer uses the seed itself."""
        seed = secrets.randbits(64) if self.seed is None else self.seed + choice
        return random.Random(seed & (2**64 - 1))  # Random treats -1 and 1 as the same seed


def sample(logits_BV: torch.Tensor, samplings: Sequence[Sampling], draws: Sequence[float]) -> torch.Tensor:
    """The next token of each row, [B]. `draws` has a number from [0, 1) for each row; greedy rows ignore theirs."""
    ids_B = logits_BV.argmax(-1)
    drawn = [i for i, sampling in enumerate(samplings) if not sampling.greedy]
    if not drawn:
        return ids_B
    rows, device = [samplings[i] for i in drawn], logits_BV.device
    temperatures = torch.tensor([[row.temperature] for row in rows], device=device)
    probs_BV = (logits_BV[drawn].float() / temperatures).softmax(-1)
    if any(row.top_k or row.top_p < 1 or row.min_p for row in rows):
        probs_BV = probs_BV.where(probs_BV >= _thresholds(probs_BV, rows), 0)
    sums_BV = probs_BV.double().cumsum(-1)
    total = sums_BV[:, -1:]
    wanted = torch.tensor([[draws[i]] for i in drawn], dtype=torch.float64, device=device) * total
    # A draw close to 1 may be rounded up to the total, beyond the last token.
    wanted = wanted.minimum(total * (1 - 2**-52))
    ids_B[drawn] = torch.searchsorted(sums_BV, wanted, right=True).squeeze(-1)
    return ids_B


def _thresholds(probs_BV: torch.Tensor, rows: Sequence[Sampling]) -> torch.Tensor:
    """The lowest probability that each row keeps, [B, 1]."""
    found = _thresholds_among(probs_BV, rows, CANDIDATES)
    return _thresholds_among(probs_BV, rows, probs_BV.shape[-1]) if found is None else found


def _thresholds_among(probs_BV: torch.Tensor, rows: Sequence[Sampling], candidates: int) -> torch.Tensor | None:
    """`_thresholds` from the likeliest `candidates` of each row; None if a row's filters need more of them."""
    vocabulary, device = probs_BV.shape[-1], probs_BV.device
    top_BC = probs_BV.topk(min(candidates, vocabulary)).values.double()
    sums_BC, count = top_BC.cumsum(-1), top_BC.shape[-1]
    top_k = torch.tensor([[min(row.top_k or vocabulary, vocabulary)] for row in rows], device=device)
    top_p = torch.tensor([[row.top_p] for row in rows], dtype=torch.float64, device=device)
    min_p = torch.tensor([[row.min_p] for row in rows], dtype=torch.float64, device=device)
    # top_p applies to what top_k leaves; if that is more than the candidates, to the whole vocabulary.
    whole = sums_BC.gather(-1, top_k.clamp(max=count) - 1).where(
        top_k <= count, probs_BV.double().sum(-1, keepdim=True)
    )
    before_BC = sums_BC - top_BC  # probability of all tokens likelier than this one
    kept = (before_BC < top_p * whole).sum(-1, keepdim=True).clamp(min=1).minimum(top_k)
    undecided = (kept == count) & (top_k > count) & (top_p < 1)
    if count < vocabulary and bool((undecided | ((top_k > count) & (top_k < vocabulary))).any()):
        return None
    lowest = top_BC.gather(-1, kept.clamp(max=count) - 1)
    lowest = lowest.where((top_k <= count) | (top_p < 1), 0)
    return lowest.maximum(min_p * top_BC[:, :1]).float()


def penalize(logits_V: torch.Tensor, seen_V: torch.Tensor, penalty: float) -> None:
    """Apply the repetition penalty to the tokens `seen_V` (bool), in place."""
    scores = logits_V[seen_V]
    logits_V[seen_V] = torch.where(scores < 0, scores * penalty, scores / penalty)
