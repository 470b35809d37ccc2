"""Readers of records with a prompt and its answer, and of records with two answers of which one is preferred.

The preferred answer is learned: `chosen` in the data of TRL and LLaMA-Factory, `preferred_output` in OpenAI's, and what
`winner` names in the Chatbot Arena's. The other answer is left out, and counted.
"""

import re
from collections import Counter
from typing import Any

from cleaning.sources.lists import earlier_rounds, finished, instruction_of, read_messages, start_conversation
from cleaning.sources.turns import (
    LABELLED,
    RawConversation,
    Rejection,
    Turn,
    as_list,
    first_of,
    keys_of,
    read_content,
    read_turn,
    shown,
    text_of,
)
from fastft.common.records import repair_text

PROMPTS = ("prompt", "question", "query", "inputs", "input")
COMPLETIONS = ("completion", "response", "answer", "output", "targets", "target")
_WINNERS = {"model_a": "a", "model_b": "b", "tie": "a", "tie (bothbad)": "a"}


def is_preference(record: dict) -> bool:
    """Tell whether a record holds two answers and a judgement.

    `chosen` alone is not enough, because it may be a truth value: whether the row was chosen for something.
    """
    if "winner" in record:
        return isinstance(record.get("conversation_a"), list) and isinstance(record.get("conversation_b"), list)
    chosen, other = ("chosen", "rejected") if "rejected" in record else ("preferred_output", "non_preferred_output")
    return isinstance(record.get(chosen), (str, dict, list)) and record.get(other) is not None


def is_completion(record: dict) -> bool:
    """Tell whether a record holds a prompt and its answer."""
    if record.get("instruction") is not None:  # such a record is Alpaca's
        return False
    return first_of(record, *PROMPTS) is not None and first_of(record, *COMPLETIONS) is not None


def read_completion(record: dict) -> RawConversation:
    """Read {"prompt", "completion"}, {"question", "answer"}, {"query", "response", "history"}, …: texts or lists of turns."""
    if not is_completion(record):
        raise Rejection("not_a_conversation", f"no prompt, or nothing that answers it; keys: {keys_of(record)}")
    conversation = start_conversation(record)
    asked = _asked(record, conversation.notes)
    answer = _said(first_of(record, *COMPLETIONS), "assistant", len(asked) + 1, conversation.notes)
    conversation.turns = _whole(asked, answer)
    return finished(conversation, record)


def read_preference(record: dict) -> RawConversation:
    """Read {"prompt" or turns, "chosen", "rejected"}. `chosen` is an answer, or the whole dialogue that ends with it."""
    if not is_preference(record):
        raise Rejection("not_a_conversation", f"no 'chosen' and 'rejected'; keys: {keys_of(record)}")
    if "winner" in record:
        return _read_arena(record)
    conversation = start_conversation(record)
    asked = _asked(record, conversation.notes)
    chosen = _said(first_of(record, "chosen", "preferred_output"), "assistant", len(asked) + 1, conversation.notes)
    conversation.turns = _whole(asked, chosen)
    conversation.notes["rejected answers of preferences, left out"] += 1
    return finished(conversation, record)


def _read_arena(record: dict) -> RawConversation:
    """Read a battle of the Chatbot Arena. Of a tie, side a is taken; where both sides are bad, it is not to be learned."""
    winner = record["winner"]
    side = _WINNERS.get(winner) if isinstance(winner, str) else None
    if side is None:
        raise Rejection("not_a_conversation", f"its 'winner' is {shown(winner)}")
    conversation = read_messages({**record, "messages": record[f"conversation_{side}"]})
    conversation.model = text_of(record.get(f"model_{side}"))
    conversation.notes["rejected answers of preferences, left out"] += 1
    if winner == "tie (bothbad)":
        for turn in conversation.turns:
            conversation.notes[LABELLED] += turn.role == "assistant" and turn.train
            turn.train = False
    return conversation


def _asked(record: dict, notes: Counter[str]) -> list[Turn]:
    """Return the turns before the answer; none if the answer itself is a whole dialogue that contains them."""
    turns = first_of(record, "messages", "conversations", "conversation")
    if turns is not None:
        return [read_turn(turn, number, notes) for number, turn in enumerate(as_list(turns, "turns"), start=1)]
    before = earlier_rounds(record, notes)
    if record.get("instruction") is not None:
        return [*before, Turn("user", instruction_of(record, notes))]
    prompt = first_of(record, *PROMPTS)
    if isinstance(prompt, dict):  # OpenAI's {"messages": [turn, …]}
        prompt = as_list(prompt.get("messages"), "turns of the prompt")
    return before if prompt is None else [*before, *_said(prompt, "user", len(before) + 1, notes)]


_HH = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):[ \t]?")  # Anthropic's HH-RLHF writes a dialogue as one text


def _said(value: Any, role: str, number: int, notes: Counter[str]) -> list[Turn]:
    """Return the turns of `value`: a text that `role` says, a dialogue in HH-RLHF's form, a turn, or a list of turns."""
    if isinstance(value, dict):
        return [read_turn(value, number, notes)]
    if isinstance(value, list):
        return [read_turn(turn, at, notes) for at, turn in enumerate(value, start=number)]
    text = read_content(value, number, notes)
    if not _HH.match(text):
        return [Turn(role, text)]
    _, *pieces = _HH.split(repair_text(text))
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = [Turn(roles[name], text.strip()) for name, text in zip(pieces[::2], pieces[1::2])]
    return turns if turns[-1].text else turns[:-1]  # a prompt may end with the empty mark of the answer's turn


def _whole(asked: list[Turn], answer: list[Turn]) -> list[Turn]:
    """Return question and answer as one dialogue. Raises Rejection if there is no question.

    An answer that includes its question is a whole dialogue already. An answer at the end of `asked` is replaced.
    """
    if any(turn.role == "user" for turn in answer):
        return answer
    while asked and asked[-1].role == "assistant":
        asked = asked[:-1]
    if not asked:
        raise Rejection("not_a_conversation", "it has an answer, and no question")
    return asked + answer
