"""`fastft serve --check`: what each name would do, and what is doubtful, without starting anything or asking anybody.

    mine    model   runs/mine/model, run here
    chai    blend   mine 0.5, qwen 0.5, drawn for each turn
    spring  ab      control 50 %: mine; blend 50 %: chai. Over all users: mine 0.75, qwen 0.25

What is wrong has raised an error before: whoever calls `show` has made the plan.
"""

import logging
import time
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fastft.compose.abtest.policy import Experiment
from fastft.compose.blend import BlendPolicy
from fastft.compose.policy import Policy
from fastft.compose.router.policy import RoutePolicy
from fastft.compose.style import compare_styles
from fastft.compose.virtual import VirtualModels
from fastft.serve.gateway.events import FILE, read_events
from fastft.serve.settings import RemoteWorker, ServeConfig

logger = logging.getLogger(__name__)

COMPARED = 500
"""Answers of a model, the newest ones, whose style is compared."""


def show(
    config: ServeConfig, local: Mapping[str, tuple[str, Any]], remote: list[RemoteWorker], virtual: VirtualModels
) -> None:
    """Print a line for each name and for what else the configuration says, and log a warning for what is doubtful."""
    rows = [(name, "model", f"{model}, run here") for name, (model, _) in local.items()]
    rows += [(worker.served_name, "model", _worker(worker)) for worker in remote]
    rows += [(name, policy.kind, describe(name, virtual)) for name, policy in virtual.items()]
    widths = [max(len(row[column]) for row in rows) if rows else 0 for column in (0, 1)]
    for name, kind, does in rows:
        print(f"{name:<{widths[0]}}  {kind:<{widths[1]}}  {does}")
    for line in _rest(config, virtual):
        print(line)
    for line in (*doubts(config, virtual), *_styles(config, virtual)):
        logger.warning("%s", line)


def _worker(worker: RemoteWorker) -> str:
    return worker.url + (f", with the key in {worker.key_env}" if worker.key_env else "")


def _rest(config: ServeConfig, virtual: VirtualModels) -> Iterator[str]:
    """Keys and record, in a line each."""
    keys = [key.name + (f" ({key.per_minute} a minute)" if key.per_minute else "") for key in config.keys]
    keys += [f"the one in {config.api_key_env}"] if config.api_key_env else []
    yield f"keys: {', '.join(keys) or 'none is asked for'}"
    if config.admin_key_env:
        yield f"admin key: in {config.admin_key_env}"
    texts = "messages and answers" if config.record_texts else "hashes of messages and answers"
    yield f"record: {f'{config.record}, {texts}' if config.record else 'none'}"
    if config.record and any(isinstance(each, Experiment) for each in virtual.values()):
        where = config.unit_key_env or "a random one, kept beside the record"
        yield f"users in the record: a keyed hash (key: {where})"


# What a name does ----------------------------------------------------------------------------------------------------------


def describe(name: str, virtual: VirtualModels) -> str:
    """What a virtual model does, in a line."""
    policy = virtual[name]
    if isinstance(policy, BlendPolicy):
        said = _blend(policy)
    elif isinstance(policy, RoutePolicy):
        said = _route(policy)
    elif isinstance(policy, Experiment):
        said = _experiment(policy)
    elif policy.kind == "grimoire":
        said = f"{policy.models[0]}, which is told {policy.setting_name} of {policy.directory}"
    else:
        said = policy.models[0]
    if not any(model in virtual for model in policy.models):
        return said
    expected = probabilities(name, virtual)
    return f"{said}. {f'Over all: {_shares(expected)}' if expected else 'Over all: depends on the questions'}"


def _blend(policy: BlendPolicy) -> str:
    runs = "each turn" if policy.min_run == 1 else f"{policy.min_run} turns at a time"
    said = f"{_shares(_normalised(policy.weights[0]))}, drawn for {runs} (seed {policy.seed})"
    later = zip(policy.from_turn[1:], policy.weights[1:])
    return said + "".join(f"; from turn {turn}: {_shares(_normalised(weights))}" for turn, weights in later)


def _route(policy: RoutePolicy) -> str:
    by = {"first": "the first question", "every": "each question", "conversation": "all questions so far"}[
        policy.decide_on
    ]
    names = [model if model == candidate else f"{model} ({candidate})" for candidate, model in policy.of.items()]
    default = list(policy.of.values())[policy.default]
    said = f"{', '.join(names)}, chosen by {policy.directory} for {by}; {default} unless another leads by {policy.margin:g}"
    if policy.decide_on != "first":
        said += f"; a conversation changes for a lead of {policy.switch_margin:g}"
    return said + (f"; a dollar is worth {policy.usd_weight:g}" if policy.usd_weight else "")


def _experiment(policy: Experiment) -> str:
    arms = "; ".join(f"{arm} {share:.4g}: {model}" for arm, (model, share) in policy.arms.items())
    said = f"{arms}. Control: {policy.control}"
    if policy.coverage < 1:
        said += f"; {policy.coverage:.4g} of the users are in it"
    if policy.namespace:
        name, (start, end) = policy.namespace
        said += f"; users {start:g} to {end:g} of the namespace {name}"
    return said + (f"; until {policy.until}" if policy.until else "")


def _shares(shares: Mapping[str, float]) -> str:
    return ", ".join(f"{model} {share:.4g}" for model, share in shares.items())


def _normalised(weights: Mapping[str, float]) -> dict[str, float]:
    total = sum(weights.values())
    return {model: weight / total for model, weight in weights.items()}


def probabilities(name: str, virtual: VirtualModels) -> dict[str, float] | None:
    """How probable each model is at the first turn of an unknown user of the experiment; None if a router decides."""
    policy = virtual.get(name)
    if policy is None:
        return {name: 1.0}
    if isinstance(policy, RoutePolicy):
        return None
    total: dict[str, float] = {}
    for each, share in _steps(policy).items():
        if (inside := probabilities(each, virtual)) is None:
            return None
        for model, probability in inside.items():
            total[model] = total.get(model, 0.0) + share * probability
    return total


def _steps(policy: Policy | Experiment) -> dict[str, float]:
    if isinstance(policy, Experiment):
        return policy.shares
    return _normalised(policy.weights[0]) if isinstance(policy, BlendPolicy) else {policy.models[0]: 1.0}


# What is doubtful ----------------------------------------------------------------------------------------------------------


def doubts(config: ServeConfig, virtual: VirtualModels) -> Iterator[str]:
    """What can be served, and is probably not meant."""
    for name, policy in virtual.items():
        if isinstance(policy, BlendPolicy) and sum(map(bool, policy.weights[0].values())) == 1:
            [alone] = [model for model, weight in policy.weights[0].items() if weight]
            yield f"{name}: no blend: only {alone} has a weight"
        if isinstance(policy, RoutePolicy) and len(policy.models) == 1:
            yield f"{name}: nothing to choose: all candidates of the router are {policy.models[0]} here"
        if isinstance(policy, RoutePolicy) and policy.gain and policy.gain[1] <= 0:
            gain, low, high = policy.gain
            points = f"{gain:+.2f} [{low:.2f}, {high:.2f}] points"
            yield f"{name}: not worth it: on held-out queries {points} over its best model alone"
        if isinstance(policy, Experiment):
            if policy.over(time.time()):
                yield f"{name}: the experiment was over on {policy.until}: everybody gets {policy.control}"
            if not config.record:
                yield f"{name}: an experiment without a record cannot be read: record: DIRECTORY"
            if len(policy.models) == 1:
                yield f"{name}: all arms are {policy.models[0]}: an A/A test"


def _styles(config: ServeConfig, virtual: VirtualModels) -> Iterator[str]:
    """What a record that is there already says about blends whose models write differently."""
    blends = {name: policy for name, policy in virtual.items() if isinstance(policy, BlendPolicy)}
    if not blends or not config.record or not (Path(config.record) / FILE).is_file():
        return
    answers: dict[str, deque[str]] = defaultdict(lambda: deque(maxlen=COMPARED))
    for event in read_events(Path(config.record)):
        if event["outcome"] == "answered" and "messages" in event:
            answers[event["model"]].extend(answer["content"] for answer in event["answers"])
    for name, policy in blends.items():
        for warning in compare_styles({model: answers[model] for model in policy.models if model in answers}):
            yield f"{name}: {warning}"
