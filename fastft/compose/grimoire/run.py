"""The steps of a grimoire's directory, each a file that the next one reads: a killed run goes on where it stopped.

settings.json     what the directory was made with; another task, model or seed needs a directory of its own
splits/           train, validation, and test if the task names none
runs.jsonl        the weak model's answers to train (zero-shot, for the hard samples) and to validation
samples.jsonl     the training questions that each sampler has drawn
grimoires.jsonl   what the strong model wrote, with copies and faults; may be edited
choice.json       the gains on validation, the choice, and the prompt of every setting; prompt.txt: the chosen prompt
ranker.safetensors
test_read.json    for which choice the test split was read; it is read for no other
test_runs.jsonl, evaluation.json, grimoire.md, grimoire.html      after `fastft grimoire evaluate`
*.cache.jsonl, spent.jsonl      every reply that was paid for, and the account
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastft.compose.grimoire.answering.answers import FEW_SHOT, ZERO_SHOT, Setting, choice_format
from fastft.compose.grimoire.answering.weak import ANSWER_TOKENS
from fastft.compose.grimoire.task import LabelTask, OpenSplits, TaskQuestion
from fastft.compose.grimoire.writing.money import KeptMoney
from fastft.compose.grimoire.writing.prompts import PromptTexts, few_shot_help, system_prompt
from fastft.compose.grimoire.writing.samplers import CLUSTERED, HARD_SHARE, draw_samples
from fastft.compose.grimoire.writing.write import KINDS, SIMPLE_WORDS, TOKENS_PER_WORD, TOLERANCE, TRIES, Grimoire
from fastft.inference.budget import Cache
from fastft.inference.client import Client, make_clients
from fastft.inference.endpoint import EndpointConfig, is_address

SIMILAR, RANKED = "similar", "ranked"
"""The two settings that choose a grimoire for each question."""
FEW_SHOT_EXAMPLES = 4  # in all, as in Grimoire's paper
AROUND = 64  # bytes around a text in a request: roles, blank lines, "Answer: "
BYTES_PER_WORD = 10  # at most on average, in what a strong model writes; English has 6


@dataclass(frozen=True)
class Endpoints:
    """The endpoints of a run, which share one account. None for what is no endpoint."""

    money: KeptMoney
    strong: Client | None
    weak: Client | None
    encoder: Client | None


def open_endpoints(
    directory: Path, endpoint: EndpointConfig, key_envs: Sequence[str], strong: str | None, weak: str, encoder: str
) -> Endpoints:
    """Return the clients. Prices and keys are in the order strong, weak, encoder, of those that are endpoints."""
    money = KeptMoney(directory / "spent.jsonl", endpoint.max_usd)
    named = {"strong": strong or "", "weak": weak, "encoder": encoder}
    addresses = {name: address for name, address in named.items() if is_address(address)}
    found: dict[str, Client | None] = dict.fromkeys(named)
    if addresses:
        places = [*addresses.values()]
        same = {name: places.index(address) for name, address in addresses.items()}
        distinct = list(dict.fromkeys(places))
        prices = endpoint.prices(len(places))
        cache = Cache(directory / "replies.cache.jsonl")
        clients = make_clients(
            distinct, key_envs, endpoint.limits, [prices[places.index(each)] for each in distinct], cache, money
        )
        found |= {name: clients[distinct.index(places[place])] for name, place in same.items()}
    return Endpoints(money, **found)


@dataclass(frozen=True)
class BuildPlan:
    """How much is asked of whom, before anything is."""

    samplers: Sequence[str]
    train: int
    validation: int
    hard: bool  # whether the weak model must answer the training questions
    strong_calls: int
    weak_calls: int
    usd: float  # the most that it can cost: a byte counts as a token, as no tokenizer makes more of a text

    def lines(self) -> list[str]:
        cost = "free" if not self.usd else f"at most ${self.usd:.2f}"
        return [
            f"strong model: {self.strong_calls} calls ({len(self.samplers)} samplers, profound and simple), each tried "
            "again twice at most if its text cannot be used",
            f"weak model: {self.weak_calls:,} answers at most ({self.validation} validation questions in each setting"
            + (f", and {self.train} training questions without help, for the hard samples)" if self.hard else ")"),
            f"cost: {cost}",
        ]


def plan_build(
    task: LabelTask,
    split: OpenSplits,
    prompts: PromptTexts,
    samplers: Sequence[str],
    count: int,
    words: int,
    endpoints: Endpoints,
    known: bool,
    done: Sequence[Grimoire] = (),
) -> BuildPlan:
    """Count the calls and estimate the most that they cost. `known`: the training questions' results are known already."""
    longest = sorted((len(each.text.encode()) for each in split.train), reverse=True)
    labels = AROUND + len(", ".join(task.labels).encode())
    samples = sum(AROUND + size for size in longest[: count * len(task.labels)]) + count * labels
    hard = any(sampler in HARD_SHARE for sampler in samplers) and not known and not done
    helps = [len(each.text.encode()) for each in done if not each.fault]
    settings = 2 + (len(helps) if done else len(samplers) * len(KINDS))
    questions = settings * len(split.validation) + hard * len(split.train)
    strong_calls = 0 if done else len(samplers) * len(KINDS)
    usd = 0.0
    longest_grimoire = max(helps, default=0) if done else int(words * TOLERANCE) * BYTES_PER_WORD
    longest_help = max(longest_grimoire, sum(AROUND + size for size in longest[:FEW_SHOT_EXAMPLES]))
    task_size = AROUND + len(task.description.encode()) + labels
    if endpoints.strong is not None and not done:
        prompt = len(prompts.profound.encode()) + task_size + samples
        profound = endpoints.strong.usd(prompt, words * TOKENS_PER_WORD)
        simple = endpoints.strong.usd(
            len(prompts.simple.encode()) + task_size + longest_grimoire, SIMPLE_WORDS * TOKENS_PER_WORD
        )
        usd += TRIES * len(samplers) * (profound + simple)
    if endpoints.weak is not None:
        told = len(prompts.answer.encode()) + task_size + longest_help + len(json.dumps(choice_format(task.labels)))
        asked = sum(len(each.text.encode()) + told for each in split.validation) * settings
        asked += sum(len(each.text.encode()) + told for each in split.train) * hard
        usd += endpoints.weak.usd(asked, ANSWER_TOKENS * questions)
    if endpoints.encoder is not None:
        clustered = not done and any(sampler in CLUSTERED for sampler in samplers)
        embedded = [*split.validation, *(split.train if clustered else ())]
        asked = sum(len(each.text.encode()) for each in embedded) + settings * longest_grimoire
        usd += endpoints.encoder.usd(asked, 0)
    return BuildPlan(samplers, len(split.train), len(split.validation), hard, strong_calls, questions, usd)


def zero_shot_setting(task: LabelTask, prompts: PromptTexts) -> Setting:
    return Setting(ZERO_SHOT, ZERO_SHOT, system_prompt(prompts, task))


def settings_of(
    task: LabelTask, prompts: PromptTexts, examples: Sequence[TaskQuestion], grimoires: Sequence[Grimoire]
) -> list[Setting]:
    """Return zero-shot, few-shot, and each grimoire that can be used."""
    few = few_shot_help(examples)
    found = [zero_shot_setting(task, prompts), Setting(FEW_SHOT, FEW_SHOT, system_prompt(prompts, task, few), text=few)]
    for each in grimoires:
        if not each.fault:
            found.append(
                Setting(each.name, each.kind, system_prompt(prompts, task, each.text), each.sampler, each.text)
            )
    return found


def few_shot_examples(train: Sequence[TaskQuestion], labels: Sequence[str], seed: int) -> list[TaskQuestion]:
    """Return four training questions, of different labels as far as there are."""
    by_label = [draw_samples(train, [label], "random", FEW_SHOT_EXAMPLES, seed=seed) for label in labels]
    rounds = [drawn[i] for i in range(FEW_SHOT_EXAMPLES) for drawn in by_label if i < len(drawn)]
    return rounds[:FEW_SHOT_EXAMPLES]


# Which grimoire for a question ------------------------------------------------------------------------------------------------


def per_question_outcomes(
    questions: Sequence[TaskQuestion],
    grimoires: Sequence[Setting],
    outcomes: Mapping[str, Mapping[str, float]],
    places: Mapping[str, np.ndarray],
) -> dict[str, dict[str, float]]:
    """Return the outcomes of the settings that choose for each question, from those of the grimoires that they chose."""
    found: dict[str, dict[str, float]] = {}
    for name, places_N in places.items():
        rows = found.setdefault(name, {})
        for question, place in zip(questions, places_N):
            right = outcomes.get(grimoires[int(place)].name, {}).get(question.id)
            if right is not None:
                rows[question.id] = right
    return found


def right_matrix(
    questions: Sequence[TaskQuestion], settings: Sequence[Setting], outcomes: Mapping[str, Mapping[str, float]]
) -> np.ndarray:
    """Return who was right [N, G], NaN where a call failed."""
    return np.array(
        [[outcomes.get(setting.name, {}).get(question.id, np.nan) for setting in settings] for question in questions]
    )
