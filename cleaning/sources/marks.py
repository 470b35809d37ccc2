"""What a dump says of an answer beside its text: whether it is to be learned, and whether it came to its end.

Every reader asks here (by way of `cleaning.sources.turns.marked` and `mark_by_record`), and what is found becomes `train`
and `ends` of a message. The spellings of loss flags are `fastft.data.conversation.LOSS_FLAGS`, for the trainer's reader too.
The functions raise UserError, without saying where, for a mark that says neither yes nor no: it is not for us to guess.
"""

from collections import Counter
from typing import Any

from fastft.data.conversation import LOSS_FLAGS, loss_weight
from fastft.errors import UserError

NOT_LEARNED = "answers marked not to learn from"  # notes
FRACTIONS = "answers with a weight other than 0 and 1, learned in full"
LABELLED = "answers that their record labels as bad, not to learn from"
CUT = "answers cut before their end"

# axolotl's flags for pieces of a message; the contract knows whole messages only.
_PIECES = ("train_detail", "training_detail")
# How an answer ended, by OpenAI, Anthropic, Gemini, Ollama and ChatGPT's page.
_ENDINGS = (
    "finish_reason", "finishReason", "stop_reason", "stopReason", "done_reason", "finish_details", "incomplete_details",
)  # fmt: skip
_OF_MESSAGE = (*_ENDINGS, "status")  # a record's own status may be its annotators'
_CUT = frozenset(
    """
    length max_tokens max_length max_output_tokens max_new_tokens model_length model_context_window_exceeded
    content_filter interrupted incomplete user_canceled user_cancelled canceled cancelled abort aborted error timeout
    in_progress finished_partial_completion
    """.split()
)
MARKS = frozenset((*LOSS_FLAGS, *_PIECES, *_OF_MESSAGE, "ends", "interrupted", "metadata"))
RECORD_MARKS = frozenset((*LOSS_FLAGS, *_ENDINGS, "kto_tag", "label"))


def is_learned(message: dict, notes: Counter[str]) -> bool:
    """False for a weight of 0, in any spelling. A fraction is learned as 1, and counted: `train` is true or false."""
    for key in _PIECES:
        if message.get(key):
            raise UserError(f"{key!r} marks pieces of it; a message is learned as a whole or not at all")
    weight = loss_weight(message)
    if weight == 0:
        notes[NOT_LEARNED] += 1
    elif weight not in (None, 1):
        notes[FRACTIONS] += 1
    return weight != 0


def comes_to_its_end(message: dict, notes: Counter[str]) -> bool:
    """False for an answer that was stopped, that ran into a limit, or of which our own splitter cut a piece off."""
    inner = message.get("metadata")  # where ChatGPT's export says it
    reason = _cut_by(message, _OF_MESSAGE) or (_cut_by(inner, _OF_MESSAGE) if isinstance(inner, dict) else "")
    if not reason and message.get("interrupted") is True:
        reason = "interrupted"
    if reason:
        notes[f"{CUT} ({reason})"] += 1
    return not reason and message.get("ends") is not False


def _cut_by(message: dict, keys: tuple[str, ...]) -> str:
    for key in keys:
        value = message.get(key)
        if isinstance(value, dict):  # {"type": "max_tokens", …}, {"reason": "max_output_tokens"}
            value = value.get("type") or value.get("reason")
        if isinstance(value, str) and value.casefold() in _CUT:
            return value.casefold()
    return ""


def last_answer_is_cut(record: dict, notes: Counter[str]) -> bool:
    """For a record that says itself how its answer ended."""
    reason = _cut_by(record, _ENDINGS)
    if reason:
        notes[f"{CUT} ({reason})"] += 1
    return bool(reason)


def is_bad_example(record: dict) -> bool:
    """True for a row of KTO (TRL's `label`, LLaMA-Factory's `kto_tag`) whose completion is one that nobody wants.

    A `label` that is neither true nor false is some other label.
    """
    tag = record.get("kto_tag")
    if tag not in (None, True, False):  # 0 and 1 among them
        raise UserError("its 'kto_tag' is neither true nor false")
    return tag in (False, 0) or record.get("label") is False


def none_is_learned(record: dict) -> bool:
    """True where the whole record has a loss weight of 0. Other values of such a column may mean anything."""
    return any(_is(record.get(key), 0 if positive else 1) for key, positive in LOSS_FLAGS.items())


def _is(value: Any, number: int) -> bool:
    return isinstance(value, (bool, int, float)) and value == number
