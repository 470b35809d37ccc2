"""Measure a router on outcomes that it has not seen: `fastft router evaluate DIR OUTCOMES… -o DIR2`.

    fastft router evaluate routers/expert test_*.jsonl.gz -o evaluated
    fastft router evaluate routers/expert test_*.jsonl.gz -o evaluated --leave_one_out train_*.jsonl.gz

Writes DIR2/evaluation.json and DIR2/evaluation.html, prints tables, and says in its last line whether the router is worth it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastft.common.command_line import option, parse, run_module
from fastft.common.files import make_directory, require_not_input, write_whole
from fastft.compose.router.figures.evaluation import evaluate, read_with_sets, to_json
from fastft.compose.router.figures.leave_out import leave_one_out
from fastft.compose.router.figures.page import show, verdict, write_evaluation_page
from fastft.compose.router.router import Router, require_weights
from fastft.errors import UsageError, UserError


@dataclass
class RouterEvaluateConfig:
    """Which router is evaluated on what."""

    router: str = option(positional=True)
    """The directory that fastft router train wrote."""
    output: str = option(short="-o")
    """The directory for evaluation.json and evaluation.html."""
    outcomes: list[str] = option(positional=True, several=True)
    """Files of outcomes."""
    usd_weight: float = 0.0
    """What a dollar counts against the router's value of an answer, as it would be served."""
    margin: float | None = None
    """The lead for which the default is left. Default: the router's own."""
    leave_one_out: list[str] = option([], several=True)
    """The outcomes that the router was trained on: each set is left out of a training once, and evaluated by that router."""


def main(argv: Sequence[str]) -> int:
    """`fastft router evaluate`."""
    what = "Measure a router on outcomes that it has not seen."
    [config] = parse(argv, "fastft router evaluate", what, RouterEvaluateConfig)
    from rich.console import Console

    output = Path(config.output)
    if output.exists() and not output.is_dir():
        raise UserError(f"{output}: is a file; -o names a directory")
    require_weights(config.usd_weight, config.margin)
    if not config.outcomes:
        raise UsageError("outcomes: name at least one file of outcomes")
    for name in ("evaluation.json", "evaluation.html"):
        require_not_input(output / name, [*config.outcomes, *config.leave_one_out])
    router = Router.load(config.router, with_baselines=True)
    outcomes, sets = read_with_sets(config.outcomes)
    made = evaluate(router, outcomes, sets, config.usd_weight, config.margin)
    if config.leave_one_out:
        made.left_out = leave_one_out(router, outcomes, sets, config.leave_one_out)
    make_directory(output)
    write_whole(output / "evaluation.json", to_json(made))
    write_evaluation_page(output / "evaluation.html", made)
    show(made, Console())
    print(f"page: {output / 'evaluation.html'}")
    print(verdict(made))
    return 0


if __name__ == "__main__":
    run_module(main)
