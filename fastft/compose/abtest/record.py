"""What the gateway's events say beside user, arm and time: the experiment, the planned shares, and which turns failed."""

from collections import Counter
from typing import Any

import numpy as np

from fastft.compose.abtest.table import ColumnTable, nearest
from fastft.errors import UserError

NO_ANSWER = ("refused", "failed", "died", "error", "shut_down")
"""Outcomes of the gateway's turns that gave the user no answer, or a broken one."""


def of_experiment(table: ColumnTable, name: str | None, left_out: Counter[str]) -> ColumnTable:
    """The rows of one experiment, and of the gateway's events those that expose a known user to an arm."""
    events = "experiment" in table.columns and "user" in table.columns and "arm" in table.columns
    if not events and name is not None:
        raise UserError(f"{table.path}: there is no column 'experiment', which --experiment needs")
    if not events:
        return table
    chosen = table.columns["experiment"]
    found = sorted({str(each) for each in chosen if each not in (None, "")})
    if name is None and len(found) > 1:
        raise UserError(
            f"{table.path}: there are several experiments ({', '.join(found)}): choose one with --experiment"
        )
    if not found:
        raise UserError(f"{table.path}: no row belongs to an experiment (the column experiment is empty)")
    name = name or found[0]
    if name not in found:
        raise UserError(f"{table.path}: there is no experiment {name!r}{nearest(name, found)}")
    exposed = table.columns.get("exposed")
    kept = []
    for row, each in enumerate(chosen):
        if each != name:
            left_out["rows outside of the experiment"] += 1
        elif exposed and str(exposed[row]).lower() not in ("true", "1"):
            left_out["turns that exposed nobody to an arm"] += 1
        elif table.columns["user"][row] in (None, "") or table.columns["arm"][row] in (None, ""):
            left_out["turns without a user"] += 1
        else:
            kept.append(row)
    if not kept:
        raise UserError(f"{table.path}: no turn of the experiment {name!r} exposed a known user to an arm")
    table = table.keep(np.array(kept))
    seen: dict[Any, int] = {}
    for row, each in enumerate(table.columns.get("id", ())):
        if each not in (None, "") and seen.setdefault(each, row) != row:
            raise table.wrong(
                row, f"the event {each!r} stands on line {table.lines[seen[each]]}, too; keep one of them"
            )
    return table


def planned_shares(table: ColumnTable, arm_R: np.ndarray, arms: list[str]) -> dict[str, float]:
    """The share of each arm; none if one changed."""
    share_R = table.numbers("share")
    shares = {arm: np.unique(share_R[arm_R == i]) for i, arm in enumerate(arms)}
    if all(len(values) == 1 and values[0] > 0 for values in shares.values()):
        return {arm: float(values[0]) for arm, values in shares.items()}
    return {}


def is_record(table: ColumnTable) -> bool:
    """Whether the rows are the gateway's events, which say what became of each turn."""
    return "exposed" in table.columns and "outcome" in table.columns


def failed(table: ColumnTable) -> np.ndarray:
    return np.array([outcome in NO_ANSWER for outcome in table.columns["outcome"]])
