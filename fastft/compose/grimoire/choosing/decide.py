"""Compare what the weak model answered in every setting, and write the choice: choice.json, prompt.txt, ranker.safetensors."""

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from fastft.common.files import write_whole
from fastft.compose.grimoire.answering.answers import (
    FEW_SHOT,
    ZERO_SHOT,
    Setting,
    WeakAnswer,
    calibrated,
    label_means,
)
from fastft.compose.grimoire.answering.weak import WeakModel
from fastft.compose.grimoire.choosing.choose import Gain, chosen, compare, gain_rows, outcomes_of, valid_shares
from fastft.compose.grimoire.choosing.rank import FOLDS, Ranker, cross_chosen, nearest
from fastft.compose.grimoire.run import RANKED, SIMILAR, per_question_outcomes, right_matrix
from fastft.compose.grimoire.settings import BuildConfig
from fastft.compose.grimoire.task import LabelTask, OpenSplits, TaskQuestion, hash_share
from fastft.compose.grimoire.writing.embed import Embedder
from fastft.inference.endpoint import is_address

logger = logging.getLogger(__name__)

FEW_VALID = 0.5  # a smaller share of answers that name a label is worth a line


def decide(
    config: BuildConfig,
    task: LabelTask,
    split: OpenSplits,
    weak: WeakModel,
    settings: list[Setting],
    answers: list[WeakAnswer],
    embed: Embedder,
) -> None:
    """Compare all settings on validation, and write choice.json and prompt.txt."""
    means = label_means(answers) if config.calibrate else {}
    answers = calibrated(answers, means)
    outcomes, (valid, failed) = outcomes_of(answers), valid_shares(answers)
    grimoires = [each for each in settings if each.text and each.name != FEW_SHOT]
    if len(grimoires) > 1:
        outcomes |= _choosing_per_question(config, split.validation, grimoires, outcomes, embed)
    gains = compare(outcomes, valid, failed)
    name = chosen(gains)
    _say_invalid(answers, valid)
    content = {
        "task": task.name,
        "description": task.description,
        "labels": task.labels,
        "weak": weak.name,
        "answers": weak.how,
        "chosen": name,
        "why": _why(gains, name, len(split.validation)),
        "gains": gain_rows(gains),
        "settings": [asdict(each) for each in settings],
        "means": means,
        "encoder": config.encoder,
        "places": {
            "task": str(config.task.resolve()),
            "weak": config.weak if is_address(config.weak) else str(Path(config.weak).resolve()),
            "template": config.template,
            "dtype": config.dtype,
            "identity": weak.identity,
        },
        "train": [each.id for each in split.train],
        "validation": [each.id for each in split.validation],
    }
    prompt = next((each.prompt for each in settings if each.name == name), None)
    (config.output / "prompt.txt").unlink(missing_ok=True)  # of an earlier choice
    if prompt is not None:
        write_whole(config.output / "prompt.txt", prompt + "\n")
    write_whole(config.output / "choice.json", json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def _choosing_per_question(
    config: BuildConfig,
    questions: Sequence[TaskQuestion],
    grimoires: list[Setting],
    outcomes: dict[str, dict[str, float]],
    embed: Embedder,
) -> dict[str, dict[str, float]]:
    """Return the validation outcomes of choosing a grimoire for each question, and keep the ranker."""
    asked, written = embed([each.text for each in questions]), embed([each.text for each in grimoires])
    right_NG = right_matrix(questions, grimoires, outcomes)
    folds_N = np.array([int(hash_share("fold", each.text) * FOLDS) for each in questions])
    places = {
        SIMILAR: nearest(asked, written),
        RANKED: cross_chosen(asked, written, right_NG, folds_N, config.seed),
    }
    Ranker.train(asked, written, right_NG, config.seed).save(config.output / "ranker.safetensors")
    return per_question_outcomes(questions, grimoires, outcomes, places)


def _why(gains: Sequence[Gain], name: str, questions: int) -> str:
    others = [each for each in gains if each.setting != ZERO_SHOT]
    if name == ZERO_SHOT:
        best = max(others, key=lambda each: each.gain.value if each.questions else -1.0)
        return (
            f"no setting is surely better than zero-shot on {questions} validation questions; the best, {best.setting}, "
            f"gains {_points(best)}"
        )
    best = next(each for each in others if each.setting == name)
    return f"gains {_points(best)} over zero-shot on {questions} validation questions, the highest lower end"


def _points(gain: Gain) -> str:
    value, low, high = (100 * each for each in (gain.gain.value, gain.gain.low, gain.gain.high))
    return f"{value:+.1f} points [{low:.1f}, {high:.1f}]"


def _say_invalid(answers: Sequence[WeakAnswer], valid: dict[str, float]) -> None:
    """Say it in a line if most texts name no label, because they are in another language or another form."""
    texts = [each for each in answers if each.how == "text" and not each.error]
    if not texts:
        return
    missed = [each for each in texts if each.answer is None]
    if len(missed) > FEW_VALID * len(texts):
        first = " ".join(missed[0].text.split())[:60]
        logger.warning(
            "%d of %d answers name no label, such as %r: another language, or another form, counts as wrong", len(missed),
            len(texts), first,
        )  # fmt: skip
