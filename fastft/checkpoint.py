"""Checkpoints that are whole or not there, and the export to Hugging Face's format.

A checkpoint is a directory OUTPUT_DIR/checkpoints/step-00000100: PyTorch's distributed checkpoint (every rank writes its
shards and syncs them to disk) and `meta.json`, which lists every file with its size. A step waits only while the state is
copied to the host's memory; a thread writes the copy as `….tmp` and publishes it by one rename. `latest` is a hint for
people and scripts: `newest` looks at the directories, checks their files, and falls back to the next older one. A run's
position is one integer, the step; everything else is computed again.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from fastft import lora
from fastft.model import TrainedModel
from fastft.template import ChatTemplate


class Writer:
    """Writes checkpoints into `directory` while training goes on, one at a time, and removes those that are not to be kept."""

    def __init__(self, directory: Path, keep: int, keep_every: int = 0):
        self.directory, self.keep, self.keep_every = directory, keep, keep_every
        directory.mkdir(parents=True, exist_ok=True)
        self.group = dist.new_group(backend="gloo")  # the thread's own: its messages must not meet the trainer's
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        pinned = torch.cuda.is_available()
        options = StagingOptions(
            use_pinned_memory=pinned, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=pinned
        )
        self.stager = DefaultStager(options)
        self.under_way: tuple[Path, Future[str | None]] | None = None

    def save(self, step: int, model: TrainedModel, optimizer: torch.optim.Optimizer, meta: dict[str, Any]) -> None:
        """Copy the state and leave the rest to the thread; collective. Raises ValueError as `wait` does."""
        self.wait()
        final = self.directory / f"step-{step:08d}"
        staged = self.stager.stage(_state(model, optimizer))
        meta = {**meta, "step": step, "world_size": dist.get_world_size()}
        self.under_way = final, self.thread.submit(self._write, staged, final, meta)

    def wait(self) -> None:
        """Return when the checkpoint under way is published; collective.

        Raises ValueError on every rank when any rank could not write (a full disk, say); nothing that looks whole is left.
        """
        if self.under_way is None:
            return
        (final, written), self.under_way = self.under_way, None
        failures: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(failures, written.result())
        if any(failures):
            if dist.get_rank() == 0:
                shutil.rmtree(_partial(final), ignore_errors=True)
            reason = next(f for f in failures if f)
            raise ValueError(
                f"{final}: the checkpoint could not be written ({reason}). Earlier checkpoints are untouched: make room "
                "and start the same command again"
            )

    def _write(self, state: dict[str, Any], final: Path, meta: dict[str, Any]) -> str | None:
        """Runs in the thread, on every rank; returns what went wrong."""
        try:
            if dist.get_rank() == 0:
                shutil.rmtree(_partial(final), ignore_errors=True)
            dist.barrier(self.group)
            dcp.save(state, checkpoint_id=_partial(final), process_group=self.group)
            if dist.get_rank() == 0:  # all ranks have written: the last thing that rank 0 does there is to hear so
                _publish(_partial(final), final, meta)
                prune(self.directory, self.keep, self.keep_every)
        except (Exception, CheckpointException) as error:  # the latter is no Exception; all ranks must hear of either
            return _root_cause(error)
        return None


def _partial(final: Path) -> Path:
    return final.with_name(final.name + ".tmp")


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
        fault = fault_of(path)
        if fault is None:
            found.append((path, read_meta(path)))
        else:
            say(f"{path}: passed over: {fault}")
    return found


def read_meta(path: Path) -> dict[str, Any]:
    """What a complete checkpoint says of itself."""
    return json.loads((path / "meta.json").read_text())


def newest(directory: Path, say=print) -> tuple[Path, dict[str, Any]] | None:
    """The newest complete checkpoint and its meta data, or None."""
    return next(iter(complete(directory, say)), None)


def prune(directory: Path, keep: int, keep_every: int = 0) -> None:
    """Remove what interrupted writes left, checkpoints that are not complete, and of the others all but the newest `keep`
    and those whose step is a multiple of `keep_every` (0: none).
    """
    found = complete(directory, say=lambda line: None)
    kept = [path for i, (path, meta) in enumerate(found) if i < keep or (keep_every and meta["step"] % keep_every == 0)]
    for path in (*directory.glob("step-????????"), *directory.glob("*.tmp")):
        if path not in kept:
            shutil.rmtree(path, ignore_errors=True)


def read_trained(path: Path, names: Iterable[str], dtype: Callable[[str], torch.dtype]) -> dict[str, torch.Tensor]:
    """The weights that a checkpoint holds among the parameters `names`, whole, on the CPU, each in dtype(name).

    Any number of processes may have written it. Raises ValueError where it cannot be read.
    """
    try:
        saved = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
        found = {
            name: torch.empty(saved[f"model.{name}"].size, dtype=dtype(name))
            for name in names
            if f"model.{name}" in saved
        }
        dcp.load({"model": found}, checkpoint_id=path)
    except (Exception, CheckpointException) as error:  # damaged in a way that its sizes do not show
        raise ValueError(f"{path}: the checkpoint cannot be read ({_root_cause(error)})") from None
    return found


def export(
    model: TrainedModel, template: ChatTemplate, source: str, config, path: Path, card: str, adapter: Path | None = None
) -> None:
    """Write `path` as a Hugging Face model directory with `card` as its README.md; collective. It is written beside and
    renamed.

    `config` is the transformers config that the model was built from; weights get the data type that it names, that of the
    model at `source`, from which the run started. Adapters are merged, and written alone to `adapter` first. The
    generation config stops at the template's end of turn, and the tokenizer carries the chat template.
    """
    causal_lm, first = model.causal_lm, dist.get_rank() == 0
    weights, adapters = _gathered(causal_lm, config.dtype or torch.float32)
    failure = [None]
    if first:
        try:
            if adapters and adapter:
                _replace(adapter, lambda partial: lora.write_adapter(adapters, causal_lm, partial))
            _replace(path, lambda partial: _write_model(weights, template, source, config, card, partial))
        except (OSError, SafetensorError) as error:
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
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        write(partial)
        for file in partial.iterdir():
            _sync(file)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(path, ignore_errors=True)
    os.rename(partial, path)


def _write_model(
    weights: dict[str, torch.Tensor], template: ChatTemplate, source: str, config, card: str, path: Path
) -> None:
    from transformers import AutoModelForCausalLM, GenerationConfig
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
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
    (path / "README.md").write_text(card, encoding="utf-8")


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


def fault_of(path: Path) -> str | None:
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
