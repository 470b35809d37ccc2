"""Judge a policy before it is served, by a record of what was served or by outcomes: `fastft router simulate FILE --policy …`.

    fastft record export record/ --as events -o events.jsonl
    fastft router simulate events.jsonl --rewards rewards.jsonl --policy routers/expert
    fastft router simulate events.jsonl --rewards votes.jsonl --policy blend:small=1,large=3 --name chat
    fastft router simulate outcomes.jsonl --policy large

An event knows the answer of one model, so the rewards of the others are estimated by the probabilities with which the served
policy chose (fastft.compose.router.replay.propensity): it must have given every model a chance, as a blend does. An outcomes file
knows the scores of all models, so a policy's value is computed; estimates from a record with one drawn model a query stand
beside it and show what as many served turns would tell.
"""

import csv
import difflib
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fastft.common.command_line import option, parse, run_module
from fastft.common.files import make_directory, require_not_input, write_whole
from fastft.common.records import read_records, repair_text
from fastft.compose.blend import BlendPolicy
from fastft.compose.blend_parts import PREFIX, is_blend
from fastft.compose.policy import FixedPolicy, Policy, draw
from fastft.compose.router.figures.evaluation import plain, whole_rows
from fastft.compose.router.outcomes import read_outcomes
from fastft.compose.router.policy import AHEAD, RoutePolicy
from fastft.compose.router.replay.propensity import (
    LoggedTurns,
    clustered_mean,
    doubly_robust,
    effective_turns,
    inverse_propensity,
    mean_rewards,
    require_overlap,
    robust_rewards,
    self_normalised,
)
from fastft.compose.router.router import require_weights
from fastft.data.conversation import Conversation, Message
from fastft.errors import UsageError, UserError
from fastft.judge.judgment import VOTE_SCORES
from fastft.judge.rows import is_number
from fastft.judge.statistics.intervals import Interval
from fastft.judge.tables import number

FEW = 30
"""Effective turns below which normal intervals are not to be trusted."""


@dataclass
class SimulateConfig:
    """What is replayed, under which policy."""

    file: str = option(positional=True)
    """What fastft record export --as events wrote, or a file of outcomes."""
    policy: str
    """What would be served instead: a router's directory, blend:NAME=WEIGHT,NAME=WEIGHT, or a model's name."""
    rewards: str | None = None
    """The rewards of events: {"id": event, "reward": number} as JSON Lines or CSV, or fastft record export --as votes."""
    name: str | None = None
    """Only events of turns that asked for this name. Needed if the record has turns of several policies."""
    usd_weight: float = 0.0
    """For a router: what a dollar counts, as it would be served."""
    margin: float | None = None
    """For a router: the lead for which its default is left."""
    decide_on: Literal["first", "every", "conversation"] = "first"
    """For a router: what it decides by, as in serve.yaml."""
    seed: str = "0"
    """For outcomes: of the draws."""
    output: str | None = option(None, short="-o")
    """A directory for simulation.json."""


@dataclass
class RewardedTurn:
    """A turn that can be judged: its conversation up to the question, and what the served policy did."""

    conversation: Conversation
    number: int
    cluster: str
    """Turns with the same one depend on each other: the conversation, the battle, or the user of an experiment."""
    chosen: str
    probabilities: dict[str, float]
    reward: float


@dataclass
class Simulation:
    policy: str
    turns: int
    conversations: int
    left_out: dict[str, int]
    served: Interval
    """The mean reward of what was served."""
    estimates: dict[str, Interval]
    gain: Interval
    """The policy minus what was served; from the doubly robust estimate, or exact."""
    effective_turns: float
    largest_weight: float
    choices: dict[str, float]
    """The share of turns that the policy would give to each model."""
    exact: Interval | None = None
    """The policy's value, where all scores are known."""
    remarks: list[str] = field(default_factory=list)


def main(argv: Sequence[str]) -> int:
    """`fastft router simulate`."""
    what = "Judge a policy before it is served, by a record or by outcomes."
    [config] = parse(argv, "fastft router simulate", what, SimulateConfig)
    require_weights(config.usd_weight, config.margin)
    if config.output:
        require_not_input(Path(config.output) / "simulation.json", filter(None, (config.file, config.rewards)))
    made = _of_outcomes(config) if _holds_outcomes(Path(config.file)) else _of_events(config)
    if config.output:
        make_directory(Path(config.output))
        text = json.dumps(plain(asdict(made)), indent=1, ensure_ascii=False)
        write_whole(Path(config.output) / "simulation.json", repair_text(text) + "\n")
    _show(made)
    print(_verdict(made))
    return 0


def _holds_outcomes(path: Path) -> bool:
    """Whether a file holds outcomes, not events. Raises UserError if it holds neither."""
    if path.is_dir():
        raise UserError(f"{path}: is a directory; export its events first: fastft record export {path} -o events.jsonl")
    record = next(read_records(path))
    row = record.value if isinstance(record.value, dict) else {}
    if isinstance(row.get("rewards"), dict):
        return True
    if "probabilities" not in row:
        raise UserError(
            f"{record.where}: {record.error or 'is neither an event (no probabilities) nor an outcome (no rewards)'}"
        )
    return False


# --- Events -----------------------------------------------------------------------------------------------------------


def _of_events(config: SimulateConfig) -> Simulation:
    if config.rewards is None:
        raise UsageError("rewards: missing; events do not say how good an answer was: --rewards FILE")
    rewards = read_rewards(Path(config.rewards))
    left_out: Counter[str] = Counter()
    turns = list(_turns(Path(config.file), rewards, config, left_out))
    if not turns and config.name is not None:
        _require_asked(config)
    if not turns:
        reasons = "; ".join(f"{count:,} {why}" for why, count in left_out.most_common())
        raise UserError(f"{config.file}: no turn can be judged ({reasons or 'it holds no event'})")
    models = sorted({name for turn in turns for name in turn.probabilities})
    policy = read_policy(config, models)
    logged = _logged(turns, models, policy)
    made = simulate(logged, models, config.policy)
    made.left_out = dict(left_out.most_common())
    return made


def _require_asked(config: SimulateConfig) -> None:
    """Raise UserError if no event asked for --name."""
    asked = {record.value.get("asked") for record in read_records(Path(config.file))}
    if config.name not in asked:
        names = sorted(name for name in asked if isinstance(name, str))
        raise UserError(
            f"--name {config.name}: no event of {config.file} asked for it; they asked for {', '.join(names)}"
            f"{_meant(config.name, names)}"
        )


def _meant(written: str, names: Sequence[str]) -> str:
    nearest = difflib.get_close_matches(written, names, n=1)
    return f"; did you mean {nearest[0]}?" if nearest else ""


def _turns(
    path: Path, rewards: dict[str, float], config: SimulateConfig, left_out: Counter[str]
) -> Iterator[RewardedTurn]:
    """The events that can be judged; the others are counted by reason. Raises UserError."""
    needs_text = _is_router(config.policy)
    for record in read_records(path):
        event = record.value
        if record.error or not _is_event(event):
            raise UserError(f"{record.where}: {record.error or 'is no event of a record (fastft record export)'}")
        if config.name is not None and event.get("asked") != config.name:
            left_out[f"asked for {event.get('asked')}, not for {config.name}"] += 1
        elif event.get("conversation_from") in ("background", "none"):
            left_out["no turn of a conversation"] += 1
        elif event.get("model") is None:
            left_out["without an answer"] += 1
        elif event["model"] != event.get("chosen"):
            left_out["answered by another model than the chosen one (failover)"] += 1
        elif event["id"] not in rewards:
            left_out["without a reward"] += 1
        else:
            yield _turn(event, record.where, rewards[event["id"]], needs_text)


def _is_event(event: Any) -> bool:
    return (
        isinstance(event, dict)
        and isinstance(event.get("id"), str)
        and isinstance(event.get("chosen"), str)
        and isinstance(event.get("probabilities"), dict)
        and all(map(is_number, event["probabilities"].values()))
    )


def _turn(event: dict[str, Any], where: str, reward: float, needs_text: bool) -> RewardedTurn:
    probabilities = _probabilities(event)
    if abs(sum(probabilities.values()) - 1) > 1e-3 or min(probabilities.values(), default=0) < 0:
        raise UserError(
            f"{where}: its probabilities sum to {sum(probabilities.values()):.3f}, not to 1: they do not say how likely each "
            "model was to be chosen"
        )
    if probabilities.get(event["chosen"], 0) <= 0:
        raise UserError(f"{where}: it chose {event['chosen']}, to which its probabilities give no chance")
    if needs_text and "messages" not in event:
        raise UserError(
            f"{where}: the record keeps hashes only (--record_texts false), and a router needs the questions themselves"
        )
    messages = [
        Message(message["role"], _text(message.get("content")))
        for message in event.get("messages") or ()
        if isinstance(message, dict) and isinstance(message.get("role"), str)
    ]
    identity = event.get("conversation") or event["id"]
    # In an experiment a user is drawn once for all conversations; `unit` is the hash of the user. A battle has one vote.
    cluster = event.get("unit") or (event.get("battle") or {}).get("id") or identity
    conversation = Conversation(identity, messages)
    return RewardedTurn(conversation, event.get("turn") or 1, cluster, event["chosen"], probabilities, reward)


def _probabilities(event: dict[str, Any]) -> dict[str, float]:
    """How likely each model was to be chosen. In an anonymous battle, the arena draws each side from all models alike."""
    drawn_from = (event.get("battle") or {}).get("drawn_from")
    if drawn_from and event.get("policy") is None:
        return {name: 1 / len(drawn_from) for name in drawn_from}
    return {name: float(probability) for name, probability in event["probabilities"].items()}


def _text(content: Any) -> str:
    """The text of a message, also of one in parts; parts that are not text are left out, as the gateway does."""
    if isinstance(content, list):
        return "\n".join(
            part["text"] for part in content if isinstance(part, dict) and isinstance(part.get("text"), str)
        )
    return content if isinstance(content, str) else ""


def _logged(turns: Sequence[RewardedTurn], models: Sequence[str], policy: Policy) -> LoggedTurns:
    choices = []
    for start in range(0, len(turns), AHEAD):
        some = turns[start : start + AHEAD]
        if isinstance(policy, RoutePolicy):
            policy.look_ahead([turn.conversation for turn in some])  # a tenth of the time of one by one
        choices += [policy.choose(turn.conversation, turn.number, models).probabilities for turn in some]
    return LoggedTurns(
        rewards_N=np.array([turn.reward for turn in turns]),
        chosen_N=np.array([models.index(turn.chosen) for turn in turns]),
        logged_NM=np.array([[turn.probabilities.get(name, 0.0) for name in models] for turn in turns]),
        wanted_NM=np.array([[choice.get(name, 0.0) for name in models] for choice in choices]),
        conversations=[turn.cluster for turn in turns],
    )


def read_rewards(path: Path) -> dict[str, float]:
    """Event id -> reward. A file of votes gives a won battle's events 1, a lost one's 0, a tie's 0.5. Raises UserError."""
    rewards: dict[str, float] = {}
    for where, row in _rows(path):
        if "battle" in row and "winner" in row:
            rewards |= _voted(row, where)
            continue
        try:
            identity, reward = row["id"], float(row["reward"])
        except (KeyError, TypeError, ValueError):
            raise UserError(f'{where}: a reward is {{"id": event, "reward": number}}, not {str(row)[:80]}') from None
        if not math.isfinite(reward):
            raise UserError(f"{where}: the reward of {identity} is not a finite number")
        if identity in rewards:
            raise UserError(f"{where}: event {identity} has a second reward; one turn has one")
        rewards[identity] = reward
    return rewards


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    if path.suffix == ".csv":
        if not path.is_file():
            raise UserError(f"{path}: no such file")
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield from ((f"{path.name}: line {number}", row) for number, row in enumerate(csv.DictReader(file), 2))
        return
    for record in read_records(path):
        if record.error or not isinstance(record.value, dict):
            raise UserError(f"{record.where}: {record.error or 'is not a JSON object'}")
        yield record.where, record.value


def _voted(vote: dict[str, Any], where: str) -> dict[str, float]:
    """The rewards of a vote; none if it does not count, because the voter knew the models or took it back."""
    if not vote.get("counted") or vote["winner"] not in VOTE_SCORES:
        return {}
    try:
        return {
            event: reward for side, reward in zip("ab", VOTE_SCORES[vote["winner"]]) for event in vote["turns"][side]
        }
    except (KeyError, TypeError):
        raise UserError(f"{where}: is no vote of a record: it does not name the turns of both sides") from None


# --- Policies ---------------------------------------------------------------------------------------------------------


def _is_router(spelled: str) -> bool:
    return not is_blend(spelled) and Path(spelled).is_dir()


def read_policy(config: SimulateConfig, models: Sequence[str]) -> Policy:
    """The policy that `--policy` spells. Raises UserError if there is none, or if it would choose unknown models."""
    spelled = config.policy
    if is_blend(spelled):
        policy: Policy = BlendPolicy("simulated", _weights(spelled.removeprefix(PREFIX)))
    elif _is_router(spelled):
        policy = RoutePolicy(
            "simulated", Path(spelled), usd_weight=config.usd_weight, margin=config.margin, decide_on=config.decide_on
        )
        policy.load()
    else:
        policy = FixedPolicy(spelled)
    if unknown := [name for name in policy.models if name not in models]:
        kind = "" if len(policy.models) > 1 else " or a router's directory"
        raise UserError(
            f"--policy {spelled}: {unknown[0]} is not a model{kind} here (the models of {config.file}: {', '.join(models)})"
            f"{_meant(unknown[0], models)}"
        )
    return policy


def _weights(written: str) -> dict[str, float]:
    weights = {}
    for each in written.split(","):
        name, _, weight = each.rpartition("=")
        try:
            weights[name or weight] = float(weight) if name else 1.0
        except ValueError:
            raise UsageError(f"policy: {each!r}: a blend is blend:NAME=WEIGHT,NAME=WEIGHT") from None
    return weights


# --- Estimates --------------------------------------------------------------------------------------------------------


def simulate(turns: LoggedTurns, models: Sequence[str], policy: str) -> Simulation:
    """Estimate what the policy would have earned on these turns. Raises UserError if they cannot say (no overlap)."""
    require_overlap(turns, models)
    predicted_NM = mean_rewards(turns)
    weights_N = turns.weights_N
    effective = effective_turns(turns)
    remarks = []
    if effective < FEW:
        remarks.append(
            f"The estimates rest on {effective:.1f} effective turns of {len(weights_N):,}: too few to trust the intervals."
        )
    return Simulation(
        policy=policy,
        turns=len(weights_N),
        conversations=len(set(turns.conversations)),
        left_out={},
        served=clustered_mean(turns.rewards_N, turns.conversations),
        estimates={
            "IPS": inverse_propensity(turns),
            "SNIPS": self_normalised(turns),
            "doubly robust": doubly_robust(turns, predicted_NM),
        },
        gain=clustered_mean(robust_rewards(turns, predicted_NM) - turns.rewards_N, turns.conversations),
        effective_turns=effective,
        largest_weight=float(weights_N.max()),
        choices=dict(zip(models, turns.wanted_NM.mean(0).tolist())),
        remarks=remarks,
    )


def _of_outcomes(config: SimulateConfig) -> Simulation:
    """The value of a policy where every model's score is known, beside its estimates from one drawn model a query."""
    outcomes = read_outcomes([config.file])
    policy = read_policy(config, outcomes.models)
    candidates = outcomes.models
    outcomes, _, remarks = whole_rows(outcomes, outcomes.ids)
    rewards_NM, rows = outcomes.measure, np.arange(len(outcomes))
    drawn_N = [int(draw(config.seed, "uniform", identity, 1) * len(candidates)) for identity in outcomes.ids]
    turns = [
        RewardedTurn(Conversation(identity, [Message("user", query)]), 1, query, candidates[drawn], {}, 0.0)
        for identity, query, drawn in zip(outcomes.ids, outcomes.queries, drawn_N)
    ]
    wanted = _logged(turns, candidates, policy).wanted_NM
    logged = LoggedTurns(
        rewards_NM[rows, drawn_N], np.array(drawn_N), np.full(rewards_NM.shape, 1 / len(candidates)), wanted,
        outcomes.queries,
    )  # fmt: skip
    made = simulate(logged, candidates, config.policy)
    earned_N = (wanted * rewards_NM).sum(1)
    made.exact = clustered_mean(earned_N, outcomes.queries)
    made.served = clustered_mean(rewards_NM.mean(1), outcomes.queries)
    made.gain = clustered_mean(earned_N - rewards_NM.mean(1), outcomes.queries)
    made.remarks = [
        *remarks,
        f"All scores are known ({'correct' if outcomes.correct is not None else 'rewards'}), so the value is computed. The "
        "estimates are what a record would tell in which a uniform blend answered each query once.",
        *made.remarks,
    ]
    return made


# --- What is shown ----------------------------------------------------------------------------------------------------


def _show(made: Simulation) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table("", "mean reward [95 %]", title=f"{made.policy}", title_justify="left", show_edge=False)
    served = "a uniform blend" if made.exact else "as served"
    rows: Iterable[tuple[str, Interval]] = [(served, made.served), *made.estimates.items()]
    for name, interval in [*rows, *([("exact", made.exact)] if made.exact else []), ("difference", made.gain)]:
        table.add_row(name, number(interval, 4))
    console.print(table, markup=False)
    shares = ", ".join(f"{name} {share:.1%}" for name, share in made.choices.items() if share)
    lines = [
        f"{made.turns:,} turns of {made.conversations:,} {'queries' if made.exact else 'conversations'}; it would choose "
        f"{shares}.",
        f"Effective turns: {made.effective_turns:,.1f}; the largest weight is {made.largest_weight:.3g}. Intervals: by "
        f"{'query' if made.exact else 'conversation'}.",
        *(f"{count:,} {'event' if count == 1 else 'events'} left out: {why}." for why, count in made.left_out.items()),
        *made.remarks,
    ]
    for line in lines:
        console.print(line, markup=False)


def _verdict(made: Simulation) -> str:
    than = "a uniform blend" if made.exact else "what was served"
    if made.gain.low > 0:
        return f"{made.policy} would earn more than {than}: {number(made.gain, 4)} a turn."
    if made.gain.high < 0:
        return f"{made.policy} would earn less than {than}: {number(made.gain, 4)} a turn."
    return f"{made.policy} cannot be told from {than}: {number(made.gain, 4)} a turn, and that interval holds 0."


if __name__ == "__main__":
    run_module(main)
