"""Make queries by a recipe: Evol-Instruct rewrites seeds, Magpie has a chat model write what a user would say.

Prompts and elimination rules are YAML (evolve.yaml, magpie.yaml, or a file of the user's). What a recipe makes is a file of
queries like any other, OUTPUT/queries/COLLECTION.jsonl; COLLECTION.json beside it says what was eliminated and why.
"""

import hashlib
import json
import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import orjson

from fastft.common.files import make_directory, write_whole
from fastft.common.records import parsed
from fastft.distill.draws import draw
from fastft.distill.queries.files import NoQuery, Query, file_stats, read_query, records_of
from fastft.distill.settings import DistillConfig, QuerySource, TeacherConfig
from fastft.errors import UserError
from fastft.inference.budget import Cache, Money
from fastft.inference.client import Client, Unanswered, run_all

logger = logging.getLogger(__name__)

STOP_WORDS = frozenset(
    "a an and are as at be but by for from in is it of on or that the this to was what with you".split()
)
AT_A_TIME = 8  # queries that a local model writes at once


@dataclass(frozen=True)
class Rules:
    """When a query that was made is eliminated. `same` is a prompt with {before} and {query}, "" for none."""

    least_words: int = 1
    most_words: int = 1000
    phrases: tuple[str, ...] = ()
    sorry_below_words: int = 0
    same: str = ""

    def against(self, text: str) -> str | None:
        """Why a text is eliminated, as far as the text alone tells; None if it is not."""
        words = re.findall(r"\w+", text.casefold())
        if not words or sum(word not in STOP_WORDS for word in words) < self.least_words:
            return "says too little"
        if len(words) > self.most_words:
            return "too long"
        if "sorry" in words and len(words) < self.sorry_below_words:
            return "an apology"
        folded = " ".join(text.casefold().split())
        return "repeats words of the instruction" if any(phrase in folded for phrase in self.phrases) else None


@dataclass
class Recipe:
    """A recipe's own YAML file."""

    rules: Rules
    steps: dict[str, str] = field(default_factory=dict)


def make_queries(config: DistillConfig, paid: dict[str, float], dry_run: bool = False) -> list[QuerySource]:
    """The sources of the plan, those of recipes as the files that they make, now if they are not there yet.

    `paid` is what each teacher's answers have cost before; it counts against the limits.

    A dry run makes none, and says what would be asked for them.
    """
    sources = []
    for source in config.sources:
        if source.recipe == "none":
            sources.append(source)
            continue
        made = _made(config, source)
        if made is None and dry_run:
            print(
                f"{source.collection or source.recipe}: is made by the first run, and is not in this plan{_calls(source)}"
            )
            continue
        sources.append(made or _make(config, source, paid))
    return sources


def recipe_usd(config: DistillConfig) -> dict[str, float]:
    """What recipes have cost so far, by teacher."""
    spent: dict[str, float] = {}
    for source in config.sources:
        if source.recipe == "evolve" and (account := _account(config, source)):
            spent[source.teacher] = spent.get(source.teacher, 0.0) + account.get("usd", 0.0)
    return spent


def load_recipe(source: QuerySource) -> Recipe:
    """Read a recipe's YAML. Raises UserError with the file and what is wrong there."""
    import yaml

    path = Path(source.prompts) if source.prompts else Path(__file__).with_name(f"{source.recipe}.yaml")
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
        rules = found.get("eliminate") or {}
        recipe = Recipe(Rules(**{**rules, "phrases": tuple(rules.get("phrases", ()))}), found.get("steps") or {})
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, AttributeError, TypeError, UnicodeDecodeError) as error:
        known = ", ".join(asdict(Rules()))
        said = " ".join(str(error).split())[:100]
        raise UserError(f"{path}: is no recipe ({said}); it has steps, and eliminate with {known}") from None
    steps = recipe.steps
    if source.recipe == "evolve" and not (steps and all("{query}" in str(text) for text in steps.values())):
        raise UserError(f"{path}: steps must be names with prompts, each of which holds {{query}}")
    return recipe


def _calls(source: QuerySource) -> str:
    if source.recipe == "magpie":
        return f": {source.count:,} texts of {source.model}"
    seeds = sum(1 for _ in _seeds(source))
    return (
        f": {seeds:,} seeds x {source.rounds} rounds, at most {2 * seeds * source.rounds:,} calls of {source.teacher}"
    )


def _path(config: DistillConfig, source: QuerySource) -> Path:
    return config.directory / "queries" / f"{source.collection or source.recipe}.jsonl"


def _account(config: DistillConfig, source: QuerySource) -> dict[str, Any] | None:
    path = _path(config, source).with_suffix(".json")
    return json.loads(path.read_bytes()) if path.is_file() else None


def _identity(config: DistillConfig, source: QuerySource) -> str:
    teacher = asdict(config.teacher(source.teacher)) if source.teacher else {}
    named = {name: teacher.get(name) for name in ("model", "url")}
    recipe = load_recipe(source)
    seeds = file_stats([source.path]) if source.path else []
    everything = [asdict(source), seeds, named, recipe.steps, asdict(recipe.rules), config.seed]
    return hashlib.blake2b(json.dumps(everything, sort_keys=True).encode(), digest_size=16).hexdigest()


def _made(config: DistillConfig, source: QuerySource) -> QuerySource | None:
    """The file that a recipe has made, None if it is not there for the same settings."""
    path, account = _path(config, source), _account(config, source)
    if not path.is_file() or not account or account["identity"] != _identity(config, source):
        return None
    return QuerySource(str(path), source.collection or source.recipe)


def _make(config: DistillConfig, source: QuerySource, paid: dict[str, float]) -> QuerySource:
    path, recipe = _path(config, source), load_recipe(source)
    make_directory(path.parent)
    eliminated: Counter = Counter()
    if source.recipe == "evolve":
        rows, usd, stopped = _evolve(config, source, recipe, path, eliminated, paid)
    else:
        rows, usd, stopped = list(_magpie(config, source, recipe.rules, eliminated)), 0.0, None
    account = {"identity": _identity(config, source), "made": len(rows), "eliminated": dict(eliminated), "usd": usd}
    if stopped:
        write_whole(path.with_suffix(".json"), json.dumps({**account, "identity": "unfinished"}))
        raise UserError(f"{path.stem}: {stopped}; the same command goes on")
    if not rows:
        reasons = ", ".join(f"{count} {reason}" for reason, count in eliminated.items())
        raise UserError(f"{path.stem}: the recipe {source.recipe} left no query ({reasons or 'there were no seeds'})")
    write_whole(path, b"".join(orjson.dumps(row) + b"\n" for row in rows))
    write_whole(path.with_suffix(".json"), json.dumps(account))
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in eliminated.most_common())
    logger.info("%s: %d queries made; eliminated: %s", path.stem, len(rows), reasons or "none")
    return QuerySource(str(path), source.collection or source.recipe)


# --- Evol-Instruct ----------------------------------------------------------------------------------------------------


def _seeds(source: QuerySource) -> Iterator[Query]:
    for record in records_of(source):
        try:
            yield read_query(parsed(record).value, source)
        except NoQuery:
            continue


def _evolve(
    config: DistillConfig,
    source: QuerySource,
    recipe: Recipe,
    path: Path,
    eliminated: Counter,
    paid: dict[str, float],
) -> tuple[list[dict[str, Any]], float, str | None]:
    """Rewrite the seeds. Returns the rows, the dollars of all starts, and why it stopped early, if it did.

    Every reply is in a cache, so a start after a kill asks only what is missing.
    """
    teacher, seeds = config.teacher(source.teacher), list(_seeds(source))
    cache = Cache(path.with_suffix(".cache.jsonl"))
    before = max((_account(config, source) or {}).get("usd", 0.0), cache.usd)  # a killed start has left no account
    money = Money(_limit(config, teacher, paid, _account(config, source)))
    money.spent = before
    client = Client(
        teacher.addresses[0], teacher.limits, cache, teacher.usd_per_million or (0.0, 0.0), money, teacher.key_env
    )
    made: dict[int, list[dict[str, Any]]] = {}

    def done(index: int, found: tuple[list[dict[str, Any]], Counter]) -> None:
        made[index] = found[0]
        eliminated.update(found[1])

    works = [partial(_evolve_one, config.seed, source, recipe, client, teacher, seed) for seed in seeds]
    stopped = run_all(works, "evolving", money, done)
    return [row for index in sorted(made) for row in made[index]], money.spent, stopped


def _limit(
    config: DistillConfig, teacher: TeacherConfig, paid: dict[str, float], own: dict[str, Any] | None
) -> float | None:
    """The dollars that a recipe may cost in all its starts: what limits leave beside answers and other recipes."""
    others = recipe_usd(config)
    others[teacher.name] = others.get(teacher.name, 0.0) - (own or {}).get("usd", 0.0)
    spent_by_teacher = paid.get(teacher.name, 0.0) + others[teacher.name]
    spent = sum(paid.values()) + sum(others.values())
    pairs = ((teacher.max_usd, spent_by_teacher), (config.max_usd, spent))
    return min((max(limit - gone, 0.0) for limit, gone in pairs if limit is not None), default=None)


async def _evolve_one(
    seed: int, source: QuerySource, recipe: Recipe, client: Client, teacher: TeacherConfig, query: Query
) -> tuple[list[dict[str, Any]], Counter]:
    """Rewrite one query, round after round. A rewriting that is eliminated leaves the query as it was for the next round."""
    rows, eliminated, text = [], Counter(), query.text
    for number in range(1, source.rounds + 1):
        names = list(recipe.steps)
        step = names[draw(seed, f"evolve {number}", query.id) % len(names)]
        prompt = recipe.steps[step].replace("{query}", text)
        try:
            new = (await _ask(client, prompt, source.temperature, source.max_tokens)).strip()
            why = recipe.rules.against(new) or await _same(client, recipe.rules, text, new, teacher)
        except Unanswered:
            why = "not answered"
        if why:
            eliminated[why] += 1
            continue
        text = new
        rows.append({"id": f"{query.id}.evolved{number}", "task": step, "query": text, "parent": query.id})
    return rows, eliminated


async def _ask(client: Client, prompt: str, temperature: float, max_tokens: int) -> str:
    reply = await client.ask([{"role": "user", "content": prompt}], temperature=temperature, max_tokens=max_tokens)
    return "" if reply.finish_reason == "length" else reply.text


async def _same(client: Client, rules: Rules, before: str, new: str, teacher: TeacherConfig) -> str | None:
    """Whether a rewriting gained nothing: its words are those it had before, or the endpoint says that the two are equal."""
    if " ".join(before.casefold().split()) == " ".join(new.casefold().split()):
        return "no information gained"
    if not rules.same:
        return None
    prompt = rules.same.replace("{before}", before).replace("{query}", new)
    said = await _ask(client, prompt, 0.0, 16)
    return "no information gained" if re.match(r"\W*equal\b", said.casefold()) else None


# --- Magpie -----------------------------------------------------------------------------------------------------------


def _magpie(config: DistillConfig, source: QuerySource, rules: Rules, eliminated: Counter) -> Iterator[dict[str, Any]]:
    """Yield the queries that a model writes when its template stops where a user's words begin."""
    seen: set[str] = set()
    for number, text in enumerate(_written(config.seed, source), 1):
        why = "not ended" if text is None else rules.against(text)
        if why is None and (folded := " ".join(text.casefold().split())) in seen:
            why = "equal to another"
        if why:
            eliminated[why] += 1
            continue
        seen.add(folded)
        yield {"id": f"{source.collection or source.recipe}-{number}", "query": text}


def _written(seed: int, source: QuerySource) -> Iterable[str | None]:
    """Yield `count` texts; None for one that did not end."""
    import torch

    from fastft.data.conversation import Message
    from fastft.inference.engine import DECODING, ChatModel

    chat, mark = ChatModel(source.model), "\ue000"
    before, _, after = chat.template.render([Message("user", mark)]).partition(mark)
    tokenizer, stops = chat.template.tokenizer, sorted(chat.template.stop_token_ids)
    ids = tokenizer(before, add_special_tokens=False).input_ids
    torch.manual_seed(seed)
    left = source.count
    while left > 0:
        ids_BT = torch.tensor([ids] * min(left, AT_A_TIME), device=chat.device)
        with torch.inference_mode():
            out_BT = chat.model.generate(
                ids_BT,
                attention_mask=torch.ones_like(ids_BT),
                do_sample=source.temperature > 0,
                temperature=source.temperature or None,
                top_k=0,
                top_p=1.0,
                max_new_tokens=source.max_tokens,
                eos_token_id=stops,
                pad_token_id=stops[0],
            )
        left -= len(ids_BT)
        for row in out_BT[:, len(ids) :].tolist():
            end = next((place for place, token in enumerate(row) if token in stops), None)
            text = tokenizer.decode(row[:end], **DECODING)
            said, mark_found, _ = text.partition(after.strip()) if after.strip() else (text, "", "")
            yield said.strip() if end is not None or mark_found else None
