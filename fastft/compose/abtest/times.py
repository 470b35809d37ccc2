"""Reads a column of times: numbers of any unit since 1970, or ISO dates."""

import datetime
import math
import re
import time
from typing import Any

import numpy as np

from fastft.compose.abtest.table import ColumnTable, number

DAY_S = 86_400
FIRST_TIME = 1e8
"""Smaller numbers, before 1973, are no times."""
UNITS = ((1e17, 1e9), (1e14, 1e6), (1e11, 1e3))
"""Times from the first number on are nano-, micro- or milliseconds: in a larger unit, they would be after the year 5000."""
COMPACT_DATE = re.compile(r"(\d{4})(\d\d)(\d\d)", re.ASCII)


def seconds(table: ColumnTable) -> tuple[np.ndarray, bool]:
    """(seconds since 1970 of each row, whether all are dates without a time). A time without a zone is read as UTC.

    Raises UserError for what is no time, and for a time that has not come: the file would seem to go on until then.
    """
    values = table.columns["time"]
    parsed = {value: moment(value) for value in dict.fromkeys(values)}
    at_R = np.array([parsed[value][0] for value in values])
    now = time.time() + DAY_S  # a clock in another zone may be written as UTC
    for bad_R, why in (
        (~np.isfinite(at_R), "is no time: write seconds since 1970, 2026-11-29, or 2026-11-29T12:00:00+00:00"),
        (at_R < FIRST_TIME, "is before 1973; correct the row or delete it"),
        (at_R > now, "has not come yet; correct the row or delete it, for the file is taken to end at its last time"),
    ):
        if bad_R.any():
            row = int(bad_R.argmax())
            raise table.wrong(row, f"{table.named['time']} {values[row]!r} {why}")
    return at_R, all(midnight for _, midnight in parsed.values())


def moment(value: Any) -> tuple[float, bool]:
    """(seconds since 1970, whether it is a midnight) of a number or an ISO date; NaN for anything else."""
    text = str(value).strip()
    if compact := COMPACT_DATE.fullmatch(text):
        text = "-".join(compact.groups())
    elif math.isfinite(seconds := number(value)):
        if seconds < FIRST_TIME:
            return math.nan, False
        seconds /= next((unit for least, unit in UNITS if seconds >= least), 1)
        return seconds, seconds % DAY_S == 0
    try:
        moment = datetime.datetime.fromisoformat(text.replace("Z", "+00:00"))
        aware = moment if moment.tzinfo else moment.replace(tzinfo=datetime.timezone.utc)
        return aware.timestamp(), moment.time() == datetime.time()
    except (ValueError, OverflowError):
        return math.nan, False
