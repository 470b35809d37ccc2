"""`fastft grimoire build TASK.yaml --weak DIR|URL#name --strong URL#name -o DIR`: write grimoires, try them, and choose.

    fastft grimoire build trec.yaml --weak small/model --strong https://api.openai.com/v1#gpt-4.1 -o grimoires/trec --dry_run

Nothing of the test split is read here. `fastft.compose.grimoire.run` says which files are written; a second start with the
same -o does only what is missing, and pays for nothing twice.
"""

import json
import logging
from collections.abc import Sequence
from pathlib import Path

from fastft.common.command_line import parse, run_module
from fastft.common.files import make_directory
from fastft.compose.grimoire.answering.answers import AnswerFile, Setting, calibrated, label_means
from fastft.compose.grimoire.answering.weak import WeakModel
from fastft.compose.grimoire.choosing.decide import decide
from fastft.compose.grimoire.run import (
    Endpoints,
    few_shot_examples,
    open_endpoints,
    plan_build,
    settings_of,
    zero_shot_setting,
)
from fastft.compose.grimoire.settings import BuildConfig, making_of
from fastft.compose.grimoire.task import (
    LabelTask,
    OpenSplits,
    divided,
    first_by_hash,
    overlapping_labels,
    read_task,
    split_questions,
)
from fastft.compose.grimoire.writing.copies import CopyGuard
from fastft.compose.grimoire.writing.embed import Embedder, embedder
from fastft.compose.grimoire.writing.prompts import PromptTexts, load_prompts
from fastft.compose.grimoire.writing.samplers import CLUSTERED, HARD_SHARE, draw_samples, strata
from fastft.compose.grimoire.writing.write import (
    Grimoire,
    WritingLimits,
    load_grimoires,
    save_grimoires,
    save_samples,
    write_grimoires,
)
from fastft.errors import UserError
from fastft.inference.endpoint import EndpointConfig

logger = logging.getLogger(__name__)


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
    making = making_of(config, task, prompts, weak)
    making.check(output / "settings.json")
    split = divided(task)  # nothing is kept of a task that cannot work
    if (output / "choice.json").is_file():
        print("the choice has been made: nothing is asked, and nothing is paid")
        return _show_choice(output)
    if not config.dry_run:
        make_directory(output)
        making.keep(output / "settings.json")
        split = split_questions(task, output / "splits")
    split = _limited(split, config)
    for remark in split.remarks:
        logger.info("%s", remark)
    written = _kept(output / "grimoires.jsonl")
    known = all(weak.name in each.zero_shot for each in split.train)
    plan = plan_build(task, split, prompts, config.sampler_names, config.count, config.words, endpoints, known, written)
    print("\n".join(plan.lines()))
    if config.dry_run:
        return None
    runs = AnswerFile(output / "runs.jsonl")
    embed = embedder(
        config.encoder, [each.text for each in split.train], output / "embeddings.cache.jsonl", endpoints.encoder
    )
    if not written:
        right = _zero_shot_on_train(config, split, weak, zero_shot_setting(task, prompts), task, runs, known)
        written = _written(config, task, prompts, split, endpoints, embed, right)
    for each in written:
        if each.fault:
            logger.warning("%s is left out: %s", each.name, each.fault)
    if all(each.fault for each in written):
        raise UserError(
            f"no grimoire can be used ({written[0].fault}); try another --strong and -o, or edit "
            f"{output / 'grimoires.jsonl'}"
        )
    settings = settings_of(task, prompts, few_shot_examples(split.train, task.labels, config.seed), written)
    answers = [answer for setting in settings for answer in weak.answer(setting, split.validation, task.labels, runs)]
    decide(config, task, split, weak, settings, answers, embed)
    return _show_choice(output)


def _kept(path: Path) -> list[Grimoire]:
    """Return the grimoires of an earlier start; none if all were refused, cut or unanswered, so that they are asked for again:
    replies that were paid for are still there.
    """
    written = load_grimoires(path) if path.is_file() else []
    return [] if all(each.wrong for each in written) else written


def _say_overlaps(task: LabelTask) -> None:
    if pairs := overlapping_labels(task.labels):
        shown = ", ".join(f"{a!r} is part of {b!r}" for a, b in pairs[:3])
        logger.warning("labels: %s; answers are read as whole words, the longest label first", shown)


def _limited(split: OpenSplits, config: BuildConfig) -> OpenSplits:
    train = first_by_hash(split.train, config.max_train)
    return OpenSplits(train, first_by_hash(split.validation, config.max_validation), split.remarks)


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
    prompts: PromptTexts,
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


def _show_choice(output: Path) -> None:
    content = json.loads((output / "choice.json").read_text("utf-8"))
    print(f"chosen: {content['chosen']}: {content['why']}")
    print(f"next: fastft grimoire evaluate {output}")


if __name__ == "__main__":
    run_module(main)
