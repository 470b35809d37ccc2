"""Say why a question goes to a model: `fastft router explain DIR "question"`.

Shows the value of every candidate, the words and characters that move it most, the training queries that the question resembles
with their tags, and the decision.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastft.common.command_line import option, parse, run_module
from fastft.compose.router.router import Router, Scores, require_weights
from fastft.compose.router.vectors.features import HashedFeatures, grams_of
from fastft.compose.router.vectors.neighbours import NEAREST

SHOWN = 6  # n-grams for and against a model


@dataclass
class ExplainConfig:
    router: str = option(positional=True)
    """The directory that fastft router train wrote."""
    question: str = option(positional=True)
    """What a user asks, in quotes."""
    usd_weight: float = 0.0
    """What a dollar counts against the router's value of an answer."""
    margin: float | None = None
    """The lead for which the default is left. Default: the router's own."""


@dataclass(frozen=True)
class Push:
    """What a word or run of characters adds to the logit of a model, above what it adds to the mean of all models."""

    gram: str
    weight: float


def main(argv: Sequence[str]) -> int:
    """`fastft router explain`."""
    [config] = parse(argv, "fastft router explain", "Say why a question goes to a model.", ExplainConfig)
    from rich.console import Console

    require_weights(config.usd_weight, config.margin)
    router = Router.load(config.router)
    show(router, config.question, config.usd_weight, config.margin, Console())
    return 0


def show(router: Router, question: str, usd_weight: float, margin: float | None, console: Any) -> None:
    """Print the tables and the decision."""
    scores = router.scores([question])
    decision = router.decide(question, usd_weight, margin)
    console.width = max(console.width, 110)
    console.print(_values(router, scores, decision.model))
    if isinstance(router.features, HashedFeatures):
        _show_pushes(router, question, decision.model)
    else:
        print(f"What weighs: nothing that has a name; the {router.features.kind} features are numbers of a model.")
    _show_neighbours(router, question)
    if not router.knows([question])[0]:
        print("Nothing in this question was seen in training: the values above are the models' means.")
    elif bool(scores.unlike[0]):
        print("This question is unlike the training queries: the values above are little more than the models' means.")
    print(f"{decision.model}: {decision.why}")


def _values(router: Router, scores: Scores, chosen: str) -> Any:
    from rich.table import Table

    heads = ["", "success", "distribution", "mean in training"] + ["$ per 1,000"] * bool(router.usd)
    title = f"Decides: {router.rule}, with a margin of {router.margin:g} over {router.default}"
    table = Table(*heads, title=title, show_edge=False, title_justify="left")
    means = router.report.get("means", {})
    for place in np.argsort(-getattr(scores, router.rule)[0], kind="stable"):
        name = router.candidates[place]
        cells = [f"{'▶ ' if name == chosen else '  '}{name}", f"{scores.success[0, place]:.3f}"]
        cells += [f"{scores.distribution[0, place]:.3f}", f"{means[name]:.3f}" if name in means else "–"]
        table.add_row(*cells, *([f"{1000 * router.usd[name]:.3f}"] if router.usd else []))
    return table


def pushes(router: Router, question: str) -> tuple[list[str], np.ndarray]:
    """The n-grams of a question, [G], and what each adds to the logits of the rule's head, [G, M], less the mean of all models.

    Their columns sum to the logits without the bias, less their mean. N-grams that share a column share its weight.
    """
    assert isinstance(router.features, HashedFeatures)
    columns, values = router.features.row(question)
    head = getattr(router, router.rule)
    added = head.weights[columns] * values[:, None]
    added = added - added.mean(1, keepdims=True)
    place = {int(column): number for number, column in enumerate(columns)}
    names: dict[int, dict[str, None]] = {}
    for gram, column in grams_of(question):
        names.setdefault(place[column], {})[gram] = None
    return [" or ".join(names[number]) for number in range(len(columns))], added


def strongest(router: Router, question: str, model: str) -> tuple[list[Push], list[Push]]:
    """The n-grams that speak most for and most against a model; a word counts together with equal characters."""
    grams, added = pushes(router, question)
    own: dict[str, float] = {}
    for gram, weight in zip(grams, added[:, router.candidates.index(model)]):
        own[gram] = own.get(gram, 0.0) + float(weight)
    ordered = [Push(gram, own[gram]) for gram in sorted(own, key=lambda gram: -own[gram])]
    speak_for = [push for push in ordered[:SHOWN] if push.weight > 0]
    return speak_for, [push for push in ordered[::-1][:SHOWN] if push.weight < 0]


def _show_pushes(router: Router, question: str, chosen: str) -> None:
    for name in dict.fromkeys([chosen, router.default]):
        speak_for, against = strongest(router, question, name)
        print(f"For {name}: {_listed(speak_for)}\n  against: {_listed(against)}")


def _listed(found: list[Push]) -> str:
    return ", ".join(f"{push.gram!r} {push.weight:+.3f}" for push in found) or "nothing"


def _show_neighbours(router: Router, question: str) -> None:
    """The training queries that the question resembles most, by id, and what models scored on their tags."""
    examples = router.report.get("examples")
    if router.neighbours is None or not examples:
        return
    dense = router.features.dense(router.features.transform([question]))
    nearest, similarity = router.neighbours.nearest(dense, NEAREST)
    print("Most similar training queries:")
    tags: dict[str, None] = {}
    for place, alike in zip(nearest[0], similarity[0]):
        example = examples[int(place)]
        print(f"  {alike:.2f}  {example['id']}  {', '.join(example['tags'])}")
        tags |= dict.fromkeys(example["tags"])
    known = router.report.get("tags", {})
    for tag in tags:
        if tag in known:
            means = known[tag]["means"]
            best = sorted((name for name in means if means[name] is not None), key=lambda name: -means[name])[:3]
            named = ", ".join(f"{name} {means[name]:.3f}" for name in best)
            print(f"Best on {tag} ({known[tag]['queries']:,} queries): {named}")


if __name__ == "__main__":
    run_module(main)
