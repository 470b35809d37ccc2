"""System messages: which there are, which collections use which, and which one a query gets.

    messages = load_messages("orca")
    name, text = messages.drawn(seed, query.id, query.collection, query.multiple_choice)

The draw is a function of (seed, id) and the collection's weights alone.
"""

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastft.common.records import repair_text
from fastft.distill.draws import share
from fastft.errors import UserError

ORCA = Path(__file__).with_name("orca.yaml")
NONE = "none"
OWN = "own"  # the name of a system message that the query brings along
CONDITIONS = {"multiple_choice": True, "not multiple_choice": False}


@dataclass(frozen=True)
class MessageCase:
    """Messages with weights, for queries that meet a condition; None is met by all."""

    multiple_choice: bool | None
    weights: dict[str, float]


@dataclass(frozen=True)
class SystemMessages:
    """Named messages and, by collection, the cases in which they are used."""

    where: str
    texts: dict[str, str]
    cases: dict[str, list[MessageCase]]

    def drawn(self, seed: int, id: str, collection: str, multiple_choice: bool) -> tuple[str, str]:
        """The (name, text) of the message that a query gets. Raises UserError for a collection that has none."""
        if self.where == NONE:
            return NONE, ""
        weights = self._weights(collection, multiple_choice)
        place, names = share(seed, "message", id) * sum(weights.values()), list(weights)
        bounds = itertools.accumulate(weights.values())
        name = next((name for name, bound in zip(names, bounds) if place < bound), names[-1])
        return name, self.texts[name]

    def _weights(self, collection: str, multiple_choice: bool) -> dict[str, float]:
        cases = self.cases.get(collection) or self.cases.get("default")
        for case in cases or ():
            if case.multiple_choice in (None, multiple_choice):
                return case.weights
        known = ", ".join(self.cases)
        kind = "" if not cases else f" for {'' if multiple_choice else 'other than '}multiple-choice queries"
        raise UserError(
            f"messages: {self.where} has none for the collection {collection!r}{kind} (it knows {known}); add it there, or a "
            "default, or set messages: none"
        )


def load_messages(place: str) -> SystemMessages:
    """Read `orca`, `none`, or a YAML file. Raises UserError with the file and the key that is wrong."""
    import yaml

    if place == NONE:
        return SystemMessages(NONE, {}, {})
    path = ORCA if place == "orca" else Path(place)
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UserError(f"messages: {path}: cannot be read ({reason}); orca and none are the built-in ones") from None
    except yaml.YAMLError as error:
        raise UserError(f"messages: {path}: is not YAML ({' '.join(str(error).split())[:150]})") from None
    if not isinstance(found, dict) or set(found) != {"messages", "collections"}:
        raise UserError(f"messages: {path}: must have the two keys messages and collections")
    texts, collections = found["messages"], found["collections"]
    if not isinstance(texts, dict) or not texts or not all(isinstance(text, str) for text in texts.values()):
        raise UserError(f"messages: {path}: messages must be names with texts")
    if not isinstance(collections, dict) or not collections:
        raise UserError(f"messages: {path}: collections must say which collection uses which messages")
    texts = {str(name): repair_text(text) for name, text in texts.items()}
    cases = {str(name): _cases(rule, texts, f"messages: {path}: {name}") for name, rule in collections.items()}
    return SystemMessages(place, texts, cases)


def _cases(rule: Any, texts: dict[str, str], at: str) -> list[MessageCase]:
    is_cases = isinstance(rule, list) and all(isinstance(each, dict) for each in rule) and rule
    cases = []
    for case in rule if is_cases else [{"use": rule}]:
        when = case.get("when")
        if set(case) - {"when", "use"} or "use" not in case or when not in (None, *CONDITIONS):
            raise UserError(f"{at}: a case is {{when: multiple_choice or not multiple_choice, use: [names]}}")
        cases.append(MessageCase(CONDITIONS[when] if when else None, _read_weights(case["use"], texts, at)))
    return cases


def _read_weights(use: Any, texts: dict[str, str], at: str) -> dict[str, float]:
    weights = dict.fromkeys(use, 1) if isinstance(use, list) else use
    if not isinstance(weights, dict) or not weights:
        raise UserError(f"{at}: expected a list of messages, or {{message: weight}}")
    for name, weight in weights.items():
        if str(name) not in texts:
            raise UserError(f"{at}: there is no message {str(name)!r} (there are {', '.join(texts)})")
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < float("inf"):
            raise UserError(f"{at}: the weight of {name} is {weight!r}, not a number above 0")
    return {str(name): float(weight) for name, weight in weights.items()}
