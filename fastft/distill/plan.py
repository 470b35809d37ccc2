"""The plan: which query is asked with which system message, and by which teachers.

    account = make_plan(config, Path("runs/orca/plan.jsonl"))

plan.jsonl has a row for each query that is asked:

    {"id", "collection", "task", "message", "system", "query", "gold", "options", "teachers": ["first", "second"]}

It is a function of the queries, the sample, the messages, the benchmarks, the teachers' shares and the seed; the number of
processes does not change a byte. Two passes over the files make it, so that memory holds ids and not texts: the first decides
about each query, the second writes those that are asked.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import orjson

from fastft.common.files import make_directory, write_whole, written_whole
from fastft.common.records import RawRecord, parsed
from fastft.common.workers import ordered_map, process_pool
from fastft.distill.draws import draw
from fastft.distill.queries.files import NoQuery, Query, file_stats, read_query, records_of
from fastft.distill.settings import DistillConfig, QuerySource
from fastft.distill.system_messages import OWN, SystemMessages, load_messages
from fastft.errors import UserError

FORMAT = 2  # of plan.jsonl; a plan of another format is made again
BATCH = 512  # records that a process gets at a time
FEW = 32 << 20  # bytes of queries below which one process is as fast as several
SHOWN = 5  # places that the account names for each reason


@dataclass(frozen=True)
class QueryReader:
    """What every process needs to know about the queries."""

    sources: tuple[QuerySource, ...]
    against: tuple[str, ...]
    few_shot: bool
    messages: str
    seed: int


@dataclass(frozen=True, slots=True)
class Survey:
    """What the first pass finds about a record. `reason` says why it is not asked, "" if it may be."""

    where: str
    reason: str = ""
    id: str = ""
    digest: bytes = b""
    collection: str = ""
    task: str = ""


@dataclass
class PlanAccount:
    """What became of the queries: read = planned + left_out, by reason."""

    read: int = 0
    planned: int = 0
    left_out: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)
    collections: dict[str, dict[str, int]] = field(default_factory=dict)
    messages: dict[str, dict[str, int]] = field(default_factory=dict)
    asked: dict[str, int] = field(default_factory=dict)  # by teacher

    def leave_out(self, reason: str, where: str) -> None:
        self.left_out[reason] = self.left_out.get(reason, 0) + 1
        examples = self.examples.setdefault(reason, [])
        if len(examples) < SHOWN:
            examples.append(where)


def make_plan(config: DistillConfig, sources: list[QuerySource], path: Path) -> PlanAccount:
    """Write the plan to `path`, and its account beside it, unless both are there for the same settings and files.

    Raises UserError for queries that cannot be read, ids that stand for two texts, and collections without messages.
    """
    account_path, identity = path.with_suffix(".json"), _identity(config, sources)
    if path.is_file() and (known := _read_account(account_path, identity)):
        return known
    make_directory(path.parent)
    messages = load_messages(config.messages)
    reader = QueryReader(tuple(sources), tuple(config.against), config.few_shot, config.messages, config.seed)
    account = PlanAccount()
    with ExitStack() as stack:
        pool = _pool(config, sources, stack)
        found = _survey_all(reader, pool, account)
        _require_messages(messages, found)
        taken = _sampled(config, found, account)
        shares = _shares(config, [found[index].id for index in taken])
        with written_whole(path) as partial_path, partial_path.open("wb") as file:
            wanted = _wanted(reader, found, dict(zip(taken, shares)))
            for lines, counted in ordered_map(partial(_plan_rows, reader), _batches(wanted), pool):
                file.write(lines)
                for (collection, message), count in counted.items():
                    by_message = account.messages.setdefault(collection, {})
                    by_message[message] = by_message.get(message, 0) + count
    account.planned = len(taken)
    names = [teacher.name for teacher in config.teachers]
    account.asked = {name: sum(name in share for share in shares) for name in names}
    account.messages = {key: dict(sorted(counts.items())) for key, counts in sorted(account.messages.items())}
    assert account.read == account.planned + sum(account.left_out.values()), account
    if not taken:
        raise UserError(f"no query is left to ask: {', '.join(f'{n:,} {why}' for why, n in account.left_out.items())}")
    write_whole(account_path, orjson.dumps({"identity": identity, **asdict(account)}, option=orjson.OPT_INDENT_2))
    return account


def read_plan(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a plan."""
    with path.open("rb") as file:
        yield from map(orjson.loads, file)


# --- The first pass ---------------------------------------------------------------------------------------------------


def _survey_all(reader: QueryReader, pool: Any, account: PlanAccount) -> list[Survey | None]:
    """What is known about each record, in the order of the files; None for those that are left out."""
    found: list[Survey | None] = []
    seen: dict[str, bytes] = {}  # id -> digest of its text
    for batch in ordered_map(partial(_survey, reader), _batches(_records(reader.sources)), pool):
        for each in batch:
            account.read += 1
            if each.reason:
                account.leave_out(each.reason, each.where)
                found.append(None)
            elif each.id in seen and seen[each.id] != each.digest:
                raise UserError(
                    f"{each.where}: another query has the id {each.id!r}, too; give each query an id of its own"
                )
            elif each.id in seen:
                account.leave_out("the same id and text again", each.where)
                found.append(None)
            else:
                seen[each.id] = each.digest
                found.append(each)
    return found


def _survey(reader: QueryReader, batch: list[tuple[int, RawRecord]]) -> list[Survey]:
    return [_survey_one(reader, number, record) for number, record in batch]


def _survey_one(reader: QueryReader, number: int, record: RawRecord) -> Survey:
    read = parsed(record)
    if read.error:
        return Survey(record.where, f"unreadable: {read.error.split(':')[0]}")
    try:
        query = read_query(read.value, reader.sources[number])
    except NoQuery as reason:
        return Survey(record.where, str(reason))
    if query.few_shot and not reader.few_shot:
        return Survey(record.where, "few-shot")
    if reader.against and (benchmark := _contaminated_by(query, reader.against)):
        return Survey(record.where, f"shares text with {benchmark}")
    text = f"{query.collection}\0{query.task}\0{query.system}\0{query.text}"
    return Survey(
        where=record.where,
        id=query.id,
        digest=hashlib.blake2b(text.encode(), digest_size=8).digest(),
        # With multiple choice, because messages may depend on it.
        collection=f"{query.collection}\0{int(query.multiple_choice)}{int(query.system is not None)}",
        task=query.task,
    )


def _contaminated_by(query: Query, against: tuple[str, ...]) -> str | None:
    """The benchmark with which a query shares text, None if there is none."""
    from fastft.data.conversation import Conversation, Message
    from fastft.data.dedup.contamination import load_benchmarks

    hits = load_benchmarks(against).hits(Conversation(query.id, [Message("user", query.text)]))
    return hits[0].benchmark if hits else None


def _require_messages(messages: SystemMessages, found: Iterable[Survey | None]) -> None:
    """Raise UserError, before anything is asked, if a collection has no messages."""
    for kind in dict.fromkeys(each.collection for each in found if each):
        collection, marks = kind.split("\0")
        if marks[1] == "0":
            messages.drawn(0, "", collection, marks[0] == "1")


# --- Which are asked, and by whom -------------------------------------------------------------------------------------


def _sampled(config: DistillConfig, found: list[Survey | None], account: PlanAccount) -> list[int]:
    """The positions of the queries that the sample takes, in order. Raises UserError for a rule about no collection."""
    import numpy as np

    from fastft.distill.queries.sample import chosen, per_task_counts

    members: dict[str, list[int]] = {}
    for index, each in enumerate(found):
        if each:
            members.setdefault(each.collection.split("\0")[0], []).append(index)
    if unknown := [name for name in config.sample if name not in members]:
        raise UserError(
            f"sample: no query is of the collection {unknown[0]!r} (there are {', '.join(sorted(members))})"
        )
    taken: list[int] = []
    for collection, places in sorted(members.items()):
        names, tasks = np.unique([found[index].task for index in places], return_inverse=True)
        sizes = np.bincount(tasks, minlength=len(names))
        rule = config.sample.get(collection, "all")
        counts = per_task_counts(sizes, rule, draw(config.seed, "algorithm 1", collection))
        if config.sample and collection not in config.sample:
            counts = counts * 0  # a sample names the collections that it takes
        kept = chosen([found[index].id for index in places], tasks, counts, config.seed)
        for index, is_kept in zip(places, kept):
            if not is_kept:
                account.leave_out("not sampled", found[index].where)
        taken += [index for index, is_kept in zip(places, kept) if is_kept]
        account.collections[collection] = {
            "queries": len(places),
            "tasks": len(names),
            "planned": int(counts.sum()),
            "exhausted_tasks": int((counts == sizes).sum()),
        }
    return sorted(taken)


def _shares(config: DistillConfig, ids: list[str]) -> list[tuple[str, ...]]:
    """The teachers of each query: those with a share below 1 get exactly that part, the queries that a hash puts first."""
    ranked = sorted(range(len(ids)), key=lambda index: (draw(config.seed, "share", ids[index]), ids[index]))
    rank = [0] * len(ids)
    for place, index in enumerate(ranked):
        rank[index] = place
    limits = [(teacher.name, round(teacher.share * len(ids))) for teacher in config.teachers]
    return [tuple(name for name, limit in limits if place < limit) for place in rank]


# --- The second pass --------------------------------------------------------------------------------------------------


def _wanted(
    reader: QueryReader, found: list[Survey | None], shares: dict[int, tuple[str, ...]]
) -> Iterator[tuple[int, RawRecord, tuple[str, ...]]]:
    """Yield (source, record, teachers) of each record that is asked. Raises UserError if the files have changed meanwhile."""
    count = 0
    for index, (number, record) in enumerate(_records(reader.sources)):
        count += 1
        if index in shares:
            yield number, record, shares[index]
    if count != len(found):
        raise UserError("the files of queries have changed while they were read; start the same command again")


def _plan_rows(
    reader: QueryReader, batch: list[tuple[int, RawRecord, tuple[str, ...]]]
) -> tuple[bytes, Counter[tuple[str, str]]]:
    """The rows of the plan for a batch, and how often each message was drawn, by (collection, message)."""
    messages, lines, counted = _messages(reader.messages), [], Counter()
    for number, record, teachers in batch:
        query = read_query(parsed(record).value, reader.sources[number])
        name, system = OWN, query.system
        if system is None:
            name, system = messages.drawn(reader.seed, query.id, query.collection, query.multiple_choice)
        row = {
            "id": query.id,
            "collection": query.collection,
            "task": query.task,
            "message": name,
            "system": system,
            "query": query.text,
            "gold": query.gold,
            "options": query.options,
            "teachers": teachers,
        }
        lines.append(orjson.dumps(row) + b"\n")
        kind = f"{query.collection}{' (multiple choice)' if query.multiple_choice else ''}"
        counted[kind, name] += 1
    return b"".join(lines), counted


@lru_cache(maxsize=1)
def _messages(place: str) -> SystemMessages:
    return load_messages(place)


# --- Files and processes ----------------------------------------------------------------------------------------------


def _records(sources: Iterable[QuerySource]) -> Iterator[tuple[int, RawRecord]]:
    for number, source in enumerate(sources):
        for record in records_of(source):
            yield number, record


def _batches(items: Iterable[Any]) -> Iterator[list[Any]]:
    batch: list[Any] = []
    for item in items:
        batch.append(item)
        if len(batch) == BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def _pool(config: DistillConfig, sources: list[QuerySource], stack: ExitStack) -> Any:
    """Processes for large files, or as many as the settings name; None if this one alone is as fast."""
    size = sum(Path(source.path).stat().st_size for source in sources if Path(source.path).is_file())
    workers = config.workers or (len(os.sched_getaffinity(0)) if size > FEW else 1)
    if workers == 1:
        return None
    return stack.enter_context(process_pool(workers, ["fastft.distill.plan", "fastft.data.dedup.contamination"]))


def _identity(config: DistillConfig, sources: list[QuerySource]) -> str:
    """A digest of everything that the plan is a function of; files count by size and time of change."""
    files = [source.path for source in sources] + config.against + [config.messages]
    stats = file_stats(files)
    shares = [(teacher.name, teacher.share) for teacher in config.teachers]
    settings = [config.sample, config.messages, config.few_shot, config.against, config.seed, shares]
    everything = [FORMAT, [asdict(source) for source in sources], stats, settings]
    return hashlib.blake2b(json.dumps(everything).encode(), digest_size=16).hexdigest()


def _read_account(path: Path, identity: str) -> PlanAccount | None:
    """The account of the plan that is there, None if it was made for other settings."""
    try:
        found = orjson.loads(path.read_bytes())
    except (OSError, orjson.JSONDecodeError):
        return None
    return PlanAccount(**found) if isinstance(found, dict) and found.pop("identity", None) == identity else None
