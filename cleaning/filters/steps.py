"""The table of all filters and repairs. To add one, write its function and list it here.

The first complaint about a conversation decides, and the name of its step is the reason in report.json and rejected.jsonl.
A filter of a user's own needs no row: `--filters my.py:too_polite` takes a function Conversation -> str | None from a file.
"""

from collections.abc import Sequence

from cleaning.filters import language, privacy, quality, refusals, structure
from cleaning.filters.base import Filter, Repair, Step, TurnFilter
from fastft.data.refusals import asks_for_somebodys_words

ALWAYS = ("too_short", "wrong_role_order")  # later stages cannot read what these reject
MASKS = ("masked_keys", "masked_emails", "masked_ips", "masked_phones")
REFUSALS = ("self_identification", "ai_boilerplate", "refusal", "policy_refusal")

# In the order in which they are applied.
STEPS: Sequence[Step] = (
    Filter("other_model", structure.other_model, "not answered by any of the models asked for", option="--models"),
    Filter("plugin_session", structure.plugin_session, "a plugin took part, and what it returned is not in the dump"),
    Filter("tool_session", structure.tool_session, "contains calls of a tool, or its results"),
    Repair(
        "dropped_leading_assistant",
        structure.drop_leading_assistant,
        "answers before the first question are dropped",
    ),
    # This comes before answers in a row are merged, because a banner is not recognised inside of a merged answer.
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
    # The name `too_short` is historical and is kept because files and scripts use it. The rule is not about length.
    Filter("too_short", structure.no_question_or_no_answer, "has no question or no answer, whatever its length"),
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
        asked_for=asks_for_somebodys_words,
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
