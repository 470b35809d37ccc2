"""Have all candidates answer queries, and score the answers: `fastft router outcomes QUERIES --candidates … -o outcomes.jsonl`.

    fastft router outcomes q.jsonl --candidates small=runs/a/model large=http://10.0.0.5:8000/v1#large -o outcomes.jsonl
    fastft router outcomes q.jsonl --candidates … --reward_model models/reward -o outcomes.jsonl
    fastft router outcomes q.jsonl --candidates … --judge https://api.openai.com/v1#gpt-4.1 --dry_run -o outcomes.jsonl

QUERIES are JSON Lines: {"id", "query" (or "prompt"), "tags"?, "gold"?}. Gold answers make `correct`; a reward model or a judge
makes `rewards`; without either, `rewards` is `correct`. Answers and scores are kept in outcomes.work/, so that the same
command continues after a kill, and asks and pays for nothing twice. What people said about served answers is exported by
`fastft record export DIR --as outcomes`.
"""

import hashlib
import json
import logging
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from fastft.common.command_line import option, parse, run_module
from fastft.common.files import (
    make_directory,
    require_not_input,
    require_place,
    short_name,
    split_name,
    write_whole,
)
from fastft.common.records import repair_text
from fastft.compose.router.figures.verdict import counted
from fastft.errors import UserError
from fastft.inference.budget import FREE, Cache, Money, Price
from fastft.inference.client import Client, make_clients
from fastft.inference.endpoint import EndpointConfig, is_address, key_variables
from fastft.judge.answer import (
    Answerer,
    ModelConfig,
    answer_all,
    answered_before,
    answerer_for,
    cut_torn_line,
    estimate_prompt,
)
from fastft.judge.exams.gold import Check, is_right, kind_of_gold
from fastft.judge.exams.options import options_in
from fastft.judge.pairwise import JudgeTask, estimate, judge_all, load_prompts
from fastft.judge.questions import Answer, Question
from fastft.judge.rows import is_text, read_objects

if TYPE_CHECKING:
    from fastft.compose.router.scoring.reward_model import RewardModel

logger = logging.getLogger(__name__)

JUDGE_TOKENS = 1024
"""The longest reply of a judge."""
Answers = dict[str, dict[str, Answer]]
"""By model and by the question's id."""
Rewards = dict[tuple[str, str], float | None]
"""By query and model."""


@dataclass(kw_only=True)
class CollectConfig:
    """What is asked, who answers, and what scores the answers."""

    queries: Path = option(positional=True)
    """Queries as JSON Lines: {"id", "query", "tags", "gold"}."""
    candidates: list[str] = option(several=True)
    """The models between which the router will choose, each DIR or URL#name, or NAME=… to give it another name."""
    candidate_key_env: list[str] = option(several=True)
    """The environment variable with the key for an endpoint; once for each endpoint among the candidates, '' for none."""
    gold: Check = "auto"
    """How answers are compared with gold answers: by the option they name, their number, their text, or not at all."""
    reward_model: str | None = None
    """A directory with a sequence classifier of one output, which scores each answer."""
    judge: str | None = None
    """URL#name of an endpoint that grades each answer from 1 to 10."""
    judge_key_env: str = ""
    """The environment variable with the key for --judge."""
    temperature: float = 0.0
    """0 always takes the likeliest token."""
    max_tokens: int = 512
    """The longest answer, in tokens."""
    batch_size: int = 16
    """Questions at a time, for a model's directory."""
    allow_missing: bool = False
    """Write the outcomes even if some answers or scores are missing; they are named, and never read as 0."""
    dry_run: bool = False
    """Say what would be asked and what that would cost, and ask nothing."""
    output: Path = option(short="-o")
    """The file of outcomes to write."""

    def __post_init__(self) -> None:
        if len(self.candidates) < 2:
            raise UserError("--candidates: name two models or more; a router of one has nothing to choose")
        if self.reward_model and self.judge:
            raise UserError("--reward_model and --judge both score the answers; give one of them")
        if self.output.is_dir():
            raise UserError(f"{self.output}: is a directory; -o names the file of outcomes")
        require_not_input(self.output, [self.queries])


@dataclass(frozen=True)
class QueryRow:
    """A query, and the question as which it is asked."""

    id: str
    question: Question
    tags: list[str]
    gold: str | None

    @property
    def text(self) -> str:
        return self.question.turns[0]


def main(argv: Sequence[str]) -> int:
    """Run `fastft router outcomes`. Raises UserError if answers or scores are missing at the end."""
    config, endpoint = parse(
        argv, "fastft router outcomes", "Score what the candidates answer to queries.", CollectConfig, EndpointConfig
    )
    collect(config, endpoint)
    return 0


def collect(config: CollectConfig, endpoint: EndpointConfig) -> None:
    """Say what it takes, ask, score, write."""
    queries = read_queries(config.queries)
    _require_scores(config, queries)
    models = _models(config)
    prices = _prices(models, config, endpoint)
    require_place(config.output)
    work = CollectedAnswers(config.output.with_suffix(".work"), config, endpoint, queries)
    for model, price in zip(models, prices):
        print(work.would_ask(model, price))
    if config.judge:
        print(work.would_judge(len(models), prices[-1]))
    if config.dry_run:
        return
    make_directory(work.directory)
    answers = {model.shown_name: work.answers(model, price) for model, price in zip(models, prices)}
    rewards = (
        work.judged(answers, prices[-1]) if config.judge else work.scored(answers) if config.reward_model else None
    )
    rows = list(outcomes_of(queries, answers, rewards, config.gold, dict(zip(answers, prices))))
    write_whole(config.output, repair_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)))
    spent = f", ${work.spent:.2f}" if work.spent else ""
    print(f"{config.output}: {counted(len(rows))}, {len(models)} models{spent}")
    _show_missing(rows, config)


def _show_missing(rows: list[dict[str, Any]], config: CollectConfig) -> None:
    """Raise UserError, or warn, if scores are missing."""
    missing = Counter(model for row in rows for model, score in row["rewards"].items() if score is None)
    if missing:
        named = ", ".join(f"{model} {count:,}" for model, count in missing.items())
        total = missing.total()
        said = f"{config.output}: {total:,} {'score is' if total == 1 else 'scores are'} missing ({named})"
        if not config.allow_missing:
            raise UserError(f"{said}; the same command continues with them, or --allow_missing takes them as they are")
        logger.warning("%s: null in the file, never read as 0", said)


# Queries and candidates ----------------------------------------------------------------------------------------------------


def read_queries(path: Path) -> list[QueryRow]:
    """Return the queries of a file. Raises UserError, with its line, for what is none and for an id that is used twice."""
    found: dict[str, QueryRow] = {}
    for record in read_objects(path):
        row = record.value
        text, gold, tags = row.get("query", row.get("prompt")), row.get("gold"), row.get("tags") or []
        if not is_text(text):
            raise UserError(f'{record.where}: is no query: {{"id", "query", "tags", "gold"}}, with "query" as a text')
        if not isinstance(tags, list) or not all(map(is_text, tags)):
            raise UserError(f'{record.where}: "tags" must be a list of texts')
        if isinstance(gold, (int, float)) and not isinstance(gold, bool):
            gold = f"{gold:g}" if isinstance(gold, float) else str(gold)
        if gold is not None and not is_text(gold):
            raise UserError(f'{record.where}: "gold" must be a text or a number')
        name = str(row.get("id") or record.where)
        if name in found:
            raise UserError(f"{record.where}: the id {name} is used twice")
        # The id of the question changes with its text, so that no answer to an earlier wording is taken for one to it.
        asked = f"{name} {hashlib.sha256(text.encode()).hexdigest()[:8]}"
        found[name] = QueryRow(name, Question(asked, "", (text,), (gold,) if gold else None), tags, gold)
    if not found:
        raise UserError(f"{path}: holds no queries")
    return list(found.values())


def _require_scores(config: CollectConfig, queries: list[QueryRow]) -> None:
    """Raise UserError if nothing would score some answer."""
    if config.reward_model:
        from fastft.compose.router.scoring.reward_model import require_reward_model

        require_reward_model(config.reward_model)
    if config.reward_model or config.judge:
        return
    if config.gold == "none":
        raise UserError(
            "nothing scores the answers: give --reward_model DIR or --judge URL#name, or compare with gold answers"
        )
    if without := [query for query in queries if query.gold is None]:
        raise UserError(
            f"{config.queries}: {len(without):,} of {len(queries):,} queries have no gold answer, the first is {without[0].id}; "
            "give --reward_model DIR or --judge URL#name"
        )
    if config.gold == "auto":
        for query in queries:
            if kind_of_gold(query.gold or "", options_in(query.text)) == "none":
                raise UserError(
                    f"{config.queries}: the gold answer of {query.id} is no option, number or short text; --gold text takes an "
                    "answer that contains it as right"
                )


def _models(config: CollectConfig) -> list[ModelConfig]:
    """The candidates. Raises UserError if two have one name."""
    named = [split_name(each) for each in config.candidates]
    addresses = [place for _, place in named if is_address(place)]
    keys = dict(zip(addresses, key_variables(config.candidate_key_env, addresses)))
    common = {name: getattr(config, name) for name in ("temperature", "max_tokens", "batch_size")}
    models = []
    for name, place in named:
        if not is_address(place) and not (Path(place) / "config.json").is_file():
            raise UserError(f"--candidates {place}: holds no model (there is no config.json); an endpoint is URL#name")
        name = name or (None if is_address(place) else short_name(place))
        key = [keys[place]] if keys.get(place) else []
        models.append(ModelConfig(model=place, name=name, model_key_env=key, **common))
    names = [model.shown_name for model in models]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"--candidates: two are called {twice[0]!r}; give one another name: NAME={named[-1][1]}")
    return models


def _prices(models: list[ModelConfig], config: CollectConfig, endpoint: EndpointConfig) -> list[Price]:
    """The price of each candidate, which is nothing for directories, and of the judge at the end, if there is one."""
    paid = [is_address(model.model) for model in models] + [True] * bool(config.judge)
    given = iter(endpoint.prices(sum(paid)))
    return [next(given) if each else FREE for each in paid]


# Answers and scores --------------------------------------------------------------------------------------------------------


class CollectedAnswers:
    """The folder beside the outcomes in which answers and scores are kept, and the money that is left to ask for more."""

    def __init__(self, directory: Path, config: CollectConfig, endpoint: EndpointConfig, queries: list[QueryRow]):
        self.directory, self.config, self.endpoint, self.queries = directory, config, endpoint, queries
        self.questions = [query.question for query in queries]
        self.spent = 0.0

    def would_ask(self, model: ModelConfig, price: Price) -> str:
        """Say what is still to be asked of a candidate."""
        answerer, path = self._answerer(model, price)
        _set_aside(path, {question.id for question in self.questions})
        done = answered_before(path, answerer.name, answerer.made_with, self.questions)
        missing = [question for question in self.questions if question.id not in done]
        return f"{answerer.name}: {answerer.would_ask(missing)}"

    def answers(self, model: ModelConfig, price: Price) -> dict[str, Answer]:
        """The answers of a candidate by the question's id. Raises UserError if some are missing, unless that is allowed."""
        answerer, path = self._answerer(model, price)
        try:
            return answer_all(self.questions, path, answerer)[0]
        except UserError as error:
            if not (self.config.allow_missing and path.is_file()):
                raise
            logger.warning("%s: %s", answerer.name, error)
            return answered_before(path, answerer.name, answerer.made_with, self.questions)
        finally:
            self.spent = answerer.money.spent

    def _answerer(self, model: ModelConfig, price: Price) -> tuple[Answerer, Path]:
        path = self.directory / f"{model.shown_name.replace('/', '_')}.jsonl"
        usd = [f"{price[0]},{price[1]}"] if any(price) else []
        limit = self.endpoint.max_usd if any(price) else None
        answerer = answerer_for(model, replace(self.endpoint, usd_per_million=usd, max_usd=limit), path)
        answerer.money.spent = self.spent  # one limit for all of them
        return answerer, path

    def scored(self, answers: Answers) -> Rewards:
        """Scores by the reward model. Each is kept under a hash of the model, the query and the answer."""
        from fastft.compose.router.scoring.reward_model import RewardModel

        model = RewardModel(self.config.reward_model or "", self.config.batch_size)
        kept = _KeptScores(self.directory / "rewards.jsonl")
        pairs = {
            _key(model.digest, query.text, found.turns[0]): (query.text, found.turns[0])
            for those in answers.values()
            for query in self.queries
            if (found := those.get(query.question.id))
        }
        kept.fill({key: pair for key, pair in pairs.items() if key not in kept.scores}, model)
        return {
            (query.id, name): kept.scores.get(_key(model.digest, query.text, found.turns[0]))
            for name, those in answers.items()
            for query in self.queries
            if (found := those.get(query.question.id))
        }

    def judged(self, answers: Answers, price: Price) -> Rewards:
        """Grades by the judge, 1 to 10; an unreadable one is missing."""
        ids = {query.question.id: query.id for query in self.queries}
        money = Money(self.endpoint.max_usd if any(price) else None)
        money.spent = self.spent
        client, prompts, tasks = self._judge(price, money), load_prompts(), []
        for query in self.queries:
            found = [those[query.question.id] for those in answers.values() if query.question.id in those]
            tasks += [JudgeTask(query.question, 1, answer, None) for answer in found]
        calls, prompt, reply, usd = estimate(tasks, [client], prompts, JUDGE_TOKENS)
        logger.info(
            "judge: %s calls, about %s prompt and %s reply tokens, $%.2f",
            *(f"{n:,}" for n in (calls, prompt, reply)),
            usd,
        )
        judgments, stopped = judge_all(tasks, [client], prompts, JUDGE_TOKENS, money)
        self.spent = money.spent
        if stopped:
            logger.warning("judge: %s", stopped)
        return {(ids[each.question_id], each.model_a): each.score_a for each in judgments}

    def would_judge(self, models: int, price: Price) -> str:
        """Say what grading takes at most, before the answers are known."""
        calls = models * len(self.queries)
        instructions = estimate_prompt([load_prompts()["single-reference"]])
        prompt = models * (estimate_prompt([q.text for q in self.queries])) + calls * (
            instructions + self.config.max_tokens
        )
        client = self._judge(price, Money())
        usd = f", at most ${client.usd(prompt, calls * JUDGE_TOKENS):.2f}" if any(price) else ""
        return f"{client.label}: would grade {calls:,} answers: at most {prompt:,} prompt tokens{usd}"

    def _judge(self, price: Price, money: Money) -> Client:
        keys = [self.config.judge_key_env] if self.config.judge_key_env else []
        cache = Cache(self.directory / "judge.cache.jsonl")
        return make_clients([self.config.judge or ""], keys, self.endpoint.limits, [price], cache, money)[0]


def _set_aside(path: Path, asked: set[str]) -> None:
    """Move answers to queries that are not asked this time to a file beside `path`, and those that are asked again back."""
    aside = path.with_suffix(".aside.jsonl")
    lines: dict[str, bytes] = {}
    for each in (aside, path):
        if each.is_file():
            cut_torn_line(each)
            lines |= {
                row["question_id"]: line for line in each.read_bytes().splitlines() if (row := orjson.loads(line))
            }
    if not lines or (not aside.is_file() and lines.keys() <= asked):
        return
    # First all of them aside, so that a kill between two steps loses none.
    for place, wanted in ((aside, lines.keys()), (path, lines.keys() & asked), (aside, lines.keys() - asked)):
        write_whole(place, b"".join(line + b"\n" for name, line in lines.items() if name in wanted))


class _KeptScores:
    """Scores in a file to which each batch is appended at once."""

    def __init__(self, path: Path):
        self.path, self.scores = path, {}
        if path.is_file():
            cut_torn_line(path)
            self.scores = {row.value["key"]: row.value["score"] for row in read_objects(path)}

    def fill(self, missing: dict[str, tuple[str, str]], model: "RewardModel") -> None:
        """Score what is missing, the shortest first, and keep it."""
        from rich.console import Console
        from rich.progress import track

        keys = sorted(missing, key=lambda key: sum(map(len, missing[key])))
        batches = [keys[start : start + model.batch_size] for start in range(0, len(keys), model.batch_size)]
        with open(self.path, "ab", buffering=0) as file:
            for batch in track(batches, "scoring", console=Console(stderr=True)):
                scores = dict(zip(batch, model.score([missing[key] for key in batch])))
                self.scores |= scores
                file.write(
                    b"".join(orjson.dumps({"key": key, "score": score}) + b"\n" for key, score in scores.items())
                )


def _key(*parts: str) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def outcomes_of(
    queries: list[QueryRow], answers: Answers, rewards: Rewards | None, check: Check, prices: dict[str, Price]
) -> Iterator[dict[str, Any]]:
    """A row for each query. A score is null if there is no answer, or if it could not be read."""
    priced = any(map(any, prices.values()))
    for query in queries:
        given = {name: those.get(query.question.id) for name, those in answers.items()}
        right = {name: _correct(query, answer, check) for name, answer in given.items()}
        scores = right if rewards is None else {name: _finite(rewards.get((query.id, name))) for name in given}
        row: dict[str, Any] = {"id": query.id, "query": query.text, "tags": query.tags, "rewards": scores}
        if query.gold is not None and check != "none":
            row["correct"] = right
        if priced:
            row["usd"] = {name: _usd(answer, prices[name]) for name, answer in given.items()}
        yield row


def _correct(query: QueryRow, answer: Answer | None, check: Check) -> float | None:
    kind = kind_of_gold(query.gold, options_in(query.text)) if query.gold and check == "auto" else check
    if answer is None or query.gold is None or kind == "none":
        return None
    return float(is_right(answer.turns[0], query.gold, query.text, check))


def _finite(score: float | None) -> float | None:
    return score if score is not None and math.isfinite(score) else None


def _usd(answer: Answer | None, price: Price) -> float | None:
    if answer is None:
        return None
    return (price[0] * (answer.prompt_tokens or 0) + price[1] * (answer.completion_tokens or 0)) / 1e6


if __name__ == "__main__":
    run_module(main)
