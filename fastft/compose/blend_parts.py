"""Read which models a blend consists of, for `--model blend:…`: as words on the command line, or as a YAML file.

    read_blend("blend:runs/a/model,runs/b/model=2")         # two directories, the second drawn twice as often
    read_blend("blend:vicuna=runs/a/model,http://10.0.0.5:8000/v1#spring", seed="7")
    read_blend("blend:chai.yaml")                           # {name: chai, models: {vicuna=runs/a/model: 1, …}, seed: "7", …}

A model is written as for `fastft serve --model`: DIR, NAME=DIR or URL#name. It gets the name that the gateway would give it:
NAME, the directory's last part, or the endpoint's name. Where two would have one name, each is called by what was written.
Draws depend on names only, so the gateway draws the same under the same names of the blend and of its models.
"""

import logging
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fastft.common.command_line import parse
from fastft.common.files import short_name, split_name
from fastft.compose.blend import BlendPolicy, BlendStage, stages_of
from fastft.errors import UsageError, UserError
from fastft.inference.endpoint import is_address, split_address

logger = logging.getLogger(__name__)

PREFIX = "blend:"
_HOW = "write blend:DIR,DIR, blend:DIR=2,DIR=1 with weights, or blend:FILE.yaml"


@dataclass(kw_only=True)
class BlendFile:
    """A blend as a YAML file describes it, with the keys of a virtual model in serve.yaml."""

    name: str = "blend"
    """The blend's name, which its draws depend on."""
    policy: Literal["blend"] = "blend"
    models: dict[str, float] = field(default_factory=dict)
    """Models (DIR, NAME=DIR or URL#name) with their weights."""
    seed: str = "0"
    min_run: int = 1
    schedule: list[BlendStage] = field(default_factory=list)
    """New weights from some turn on; models may be written by the names that they have in `models`."""


@dataclass(frozen=True)
class Blend:
    """A blend that is ready to be asked."""

    policy: BlendPolicy
    places: dict[str, str]
    """The directory or URL#name of each model, by its name."""

    @property
    def described(self) -> dict[str, Any]:
        """Everything that decides who answers a turn, as JSON can hold it."""
        stages = {str(turn): dict(weights) for turn, weights in zip(self.policy.from_turn, self.policy.weights)}
        return {"policy": "blend", "seed": self.policy.seed, "min_run": self.policy.min_run, "from_turn": stages}


def is_blend(model: str) -> bool:
    """Return whether `--model` names a blend."""
    return model.startswith(PREFIX)


def read_blend(spelled: str, name: str | None = None, seed: str | None = None) -> Blend:
    """Return the blend that `blend:…` spells. `name` and `seed` replace those of the file. Raises UserError."""
    written = spelled.removeprefix(PREFIX)
    if written.endswith((".yaml", ".yml")):
        found = _read_file(Path(written))
    else:
        found = BlendFile(models=_read_words(written))
    stages = stages_of(found.schedule, f"{written}: schedule")
    places, names = _named([entry for each in (found.models, *stages.values()) for entry in each])
    for place in places.values():
        _check_place(place)

    def by_name(weights: dict[str, float]) -> dict[str, float]:
        return {names[entry]: weight for entry, weight in weights.items()}

    policy = BlendPolicy(
        name or found.name,
        by_name(found.models),
        found.seed if seed is None else seed,
        found.min_run,
        {turn: by_name(weights) for turn, weights in stages.items()},
    )
    if sum(any(weights.get(name) for weights in policy.weights) for name in policy.models) == 1:
        logger.warning("--model %s: is a blend of one model, which answers every turn; another one is missing", spelled)
    return Blend(policy, places)


def _read_file(path: Path) -> BlendFile:
    if not path.is_file():
        raise UserError(f"{path}: no such file; it should describe a blend")
    try:
        [found] = parse(["--config", str(path)], "fastft answer", "A blend.", BlendFile)
    except UsageError as error:
        raise UserError(f"{path}: {error}") from None
    if not found.models:
        raise UserError(
            f"{path}: a blend needs models with their weights, such as models: {{runs/a/model: 1, runs/b/model: 1}}"
        )
    return found


def _read_words(written: str) -> dict[str, float]:
    """Read "DIR,NAME=DIR=2,URL#name" as {"DIR": 1, "NAME=DIR": 2, "URL#name": 1}."""
    found: dict[str, float] = {}
    for word in written.split(","):
        entry, weight = _with_weight(word.strip())
        if not entry and not written:
            raise UserError(f"--model {PREFIX} names no models; {_HOW}")
        if not entry:
            raise UserError(f"--model {PREFIX}{written}: names no model between two commas; {_HOW}")
        if entry in found:
            raise UserError(f"--model {PREFIX}{written}: {entry} is given twice; {entry}=2 gives it twice the weight")
        found[entry] = weight
    return found


def _with_weight(word: str) -> tuple[str, float]:
    entry, _, last = word.rpartition("=")
    try:
        weight = float(last) if entry and not Path(word).exists() else math.nan
    except ValueError:
        weight = math.nan
    return (word, 1.0) if math.isnan(weight) else (entry, weight)


def _named(entries: Iterable[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Return ({name: directory or address}, {entry: name}) of the models that are written as `entries`."""
    split = {entry: _split(entry) for entry in dict.fromkeys(entries)}
    # A schedule may use the name that a model got together with its place.
    names = {name: name for entry, (name, place) in split.items() if name in split and entry != name and place != name}
    split = {entry: pair for entry, pair in split.items() if entry not in names}
    shared = Counter(name for name, _ in split.values())
    names |= {entry: name if shared[name] == 1 else entry for entry, (name, _) in split.items()}
    return {names[entry]: place for entry, (_, place) in split.items()}, names


def _split(entry: str) -> tuple[str, str]:
    """Return (name, directory or address) of a model as it is written."""
    if is_address(entry):
        return split_address(entry)[1], entry
    name, place = split_name(entry)
    return name or short_name(place), place


def _check_place(place: str) -> None:
    if not is_address(place) and not Path(place, "config.json").is_file():
        what = "holds no model (config.json)" if Path(place).is_dir() else "no such directory"
        raise UserError(f"{place}: {what}; {_HOW}")
