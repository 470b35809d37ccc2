"""Let a model, or a blend of several, answer questions: `fastft answer [QUESTIONS] --model DIR|URL#name|blend:… -o FILE`.

    fastft answer --model runs/first/model -o first.jsonl                       # a Hugging Face directory, on GPU or CPU
    OPENAI_API_KEY=… fastft answer --model https://api.openai.com/v1#gpt-4.1 -o gpt.jsonl
    fastft answer --model blend:runs/a/model,runs/b/model=2 -o blend.jsonl      # each turn drawn, b twice as often
    fastft answer --model blend:chai.yaml -o chai.jsonl                         # the keys of a virtual model in serve.yaml

A second run with the same file asks only what is missing or has failed (fastft.judge.answer, fastft.compose.blend_answers).
"""

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastft.common.command_line import option, parse, run_module
from fastft.common.files import require_not_input
from fastft.compose.blend_answers import BlendAnswerer
from fastft.compose.blend_parts import is_blend, read_blend
from fastft.compose.style import compare_styles
from fastft.errors import UserError
from fastft.inference.endpoint import EndpointConfig
from fastft.judge.answer import Answerer, ModelConfig, answer_all, answerer_for
from fastft.judge.questions import OWN, Answer, load_questions

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class AnswerConfig(ModelConfig):
    """What is asked, and where the answers are kept."""

    model: str
    """A model's directory, URL#name of an OpenAI-compatible endpoint, or a blend of them, whose turns are drawn:
    blend:DIR,DIR; blend:DIR=2,DIR=1 with weights; blend:FILE.yaml with the keys of a virtual model in serve.yaml."""
    seed: str | None = None
    """blend: the seed of the draws; another one draws other models."""
    questions: Path = option(OWN, positional=True)
    """Questions as JSON Lines; by default our own 80."""
    output: Path = option(short="-o")
    """The file for the answers, as JSON Lines; answers that it holds already are kept."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.output.is_dir():
            raise UserError(f"{self.output}: is a directory; -o names the file for the answers")
        require_not_input(self.output, [self.questions])
        if self.seed is not None and not is_blend(self.model):
            raise UserError("--seed is for the draws of a blend: --model blend:DIR,DIR")


def main(argv: Sequence[str]) -> int:
    """Run `fastft answer`. Raises UserError if questions are still unanswered at the end."""
    config, endpoint = parse(argv, "fastft answer", "Have a model answer questions.", AnswerConfig, EndpointConfig)
    questions = load_questions(config.questions)
    answerer = _answerer(config, endpoint)
    answers, usd = answer_all(questions, config.output, answerer, config.dry_run)
    if config.dry_run:
        return 0
    print(f"{config.output}: {len(answers)} answers of {answerer.name}{f', ${usd:.2f}' if usd else ''}")
    if isinstance(answerer, BlendAnswerer):
        _show_parts(answers.values())
    return 0


def _answerer(config: AnswerConfig, endpoint: EndpointConfig) -> Answerer:
    if not is_blend(config.model):
        return answerer_for(config, endpoint, config.output)
    return BlendAnswerer(read_blend(config.model, config.name, config.seed), config, endpoint, config.output)


def _show_parts(answers: Iterable[Answer]) -> None:
    """Print how many turns each model has answered, and warn where their styles differ strongly."""
    texts: dict[str, list[str]] = {}
    for answer in answers:
        for by, text in zip(answer.answered_by or (), answer.turns):
            texts.setdefault(by["model"], []).append(text)
    counts = Counter({model: len(each) for model, each in texts.items()})
    print("turns: " + ", ".join(f"{model} {count}" for model, count in counts.most_common()))
    for warning in compare_styles(texts):
        logger.warning(warning)


if __name__ == "__main__":
    run_module(main)
