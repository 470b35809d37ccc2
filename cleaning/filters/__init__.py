"""Filters reject conversations, or single rounds, that are unfit to learn from; repairs change turns. One function a reason.

STEPS lists them in the order in which they are applied. The first complaint about a conversation decides, and the name of
its step is the reason in report.json and rejected.jsonl. To add a step, write its function and list it here. A filter of a
user's own needs no change: `--filters my.py:too_polite` takes a function Conversation -> str | None from a file.

    structure.py   who speaks when, error messages instead of turns, answers in pieces, limits
    refusals.py    refusals and self-descriptions, nine languages
    quality.py     loops, broken text, blocked phrases
    language.py    which language it is in
    privacy.py     masks for personal data and secrets
    moderation.py  an endpoint that judges texts; the first pass asks it, in batches, about what all other filters keep
"""

import collections
import functools
import importlib.util
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from cleaning.filters import language, privacy, quality, refusals, structure
from cleaning.filters.base import Filter, Repair, Step, TurnFilter
from cleaning.settings import Settings
from fastft.data.continue_requests import is_continue
from fastft.data.conversation import Conversation, Message, rounds_of
from fastft.errors import UserError

__all__ = ["FILTERS", "REPAIRS", "STEPS", "Settings", "Verdict", "apply_steps", "check", "described_filters"]

ALWAYS = ("too_short", "wrong_role_order")  # no later stage can read what these reject
MASKS = ("masked_keys", "masked_emails", "masked_ips", "masked_phones")
REFUSALS = ("self_identification", "ai_boilerplate", "refusal", "policy_refusal")

STEPS: Sequence[Step] = (
    Filter("other_model", structure.other_model, "not answered by any of the models asked for", option="--models"),
    Filter("plugin_session", structure.plugin_session, "a plugin took part, and what it returned is not in the dump"),
    Filter("tool_session", structure.tool_session, "contains calls of a tool, or its results"),
    Repair(
        "dropped_leading_assistant",
        structure.drop_leading_assistant,
        "answers before the first question are dropped",
    ),
    # Before answers in a row are merged: within a merged answer, a banner is no longer recognised.
    TurnFilter("error_banner", structure.error_banner, "a turn is an error message of the page"),
    Repair(
        "merged_assistant_turns",
        structure.merge_assistant_turns,
        "answers in a row are merged, or the last is kept (--consecutive last)",
    ),
    Repair(
        "trimmed_last_question",
        structure.trim_last_question,
        "last questions (and tools' results) without an answer are dropped",
    ),
    TurnFilter(
        "orphan_continue",
        structure.orphan_continue,
        "the dialogue opens with `continue`: what it continues is missing",
        first_only=True,
    ),
    Filter("too_short", structure.too_short, "no question or no answer"),
    Filter(
        "wrong_role_order",
        structure.wrong_role_order,
        "user and assistant do not take turns, the user first",
    ),
    TurnFilter("empty_turn", structure.empty_turn, "a question without visible text"),
    TurnFilter("empty_answer", structure.empty_answer, "an answer without visible text"),
    Repair(
        "merged_continued_answers",
        structure.merge_continued_answers,
        "an answer that was cut, `continue` and the other half are merged",
    ),
    TurnFilter(
        "unfinished_answer", structure.unfinished_answer, "an answer ends inside a code block, or was cut by an error"
    ),
    TurnFilter("repetition", quality.repetition, "an answer ends in a loop, or repeats one letter or digit 50 times"),
    TurnFilter("digit_run", quality.digit_run, "an answer has 60 digits in a row outside code", default=False),
    TurnFilter("garbage", quality.garbage, "an answer was decoded wrongly: more than 2 % broken characters"),
    TurnFilter(
        "self_identification",
        refusals.self_identification,
        "an answer says which company's product it is",
        asked_for=refusals.asks_for_somebodys_words,
    ),
    TurnFilter("refusal", refusals.refusal, "a short answer says what the model cannot do"),
    TurnFilter("policy_refusal", refusals.policy_refusal, "a short answer declines something harmful", default=False),
    TurnFilter("ai_boilerplate", refusals.ai_boilerplate, "an answer opens with `As an AI language model, I …`"),
    Filter(
        "blocked_phrase",
        quality.blocked_phrase,
        "one of these phrases, as whole words, in any turn",
        option="--blocked_phrases",
    ),
    Filter("other_language", language.other_language, "in none of the languages asked for", option="--languages"),
    Filter(
        "unknown_language",
        language.unknown_language,
        "too little text, or too mixed, to tell the language",
        default=False,
    ),
    Filter(
        "too_few_turns", structure.too_few_turns, "fewer questions and answers than --min_turns", option="--min_turns"
    ),
    Filter(
        "too_many_turns", structure.too_many_turns, "more questions and answers than --max_turns", option="--max_turns"
    ),
    Filter("too_long", structure.too_long, "more characters than --max_chars", option="--max_chars"),
    Repair(
        "masked_keys",
        privacy.mask_keys,
        "API keys, tokens and private keys are masked",
        default=False,
        option="--mask_pii",
    ),
    Repair("masked_emails", privacy.mask_emails, "e-mail addresses are masked", default=False, option="--mask_pii"),
    Repair(
        "masked_ips", privacy.mask_ips, "public IPv4 and IPv6 addresses are masked", default=False, option="--mask_pii"
    ),
    Repair("masked_phones", privacy.mask_phones, "telephone numbers are masked", default=False, option="--mask_pii"),
)
FILTERS = tuple(step for step in STEPS if not isinstance(step, Repair))
REPAIRS = tuple(step for step in STEPS if isinstance(step, Repair))


@dataclass(slots=True)
class DroppedRound:
    """A round that is rejected while the rest of its conversation is kept."""

    number: int  # among the rounds as shared, from 1
    reason: str
    detail: str
    messages: list[Message]


@dataclass(slots=True)
class Verdict:
    """What the steps decided about a conversation: rejected for a reason, or (with "") kept with these changes."""

    reason: str = ""
    detail: str = ""
    repairs: collections.Counter = field(default_factory=collections.Counter)
    dropped: list[DroppedRound] = field(default_factory=list)


def apply_steps(
    conversation: Conversation, settings: Settings, said: Mapping[str, str] = MappingProxyType({})
) -> Verdict:
    """Repair `conversation` in place, drop rounds, and say whether it is kept. Sets its `lang`.

    `said` are complaints that the record itself makes, by the name of the filter (`RawConversation.sessions`).
    """
    verdict = Verdict()
    # Complaints number turns as in the dump, whatever has been dropped before them.
    as_shared = list(conversation.messages)  # a reference to each, so that no id() is given twice
    numbers = {id(message): number for number, message in enumerate(as_shared, start=1)}
    for step in _chosen_steps(settings):
        detail = None
        if step.name == "other_language":
            conversation.lang = conversation.lang or language.detect_language(
                conversation
            )  # what the dump says has priority
        if isinstance(step, Repair):
            verdict.repairs[step.name] += step.apply(conversation.messages, settings)
        elif isinstance(step, TurnFilter):
            detail = _drop_rounds(conversation, step, settings, numbers, verdict)
        else:
            detail = said.get(step.name) or step.complaint(conversation, settings)
        if detail is not None:
            verdict.reason, verdict.detail = step.name, detail
            break
    questions = [id(message) for message in as_shared if message.role == "user"]
    for dropped in verdict.dropped:
        dropped.number = questions.index(id(dropped.messages[0])) + 1
    verdict.repairs = +verdict.repairs  # without the zeros
    return verdict


def _drop_rounds(
    conversation: Conversation, step: TurnFilter, settings: Settings, numbers: dict[int, int], verdict: Verdict
) -> str | None:
    """Drop the rounds with a turn that `step` complains about. Returns the complaint if no round is left."""
    if not any(map(step.complaint, conversation.messages, itertools.repeat(settings))):  # the usual case, made fast
        return None
    before, rounds = rounds_of(conversation.messages)
    details: dict[int, str] = {}  # by the round's position
    for position, messages in enumerate(rounds[:1] if step.first_only else rounds):
        for message in messages:
            complaint = step.complaint(message, settings)
            if complaint is not None and not (step.asked_for and step.asked_for(_question(rounds, position))):
                details.setdefault(position, f"turn {numbers[id(message)]} {complaint}")
                if message is messages[0] and position and len(rounds[position - 1]) == 1:
                    details.setdefault(position - 1, details[position])  # the question to which it was the answer
    if not details:
        return None
    for position in range(1, len(rounds)):  # `continue` has no meaning without the round before it
        if position - 1 in details and structure.leans_on_the_answer_before(rounds[position][0].content):
            details.setdefault(position, details[position - 1])
    if len(details) == len(rounds):
        return details[min(details)]
    for position, detail in sorted(details.items()):
        verdict.dropped.append(DroppedRound(0, step.name, detail, rounds[position]))
    verdict.repairs[f"dropped_rounds:{step.name}"] += len(details)
    kept = [messages for position, messages in enumerate(rounds) if position not in details]
    conversation.messages[:] = before + [message for messages in kept for message in messages]
    return None


def _question(rounds: list[list[Message]], position: int) -> str:
    """The question that a round answers: where it is `continue`, the last one before that is not."""
    questions = [messages[0].content for messages in rounds[: position + 1]]
    return next((text for text in reversed(questions) if not is_continue(text)), questions[0])


# --- what is switched on ----------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=8)
def _chosen_steps(settings: Settings) -> tuple[Step, ...]:
    """The steps that are on. The user's own filters come before the masks, so that they see the text as it is."""
    on = [s for s in STEPS if s.name not in settings.without_filters and (s.default or s.name in settings.with_filters)]
    first_mask = next((i for i, step in enumerate(on) if step.name in MASKS), len(on))
    return (*on[:first_mask], *(_own_filter(spec) for spec in settings.own_filters), *on[first_mask:])


def check(settings: Settings) -> None:
    """Raise UserError for settings that cannot be used, before any work is done."""
    names = {step.name for step in STEPS}
    for name in (*settings.with_filters, *settings.without_filters):
        if name not in names:
            raise UserError(f"no filter is called {name!r}; --list_filters shows them")
    for name in settings.without_filters:
        if name in ALWAYS:
            raise UserError(f"{name} cannot be switched off: what it rejects cannot be trained on")
    if both := set(settings.with_filters) & set(settings.without_filters):
        raise UserError(f"{min(both)} is both switched on and off")
    if settings.consecutive not in ("merge", "last"):
        raise UserError(f"--consecutive is {settings.consecutive!r}; it must be merge or last")
    for option in ("min_turns", "max_turns", "max_chars"):
        value = getattr(settings, option)
        if value is not None and value < 1:
            raise UserError(f"--{option} is {value}; it must be at least 1")
    needs_language = settings.languages or "unknown_language" in settings.with_filters
    if needs_language and not language.available():
        raise UserError("--languages needs pycld2, which has no wheel for this platform: pip install pycld2")
    language.check_codes(settings.languages)
    if settings.moderation:
        from cleaning.filters import moderation

        moderation.check_url(settings.moderation)
    own = [_own_filter(spec).name for spec in settings.own_filters]
    for name in own:
        if name in names or own.count(name) > 1:
            raise UserError(f"--filters: there are two filters called {name!r}")


@functools.cache
def _own_filter(spec: str) -> Filter:
    """Load a user's filter, given as `my.py:too_polite`. This runs the file. Raises UserError where it fails."""
    path, _, name = spec.rpartition(":")
    if not path or not name.isidentifier():
        raise UserError(f"--filters {spec}: expected FILE.py:FUNCTION")
    if not Path(path).is_file():
        raise UserError(f"--filters {spec}: {path}: no such file")
    module_spec = importlib.util.spec_from_file_location(f"own_filters_{Path(path).stem}", path)
    if module_spec is None:
        raise UserError(f"--filters {spec}: {path} is not a Python file")
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:  # noqa: BLE001  it is the user's code
        raise UserError(f"--filters {spec}: {type(error).__name__}: {error}") from None
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(f"--filters {spec}: {path} has no function {name}")
    description = (function.__doc__ or "a filter of your own").strip().split("\n")[0]
    return Filter(name, functools.partial(_ask_own, spec, function), description)


def _ask_own(spec: str, function: Callable, conversation: Conversation, settings: Settings) -> str | None:
    try:
        answer = function(conversation)
    except Exception as error:  # noqa: BLE001  a fault of the user's filter, so that nothing can be said of the conversation
        raise UserError(f"--filters {spec}: {type(error).__name__} at {conversation.id}: {error}") from None
    if answer is not None and not isinstance(answer, str):
        raise UserError(
            f"--filters {spec}: returned {type(answer).__name__}; it must return a text that says what is wrong, or None"
        )
    return answer


def described_filters(settings: Settings) -> list[str]:
    """The lines of `--list_filters`: plain text, for people and for `grep`."""
    own = [_own_filter(spec) for spec in settings.own_filters]
    rows = [("name", "default", "rejects", "what it finds or changes")]
    for step in (*STEPS, *own):
        default = "always" if step.name in ALWAYS else "on" if step.default else "off"
        rows.append((step.name, step.option or default, step.drops, step.description))
    rows.append(("moderation", "--moderation", "conversation", "the endpoint flags a turn"))
    widths = [max(map(len, column)) for column in zip(*rows)][:3]
    table = ["  ".join([*(text.ljust(width) for text, width in zip(row, widths)), row[3]]) for row in rows]
    return ["Filters and repairs, in the order in which they are applied", *table]
