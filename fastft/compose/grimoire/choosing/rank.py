"""Choose a grimoire for each question: by similarity, or by a ranker that was trained on validation outcomes.

    similar = nearest(question_rows, grimoire_rows)                              # [N], the place of a grimoire
    ranker = Ranker.train(question_rows, grimoire_rows, right_NG, seed=22)       # right_NG: 1, 0, NaN where a call failed
    ranker.scores(question_rows)                                                 # [N, G]

The ranker has two towers, one for questions and one for grimoires, and its score is their product: the log odds that the weak
model is right with that grimoire. Its outcomes on validation come from five rankers, each of which has not seen the questions
that it chooses for.
"""

from pathlib import Path
from typing import Any

import numpy as np

from fastft.errors import UserError

WIDTH, HIDDEN, STEPS = 32, 64, 100
FOLDS = 5
MOST_ROWS = 2000  # questions that the basis is made from


def nearest(question_rows: Any, grimoire_rows: Any) -> np.ndarray:
    """Return for each question the place of the most similar grimoire, by cosine [N]."""
    return np.asarray(_dense(question_rows @ grimoire_rows.T)).argmax(1)


class Ranker:
    """Two towers over reduced features. `basis` [D, R] reduces a row of features."""

    def __init__(self, basis: np.ndarray, towers: Any, grimoires_GR: np.ndarray):
        self.basis, self.towers, self.grimoires_GR = basis, towers, grimoires_GR

    @classmethod
    def train(
        cls,
        question_rows: Any,
        grimoire_rows: Any,
        right_NG: np.ndarray,
        seed: int = 22,
        basis: np.ndarray | None = None,
    ) -> "Ranker":
        """Fit to the outcomes of validation questions. Deterministic on one machine."""
        import torch

        basis = basis_of(question_rows, grimoire_rows) if basis is None else basis
        questions_NR, grimoires_GR = _dense(question_rows @ basis), _dense(grimoire_rows @ basis)
        towers = _towers(basis.shape[1], len(grimoires_GR), seed)
        known_NG = torch.from_numpy(~np.isnan(right_NG))
        wanted_NG = torch.from_numpy(np.nan_to_num(right_NG)).float()
        optimizer = torch.optim.AdamW(towers.parameters(), lr=6e-3, weight_decay=0.1, fused=True)
        inputs = torch.from_numpy(questions_NR).float(), torch.from_numpy(grimoires_GR).float()
        for _ in range(STEPS):
            loss_NG = torch.nn.functional.binary_cross_entropy_with_logits(towers(*inputs), wanted_NG, reduction="none")
            optimizer.zero_grad()
            loss_NG[known_NG].mean().backward()
            optimizer.step()
        return cls(basis, towers.eval(), grimoires_GR)

    def scores(self, question_rows: Any) -> np.ndarray:
        """Return the log odds of a right answer [N, G]."""
        import torch

        questions_NR = torch.from_numpy(_dense(question_rows @ self.basis)).float()
        with torch.inference_mode():
            return self.towers(questions_NR, torch.from_numpy(self.grimoires_GR).float()).numpy()

    def save(self, path: Path) -> None:
        from safetensors.torch import save

        from fastft.common.files import write_whole

        write_whole(path, save({**self.towers.state_dict(), **_tensors(self)}))

    @classmethod
    def load(cls, path: Path) -> "Ranker":
        """Raises UserError if the file is missing or damaged."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            tensors = load_file(path)
            basis, grimoires_GR = tensors.pop("basis").numpy(), tensors.pop("grimoires").numpy()
            towers = _towers(basis.shape[1], len(grimoires_GR), 0)
            towers.load_state_dict(tensors)
        except (OSError, SafetensorError, KeyError, RuntimeError) as error:
            raise UserError(f"{path}: the ranker cannot be loaded ({str(error).splitlines()[0][:120]})") from None
        return cls(basis, towers.eval(), grimoires_GR)


def _tensors(ranker: Ranker) -> dict[str, Any]:
    import torch

    return {"basis": torch.from_numpy(ranker.basis), "grimoires": torch.from_numpy(ranker.grimoires_GR)}


def cross_chosen(
    question_rows: Any, grimoire_rows: Any, right_NG: np.ndarray, folds_N: np.ndarray, seed: int
) -> np.ndarray:
    """Return the place of the grimoire that a ranker chooses for each question, trained on the other folds [N].

    All folds share the basis, which depends on texts alone and on no outcome.
    """
    places_N, basis = np.zeros(len(folds_N), int), basis_of(question_rows, grimoire_rows)
    for fold in np.unique(folds_N):
        own = np.flatnonzero(folds_N == fold)
        others = np.flatnonzero(folds_N != fold)
        if len(others):
            ranker = Ranker.train(question_rows[others], grimoire_rows, right_NG[others], seed, basis)
            places_N[own] = ranker.scores(question_rows[own]).argmax(1)
    return places_N


def _towers(size: int, grimoires: int, seed: int) -> Any:
    import torch

    class Towers(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.question = torch.nn.Sequential(
                torch.nn.Linear(size, HIDDEN), torch.nn.ReLU(), torch.nn.Linear(HIDDEN, WIDTH)
            )
            self.grimoire = torch.nn.Sequential(
                torch.nn.Linear(size, HIDDEN), torch.nn.ReLU(), torch.nn.Linear(HIDDEN, WIDTH)
            )
            self.bias_G = torch.nn.Parameter(torch.zeros(grimoires))

        def forward(self, questions_NR: Any, grimoires_GR: Any) -> Any:
            return self.question(questions_NR) @ self.grimoire(grimoires_GR).T / WIDTH**0.5 + self.bias_G

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Towers()


def basis_of(question_rows: Any, grimoire_rows: Any) -> np.ndarray:
    """Return the main directions of questions and grimoires together [D, R], so that the towers have few inputs.

    They are found from the products of the rows with each other, because hashed rows have 131,072 columns.
    """
    from scipy.sparse import issparse, vstack

    sparse = issparse(question_rows)
    some = question_rows[:MOST_ROWS]
    rows = vstack([some, grimoire_rows]).tocsr() if sparse else np.vstack([some, grimoire_rows])
    values_R, vectors_NR = np.linalg.eigh(np.asarray(_dense(rows @ rows.T), dtype=np.float64))
    kept = np.flatnonzero(values_R > 1e-6 * values_R[-1])[-WIDTH:]
    basis = rows.T @ (vectors_NR[:, kept] / np.sqrt(values_R[kept]))
    return np.ascontiguousarray(basis, dtype=np.float32)


def _dense(rows: Any) -> np.ndarray:
    return np.ascontiguousarray(rows.toarray() if hasattr(rows, "toarray") else rows, dtype=np.float32)
