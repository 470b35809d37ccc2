"""`fastft grimoire evaluate DIR`: measure the choice of `fastft grimoire build` on the test split, which is read once.

    fastft grimoire evaluate grimoires/trec

Every setting is asked the same test questions, so that the page can say what another choice would have given; nothing is
chosen by them. evaluation.json, grimoire.md and grimoire.html are written. A killed evaluation goes on where it stopped.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastft.common.command_line import option, parse, run_module
from fastft.common.files import write_whole
from fastft.common.records import parse_json
from fastft.compose.grimoire.answering.answers import AnswerFile, calibrated
from fastft.compose.grimoire.choosing.choice import Chosen
from fastft.compose.grimoire.choosing.choose import compare, gain_rows, outcomes_of, valid_shares
from fastft.compose.grimoire.run import RANKED, SIMILAR, per_question_outcomes
from fastft.compose.grimoire.task import first_by_hash, read_questions, read_test
from fastft.errors import UserError
from fastft.inference.endpoint import EndpointConfig

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class EvaluateConfig:
    """Which choice is measured, on how many questions."""

    directory: Path = option(positional=True)
    """What `fastft grimoire build` has written (-o)."""
    max_test: int | None = None
    """Use so many test questions at most."""
    batch_size: int = 16
    """Questions at a time, for a weak model's directory."""
    key_env: list[str] = option(several=True)
    """Environment variables with keys, for the weak model and the encoder, of those that are endpoints."""

    def __post_init__(self) -> None:
        for key in ("max_test", "batch_size"):
            if getattr(self, key) is not None and getattr(self, key) < 1:
                raise UserError(f"--{key} must be at least 1")


def main(argv: Sequence[str]) -> int:
    what = "Measure the choice on the test split, once."
    config, endpoint = parse(argv, "fastft grimoire evaluate", what, EvaluateConfig, EndpointConfig)
    evaluate(config, endpoint)
    return 0


def evaluate(config: EvaluateConfig, endpoint: EndpointConfig) -> None:
    """Ask the test questions and write the figures. Raises UserError, also if the test split was seen for another choice."""
    from fastft.compose.grimoire.page import show, write_results

    choice = Chosen.load(config.directory)
    path, read = config.directory / "evaluation.json", config.directory / "test_read.json"
    # Kept before the test split is opened, so that a killed evaluation counts, too.
    if read.is_file() and parse_json(read.read_bytes())["choice"] != choice.digest:
        raise UserError(
            f"{config.directory}: the test split has been read for another choice; a second look would not be honest: give "
            "the task new test questions, and a directory of its own"
        )
    if path.is_file():
        logger.info("%s: is shown again; the test split is not read a second time", path)
        found = parse_json(path.read_bytes())
    else:
        found = _measured(config, endpoint, choice)
        write_whole(path, json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    write_results(config.directory, choice.content, found)
    show(choice.content, found)


def _measured(config: EvaluateConfig, endpoint: EndpointConfig, choice: Chosen) -> dict[str, Any]:
    task = choice.task()
    endpoints = choice.endpoints(endpoint, config.key_env)
    weak = choice.weak(endpoints, config.batch_size)
    # The choice is on the disk: from here on the test split may be read.
    write_whole(config.directory / "test_read.json", json.dumps({"choice": choice.digest}) + "\n")
    splits = config.directory / "splits"
    seen = [each for name in ("train", "validation") for each in read_questions(splits / f"{name}.jsonl", task.labels)]
    questions, remarks = read_test(task, splits, seen)
    questions = first_by_hash(questions, config.max_test)
    file = AnswerFile(config.directory / "test_runs.jsonl")
    answers = [a for setting in choice.settings for a in weak.answer(setting, questions, task.labels, file)]
    answers = calibrated(answers, choice.content["means"])
    outcomes, (valid, failed) = outcomes_of(answers), valid_shares(answers)
    for name in (SIMILAR, RANKED):
        if any(each["setting"] == name for each in choice.content["gains"]):
            places = choice.chooser(name, endpoints.encoder).places([each.text for each in questions])
            outcomes |= per_question_outcomes(questions, choice.grimoires, outcomes, {name: places})
    gains = compare(outcomes, valid, failed, together=False)
    return {
        "choice": choice.digest,
        "chosen": choice.content["chosen"],
        "questions": len(questions),
        "remarks": remarks,
        "gains": gain_rows(gains),
        "usd": endpoints.money.spent,
    }


if __name__ == "__main__":
    run_module(main)
