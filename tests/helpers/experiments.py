"""Experiments for tests of A/B figures: who was active when, written as files of every form."""

import csv
from pathlib import Path

import numpy as np

from fastft.compose.abtest.activity import Activity, ColumnsConfig, read_activity


def write_rows(path: Path, header: str, rows) -> Path:
    """Write a CSV file; `header` has the names, separated by commas."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header.split(","))
        writer.writerows(rows)
    return path


def visits(seed: int, users: int = 60, days: int = 8, arms=("control", "test"), lift: float = 1.0) -> list[list]:
    """Rows of user, arm, day, amount: every user on day 0; later days fewer come back, `lift` times as many in the last arm."""
    rng = np.random.default_rng(seed)
    rows = []
    for user in range(users):
        arm = arms[user % len(arms)]
        rows.append([f"u{user}", arm, 0, 1 + int(rng.integers(9))])
        for day in range(1, days + 1):
            if rng.random() < 0.6 * day**-0.3 * (lift if arm == arms[-1] else 1):
                rows.append([f"u{user}", arm, day, 1 + int(rng.pareto(2) * 5)])
    return rows


def read_rows(path: Path, rows, header: str = "user,arm,day,amount") -> Activity:
    return read_activity(write_rows(path, header, rows), ColumnsConfig())
