"""What a dump says about an answer beside its text: whether it is to be learned, and whether it came to its end.

Every reader uses these functions, by way of `marked` and `mark_by_record` in `cleaning.sources.turns`. The results become
`train` and `ends` of a message. The spellings of loss flags are `fastft.data.conversation.LOSS_FLAGS`, which the trainer
uses too. For a mark that says neither yes nor no the functions raise UserError, without saying where, because guessing would
be wrong either way.
"""

from collections import Counter
from typing import Any

from fastft.data.conversation import LOSS_FLAGS, loss_weight
from fastft.errors import UserError

# Names under which marks are counted.
NOT_LEARNED = "answers marked not to learn from"
FRACTIONS = "answers with a weight other than 0 and 1, learned in full"
LABELLED = "answers that their record labels as bad, not to learn from"
CUT = "answers cut before their end"

# axolotl's flags for pieces of a message. Our conversations learn a message as a whole or not at all.
_PIECES = ("train_detail", "training_detail")
# Keys under which OpenAI, Anthropic, Gemini, Ollama and ChatGPT's page say how an answer ended.
_ENDINGS = (
    "finish_reason", "finishReason", "stop_reason", "stopReason", "done_reason", "finish_details", "incomplete_details",
)  # fmt: skip
_OF_MESSAGE = (*_ENDINGS, "status")  # not of a record, whose status may be that of its annotation
# Values under these keys that mean that the answer was cut.
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
    """Return False for a loss weight of 0, in any spelling.

    `train` is only true or false, so a fraction counts as 1; how often that happens is noted. Raises UserError.
    """
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
    """Return False for an answer that was stopped or ran into a limit, or that our own splitter continues in the next part."""
    inner = message.get("metadata")  # where ChatGPT's export says it
    reason = _cut_by(message, _OF_MESSAGE) or (_cut_by(inner, _OF_MESSAGE) if isinstance(inner, dict) else "")
    if not reason and message.get("interrupted") is True:
        reason = "interrupted"
    if reason:
        notes[f"{CUT} ({reason})"] += 1
    return not reason and message.get("ends") is not False


def _cut_by(message: dict, keys: tuple[str, ...]) -> str:
    """Return the reason for which an answer was cut, by the first of `keys` that states one, or ""."""
    for key in keys:
        value = message.get(key)
        if isinstance(value, dict):  # {"type": "max_tokens", …}, {"reason": "max_output_tokens"}
            value = value.get("type") or value.get("reason")
        if isinstance(value, str) and value.casefold() in _CUT:
            return value.casefold()
    return ""


def last_answer_is_cut(record: dict, notes: Counter[str]) -> bool:
    """Tell whether the record itself says that its last answer was cut."""
    reason = _cut_by(record, _ENDINGS)
    if reason:
        notes[f"{CUT} ({reason})"] += 1
    return bool(reason)


def is_bad_example(record: dict) -> bool:
    """Tell whether a row of KTO data labels its completion as undesired (TRL's `label`, LLaMA-Factory's `kto_tag`).

    A `label` that is neither true nor false means something else and is ignored. Raises UserError for an unclear `kto_tag`.
    """
    tag = record.get("kto_tag")
    if tag not in (None, True, False):  # 0 and 1 among them
        raise UserError("its 'kto_tag' is neither true nor false")
    return tag in (False, 0) or record.get("label") is False


def none_is_learned(record: dict) -> bool:
    """Tell whether the whole record has a loss weight of 0. Other values in such a column may mean anything."""
    return any(_is(record.get(key), 0 if positive else 1) for key, positive in LOSS_FLAGS.items())


def _is(value: Any, number: int) -> bool:
    return isinstance(value, (bool, int, float)) and value == number
