"""Reads who was active on which day after joining, and how much, from a CSV file, JSON Lines or the gateway's events.

    activity = read_activity(Path("visits.csv.gz"), ColumnsConfig())

Three forms, told apart by the header:

- times: a row for each visit, turn or message (user, arm, time, amount). A user joins with the first row. Day k is the k-th
  period of 24 hours after that; it counts for a user once it has passed whole when the file ends. Without an amount, a row
  counts 1.
- days: a row for each user and day (user, arm, day, amount). Day 0 is the day of joining. A column `followed` may say how
  many days have passed for the user; without it, all days of the file have.
- retention: a row for each user (user, arm, retention_1, retention_7, …, amount), 1 if the user was active on that day, and
  empty if it has not passed. The amount is that of the whole test.

Users with rows in two arms are left out and counted.
"""

import datetime
import math
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from fastft.common.html import visible
from fastft.compose.abtest.record import failed, is_record, of_experiment, planned_shares
from fastft.compose.abtest.table import RETENTION, ColumnTable, number, read_table
from fastft.compose.abtest.times import DAY_S, moment, seconds
from fastft.errors import UserError

LAST_DAY = 3_650
"""A larger number in the column of days is no day."""
IN_TWO = "users with rows in two arms"
TRUTH = {"0": 0, "1": 1, "false": 0, "true": 1, "no": 0, "yes": 1, "0.0": 0, "1.0": 1}


@dataclass
class ColumnsConfig:
    """The columns of the file."""

    user: str | None = None
    """The column of users. Default: user, userid, user_id or unit."""
    arm: str | None = None
    """The column of arms. Default: arm, version, group, variant or variation."""
    time: str | None = None
    """The column of times: seconds since 1970, or dates as 2026-11-29T12:00:00+00:00. Default: time, timestamp, at, date or
    datetime."""
    day: str | None = None
    """The column of days after joining, in place of times. Default: day."""
    amount: str | None = None
    """The column that says how much was used. Default: amount, seconds, turns, rounds, sum_gamerounds or minutes;
    without any, each row counts 1."""
    followed: str | None = None
    """Beside days: the column that says how many days have passed since the user joined. Default: followed."""
    experiment: str | None = None
    """Only the rows of this experiment, if the file has several (a column experiment)."""


@dataclass
class Activity:
    """U users; E pairs of a user and a day with any use, each once."""

    source: str
    users: list[str]
    arms: list[str]
    arm_U: np.ndarray
    """Index into `arms`."""
    followed_U: np.ndarray
    """The last day that has passed for the user when the file ends; -1 if the day of joining has not."""
    user_E: np.ndarray
    day_E: np.ndarray
    amount_E: np.ndarray
    days: np.ndarray
    """The days that can be compared, from 1 on, ascending."""
    unit: str
    """What the amounts are, in the plural."""
    total_U: np.ndarray | None = None
    """Each user's amount over the whole test, in a file with one row a user. Its amounts are not known by day."""
    by_day: bool = True
    planned_only: bool = False
    """Whether all days count as passed for all users, because the file does not say when they joined."""
    shares: dict[str, float] | None = None
    """The share of users that each arm was meant to get, if the file says it, as the gateway's events do; empty if it says
    several of one arm."""
    failed_turns: dict[str, dict[str, int]] = field(default_factory=dict)
    """{"turns", "failed"} of each arm, of the gateway's events."""
    left_out: Counter[str] = field(default_factory=Counter)
    remarks: list[str] = field(default_factory=list)

    def of(self, kept_U: np.ndarray) -> "Activity":
        """The activity of the users whose indices are given. A user who is given twice becomes two."""
        order = np.argsort(self.user_E, kind="stable")
        ends = np.cumsum(np.bincount(self.user_E, minlength=len(self.users)))
        counts = np.diff(ends, prepend=0)[kept_U]
        # The entries of a user are beside each other in `order`: those of the i-th kept user begin at `first`.
        first = np.repeat(ends[kept_U] - counts - np.cumsum(counts) + counts, counts)
        entries = order[first + np.arange(counts.sum())]
        return replace(
            self,
            users=[self.users[user] for user in kept_U],
            arm_U=self.arm_U[kept_U],
            followed_U=self.followed_U[kept_U],
            user_E=np.repeat(np.arange(len(kept_U)), counts),
            day_E=self.day_E[entries],
            amount_E=self.amount_E[entries],
            total_U=None if self.total_U is None else self.total_U[kept_U],
        )


def read_activity(path: Path, columns: ColumnsConfig, arms: bool = True) -> Activity:
    """Read a file. With `arms` false, all users belong to one arm, and no column of arms is needed.

    Raises UserError that names the file, and the line where there is one.
    """
    asked = {name: getattr(columns, name) for name in ("user", "arm", "time", "day", "amount", "followed")}
    table = read_table(path, asked | dict.fromkeys(("experiment", "exposed", "outcome", "share", "id")))
    left_out: Counter[str] = Counter()
    table = of_experiment(table, columns.experiment, left_out)
    table.need("user", "the user")
    if arms:
        table.need("arm", "the arm")
    user_R, users = _indices(table, "user")
    arm_R, names = _indices(table, "arm") if arms else (np.zeros(table.rows, int), ["all"])
    wide = any(RETENTION.fullmatch(name) for name in table.columns) and not (columns.time or columns.day)
    if wide:
        read = _retention
    elif "day" in table.columns and not columns.time:
        read = _days
    elif "time" in table.columns:
        read = _times
    else:
        raise UserError(
            f"{path}: no column says when a user was active (usual names: time, timestamp, at, date, day, retention_1, …); "
            f"its columns are {', '.join(table.header)}: give --time COLUMN or --day COLUMN"
        )
    order = np.argsort(names)  # by name, so that the order of the rows does not matter
    place = np.argsort(order)
    arm_R, names = place[arm_R], [names[i] for i in order]
    first_U, last_U = np.full(len(users), len(names)), np.full(len(users), -1)
    np.minimum.at(first_U, user_R, arm_R)
    np.maximum.at(last_U, user_R, arm_R)
    activity = read(table, user_R, users, first_U == last_U)
    activity.arms, activity.arm_U, activity.left_out = names, first_U, left_out
    if arms and "share" in table.columns:
        activity.shares = planned_shares(table, arm_R, names)
    if is_record(table):
        failed_R = failed(table)
        activity.failed_turns = {
            arm: {"turns": int((arm_R == i).sum()), "failed": int(failed_R[arm_R == i].sum())}
            for i, arm in enumerate(names)
        }
    if in_two := int((first_U != last_U).sum()):
        left_out[IN_TWO] = in_two
        activity = activity.of(np.flatnonzero(first_U == last_U))
    return activity


def _indices(table: ColumnTable, name: str) -> tuple[np.ndarray, list[str]]:
    """(index of each row's value, values) of a column, as texts of one line. Raises UserError for an empty value."""
    places: dict[Any, int] = {}
    index_R = np.array([places.setdefault(value, len(places)) for value in table.columns[name]])
    for empty in ("", None):
        if empty in places:
            row = int((index_R == places[empty]).argmax())
            raise table.wrong(row, f"{table.named[name]} is empty")
    values = [" ".join(visible(str(value)).split()) for value in places]
    if len(set(values)) < len(values):  # JSON Lines may hold a user as 7 and as "7"
        ours = {value: i for i, value in enumerate(dict.fromkeys(values))}
        return np.array([ours[values[i]] for i in index_R]), list(ours)
    return index_R, values


def _amounts(table: ColumnTable) -> tuple[np.ndarray, str]:
    """(amount of each row, what it is). A turn that failed is no use. Raises UserError for a negative one."""
    if "amount" not in table.columns:
        amount_R = 1.0 - failed(table) if is_record(table) else np.ones(table.rows)
        return amount_R, "turns" if "exposed" in table.columns else "events"
    amount_R = table.numbers("amount")
    if is_record(table):
        amount_R[failed(table)] = 0
    if (amount_R < 0).any():
        row = int((amount_R < 0).argmax())
        raise table.wrong(row, f"{table.named['amount']} is {table.columns['amount'][row]}; it must be 0 or more")
    name = table.named["amount"]
    return amount_R, "rounds" if name == "sum_gamerounds" else name


def _whole(table: ColumnTable, name: str) -> np.ndarray:
    """A column of days as integers. Raises UserError for anything else."""
    first = table.columns[name][0]
    if not math.isfinite(number(first)) and math.isfinite(moment(first)[0]):
        raise table.wrong(0, f"{table.named[name]} {first!r} is a date; give --time {table.named[name]}")
    day_R = table.numbers(name)
    for bad_R, why in (
        (day_R < 0, "is negative; days count from 0, the day of joining"),
        (day_R % 1 != 0, "is no whole number of days"),
        (day_R > LAST_DAY, f"is above {LAST_DAY:,}; if it is a date, give --time {table.named[name]}"),
    ):
        if bad_R.any():
            row = int(bad_R.argmax())
            raise table.wrong(row, f"{table.named[name]} {table.columns[name][row]!r} {why}")
    return day_R.astype(np.int64)


def _entries(user_R: np.ndarray, day_R: np.ndarray, amount_R: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(users, days, amounts) of the pairs of a user and a day with any use, summed over rows."""
    width = int(day_R.max(initial=0)) + 1
    key_E, which_R = np.unique(user_R * width + day_R, return_inverse=True)
    amount_E = np.bincount(which_R, amount_R, minlength=len(key_E))
    used = amount_E > 0
    return key_E[used] // width, key_E[used] % width, amount_E[used]


def _retention(table: ColumnTable, user_R: np.ndarray, users: list[str], one_arm_U: np.ndarray) -> Activity:
    """A file with one row a user."""
    repeated_R = _repeated(user_R) & one_arm_U[user_R]
    if repeated_R.any():
        row = int(repeated_R.argmax())
        first = int((user_R == user_R[row]).argmax())
        raise table.wrong(row, f"user {users[user_R[row]]!r} has a row on line {table.lines[first]} already; keep one")
    names = sorted((name for name in table.columns if RETENTION.fullmatch(name)), key=_day_of)
    days = np.array([_day_of(name) for name in names])
    names, days = [name for name, day in zip(names, days) if day > 0], days[days > 0]
    if not len(days):
        raise UserError(f"{table.path}: the only retention column is that of day 0, the day of joining")
    active_RK = np.stack([_truths(table, name) for name in names], axis=1)
    known_RK = active_RK >= 0
    if (late_RK := known_RK[:, 1:] & ~known_RK[:, :-1]).any():
        row, k = np.argwhere(late_RK)[0]
        earlier, later = table.named[names[k]], table.named[names[k + 1]]
        raise table.wrong(int(row), f"{earlier} is empty, but {later}, a later day, is not")
    followed_R = np.concatenate([[0], days])[known_RK.sum(1)]
    total_R, unit = _amounts(table) if "amount" in table.columns else (None, "")
    # In the order of users, whose first rows come in the order of the file.
    _, row_U = np.unique(user_R, return_index=True)
    user_E, k_E = np.nonzero(active_RK[row_U] == 1)
    return Activity(
        str(table.path), users, [], user_R, followed_R[row_U], user_E, days[k_E], np.ones(len(k_E)), days, unit,
        total_U=None if total_R is None else total_R[row_U], by_day=False,
    )  # fmt: skip


def _day_of(name: str) -> int:
    return int(name.rsplit("_", 1)[1])


def _repeated(user_R: np.ndarray) -> np.ndarray:
    """Whether an earlier row has the same value."""
    again_R = np.ones(len(user_R), bool)
    again_R[np.unique(user_R, return_index=True)[1]] = False
    return again_R


def _truths(table: ColumnTable, name: str) -> np.ndarray:
    """A retention column as 1, 0, or -1 where it is empty."""
    values = table.columns[name]
    read_R = np.array([-1 if value in ("", None) else TRUTH.get(str(value).lower(), -2) for value in values])
    if (read_R == -2).any():
        row = int((read_R == -2).argmax())
        said = f"{table.named[name]} is {values[row]!r}"
        raise table.wrong(row, f"{said}; it must be 0 or 1, or empty for a day that has not passed")
    return read_R


def _days(table: ColumnTable, user_R: np.ndarray, users: list[str], one_arm_U: np.ndarray) -> Activity:
    """A file with a row for each user and day."""
    day_R = _whole(table, "day")
    amount_R, unit = _amounts(table)
    again_R = _repeated(user_R * (LAST_DAY + 1) + day_R) & one_arm_U[user_R]
    if again_R.any():
        row = int(again_R.argmax())
        first = int(((user_R == user_R[row]) & (day_R == day_R[row])).argmax())
        raise table.wrong(
            row,
            f"user {users[user_R[row]]!r} has a row for day {day_R[row]} on line {table.lines[first]} already; keep one, or "
            "add them up",
        )
    remarks, last = [], int(day_R.max())
    followed_U = np.full(len(users), last)
    if "followed" in table.columns:
        followed_R = _whole(table, "followed")
        np.maximum.at(followed_U := np.zeros(len(users), np.int64), user_R, followed_R)
        if (late_R := day_R > followed_U[user_R]).any():
            row = int(late_R.argmax())
            raise table.wrong(row, f"day {day_R[row]} of a user for whom {followed_U[user_R[row]]} days have passed")
        last = int(followed_U.max())
    if not ((day_R == 0) | (amount_R == 0)).any():
        remarks.append(
            "No row has day 0 or the amount 0: users who never came back are missing from this file, so its retention is "
            "that of users who did."
        )
    entries = _entries(user_R, day_R, amount_R)
    return Activity(
        str(table.path), users, [], user_R, followed_U, *entries, np.arange(1, last + 1), unit,
        planned_only="followed" not in table.columns, remarks=remarks,
    )  # fmt: skip


def _times(table: ColumnTable, user_R: np.ndarray, users: list[str], one_arm_U: np.ndarray) -> Activity:
    """A file with a row for each visit, at its time."""
    at_R, by_date = seconds(table)
    amount_R, unit = _amounts(table)
    joined_U = np.full(len(users), np.inf)
    np.minimum.at(joined_U, user_R, at_R)
    # The file is complete up to its last row; a date stands for a whole day. Rows that are left out do not count: a record
    # may go on after the experiment, when nobody is exposed any more.
    end = float(at_R.max()) + (DAY_S if by_date else 0)
    followed_U = ((end - joined_U) // DAY_S).astype(np.int64) - 1
    day_R = ((at_R - joined_U[user_R]) // DAY_S).astype(np.int64)
    entries = _entries(user_R, day_R, amount_R)
    ended = datetime.datetime.fromtimestamp(end, datetime.timezone.utc)
    remarks = [f"The file ends on {ended:%Y-%m-%d %H:%M} UTC; days that had not passed for a user do not count for it."]
    if repeated := table.rows - len(set(zip(user_R.tolist(), at_R.tolist(), amount_R.tolist()))):
        remarks.append(
            f"{repeated:,} rows have the user, time and amount of another one; they count as use of their own."
        )
    return Activity(
        str(table.path), users, [], user_R, followed_U, *entries, np.arange(1, max(1, followed_U.max() + 1)), unit,
        remarks=remarks,
    )  # fmt: skip
