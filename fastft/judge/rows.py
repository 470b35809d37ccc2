"""Read files of JSON objects, one a line, and check the types of their values: questions, answers and judgments.

    for record in read_objects(path):
        require_values(record.value, {"seconds": (or_null(is_number), "a number or null")}, f"{record.where}: is no answer")

Other tools write these files, too, so an error is reported with its line before anything is computed.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastft.common.records import Record, read_records, repair_text
from fastft.errors import UserError

Check = Callable[[Any], bool]
Values = Mapping[str, tuple[Check, str]]
"""key -> (check of a value, description of valid values)."""


def require_values(row: dict[str, Any], values: Values, wrong: str) -> None:
    """Raise UserError, whose message begins with `wrong`, if a value under one of the keys `values` fails its check."""
    for key in values.keys() & row.keys():
        is_right, what = values[key]
        if not is_right(row[key]):
            raise UserError(f"{wrong}: its {key} is {json.dumps(row[key])[:40]} and must be {what}")


def read_objects(path: str | Path) -> Iterator[Record]:
    """Yield the rows of a file, which must be JSON objects, with their texts repaired. Raises UserError."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    for record in read_records(path):
        if record.error or not isinstance(record.value, dict):
            raise UserError(f"{record.where}: {record.error or 'is not a JSON object'}")
        yield replace(record, value=repaired(record.value))


def repaired(value: Any) -> Any:
    """Return the value with `repair_text` applied to every text in it, because requests and files cannot hold lone
    surrogates."""
    if isinstance(value, dict):
        return {repaired(key): repaired(each) for key, each in value.items()}
    if isinstance(value, list):
        return [repaired(each) for each in value]
    return repair_text(value) if isinstance(value, str) else value


def is_string(value: Any) -> bool:
    """Return whether `value` is a text, which may be empty."""
    return isinstance(value, str)


def is_text(value: Any) -> bool:
    """Return whether `value` is a text that is not blank."""
    return isinstance(value, str) and bool(value.strip())


def is_number(value: Any) -> bool:
    """Return whether `value` is a number that figures can be computed from: finite, and neither true nor false."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def is_count(value: Any) -> bool:
    """Return whether `value` is a whole number that is not below 0."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def is_flag(value: Any) -> bool:
    """Return whether `value` is true or false."""
    return isinstance(value, bool)


def or_null(check: Check) -> Check:
    """Return a check that is also passed by null."""
    return lambda value: value is None or check(value)
