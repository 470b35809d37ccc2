"""Apply a dump's marks on its answers, and count them: whether an answer is to be learned, and whether it is complete.

Every reader uses these functions, by way of `marked` and `mark_by_record` in `cleaning.sources.turns`. The results become
`train` and `ends` of a message. What counts as a mark is in `fastft.data.marks`, which the trainer's reader uses too. That
reader stops at what it cannot obey to the letter; the cleaner does the nearest thing and counts it. An unclear mark raises
UserError (without its place, which the caller adds), because any guess could be wrong.
"""

from collections import Counter
from typing import Any

from fastft.data.marks import LOSS_FLAGS, PIECE_FLAGS, ending_of, ending_of_last, loss_weight
from fastft.errors import UserError

# Names under which marks are counted.
NOT_LEARNED = "answers marked not to learn from"
FRACTIONS = "answers with a weight other than 0 and 1, learned in full"
LABELLED = "answers that their record labels as bad, not to learn from"
CUT = "answers cut before their end"


def is_learned(message: dict, notes: Counter[str]) -> bool:
    """Return False for an answer with a loss weight of 0, in any spelling, or with a label that says that it is unwanted.

    `train` is only true or false, so a fraction counts as 1; how often that happens is noted. Raises UserError.
    """
    for key in PIECE_FLAGS:
        if message.get(key):
            raise UserError(f"{key!r} marks pieces of it; a message is learned as a whole or not at all")
    weight = loss_weight(message)
    if weight == 0:
        notes[NOT_LEARNED] += 1
    elif weight not in (None, 1):
        notes[FRACTIONS] += 1
    return weight != 0


def comes_to_its_end(message: dict, notes: Counter[str]) -> bool:
    """Return False for an answer that was stopped, hit a limit, or is continued by our own splitter in the next part."""
    return not _is_cut(ending_of(message), notes) and message.get("ends") is not False


def last_answer_is_cut(record: dict, notes: Counter[str]) -> bool:
    """Tell whether the record itself says that its last answer was cut."""
    return _is_cut(ending_of_last(record), notes)


def _is_cut(ending: str, notes: Counter[str]) -> bool:
    if ending:
        notes[f"{CUT} ({ending})"] += 1
    return bool(ending)


def none_is_learned(record: dict) -> bool:
    """Tell whether the whole record has a loss weight of 0. Other values in such a column may mean anything."""
    return any(_is(record.get(key), 0 if positive else 1) for key, positive in LOSS_FLAGS.items())


def _is(value: Any, number: int) -> bool:
    return isinstance(value, (bool, int, float)) and value == number
