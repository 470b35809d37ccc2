"""A trained router as the gateway's policy: each question goes to the model that will probably answer it best.

    policy = RoutePolicy("expert", Path("routers/expert"), of={"general": "vicuna"}, decide_on="every")
    policy.load()                                               # seconds; the constructor only reads router.json
    choice = policy.choose(conversation, turn, candidates)      # in a thread, unless policy.is_quick(conversation)

What is decided by (`decide_on`): the first question, which then decides for the whole conversation; every question; or all
questions so far. In the last two, a conversation stays with the model that was chosen before, unless another one leads it by
`switch_margin`. What was chosen before is not remembered: the earlier decisions are made again from the questions in the
request, so that any gateway decides the same, also after a restart. A small table spares most of that work. A conversation
of more than MOST_TURNS questions stays with the model that it had by then.
"""

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fastft.compose.policy import Choice
from fastft.data.conversation import Conversation
from fastft.errors import UserError

if TYPE_CHECKING:
    from fastft.compose.router.router import Router

DecideOn = Literal["first", "every", "conversation"]
SETTINGS = "router.json"
LONGEST = 8000
"""Characters of a question that are read: half from its beginning, half from its end."""
MOST_TURNS = 1024
"""Questions that decide, from the first one on: a window that moves would start from the default again at each turn."""
REMEMBERED = 4096
"""Questions whose scores are kept."""
AHEAD = 64
"""Conversations that are scored together."""
QUICK = ("hashed", "static")
"""Kinds of features that take about a millisecond a question; a sentence encoder takes 10 to 20."""
MOST_QUICK = 3
"""New questions that are scored within a few milliseconds."""
MOST_LOOKED_UP = 64
"""Known questions that are found again within a few milliseconds."""


class RoutePolicy:
    """Chooses by a trained router."""

    kind = "route"

    def __init__(
        self,
        name: str,
        directory: Path,
        of: Mapping[str, str] | None = None,
        usd_weight: float = 0.0,
        margin: float | None = None,
        default: str | None = None,
        decide_on: DecideOn = "first",
        switch_margin: float = 0.1,
    ):
        """`of` maps the router's candidates to the names of models here, where they differ. `default` and `margin` replace the
        router's own. Raises UserError if the directory holds no router, and for what does not fit it.
        """
        where = f"virtual: {name}"
        settings = _read_settings(where, directory)
        self.name, self.directory = name, directory
        self.candidates: list[str] = settings["candidates"]
        self.of = {candidate: (of or {}).get(candidate, candidate) for candidate in self.candidates}
        if unknown := [candidate for candidate in of or {} if candidate not in self.of]:
            trained = ", ".join(self.candidates)
            raise UserError(
                f"{where}: of: the router {directory} knows no {unknown[0]!r}; it was trained for {trained}"
            )
        served = default or self.of[settings["default"]]
        if served not in self.of.values():
            raise UserError(f"{where}: default: {served} is none of the router's models: {', '.join(self.models)}")
        self.default = list(self.of.values()).index(served)
        self.margin = settings.get("margin", 0.0) if margin is None else margin
        for option, value in (("usd_weight", usd_weight), ("margin", self.margin), ("switch_margin", switch_margin)):
            if not 0 <= value < float("inf"):
                raise UserError(f"{where}: {option} is {value:g}; it must be 0 or more")
        if usd_weight and not settings.get("usd"):
            raise UserError(f"{where}: usd_weight: the router {directory} knows no prices; its outcomes had no usd")
        usd = settings.get("usd") or {}
        self.costs = [usd_weight * usd.get(candidate, 0.0) for candidate in self.candidates]
        held_out = (settings.get("report") or {}).get("held_out") or {}
        self.gain: list[float] | None = held_out.get("gain_over_best_single")
        """Points over the best single model on queries that training held out, with its interval; None if none were."""
        self.usd_weight, self.decide_on, self.switch_margin = usd_weight, decide_on, switch_margin
        self.quick = (settings.get("features") or {}).get("kind") in QUICK
        self.router: Router | None = None
        self.remembered: OrderedDict[bytes, tuple[list[float], bool]] = OrderedDict()
        self.lock = threading.Lock()
        """Held while `remembered` is used, and never while something is computed."""

    @property
    def models(self) -> list[str]:
        """The names of the models here."""
        return list(dict.fromkeys(self.of.values()))

    def require_served(self, served: Sequence[str]) -> None:
        """Raise UserError if the router was trained for models that are not here."""
        if missing := [candidate for candidate, model in self.of.items() if model not in served]:
            model = self.of[missing[0]]
            map_it = f"of: {{{missing[0]}: NAME}} says which one it is"
            raise UserError(
                f"virtual: {self.name}: the router {self.directory} was trained for {', '.join(self.candidates)}, and nothing "
                f"here is called {model!r}; {map_it} (served: {', '.join(served)})"
            )

    def load(self) -> None:
        """Read the router's weights. Raises UserError if they cannot be read."""
        from fastft.compose.router.router import Router

        self.router = Router.load(self.directory)
        self.router.scores(["What the first question would wait for: imports, and memory."])

    def is_quick(self, conversation: Conversation) -> bool:
        """Whether a choice takes less time than a thread's switch (5 ms), so that it need not leave the event loop."""
        asked = sum(message.role == "user" for message in conversation.messages)
        if not self.quick or (asked > MOST_LOOKED_UP and self.decide_on != "first"):
            return False
        keys = {_key(text) for text in self._texts(conversation)}
        with self.lock:
            return len(keys - self.remembered.keys()) <= MOST_QUICK

    def choose(self, conversation: Conversation, turn: int, candidates: Sequence[str]) -> Choice:
        """Choose for the last question of a conversation."""
        texts = self._texts(conversation)
        if not texts:
            return self._choice(
                self.default, [0.0] * len(self.of), "default: there is no question to read", scored=False
            )
        scored = self._scored(texts)
        chosen, why = self.default, ""
        for number, (values, _) in enumerate(scored):
            chosen, why = self._decide([v - cost for v, cost in zip(values, self.costs)], values, chosen, number == 0)
        values, unlike = scored[-1]
        return self._choice(chosen, values, why + "; unlike the training queries" * unlike)

    def look_ahead(self, conversations: Sequence[Conversation]) -> None:
        """Score the questions of up to AHEAD conversations at once, so that `choose` finds them scored."""
        self._scored([text for conversation in conversations for text in self._texts(conversation)])

    def _decide(self, utility: list[float], values: list[float], before: int, first: bool) -> tuple[int, str]:
        """Keep the model `before`, or leave it for a better one."""
        names = list(self.of.values())
        best = max(range(len(utility)), key=utility.__getitem__)
        lead, margin = utility[best] - utility[before], self.margin if first else self.switch_margin
        if lead <= 0:
            return before, f"{names[before]} {values[before]:.2f}, the highest"
        if lead < margin:
            stays = "default" if first else f"stays with {names[before]}"
            return before, f"{stays}: {names[best]} leads by {lead:.2f}, less than {margin:g}"
        return best, f"{names[best]} {values[best]:.2f} over {values[before]:.2f} of {names[before]}"

    def _choice(self, chosen: int, values: list[float], why: str, scored: bool = True) -> Choice:
        names = list(self.of.values())
        order = sorted(range(len(names)), key=lambda index: self.costs[index] - values[index])
        others = dict.fromkeys(names[index] for index in order if names[index] != names[chosen])
        probabilities = {name: float(name == names[chosen]) for name in self.models}
        return Choice(names[chosen], probabilities, why, tuple(others), dict(zip(names, values)) if scored else None)

    def _texts(self, conversation: Conversation) -> list[str]:
        """What each decision of the conversation is made by, the last one last."""
        asked = [message.content for message in conversation.messages if message.role == "user"]
        if self.decide_on == "first":
            return [_shortened(text) for text in asked[:1]]
        texts = [_shortened(text) for text in asked[:MOST_TURNS]]
        if self.decide_on == "conversation":
            # What is shortened before and after a text is added is what is shortened once at the end.
            texts = list(accumulate(texts, lambda said, text: _shortened(f"{said}\n{text}")))
        return texts

    def _scored(self, texts: list[str]) -> list[tuple[list[float], bool]]:
        """(value of each candidate, whether the text is unlike the training queries) by the router's own rule."""
        keys = list(map(_key, texts))
        with self.lock:
            known = {key: self.remembered[key] for key in keys if key in self.remembered}
        if new := {key: text for key, text in zip(keys, texts) if key not in known}:
            assert self.router is not None, "load() comes first"
            scores = self.router.scores(list(new.values()))
            rows = getattr(scores, self.router.rule).tolist()
            known |= zip(new, zip(rows, map(bool, scores.unlike)))
        with self.lock:
            for key in keys:
                self.remembered[key] = known[key]
                self.remembered.move_to_end(key)
            while len(self.remembered) > REMEMBERED:
                self.remembered.popitem(last=False)
        return [known[key] for key in keys]


def _key(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _shortened(text: str) -> str:
    return text if len(text) <= LONGEST else text[: LONGEST // 2] + text[-LONGEST // 2 :]


def _read_settings(where: str, directory: Path) -> dict[str, Any]:
    """router.json, without the weights. Raises UserError."""
    path = directory / SETTINGS
    if not path.is_file():
        raise UserError(
            f"{where}: router: {directory} holds no {SETTINGS}; fastft router train -o writes such a directory"
        )
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        right = settings["default"] in settings["candidates"] and all(
            isinstance(c, str) for c in settings["candidates"]
        )
    except (ValueError, KeyError, TypeError):
        right = False
    if not right:
        raise UserError(f"{where}: router: {path} is not a router's; train it again with fastft router train")
    return settings
