"""What makes a conversation, or one round of it, unfit to learn from: one small function per reason, and the repairs.

STEPS is the list of them, in the order in which they are applied; the first complaint about a conversation decides, and
its name is the reason in report.json and rejected.jsonl. To add one, write the function and list it. One's own needs no
change here: `--filters my.py:too_polite` takes a function Conversation -> str | None from a file.

    structure.py   who speaks when, error messages in the place of turns, answers in pieces, limits
    refusals.py    refusals and self-descriptions, nine languages
    quality.py     loops, broken text, blocked phrases
    language.py    which language it is in
    privacy.py     masks for personal data and secrets
    moderation.py  an endpoint that judges texts; the pipeline asks it, in batches, about what everything else keeps
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

ALWAYS = ("too_short", "wrong_role_order")  # nothing down the road can read what these reject
MASKS = ("masked_keys", "masked_emails", "masked_ips", "masked_phones")
REFUSALS = ("self_identification", "ai_boilerplate", "refusal", "policy_refusal")

STEPS: Sequence[Step] = (
    Filter("other_model", structure.other_model, "not answered by one of the models wanted", option="--models"),
    Filter(
        "plugin_session", structure.plugin_session, "a plugin had a part in it, and what it said is not in the dump"
    ),
    Filter("tool_session", structure.tool_session, "calls a tool, or has turns of one"),
    Repair(
        "dropped_leading_assistant",
        structure.drop_leading_assistant,
        "answers before the first question are dropped",
    ),
    # Before answers in a row are merged, which would bury it.
    TurnFilter("error_banner", structure.error_banner, "an error message of the page stands for a turn"),
    Repair(
        "merged_assistant_turns",
        structure.merge_assistant_turns,
        "answers in a row become one, or the last is kept (--consecutive last)",
    ),
    Repair(
        "trimmed_last_question",
        structure.trim_last_question,
        "last questions (and tools' results) without an answer are dropped",
    ),
    TurnFilter(
        "orphan_continue",
        structure.orphan_continue,
        "a dialogue opens with `continue`: what it continues was cut off",
        first_only=True,
    ),
    Filter("too_short", structure.too_short, "no question or no answer"),
    Filter(
        "wrong_role_order",
        structure.wrong_role_order,
        "user and assistant do not take turns, beginning with the user",
    ),
    TurnFilter("empty_turn", structure.empty_turn, "a question without visible text"),
    TurnFilter("empty_answer", structure.empty_answer, "an answer without visible text"),
    Repair(
        "merged_continued_answers",
        structure.merge_continued_answers,
        "an answer that was cut, `continue`, and its other half become one",
    ),
    TurnFilter(
        "unfinished_answer", structure.unfinished_answer, "an answer ends inside a code block, or was cut by an error"
    ),
    TurnFilter("repetition", quality.repetition, "an answer in a loop, or 50 times the same letter or digit"),
    TurnFilter("digit_run", quality.digit_run, "60 digits in a row, outside code", default=False),
    TurnFilter("garbage", quality.garbage, "an answer decoded wrongly: more than 2 % broken characters"),
    TurnFilter(
        "self_identification",
        refusals.self_identification,
        "the answer says which company's product it is",
        asked_for=refusals.asks_for_somebodys_words,
    ),
    TurnFilter("refusal", refusals.refusal, "a short answer says what the model cannot do"),
    TurnFilter("policy_refusal", refusals.policy_refusal, "a short answer declines something harmful", default=False),
    TurnFilter("ai_boilerplate", refusals.ai_boilerplate, "an answer opens with `As an AI language model, I …`"),
    Filter(
        "blocked_phrase",
        quality.blocked_phrase,
        "one of these phrases, at word borders, in any turn",
        option="--blocked_phrases",
    ),
    Filter("other_language", language.other_language, "in none of the languages wanted", option="--languages"),
    Filter(
        "unknown_language",
        language.unknown_language,
        "too little text or too mixed to tell the language",
        default=False,
    ),
    Filter("too_few_turns", structure.too_few_turns, "fewer questions and answers than wanted", option="--min_turns"),
    Filter("too_many_turns", structure.too_many_turns, "more questions and answers than wanted", option="--max_turns"),
    Filter("too_long", structure.too_long, "more characters than wanted", option="--max_chars"),
    Repair("masked_keys", privacy.mask_keys, "keys, tokens, private keys", default=False, option="--mask_pii"),
    Repair("masked_emails", privacy.mask_emails, "e-mail addresses", default=False, option="--mask_pii"),
    Repair("masked_ips", privacy.mask_ips, "public IPv4 and IPv6 addresses", default=False, option="--mask_pii"),
    Repair("masked_phones", privacy.mask_phones, "telephone numbers", default=False, option="--mask_pii"),
)
FILTERS = tuple(step for step in STEPS if not isinstance(step, Repair))
REPAIRS = tuple(step for step in STEPS if isinstance(step, Repair))


@dataclass(slots=True)
class DroppedRound:
    """A round that went while its conversation stayed."""

    number: int  # among the rounds as shared, from 1
    reason: str
    detail: str
    messages: list[Message]


@dataclass(slots=True)
class Verdict:
    """What became of a conversation: rejected for a reason, or kept ("") with these changes."""

    reason: str = ""
    detail: str = ""
    repairs: collections.Counter = field(default_factory=collections.Counter)
    dropped: list[DroppedRound] = field(default_factory=list)


def apply_steps(
    conversation: Conversation, settings: Settings, said: Mapping[str, str] = MappingProxyType({})
) -> Verdict:
    """Repair `conversation` in place, drop rounds, and say whether it stays. Sets its `lang` if it does.

    `said` are complaints that its record makes itself, by the name of the filter (`RawConversation.sessions`).
    """
    verdict = Verdict()
    # Turns are named by their place in the dump, whatever went before them.
    as_shared = list(conversation.messages)  # keeps the ids alive
    numbers = {id(message): number for number, message in enumerate(as_shared, start=1)}
    for step in _chosen_steps(settings):
        detail = None
        if step.name == "other_language":
            conversation.lang = conversation.lang or language.detect_language(conversation)  # the dump knows best
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
    """Drop the rounds with a turn that `step` complains of; its complaint, if none is left."""
    if not any(map(step.complaint, conversation.messages, itertools.repeat(settings))):  # as of most
        return None
    before, rounds = rounds_of(conversation.messages)
    details: dict[int, str] = {}  # by the round's position
    for position, messages in enumerate(rounds[:1] if step.first_only else rounds):
        for message in messages:
            complaint = step.complaint(message, settings)
            if complaint is not None and not (step.asked_for and step.asked_for(_question(rounds, position))):
                details.setdefault(position, f"turn {numbers[id(message)]} {complaint}")
                if message is messages[0] and position and len(rounds[position - 1]) == 1:
                    details.setdefault(position - 1, details[position])  # the question that got it for an answer
    if not details:
        return None
    for position in range(1, len(rounds)):  # `continue` means nothing without the round before it
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
    """What the answer of a round is to: a `continue` asks for more of the same."""
    questions = [messages[0].content for messages in rounds[: position + 1]]
    return next((text for text in reversed(questions) if not is_continue(text)), questions[0])


# --- what is switched on ----------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=8)
def _chosen_steps(settings: Settings) -> tuple[Step, ...]:
    """The steps that are on, the user's own functions before the masks: they see the text as it is."""
    on = [s for s in STEPS if s.name not in settings.without_filters and (s.default or s.name in settings.with_filters)]
    first_mask = next((i for i, step in enumerate(on) if step.name in MASKS), len(on))
    return (*on[:first_mask], *(_own_filter(spec) for spec in settings.own_filters), *on[first_mask:])


def check(settings: Settings) -> None:
    """Raises UserError for settings that cannot be used: better known before the work than in the middle of it."""
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
        raise UserError(f"--consecutive is {settings.consecutive!r}; it is merge or last")
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
    """`my.py:too_polite`: the function of that name in the file. Loading runs the file, as the user asked."""
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
    except Exception as error:
        raise UserError(f"--filters {spec}: {type(error).__name__}: {error}") from None
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(f"--filters {spec}: {path} has no function {name}")
    description = (function.__doc__ or "one's own").strip().split("\n")[0]
    return Filter(name, functools.partial(_ask_own, spec, function), description)


def _ask_own(spec: str, function: Callable, conversation: Conversation, settings: Settings) -> str | None:
    try:
        answer = function(conversation)
    except Exception as error:  # a fault of the filter, not of the conversation: no verdict can be given
        raise UserError(f"--filters {spec}: {type(error).__name__} at {conversation.id}: {error}") from None
    if answer is not None and not isinstance(answer, str):
        raise UserError(f"--filters {spec}: returned {type(answer).__name__}; a text says what is wrong, None nothing")
    return answer


def described_filters(settings: Settings) -> list[str]:
    """Lines for `--list_filters`: plain ones, for people and for `grep`."""
    own = [_own_filter(spec) for spec in settings.own_filters]
    rows = [("name", "default", "what goes", "what it does")]
    for step in (*STEPS, *own):
        default = "always" if step.name in ALWAYS else "on" if step.default else "off"
        rows.append((step.name, step.option or default, step.drops, step.description))
    rows.append(("moderation", "--moderation", "conversation", "the endpoint flags a turn"))
    widths = [max(map(len, column)) for column in zip(*rows)][:3]
    table = ["  ".join([*(text.ljust(width) for text, width in zip(row, widths)), row[3]]) for row in rows]
    return ["Filters and repairs, in the order in which they are applied", *table]
