"""The settings of `fastft grimoire build`, and what a directory was made with, so that no other run goes on there."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from fastft.common.command_line import option
from fastft.common.files import write_whole
from fastft.common.records import parse_json
from fastft.compose.grimoire.answering.weak import Dtype, How, WeakModel
from fastft.compose.grimoire.task import LabelTask
from fastft.compose.grimoire.writing.embed import TFIDF
from fastft.compose.grimoire.writing.prompts import PromptTexts
from fastft.compose.grimoire.writing.samplers import SAMPLERS
from fastft.errors import UserError
from fastft.inference.endpoint import is_address

CHANGED = {  # digests, which say nothing to a reader
    "task": "the description, the labels or the questions of the task",
    "weak": "the weak model, or what it is run with,",
    "prompts": "the prompts",
}


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


@dataclass(frozen=True)
class Making:
    """What a directory was made with. A run with other values needs another directory."""

    task: str  # a digest of the description, the labels and the files of train and validation
    weak: str
    strong: str
    answers: str
    seed: int
    samplers: list[str]
    count: int
    encoder: str
    words: int
    no_copies: bool
    calibrate: bool
    max_train: int | None
    max_validation: int | None
    prompts: str  # a digest

    def check(self, path: Path) -> None:
        """Raises UserError if an earlier start had other values."""
        before = parse_json(path.read_bytes()) if path.is_file() else asdict(self)
        for key, value in asdict(self).items():
            if before.get(key) == value:
                continue
            if key in CHANGED:
                raise UserError(f"{path.parent}: {CHANGED[key]} have changed since it was made; give another -o")
            raise UserError(
                f"{path.parent}: was made with {key} {before.get(key)!r}, and now it is {value!r}; give another -o"
            )

    def keep(self, path: Path) -> None:
        if not path.is_file():
            write_whole(path, json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n")


def making_of(config: BuildConfig, task: LabelTask, prompts: PromptTexts, weak: WeakModel) -> Making:
    content = hashlib.sha256(json.dumps([task.description, task.labels]).encode())
    for path in (task.train, task.validation):
        content.update(path.read_bytes() if path else b"none")
    # Of the test split its name alone: it is not opened here.
    content.update((task.test.name if task.test else "none").encode())
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
