"""`fastft export CHECKPOINT DIR [--push_to_hub NAME]`: write a checkpoint as a Hugging Face model with its card.

CHECKPOINT is a step's directory (RUN/checkpoints/step-00000100), or a run's directory for its newest complete checkpoint. The
export runs in one process on CPU. It needs the model from which the run started, but not the data. It takes as much memory as
the model in the data type of its files, 14 GB for 7 billion parameters. DIR is written as DIR.partial and then renamed.
"""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from fastft.common.command_line import option, parse, run_module
from fastft.common.files import make_directory
from fastft.config import TrainConfig
from fastft.data.template.chat_template import load_template
from fastft.errors import UserError, first_line, is_ours
from fastft.model import huggingface, lora, weights
from fastft.model.build import TrainedModel, assemble
from fastft.model.pretrained import fit_config, load_config, model_fingerprint
from fastft.train.checkpoint import local, manifest
from fastft.train.report.card import model_card
from fastft.train.report.run_dir import read_run

logger = logging.getLogger(__name__)


@dataclass
class ExportConfig:
    """Options of `fastft export`."""

    checkpoint: Path = option(positional=True)
    """A step's directory, RUN/checkpoints/step-00000100, or a run's directory for its newest complete checkpoint."""
    directory: Path = option(positional=True)
    """Where the model is written; must not exist."""
    push_to_hub: str | None = None
    """Upload the model to this repository on the Hub, too, such as someone/model; a new one is made private."""


def main(argv: list[str] | None = None) -> int:
    """Run the command line."""
    argv = sys.argv[1:] if argv is None else argv
    [config] = parse(argv, "fastft export", "Write a checkpoint as a Hugging Face model.", ExportConfig)
    name = config.push_to_hub
    if name:
        make_repository(name)
    export_checkpoint(config.checkpoint, config.directory, name)
    if name:
        logger.info("pushed: %s", push(config.directory, name))
    return 0


def export_checkpoint(place: Path, directory: Path, hub_name: str | None = None) -> None:
    """Write the model of the checkpoint at `place` to `directory`, which must be empty or not exist.

    `hub_name` is the name of the repository on the Hub to which the model will be uploaded, if it will be. Raises UserError
    for a checkpoint that is not complete or belongs to no run, for a model that is not the one from which the run started, and
    for a directory that cannot be written.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"{directory}: exists; choose a directory that does not, nothing is overwritten")
    step_directory, run_directory = find_checkpoint(place)
    run, meta = read_run(run_directory), manifest.read(step_directory)
    config = run.config
    source_config = load_config(config.model)
    if model_fingerprint(config.model, source_config) != meta["identity"]["model"]:
        raise UserError(
            f"{config.model}: is not the model from which the run started; if that is somewhere else now, write its place "
            f"into {run_directory / 'config.yaml'}"
        )
    template = load_template(config.model, config.template)
    model_config = fit_config(source_config, config, len(template.tokenizer))
    make_directory(directory.parent)
    with single_process():
        files = huggingface.prepare(config, model_config, template, directory)
        model = load_model(config, model_config, step_directory)
        card = model_card(run, meta["step"], hub_name or directory.name)
        with huggingface.advising("Once the cause is gone, start the same command again"):
            huggingface.export(model, files, directory, card)
    logger.info("exported: step %d of %s to %s", meta["step"], run.name, directory)


def find_checkpoint(place: Path) -> tuple[Path, Path]:
    """Find the checkpoint at `place`: its directory, and its run's directory. Raises UserError if none is complete."""
    if not place.is_dir():
        raise UserError(f"{place}: no such directory")
    if (place / "checkpoints").is_dir():
        complete = local.complete(place / "checkpoints")
        newest = complete.found[0][0] if complete.found else None
        for line in complete.passed_over:
            logger.warning(line)
        if newest is None:
            raise UserError(f"{place / 'checkpoints'}: holds no complete checkpoint")
        return newest, place
    if not place.name.startswith("step-") and not (place / "meta.json").exists():
        raise UserError(f"{place}: is neither a run's directory nor a checkpoint's (RUN/checkpoints/step-…)")
    if fault := local.fault_of(place):
        raise UserError(f"{place}: is no complete checkpoint: {fault}")
    return place, place.resolve().parent.parent


def load_model(config: TrainConfig, model_config, path: Path) -> TrainedModel:
    """Load the model of the checkpoint at `path`, on CPU and not sharded.

    Weights that were not trained come from `config.model`.
    """
    file_dtype, cpu = model_config.dtype or torch.float32, torch.device("cpu")
    model, read = assemble(config, model_config, "eager", torch.float32)  # every architecture has eager attention

    def dtype(name: str) -> torch.dtype:
        return torch.float32 if lora.is_adapter(name) else file_dtype

    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    values = local.read_trained(path, trained, dtype)
    for name, parameter in trained.items():
        if name not in values or values[name].shape != parameter.shape:
            raise UserError(f"{path}: does not hold the {name} that its run's config.yaml asks for")
    weights.fill_buffers(model, read)
    if config.lora.quantize != "none":
        lora.load_quantized(model.causal_lm, read, cpu)
    names = {parameter: name for name, parameter in model.named_parameters()}
    weights.fill(model, lambda name: values.pop(name) if name in values else read(name), cpu, lambda p: dtype(names[p]))
    return model


@contextmanager
def single_process() -> Iterator[None]:
    """A context with a process group of this process alone, for code that the trainer runs on all ranks together."""
    if dist.is_initialized():
        yield
        return
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def make_repository(name: str) -> None:
    """Create the model repository on the Hub, private, if it does not exist. Raises UserError if that fails.

    This is done before the work, so that a missing login is noticed at once.
    """
    from huggingface_hub import HfApi

    try:
        HfApi().create_repo(name, private=True, exist_ok=True)
    except Exception as error:  # invalid names, no login, no network: the Hub's library raises a dozen kinds
        if is_ours(error):
            raise
        raise UserError(f"--push_to_hub {name}: {first_line(error)}") from None


def push(directory: Path, name: str) -> str:
    """Upload the model, and return its address. Raises UserError with the command that tries again if that fails."""
    from huggingface_hub import HfApi

    try:
        return str(HfApi().upload_folder(repo_id=name, folder_path=directory, commit_message="fastft export"))
    except Exception as error:  # as above
        if is_ours(error):
            raise
        raise UserError(
            f"--push_to_hub {name}: {first_line(error)}. The model is complete in {directory}: hf upload {name} {directory}"
        ) from None


if __name__ == "__main__":
    run_module(main)
