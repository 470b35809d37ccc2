"""What every system scored on each query, as the columns that are resampled together.

columns = Columns(scores_NM, usd_NM, models)
columns.add_choice("router", "by its success", chosen_N)
extra = Extra(columns, weights_N)                       # more columns beside the systems', after all systems were added
"""

import numpy as np


def alone(model: str) -> str:
    """The name of a system that always chooses this model; no model's name is a baseline's."""
    return f"{model} alone"


class Columns:
    """Collects what every system scored on each query, and what it cost."""

    def __init__(self, scores_NM: np.ndarray, usd_NM: np.ndarray | None, models: list[str]):
        self.scores_NM, self.usd_NM, self.models = scores_NM, usd_NM, models
        self.rows = np.arange(len(scores_NM))
        self.says: dict[str, str] = {}
        self.scores: dict[str, np.ndarray] = {}
        self.usd: dict[str, np.ndarray] = {}

    def add_choice(self, name: str, says: str, chosen_N: np.ndarray) -> None:
        usd_N = None if self.usd_NM is None else self.usd_NM[self.rows, chosen_N]
        self.add(name, says, self.scores_NM[self.rows, chosen_N], usd_N)

    def add(self, name: str, says: str, scores_N: np.ndarray, usd_N: np.ndarray | None) -> None:
        self.says[name], self.scores[name] = says, scores_N
        if usd_N is not None:
            self.usd[name] = 1000 * usd_N

    def mean_usd(self) -> np.ndarray | None:
        return None if self.usd_NM is None else self.usd_NM.mean(1)


class Extra:
    """Columns beside the systems' that are resampled with them; `add` returns their place."""

    def __init__(self, systems: Columns, weights_N: np.ndarray):
        self.first, self.columns, self.weights_N = len(systems.scores), [], weights_N

    def add(self, column_N: np.ndarray) -> int:
        self.columns.append(column_N)
        return self.first + len(self.columns) - 1
