"""`fastft grimoire build TASK.yaml --weak DIR|URL#name --strong URL#name -o DIR`: write grimoires, try them, and choose.

    fastft grimoire build trec.yaml --weak small/model --strong https://api.openai.com/v1#gpt-4.1 -o grimoires/trec --dry_run

Nothing of the test split is read here. `fastft.compose.grimoire.run` says which files are written; a second start with the
same -o does only what is missing, and pays for nothing twice.
"""

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastft.common.command_line import option, parse, run_module
from fastft.common.files import make_directory, write_whole
from fastft.compose.grimoire.answering.answers import (
    FEW_SHOT,
    ZERO_SHOT,
    AnswerFile,
    Setting,
    WeakAnswer,
    calibrated,
    label_means,
)
from fastft.compose.grimoire.answering.weak import Dtype, How, WeakModel
from fastft.compose.grimoire.choosing.choose import Gain, chosen, compare, outcomes_of, valid_shares
from fastft.compose.grimoire.choosing.rank import FOLDS, Ranker, cross_chosen, nearest
from fastft.compose.grimoire.run import (
    RANKED,
    SIMILAR,
    Endpoints,
    Making,
    few_shot_examples,
    open_endpoints,
    per_question_outcomes,
    plan_build,
    right_matrix,
    settings_of,
    zero_shot_setting,
)
from fastft.compose.grimoire.task import (
    LabelTask,
    OpenSplits,
    TaskQuestion,
    divided,
    first_by_hash,
    hash_share,
    overlapping_labels,
    read_task,
    split_questions,
)
from fastft.compose.grimoire.writing.copies import CopyGuard
from fastft.compose.grimoire.writing.embed import TFIDF, Embedder, embedder
from fastft.compose.grimoire.writing.prompts import load_prompts
from fastft.compose.grimoire.writing.samplers import CLUSTERED, HARD_SHARE, SAMPLERS, draw_samples, strata
from fastft.compose.grimoire.writing.write import (
    Grimoire,
    WritingLimits,
    load_grimoires,
    save_grimoires,
    save_samples,
    write_grimoires,
)
from fastft.errors import UserError
from fastft.inference.endpoint import EndpointConfig, is_address

logger = logging.getLogger(__name__)

FEW_VALID = 0.5  # a smaller share of answers that name a label is worth a line


@dataclass(kw_only=True)
class BuildConfig:
    """What is made of which models, and where it is kept."""

    task: Path = option(positional=True)
    """The task, a YAML file: description, labels, train, and perhaps validation and test."""
    weak: str
    """The weak model: a directory, or URL#name of an OpenAI-compatible endpoint."""
    strong: str | None = None
    """The strong model, URL#name. Not needed if OUTPUT/grimoires.jsonl is there."""
    output: Path = option(short="-o")
    """A directory for everything that is made."""
    samplers: str = ",".join(SAMPLERS)
    """Which training questions the strong model sees, by these rules, separated by commas."""
    count: int = 4
    """Training questions of each label that it sees."""
    answers: How = "auto"
    """How the weak model answers: by the likelihood of each label (a directory), by a constrained choice (an endpoint), or
    by text; auto takes the first that is possible."""
    calibrate: bool = False
    """With likelihoods: take away what each label has on average over the validation questions, in every setting alike."""
    encoder: str = TFIDF
    """What clusters questions: tfidf, a sentence encoder's directory, or URL#name of an embeddings endpoint."""
    words: int = 400
    """The longest profound grimoire, in words."""
    no_copies: bool = False
    """Ask again for a grimoire that shares 8 words in a row with a question, and leave it out if it still does."""
    prompts: Path | None = None
    """A directory with profound.txt, simple.txt or answer.txt, in place of our own."""
    template: str | None = None
    """Chat template of a weak model's directory (default: the tokenizer's own)."""
    dtype: Dtype | None = None
    """Of a weak model's directory: float32 or bfloat16 (default: bfloat16 on a GPU, float32 on a CPU)."""
    batch_size: int = 16
    """Questions at a time, for a weak model's directory."""
    max_train: int | None = None
    """Use so many training questions at most."""
    max_validation: int | None = None
    """Use so many validation questions at most."""
    seed: int = 22
    """Of every draw."""
    dry_run: bool = False
    """Say what would be asked and what that would cost, and ask nothing."""
    key_env: list[str] = option(several=True)
    """Environment variables with keys, for strong, weak and encoder, of those that are endpoints."""

    def __post_init__(self) -> None:
        for key in ("count", "words", "batch_size", "max_train", "max_validation"):
            if getattr(self, key) is not None and getattr(self, key) < 1:
                raise UserError(f"--{key} must be at least 1")
        if unknown := [each for each in self.sampler_names if each not in SAMPLERS]:
            raise UserError(f"--samplers {unknown[0]}: there are {', '.join(SAMPLERS)}")
        if not self.sampler_names:
            raise UserError("--samplers is empty; none is the sampler that shows no questions")
        if self.strong is not None and not is_address(self.strong):
            raise UserError(
                f"--strong {self.strong}: must be URL#name of an endpoint; `fastft serve` makes one of a directory"
            )

    @property
    def sampler_names(self) -> list[str]:
        return list(dict.fromkeys(filter(None, map(str.strip, self.samplers.split(",")))))


def main(argv: Sequence[str]) -> int:
    what = "Have grimoires written, try them on validation questions, and choose."
    config, endpoint = parse(argv, "fastft grimoire build", what, BuildConfig, EndpointConfig)
    build(config, endpoint)
    return 0


def build(config: BuildConfig, endpoint: EndpointConfig) -> None:
    """Do every step that is missing. Raises UserError for the user's mistakes, and where a step could not end."""
    task, prompts, output = read_task(config.task), load_prompts(config.prompts), config.output
    if output.exists() and not output.is_dir():
        raise UserError(f"{output}: is a file; -o names a directory")
    _say_overlaps(task)
    endpoints = open_endpoints(output, endpoint, config.key_env, config.strong, config.weak, config.encoder)
    weak = WeakModel(config.weak, endpoints.weak, config.answers, config.template, config.batch_size, config.dtype)
    if not config.dry_run:
        make_directory(output)
        _making(config, task, weak).keep(output / "settings.json")
    split = _limited(divided(task) if config.dry_run else split_questions(task, output / "splits"), config)
    for remark in split.remarks:
        logger.info("%s", remark)
    written = load_grimoires(output / "grimoires.jsonl") if (output / "grimoires.jsonl").is_file() else []
    known = all(weak.name in each.zero_shot for each in split.train)
    plan = plan_build(task, split, prompts, config.sampler_names, config.count, config.words, endpoints, known, written)
    print("\n".join(plan.lines()))
    if config.dry_run:
        return
    if (output / "choice.json").is_file():
        _show_choice(output)
        return
    runs = AnswerFile(output / "runs.jsonl")
    zero_shot = zero_shot_setting(task, prompts)
    embed = embedder(
        config.encoder, [each.text for each in split.train], output / "embeddings.cache.jsonl", endpoints.encoder
    )
    if not written:
        right = _zero_shot_on_train(config, split, weak, zero_shot, task, runs, known)
        written = _written(config, task, prompts, split, endpoints, embed, right)
    for each in written:
        if each.wrong:
            logger.warning("%s is left out: %s", each.name, each.wrong)
    usable = [each for each in written if not each.wrong and each.text.strip()]
    for each in written:
        if not each.wrong and not each.text.strip():
            logger.warning("%s is left out: it is empty", each.name)
    if not usable:
        first = next((each.wrong for each in written if each.wrong), "they are empty")
        raise UserError(
            f"no grimoire can be used ({first}); try another --strong, or edit {output / 'grimoires.jsonl'}"
        )
    settings = settings_of(task, prompts, few_shot_examples(split.train, task.labels, config.seed), usable)
    answers = [answer for setting in settings for answer in weak.answer(setting, split.validation, task.labels, runs)]
    _choose(config, task, split, weak, settings, answers, embed)
    _show_choice(output)


def _say_overlaps(task: LabelTask) -> None:
    if pairs := overlapping_labels(task.labels):
        shown = ", ".join(f"{a!r} is part of {b!r}" for a, b in pairs[:3])
        logger.warning("labels: %s; answers are read as whole words, the longest label first", shown)


def _limited(split: OpenSplits, config: BuildConfig) -> OpenSplits:
    train = first_by_hash(split.train, config.max_train)
    return OpenSplits(train, first_by_hash(split.validation, config.max_validation), split.remarks)


def _making(config: BuildConfig, task: LabelTask, weak: WeakModel) -> Making:
    content = hashlib.sha256(json.dumps([task.description, task.labels]).encode())
    for path in (task.train, task.validation):
        content.update(path.read_bytes() if path else b"none")
    content.update(str(task.test).encode())  # its name alone: the test split is not opened here
    prompts = load_prompts(config.prompts)
    return Making(
        task=content.hexdigest()[:16],
        weak=weak.identity,
        strong=config.strong or "",
        answers=weak.how,
        seed=config.seed,
        samplers=config.sampler_names,
        count=config.count,
        encoder=config.encoder,
        words=config.words,
        no_copies=config.no_copies,
        calibrate=config.calibrate,
        max_train=config.max_train,
        max_validation=config.max_validation,
        prompts=hashlib.sha256("\0".join(asdict(prompts).values()).encode()).hexdigest()[:16],
    )


# Writing ---------------------------------------------------------------------------------------------------------------------


def _zero_shot_on_train(
    config: BuildConfig,
    split: OpenSplits,
    weak: WeakModel,
    zero_shot: Setting,
    task: LabelTask,
    runs: AnswerFile,
    known: bool,
) -> dict[str, bool]:
    """Return which training questions the weak model gets right without help, if a sampler needs that."""
    if not any(sampler in HARD_SHARE for sampler in config.sampler_names):
        return {}
    if known:
        right = {each.id: each.zero_shot[weak.name] for each in split.train}
    else:
        answers = weak.answer(zero_shot, split.train, task.labels, runs)
        if config.calibrate:
            answers = calibrated(answers, label_means(answers))
        right = {each.id: each.right for each in answers if not each.error}
    logger.info("%s on train without help: %d right, %d wrong", weak.name, *strata(split.train, right))
    return right


def _written(
    config: BuildConfig,
    task: LabelTask,
    prompts: Any,
    split: OpenSplits,
    endpoints: Endpoints,
    embed: Embedder,
    right: dict[str, bool],
) -> list[Grimoire]:
    """Draw the samples, have the grimoires written, and keep both."""
    if endpoints.strong is None:
        raise UserError("--strong URL#name is missing: who shall write the grimoires?")
    clustered = any(sampler in CLUSTERED for sampler in config.sampler_names)
    rows = embed([each.text for each in split.train]) if clustered else None
    samples = {
        sampler: draw_samples(split.train, task.labels, sampler, config.count, rows, right, config.seed)
        for sampler in config.sampler_names
    }
    save_samples(config.output / "samples.jsonl", samples)
    guard = CopyGuard(each.text for each in [*split.train, *split.validation])
    limits = WritingLimits(config.words, config.no_copies)
    grimoires = write_grimoires(task, samples, endpoints.strong, prompts, guard, limits, endpoints.money)
    save_grimoires(config.output / "grimoires.jsonl", grimoires)
    if copied := sum(bool(each.copies) for each in grimoires):
        logger.warning(
            "%d of %d grimoires share 8 words in a row with a question (--no_copies)", copied, len(grimoires)
        )
    return grimoires


# Choosing --------------------------------------------------------------------------------------------------------------------


def _choose(
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
        "gains": [asdict(each) for each in gains],
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
        best = max(others, key=lambda each: each.gain.value)
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


def _show_choice(output: Path) -> None:
    content = json.loads((output / "choice.json").read_text("utf-8"))
    print(f"chosen: {content['chosen']}: {content['why']}")
    print(f"next: fastft grimoire evaluate {output}")


if __name__ == "__main__":
    run_module(main)
