"""Checkpoints that are whole or not there, and the export to Hugging Face's format.

A checkpoint is a directory OUTPUT_DIR/checkpoints/step-00000100: PyTorch's distributed checkpoint (every rank writes its
shards and syncs them to disk) and `meta.json`, which lists every file with its size. It is written as `….tmp` and
published by one rename. `latest` is a hint for people and scripts: `newest` looks at the directories, checks their files,
and falls back to the next older one. A run's position is one integer, the step; everything else is computed again.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from fastft import lora
from fastft.model import TrainedModel
from fastft.template import ChatTemplate


def save(
    directory: Path, step: int, model: TrainedModel, optimizer: torch.optim.Optimizer, meta: dict[str, Any]
) -> Path:
    """Write and publish the checkpoint of `step`; collective. Returns its path.

    Raises ValueError on every rank when any rank could not write (a full disk, say); nothing that looks whole is left.
    """
    final = directory / f"step-{step:08d}"
    partial = final.with_name(final.name + ".tmp")
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
    dist.barrier()
    failure = None
    try:
        dcp.save(_state(model, optimizer), checkpoint_id=partial)
    except (Exception, CheckpointException) as error:  # the latter is no Exception; all ranks must hear of either
        failure = _root_cause(error)
    if dist.get_rank() == 0 and failure is None:
        try:
            _publish(partial, final, {**meta, "step": step, "world_size": dist.get_world_size()})
        except OSError as error:
            failure = str(error)
    failures: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(failures, failure)
    if any(failures):
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        reason = next(f for f in failures if f)
        raise ValueError(
            f"{final}: the checkpoint could not be written ({reason}). Earlier checkpoints are untouched: make room and "
            "start the same command again"
        )
    return final


def load(path: Path, model: TrainedModel, optimizer: torch.optim.Optimizer) -> None:
    """Restore trained weights and optimiser in place; collective; any number of ranks."""
    state = _state(model, optimizer)
    dcp.load(state, checkpoint_id=path)  # into the weights themselves
    set_optimizer_state_dict(model, optimizer, state["optimizer"])


def _state(model: TrainedModel, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What training changes. Frozen weights are where they came from."""
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return {"model": trained, "optimizer": get_optimizer_state_dict(model, optimizer)}


def complete(directory: Path, say=print) -> list[tuple[Path, dict[str, Any]]]:
    """Complete checkpoints with their meta data, the newest first. `say` is told of every one that is passed over."""
    found = []
    for path in sorted(directory.glob("step-????????"), reverse=True):
        fault = _fault(path)
        if fault is None:
            found.append((path, json.loads((path / "meta.json").read_text())))
        else:
            say(f"{path}: passed over: {fault}")
    return found


def newest(directory: Path, say=print) -> tuple[Path, dict[str, Any]] | None:
    """The newest complete checkpoint and its meta data, or None."""
    return next(iter(complete(directory, say)), None)


def prune(directory: Path, keep: int) -> None:
    """Remove what interrupted writes left, checkpoints that are not complete, and all but the newest `keep` of the others."""
    kept = [path for path, _ in complete(directory, say=lambda line: None)[:keep]]
    for path in (*directory.glob("step-????????"), *directory.glob("*.tmp")):
        if path not in kept:
            shutil.rmtree(path, ignore_errors=True)


def export(model: TrainedModel, template: ChatTemplate, source: str, config, path: Path) -> None:
    """Write `path` as a Hugging Face model directory; collective. It is written beside and renamed.

    `config` is the transformers config that the model was built from; weights get the data type that it names, that of the
    model at `source`, from which the run started. Adapters are merged, and written alone to `path`/../adapter first. The
    generation config stops at the template's end of turn, and the tokenizer carries the chat template.
    """
    causal_lm, first = model.causal_lm, dist.get_rank() == 0
    weights, adapters = _gathered(causal_lm, config.dtype or torch.float32)
    failure = [None]
    if first:
        try:
            if adapters:
                _replace(path.with_name("adapter"), lambda partial: lora.write_adapter(adapters, causal_lm, partial))
            _replace(path, lambda partial: _write_model(weights, template, source, config, partial))
        except OSError as error:
            failure = [str(error)]
    dist.broadcast_object_list(failure)
    if failure[0]:
        raise ValueError(f"{path}: the model could not be written ({failure[0]}); start the same command again")


@torch.no_grad()
def _gathered(
    causal_lm: torch.nn.Module, dtype: torch.dtype
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Whole weights in `dtype`, and whole adapters in fp32, on the CPU of rank 0; one tensor is gathered at a time."""
    weights, adapters = {}, {}
    kept = causal_lm.state_dict(keep_vars=True).keys()
    persistent = [(name, buffer) for name, buffer in causal_lm.named_buffers() if name in kept]
    for name, tensor in [*causal_lm.named_parameters(), *persistent]:
        whole = lora.merged(causal_lm, name, tensor)
        if dist.get_rank() == 0:
            adapter = lora.is_adapter(name)
            whole = whole.to("cpu", whole.dtype if adapter or not whole.is_floating_point() else dtype)
            (adapters if adapter else weights)[lora.plain_name(name)] = whole
    return weights, adapters


def _replace(path: Path, write) -> None:
    """Have `write` fill a directory beside `path`, and put it there once it is durable. Leaves nothing half-written."""
    partial = path.with_name(path.name + ".tmp")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        write(partial)
        for file in partial.iterdir():
            _sync(file)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(path, ignore_errors=True)
    os.rename(partial, path)


def _write_model(weights: dict[str, torch.Tensor], template: ChatTemplate, source: str, config, path: Path) -> None:
    from transformers import AutoModelForCausalLM, GenerationConfig

    with torch.device("meta"):
        causal_lm = AutoModelForCausalLM.from_config(config, dtype=config.dtype or torch.float32)
    causal_lm.load_state_dict(weights, strict=False, assign=True)
    causal_lm.tie_weights()
    tokenizer = template.tokenizer
    try:
        generation = GenerationConfig.from_pretrained(source)
    except OSError:  # the source has none
        generation = GenerationConfig()
    earlier = generation.eos_token_id
    earlier = earlier if isinstance(earlier, list) else [] if earlier is None else [earlier]
    stops = template.stop_token_ids
    generation.eos_token_id = [*stops, *(i for i in earlier if i not in stops)]
    generation.bos_token_id = tokenizer.bos_token_id
    generation.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stops[0]
    causal_lm.generation_config = generation
    causal_lm.save_pretrained(path)
    tokenizer.chat_template = template.source
    tokenizer.save_pretrained(path)


def _publish(partial: Path, final: Path, meta: dict[str, Any]) -> None:
    """Everything durable, then the rename, then the hint."""
    files = {p.name: p.stat().st_size for p in sorted(partial.iterdir())}
    _write_durably(partial / "meta.json", json.dumps({**meta, "files": files}, indent=1))
    _sync(partial)
    shutil.rmtree(final, ignore_errors=True)  # an incomplete one of that name: `newest` has passed over it
    os.rename(partial, final)
    _sync(final.parent)
    hint = final.parent / "latest.tmp"
    _write_durably(hint, final.name + "\n")
    os.replace(hint, final.parent / "latest")


def _fault(path: Path) -> str | None:
    """What is wrong with a published checkpoint, None if it is complete."""
    try:
        meta = json.loads((path / "meta.json").read_text())
        for name, size in meta["files"].items():
            if not (path / name).exists():
                return f"{name} is missing"
            if (path / name).stat().st_size != size:
                return f"{name} holds {(path / name).stat().st_size} bytes instead of {size}"
    except FileNotFoundError:
        return "meta.json is missing"
    except (ValueError, KeyError, AttributeError):
        return "meta.json is damaged"
    return None


def _write_durably(path: Path, text: str) -> None:
    with open(path, "w") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())


def _sync(path: Path) -> None:
    """Make a file, or a directory's list of names, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _root_cause(error: BaseException) -> str:
    """The operating system's own words, from under the wrapping of distributed checkpointing."""
    failures = getattr(error, "failures", None)  # CheckpointException: rank -> (exception, stack)
    if failures:
        error = next(iter(failures.values()))[0]
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
