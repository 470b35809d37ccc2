"""Read and check what a run is made from, its settings and its data, before there is a model; the same on every rank."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from fastft.config import TrainConfig, stages_of
from fastft.data.dataset import TokenizedData, load_data
from fastft.data.step_plan import Curriculum, plan_stage
from fastft.data.template.chat_template import ChatTemplate, load_template
from fastft.errors import UserError
from fastft.model import huggingface
from fastft.model.pretrained import fit_config, load_config, model_fingerprint
from fastft.train.checkpoint.identity import run_identity
from fastft.train.report.samples import Sampler
from fastft.train.report.trackers import tracker_names

logger = logging.getLogger(__name__)


@dataclass
class RunInputs:
    """The checked settings of a run, and everything that is derived from them and the data."""

    config: TrainConfig
    stages: list[TrainConfig]
    """The settings of each stage; a run without stages is one stage."""
    curriculum: Curriculum
    """Which rows are trained on in which step."""
    template: ChatTemplate
    model_config: Any
    """The config (of transformers) of the model that is trained."""
    model_files: huggingface.ModelFiles
    """The files of the exported model besides its weights; writing them has been tried."""
    eval_data: TokenizedData | None
    """Held-out conversations."""
    sampler: Sampler
    trackers: list[str]
    identity: dict[str, Any]
    """The values that a checkpoint must have to belong to this run."""

    @property
    def output_dir(self) -> Path:
        return Path(self.config.output_dir)

    @property
    def total(self) -> int:
        """Optimizer steps of the run."""
        return self.curriculum.total


def read_inputs(config: TrainConfig, model_dir: Path) -> RunInputs:
    """Read and check the settings and the data; collective. Raises UserError for the user's mistakes.

    The trained model will be written to `model_dir`. To prove that this will work, its files other than the weights are
    written beside `model_dir` and removed again: a model that could not be exported is not trained.
    """
    at_a_time = dist.get_world_size() * config.micro_batch_size
    if config.global_batch_size % at_a_time:
        raise UserError(
            f"global_batch_size {config.global_batch_size} is not a multiple of micro_batch_size {config.micro_batch_size} "
            f"x {dist.get_world_size()} processes; choose a multiple of {at_a_time}"
        )
    trackers = tracker_names(config.trackers)
    source_config = load_config(config.model)
    template = load_template(config.model, config.template)
    model_config = fit_config(source_config, config, len(template.tokenizer))
    if model_config is not source_config:
        logger.info(
            f"model: extended to {model_config.max_position_embeddings} positions, {model_config.vocab_size} embeddings"
        )
    model_files = huggingface.prepare(config, model_config, template, model_dir)
    stages = stages_of(config)
    curriculum = Curriculum([plan_stage(stage, template) for stage in stages])
    return RunInputs(
        config,
        stages,
        curriculum,
        template,
        model_config,
        model_files,
        eval_data=load_data(config.eval_data, template, config) if config.eval_data else None,
        sampler=Sampler(config, template),
        trackers=trackers,
        identity=run_identity(config, curriculum, model_fingerprint(config.model, source_config)),
    )
