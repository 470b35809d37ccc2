"""Train a router without each set of queries, and evaluate it on that set: `fastft router evaluate --leave_one_out`."""

import logging
from collections.abc import Sequence

from fastft.compose.router.figures.evaluation import LeftOut, of_candidates, read_with_sets, some, tag_row, whole_rows
from fastft.compose.router.figures.measures import LEAST, set_sizes
from fastft.compose.router.outcomes import Outcomes
from fastft.compose.router.router import Router
from fastft.compose.router.training.train import TrainSettings, train_router
from fastft.errors import UserError

logger = logging.getLogger(__name__)


def leave_one_out(router: Router, outcomes: Outcomes, sets: Sequence[str], paths: Sequence[str]) -> list[LeftOut]:
    """Train a router without each set, by this router's settings, and evaluate it on that set.

    Sets of fewer than LEAST different queries are left alone: they could not say anything. Raises UserError if the training
    outcomes have none of the sets.
    """
    training, training_sets = read_with_sets(paths)
    training, _ = of_candidates(training, router.candidates)
    outcomes, _ = of_candidates(outcomes, router.candidates)
    outcomes, sets, _ = whole_rows(outcomes, sets)
    known = list(dict.fromkeys(training_sets))
    sizes = set_sizes(sets, outcomes.queries)
    if few := [name for name in sizes if name in known and sizes[name] < LEAST]:
        logger.warning("--leave_one_out: too few test queries (under %d) of %s", LEAST, some(few))
    names = [name for name in sizes if name in known and name not in few]
    if not names and few:
        raise UserError(f"--leave_one_out: no set has {LEAST} different test queries ({some(few)})")
    if not names:
        raise UserError(
            f"--leave_one_out: the training outcomes have none of the sets {some(list(dict.fromkeys(sets)))}; theirs are "
            f"{some(known)}"
        )
    if len(known) < 2:
        raise UserError(f"--leave_one_out: the training outcomes have one set, {known[0]}; nothing is left to train on")
    own = router.report.get("settings", {})
    settings = TrainSettings(**{key: value for key, value in own.items() if key in TrainSettings.__dataclass_fields__})
    points = 100.0 if outcomes.measure.min() >= 0 and outcomes.measure.max() <= 1 else 1.0
    made = []
    for name in names:
        logger.info("training without %s", name)
        rest = training.select([row for row, each in enumerate(training_sets) if each != name])
        without = train_router(rest, settings, with_baselines=False)
        test = outcomes.select([row for row, each in enumerate(sets) if each == name])
        test, _ = of_candidates(test, without.candidates)
        default = without.candidates.index(without.default)
        chosen_N = without.choose(without.scores(test.queries))
        tag = tag_row(name, [True] * len(test), test, chosen_N, points * test.measure, default)
        made.append(LeftOut(name, len(rest), len(test), tag.router, without.default, tag.best_single, tag.gain))
    return made
