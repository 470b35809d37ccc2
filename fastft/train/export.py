"""A checkpoint as a Hugging Face model with its card: `fastft export CHECKPOINT DIR [--push_to_hub NAME]`.

CHECKPOINT is a step's directory (RUN/checkpoints/step-00000100), or a run's, whose newest complete checkpoint is taken. One
process on CPU; it needs the model from which the run started, and not the data. DIR is written as DIR.partial and renamed.
Memory: the model once in the data type of its files, 14 GB for 7 billion parameters.
"""

import argparse
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from fastft.config import TrainConfig
from fastft.data.template.chat_template import load_template
from fastft.errors import UserError
from fastft.model import huggingface as hugging_face
from fastft.model import lora, weights
from fastft.model.build import TrainedModel, assemble
from fastft.model.pretrained import fit_config, load_config, model_fingerprint
from fastft.train.checkpoint import local as checkpoint
from fastft.train.checkpoint import manifest
from fastft.train.report.card import model_card
from fastft.train.report.run_dir import read_run
from fastft.train.trackers import first_line

logger = logging.getLogger(__name__)


def export_checkpoint(place: Path, directory: Path, hub_name: str | None = None) -> None:
    """Write the model of the checkpoint at `place` to `directory`, which must not hold anything yet.

    Raises UserError with one line for a checkpoint that is not whole or belongs to no run, for a model that is not the one
    from which the run started, and for a directory that cannot be written.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"{directory}: exists; choose a directory that does not, nothing is written over")
    step_directory, run_directory = find_checkpoint(place)
    run, meta = read_run(run_directory), manifest.read(step_directory)
    config = run.config
    source_config = load_config(config.model)
    if model_fingerprint(config.model, source_config) != meta["identity"]["model"]:
        raise UserError(
            f"{config.model}: is not the model from which the run started; if that lies elsewhere now, say so in "
            f"{run_directory / 'config.yaml'}"
        )
    template = load_template(config.model, config.template)
    model_config = fit_config(source_config, config, len(template.tokenizer))
    directory.parent.mkdir(parents=True, exist_ok=True)
    with single_process():
        files = hugging_face.prepare(config, model_config, template, directory)
        model = load_model(config, model_config, step_directory)
        card = model_card(run, meta["step"], hub_name or directory.name)
        with hugging_face.advising("Once the cause is gone, start the same command again"):
            hugging_face.export(model, files, directory, card)
    logger.info(f"exported: step {meta['step']} of {run.name} to {directory}")


def find_checkpoint(place: Path) -> tuple[Path, Path]:
    """(a complete checkpoint's directory, its run's). Raises UserError with one line."""
    if not place.is_dir():
        raise UserError(f"{place}: no such directory")
    if (place / "checkpoints").is_dir():
        found = checkpoint.newest(place / "checkpoints", logger.info)
        if found is None:
            raise UserError(f"{place / 'checkpoints'}: holds no complete checkpoint")
        return found[0], place
    if not place.name.startswith("step-") and not (place / "meta.json").exists():
        raise UserError(f"{place}: is neither a run's directory nor a checkpoint's (RUN/checkpoints/step-…)")
    if fault := checkpoint.fault_of(place):
        raise UserError(f"{place}: is no complete checkpoint: {fault}")
    return place, place.resolve().parent.parent


def load_model(config: TrainConfig, model_config, path: Path) -> TrainedModel:
    """The model of the checkpoint at `path`, on CPU, not sharded: what was not trained comes from `config.model`."""
    kept, cpu = model_config.dtype or torch.float32, torch.device("cpu")
    model, read = assemble(config, model_config, "eager", torch.float32)  # every architecture has this attention

    def dtype(name: str) -> torch.dtype:
        return torch.float32 if lora.is_adapter(name) else kept

    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    values = checkpoint.read_trained(path, trained, dtype)
    for name, parameter in trained.items():
        if name not in values or values[name].shape != parameter.shape:
            raise UserError(f"{path}: does not hold the {name} that its run's config.yaml asks for")
    weights.fill_buffers(model, read)
    if config.lora.quantize != "none":
        lora.load_quantised(model.causal_lm, read, cpu)
    names = {parameter: name for name, parameter in model.named_parameters()}
    weights.fill(model, lambda name: values.pop(name) if name in values else read(name), cpu, lambda p: dtype(names[p]))
    return model


@contextmanager
def single_process() -> Iterator[None]:
    """A process group of this process alone, for what the trainer's many processes do together."""
    if dist.is_initialized():
        yield
        return
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def make_repository(name: str) -> None:
    """Make the model repository on the Hub, private, if it does not exist: before the work, so that a login that lacks is
    found out at once. Raises UserError with one line.
    """
    from huggingface_hub import HfApi

    try:
        HfApi().create_repo(name, private=True, exist_ok=True)
    except Exception as error:  # names that are none, nobody logged in, no network: a dozen kinds
        raise UserError(f"--push_to_hub {name}: {first_line(error)}") from None


def push(directory: Path, name: str) -> str:
    """Upload the model and return its address. Raises UserError with one line."""
    from huggingface_hub import HfApi

    try:
        return str(HfApi().upload_folder(repo_id=name, folder_path=directory, commit_message="fastft export"))
    except Exception as error:
        raise UserError(
            f"--push_to_hub {name}: {first_line(error)}. The model is whole in {directory}: hf upload {name} {directory}"
        ) from None


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="fastft export", description="Write a checkpoint as a Hugging Face model.")
    parser.add_argument(
        "checkpoint", type=Path, help="a step's directory, or a run's for its newest complete checkpoint"
    )
    parser.add_argument("directory", type=Path, help="where the model goes; must not exist")
    parser.add_argument(
        "--push_to_hub", metavar="NAME", help="upload it, too; the repository is made private if it is new"
    )
    options = parser.parse_args(argv)
    if options.push_to_hub:
        make_repository(options.push_to_hub)
    export_checkpoint(options.checkpoint, options.directory, options.push_to_hub)
    if options.push_to_hub:
        logger.info(f"pushed: {push(options.directory, options.push_to_hub)}")
    return 0
