"""The settings of a distillation, as one YAML file holds them, checked where they can be before anything is asked.

    fastft distill distill.yaml --dry_run

Every key is a field of `DistillConfig`. docs/distill.md shows a whole file.
"""

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fastft.common.command_line import option
from fastft.errors import UserError
from fastft.inference.endpoint import Limits, split_address

GENERIC = "You are a careful assistant. Follow the instructions, think before you answer, and say it plainly."
CHECKS = ("auto", "choice", "number", "text", "none")
RULES = ("all", "none")
OURS = {"model", "messages", "stream", "n", "attempt"}  # of a request; others are the user's


@dataclass
class QuerySource:
    """Where queries come from: a file, or a recipe that makes them."""

    path: str | None = None
    """JSON Lines, JSON or Parquet, also packed; a directory, or a name on the Hub (owner/name). For evolve, the seeds."""
    collection: str | None = None
    """The collection of the rows that name none; by default the file's name, or the recipe's."""
    recipe: Literal["none", "evolve", "magpie"] = "none"
    """evolve has a teacher rewrite seed queries (Evol-Instruct); magpie has a model's directory write what a user would say."""
    teacher: str | None = None
    """For evolve: the teacher that rewrites, by its name."""
    rounds: int = 1
    """For evolve: how often each seed is rewritten, one rewriting on top of the other."""
    model: str | None = None
    """For magpie: a chat model's directory."""
    count: int = 100
    """For magpie: how many queries are drawn, before its rules eliminate some."""
    temperature: float = 1.0
    """Of the recipe."""
    max_tokens: int = 512
    """The longest query that a recipe may make."""
    prompts: str | None = None
    """A YAML file in the place of the recipe's own prompts and rules."""


@dataclass
class TeacherConfig:
    """An OpenAI-compatible endpoint, or several with the same model, that answers one stage of the training data."""

    name: str
    """What files and the page call it."""
    url: str | list[str]
    """The endpoint's address, such as https://api.example.com/v1; several share the work, each within the limits."""
    model: str
    """The model's name there."""
    share: float = 1.0
    """The part of the queries that it is asked, drawn at random; smaller shares lie inside larger ones."""
    temperature: float | None = 0.7
    """None leaves it to the endpoint."""
    top_p: float | None = None
    max_tokens: int = 1024
    """The longest answer, in tokens; a longer one is cut, and not learned."""
    parameters: dict[str, Any] = field(default_factory=dict)
    """Whatever else the endpoint is to be sent, such as reasoning_effort."""
    mode: Literal["chat", "batch"] = "chat"
    """batch sends files of requests to /v1/batches, which costs less and may take a day."""
    usd_per_million: tuple[float, float] | None = None
    """Dollars for a million prompt tokens, and for a million reply tokens; batches cost half."""
    max_usd: float | None = None
    """Stop asking this teacher before more is spent, all starts together."""
    reply_tokens: int | None = None
    """The mean length of an answer, for estimates; by default what the answers so far have, else max_tokens."""
    concurrency: int = Limits.concurrency
    """Requests at a time, for each address."""
    rpm: float = Limits.rpm
    """Requests a minute for each address, 0 for no limit."""
    tpm: float = Limits.tpm
    """Tokens a minute for each address, 0 for no limit."""
    timeout: float = Limits.timeout_s
    """Seconds for one request."""
    retries: int = Limits.retries
    """Tries of one request after the first."""
    key_env: str = ""
    """The environment variable with the key."""
    any_version: bool = False
    """Go on if the endpoint gives its model another name than before, as it does for a new version."""

    @property
    def addresses(self) -> list[str]:
        """URL#name of every address."""
        urls = [self.url] if isinstance(self.url, str) else self.url
        return [f"{url.rstrip('/')}#{self.model}" for url in urls]

    @property
    def limits(self) -> Limits:
        return Limits(self.concurrency, self.rpm, self.tpm, self.retries, self.timeout)

    @property
    def sent(self) -> dict[str, Any]:
        """The parameters of every request."""
        own = {"temperature": self.temperature, "top_p": self.top_p, "max_tokens": self.max_tokens}
        return {name: value for name, value in {**own, **self.parameters}.items() if value is not None}


@dataclass
class JudgeThreshold:
    """A model that scores answers from 1 to 10; what it scores below `least` is not learned."""

    url: str | None = None
    """The judge's address; without one, nothing is judged."""
    model: str = ""
    """Its name there."""
    least: float = 6.0
    """The lowest score that is kept."""
    max_tokens: int = 1024
    usd_per_million: tuple[float, float] | None = None
    max_usd: float | None = None
    key_env: str = ""


@dataclass
class VerifyConfig:
    """What keeps an answer out of the training data. Each check can be switched off."""

    gold: str | dict[str, str] = "auto"
    """How answers are compared with gold answers: auto, choice, number, text or none; also by collection."""
    agreement: bool = False
    """Keep answers out to which the teachers disagree, where a question has options or a number as its answer."""
    refusals: Literal["drop", "keep"] = "drop"
    cut: Literal["drop", "keep"] = "drop"
    empty: Literal["drop", "keep"] = "drop"
    repeats: Literal["drop", "share"] = "drop"
    """Equal requests are paid for once. share learns the answer each time, drop only once."""
    near: float = 0.8
    """Similarity from which two conversations of a stage are near duplicates, from 0.3 to 1; 0 keeps all."""
    judge: JudgeThreshold = field(default_factory=JudgeThreshold)

    def check_for(self, collection: str) -> str:
        """How gold answers of `collection` are compared."""
        return self.gold if isinstance(self.gold, str) else self.gold.get(collection, "auto")


@dataclass
class StudentConfig:
    """What the ready train.yaml says; `fastft train --config` explains its keys."""

    model: str = "MODEL"
    """The model that learns: a directory or a name on the Hub."""
    epochs: int = 4
    """Passes over each stage, as in Orca."""
    seq_len: int = 2048
    template: str | None = None
    """Chat template for a tokenizer that has none."""
    held_out: float = 0.0
    """The part of the queries that is not trained on. Their answers are written without system messages, as Orca was
    evaluated, to held_out/conversations.jsonl, which train.yaml names as eval_data."""
    generic: str = GENERIC
    """The system message that erase_system puts in the place of others."""
    train: dict[str, Any] = field(default_factory=dict)
    """Further keys of train.yaml, such as optimizer or global_batch_size."""


@dataclass
class DistillConfig:
    """A distillation: queries, system messages, teachers, checks, and what the student gets."""

    output: str = option(short="-o")
    """The directory of the run; the same command goes on where it stopped."""
    queries: str | list[QuerySource]
    """A file of queries; in YAML also a list, each with path and collection, or a recipe."""
    teachers: list[TeacherConfig] = field(default_factory=list)
    """In YAML: one file of conversations and one training stage each, in this order."""
    sample: dict[str, Any] = field(default_factory=dict)
    """In YAML: by collection all, none, or {per_task: N, total: N}; total draws tasks uniformly (Orca's Algorithm 1)."""
    messages: str = "orca"
    """System messages: orca, none, or a YAML file of your own."""
    few_shot: bool = False
    """Also take rows that are marked as few-shot; Orca took zero-shot ones only."""
    against: list[str] = option(several=True)
    """Files of benchmark questions; a query that shares text with one is not asked."""
    verify: VerifyConfig = field(default_factory=VerifyConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    erase_system: float = 0.0
    """The part of the training rows whose system message is replaced by student.generic (Orca 2's prompt erasing)."""
    max_usd: float | None = None
    """Stop before all teachers together have cost more, all starts together."""
    batch: bool = False
    """Ask all teachers by batch files."""
    seed: int = 0
    """The plan is a function of the queries, the sample, the messages and the seed."""
    workers: int | None = None
    """Processes that read queries; by default as many as there are cores, for large files only."""
    dry_run: bool = False
    """Show what would be asked, what that would cost and how long it would take; ask and write nothing."""

    def __post_init__(self) -> None:
        if self.batch:
            for teacher in self.teachers:
                teacher.mode = "batch"
        for check in (_check_sources, _check_teachers, _check_sample, _check_verify, _check_student):
            check(self)

    @property
    def directory(self) -> Path:
        return Path(self.output)

    @property
    def sources(self) -> list[QuerySource]:
        return [QuerySource(self.queries)] if isinstance(self.queries, str) else self.queries

    def teacher(self, name: str) -> TeacherConfig:
        return next(each for each in self.teachers if each.name == name)


def _check_sources(config: DistillConfig) -> None:
    names = [teacher.name for teacher in config.teachers]
    if not config.sources:
        raise UserError("queries: name a file of queries")
    for source in config.sources:
        if source.recipe != "magpie" and not source.path:
            raise UserError(f"queries: {'the seeds of evolve need' if source.recipe == 'evolve' else 'give'} a path")
        if source.recipe == "evolve" and source.teacher not in names:
            raise UserError(f"queries: evolve: teacher is {source.teacher}, not one of {', '.join(names)}")
        if source.recipe == "magpie" and not source.model:
            raise UserError("queries: magpie: model: name a chat model's directory")
        _require(source.rounds >= 1, "queries: rounds", source.rounds, "1 or more")
        _require(source.count >= 1, "queries: count", source.count, "1 or more")
    made = [source.collection or source.recipe for source in config.sources if source.recipe != "none"]
    if len(set(made)) < len(made):
        raise UserError("queries: two recipes have one collection; name another for one of them")


def _check_teachers(config: DistillConfig) -> None:
    names = [teacher.name for teacher in config.teachers]
    if not names:
        raise UserError("teachers: name at least one")
    if len(set(names)) < len(names):
        raise UserError(f"teachers: two of them are called {max(names, key=names.count)!r}")
    for teacher in config.teachers:
        at = f"teachers: {teacher.name}"
        _require(
            bool(re.fullmatch(r"[\w.-]+", teacher.name)), at, repr(teacher.name), "letters, digits, points, - and _"
        )
        for address in teacher.addresses:
            split_address(address)
        if len(set(teacher.addresses)) < len(teacher.addresses):
            raise UserError(f"{at}: the same address is given twice")
        _require(0 < teacher.share <= 1, f"{at}: share", teacher.share, "above 0 and at most 1")
        _require(teacher.max_tokens >= 1, f"{at}: max_tokens", teacher.max_tokens, "1 or more")
        _require(teacher.concurrency >= 1, f"{at}: concurrency", teacher.concurrency, "1 or more")
        for name in ("rpm", "tpm"):
            _require(getattr(teacher, name) >= 0, f"{at}: {name}", getattr(teacher, name), "0 or more")
        _require(teacher.timeout > 0, f"{at}: timeout", teacher.timeout, "above 0")
        if ours := sorted(OURS & set(teacher.parameters)):
            raise UserError(f"{at}: parameters: {ours[0]} is set by distill itself")
        _require(teacher.retries >= 0, f"{at}: retries", teacher.retries, "0 or more")
        _check_money(at, teacher.usd_per_million, teacher.max_usd)
    requests = [(teacher.model, repr(sorted(teacher.sent.items()))) for teacher in config.teachers]
    if len(set(requests)) < len(requests):
        one = max(requests, key=requests.count)
        alike = [name for name, request in zip(names, requests) if request == one]
        raise UserError(
            f"teachers: {' and '.join(alike)} would be sent the same requests (model {one[0]}, equal parameters), so their "
            "answers could not be told apart; change a parameter of one of them, or give one teacher both addresses"
        )
    free = [teacher.name for teacher in config.teachers if not teacher.usd_per_million]
    if config.max_usd is not None:
        _require(config.max_usd > 0, "max_usd", config.max_usd, "above 0")
        if free:
            raise UserError(f"max_usd: {free[0]} has no usd_per_million; [0, 0] says that it is free")


def _check_money(at: str, prices: tuple[float, float] | None, most: float | None) -> None:
    for usd in prices or ():
        _require(0 <= usd < math.inf, f"{at}: usd_per_million", usd, "0 or more and finite")
    if most is not None:
        _require(most > 0, f"{at}: max_usd", most, "above 0")
        if prices is None:
            raise UserError(f"{at}: max_usd needs usd_per_million: prices are not known here")


def _check_sample(config: DistillConfig) -> None:
    for collection, rule in config.sample.items():
        if rule in RULES:
            continue
        if not isinstance(rule, dict) or not rule or set(rule) - {"per_task", "total"}:
            raise UserError(f"sample: {collection}: {rule!r} is not all, none, or {{per_task: N, total: N}}")
        for name, number in rule.items():
            whole = isinstance(number, int) and not isinstance(number, bool) and number >= 1
            _require(whole, f"sample: {collection}: {name}", number, "a whole number above 0")


def _check_verify(config: DistillConfig) -> None:
    verify = config.verify
    for collection, check in [("", verify.gold)] if isinstance(verify.gold, str) else verify.gold.items():
        _require(check in CHECKS, f"verify: gold{': ' * bool(collection)}{collection}", check, f"one of {CHECKS}")
    _require(verify.near == 0 or 0.3 <= verify.near <= 1, "verify: near", verify.near, "0, or between 0.3 and 1")
    if verify.judge.url:
        split_address(f"{verify.judge.url}#{verify.judge.model}")
        _check_money("verify: judge", verify.judge.usd_per_million, verify.judge.max_usd)


def _check_student(config: DistillConfig) -> None:
    _require(0 <= config.erase_system <= 1, "erase_system", config.erase_system, "between 0 and 1")
    _require(0 <= config.student.held_out < 1, "student: held_out", config.student.held_out, "at least 0 and below 1")
    for name in ("epochs", "seq_len"):
        _require(getattr(config.student, name) >= 1, f"student: {name}", getattr(config.student, name), "1 or more")
    _require(config.workers is None or config.workers >= 1, "workers", config.workers, "1 or more")


def _require(holds: bool, key: str, value: Any, wanted: str) -> None:
    if not holds:
        raise UserError(f"{key}: {value} is not {wanted}")
