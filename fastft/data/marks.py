"""Read a file's marks on answers: whether an answer is to be learned, and whether it is complete.

There are three kinds of marks. The trainer's reader (fastft.data.conversation) and the cleaner's readers
(cleaning.sources.marks) both obey them, by the tables and functions of this module.

    loss flags   `train`, `weight`, `mask` and so on (LOSS_FLAGS) of a message
    labels       KTO's `label` and `kto_tag`: of a message, or of a record, where they mean the answers to its last question
    endings      `finish_reason`, `status` and so on: of a message, or of a record, where they mean its last answer

    loss_weight({"role": "assistant", "content": "Hm", "weight": 0})                # 0.0: not to be learned
    ending_of({"role": "assistant", "content": "Hm", "finish_reason": "length"})    # "length": it was cut
"""

import itertools
import json
from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

from fastft.errors import UserError

# The keys by which datasets say whether an answer is learned: True if a value of true (or 1) means that it is learned,
# False if it means that it is not.
LOSS_FLAGS = {
    "train": True,  # our own, and one of axolotl's
    "training": True,
    "trainable": True,
    "weight": True,  # OpenAI, Mistral, Together
    "loss": True,  # ms-swift, XTuner
    "loss_weight": True,  # LLaMA-Factory
    "loss_scale": True,
    "mask": False,
    "masked": False,  # torchtune
}

# The keys by which data for KTO says whether an answer is wanted: TRL's, LLaMA-Factory's. Many datasets have a `label` of
# another kind, such as the number of a class, so of `label` only false counts, and 0 does not.
LABELS = ("label", "kto_tag")

# axolotl's flags for pieces of a message. Our conversations learn a message as a whole or not at all.
PIECE_FLAGS = ("train_detail", "training_detail")

# The keys under which OpenAI, Anthropic, Gemini, Ollama and ChatGPT's page say how an answer ended.
ENDINGS = (
    "finish_reason", "finishReason", "stop_reason", "stopReason", "done_reason", "finish_details", "incomplete_details",
)  # fmt: skip
ENDINGS_OF_MESSAGE = (*ENDINGS, "status")  # the `status` of a record may be that of its annotation
# The values under these keys that mean that the answer was cut.
CUT = frozenset(
    """
    length max_tokens max_length max_output_tokens max_new_tokens model_length model_context_window_exceeded
    content_filter interrupted incomplete user_canceled user_cancelled canceled cancelled abort aborted error timeout
    in_progress finished_partial_completion
    """.split()
)

# All keys that can hold a mark. A message or record without any of them needs no further look.
MARKS_OF_MESSAGE = frozenset(
    (*LOSS_FLAGS, *LABELS, *PIECE_FLAGS, *ENDINGS_OF_MESSAGE, "ends", "interrupted", "metadata")
)
MARKS_OF_RECORD = frozenset((*LOSS_FLAGS, *LABELS, *ENDINGS))


def loss_weight(message: dict[str, Any]) -> float | None:
    """Return how much a message counts in the loss, by its loss flags and labels: 0 is not at all, 1 is fully.

    Returns None if it has none, or only nulls. A fraction is returned as it is, and the caller decides whether it can be
    obeyed. A label counts as 0 if the answer is unwanted, and does not count if it is wanted. Raises UserError, which does
    not say where, for a flag that is neither a truth value nor a number of 0 or more, for an unclear `kto_tag`, and for two
    marks that contradict each other.
    """
    if MARKS_OF_MESSAGE.isdisjoint(message):
        return None
    found = _flags(message)
    if key := label_against(message):
        found[key] = 0.0
    if len(set(found.values())) > 1:
        marks = " and ".join(f"{key!r}: {shown(message[key])}" for key in found)
        raise UserError(f"{marks} contradict each other about whether it is learned; keep one of them")
    return next(iter(found.values()), None)


def flag_weight(record: dict[str, Any]) -> float | None:
    """Return `loss_weight` from the loss flags of a record, ignoring labels, which are about some answers only.

    Raises UserError.
    """
    return loss_weight({key: record[key] for key in LOSS_FLAGS if key in record})


def _flags(message: dict[str, Any]) -> dict[str, float]:
    """Return {loss flag: the weight that it gives}, without nulls. Raises UserError."""
    found = {}
    for key, positive in LOSS_FLAGS.items():
        value = message.get(key)
        if value is None:
            continue
        if not isinstance(value, (bool, int, float)) or not 0 <= value <= (1e300 if positive else 1):
            raise UserError(f"{key!r} is {shown(value)}; expected true or false, 1 or 0")
        found[key] = float(value if positive else 1 - value)
    return found


def label_against(values: dict[str, Any]) -> str:
    """Return the label that marks the answer of a message or a record as unwanted; "" if there is none.

    A `label` that is neither true nor false means something else and is ignored. Raises UserError for an unclear `kto_tag`.
    """
    tag = values.get("kto_tag")
    if tag not in (None, True, False):  # 0 and 1 are equal to False and True
        raise UserError("its 'kto_tag' is neither true nor false")
    if tag is not None and not tag:
        return "kto_tag"
    return "label" if values.get("label") is False else ""


def ending_of(message: dict[str, Any]) -> str:
    """Return the word in a message that says it was stopped or hit a limit, such as "length"; "" if there is none."""
    if MARKS_OF_MESSAGE.isdisjoint(message):
        return ""
    inner = message.get("metadata")  # the place in ChatGPT's export
    for values in (message, inner if isinstance(inner, dict) else {}):
        if found := _cut_by(values, ENDINGS_OF_MESSAGE):
            return found
    return "interrupted" if message.get("interrupted") is True else ""


def ending_of_last(record: dict[str, Any]) -> str:
    """Return the word in a record that says its last answer was stopped or hit a limit; "" if there is none."""
    return _cut_by(record, ENDINGS)


def _cut_by(values: dict[str, Any], keys: tuple[str, ...]) -> str:
    """Return the first value under `keys` that is in CUT, which means that the answer was cut; "" if there is none."""
    for key in keys:
        value = values.get(key)
        if isinstance(value, dict):  # {"type": "max_tokens", …}, {"reason": "max_output_tokens"}
            value = value.get("type") or value.get("reason")
        if isinstance(value, str) and value.casefold() in CUT:
            return value.casefold()
    return ""


class HasRole(Protocol):
    """A turn, of the trainer's reader or of the cleaner's."""

    role: str


Turn = TypeVar("Turn", bound=HasRole)


def after_last_question(turns: Sequence[Turn]) -> list[Turn]:
    """Return the turns after the last question, the last turn first. A record's mark is about these."""
    return list(itertools.takewhile(lambda turn: turn.role != "user", reversed(turns)))


# Values in messages to the user ------------------------------------------------------------------------------------------


def shown(value: Any) -> str:
    """Return a value as its file writes it if that is short, otherwise the kind of value that it is."""
    if value is None or isinstance(value, (bool, float)) or (isinstance(value, int) and abs(value) < 10**18):
        return json.dumps(value)
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) and len(value) <= 40 else kind_of(value)


def kind_of(value: Any) -> str:
    """Return the kind of a JSON value: "a list"."""
    if value is None:
        return "nothing"
    return _KINDS.get(type(value), type(value).__name__)


_KINDS = {
    dict: "an object",
    list: "a list",
    str: "a text",
    bool: "a truth value",
    int: "a number",
    float: "a number",
}
