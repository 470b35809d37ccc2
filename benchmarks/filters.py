"""What each filter does to the samples: the table of docs/cleaning.md.

    FASTFT_DATA=DIR python benchmarks/filters.py                     conversations, rounds and turns, by reason
    FASTFT_DATA=DIR python benchmarks/filters.py --show refusal      the same, and every hit of a reason, to be read
    FASTFT_DATA=DIR python benchmarks/filters.py --with policy_refusal,masked_emails

The filters are those that are on by default and those switched on here; duplicates are not searched for.
"""

import os
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cleaning.filters.apply import Verdict, apply_steps
from cleaning.first_pass import to_conversation
from cleaning.settings import FilterSettings
from cleaning.sources.formats import Reading, conversations_in, survey_dump
from fastft.common.command_line import option, parse, run
from fastft.common.records import read_records
from fastft.data.conversation import Conversation
from fastft.errors import UserError

SAMPLES = (
    "sharegpt_v3_sample.json",
    "sharegpt_zh.jsonl",
    "chatgpt_export.json",
    "chatgpt_pages_as_sharegpt.json",
    "schema_common_en_sample_230805.json",
    "schema_common_zh_sample_230805.json",
    "schema_gpt4_final_data_sample_230629.json",
    "schema_multilang_sample_230914.json",
    "schema_sharegpt_toolcalls.json",
    "schema_vicuna_sample_230629.json",
)


@dataclass
class FiltersBenchmark:
    """Options of this benchmark."""

    show: str | None = None
    """A reason of which every hit is printed."""
    switched_on: list[str] = option(repeated=True, separator=",", name="with")
    """Filters to switch on: a,b,c."""


def verdicts(path: Path, settings: FilterSettings) -> Iterator[tuple[Conversation, Verdict]]:
    """Yield each conversation of a dump as it was before the filters, and their verdict."""
    reading = Reading(era=survey_dump(read_records(path), Reading()))
    for number, record in enumerate(read_records(path)):
        for raw in conversations_in(record.value, reading):
            conversation = to_conversation(raw, raw.id or f"{path.name}-{number}", path.name)
            before = Conversation(conversation.id, list(conversation.messages))
            yield before, apply_steps(conversation, settings, raw.sessions)


def main() -> None:
    [options] = parse(sys.argv[1:], "benchmarks/filters.py", __doc__.splitlines()[0], FiltersBenchmark)
    settings, chats = (
        FilterSettings(with_filters=tuple(options.switched_on)),
        Path(os.environ.get("FASTFT_DATA", "data")) / "chats",
    )
    if not chats.is_dir():
        raise UserError(f"{chats}: no such directory; set FASTFT_DATA to the directory that holds chats/")
    seen, counts = 0, Counter()
    for sample in SAMPLES:
        for before, verdict in verdicts(chats / sample, settings):
            seen += 1
            hits = [("c", verdict.reason, verdict.detail, before.messages[:2])] if verdict.reason else []
            hits += [("r", dropped.reason, dropped.detail, dropped.messages) for dropped in verdict.dropped]
            for kind, reason, detail, messages in hits:
                counts[reason, kind] += 1
                if reason == options.show:
                    print(f"\n{sample}: {before.id}: {detail}")
                    print(*(f"{message.role}: {message.content[:300]}" for message in messages), sep="\n")
            counts.update({(name, "turns"): n for name, n in verdict.repairs.items() if ":" not in name})
    print(f"{seen:,} conversations of {len(SAMPLES)} samples")
    for (name, kind), count in sorted(counts.items()):
        print(f"{name:<28}{count:>6} {kind}")


if __name__ == "__main__":
    sys.exit(run(main))
