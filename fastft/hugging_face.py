"""The trained model in Hugging Face's format: gathered from all ranks, written beside, made durable, put in place by a rename."""

import os
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError

from fastft import lora
from fastft.checkpoint import sync
from fastft.model import TrainedModel
from fastft.ranks import on_first
from fastft.template import ChatTemplate


def export(
    model: TrainedModel, template: ChatTemplate, source: str, config, path: Path, card: str, adapter: Path | None = None
) -> None:
    """Write `path` as a Hugging Face model directory with `card` as its README.md; collective. It is written beside and
    renamed.

    `config` is the transformers config that the model was built from; weights get the data type that it names, that of the
    model at `source`, from which the run started. Adapters are merged, and written alone to `adapter` first. The
    generation config stops at the template's end of turn, and the tokenizer carries the chat template.
    """
    causal_lm = model.causal_lm
    weights, adapters = _gathered(causal_lm, config.dtype or torch.float32)

    def write() -> None:
        try:
            if adapters and adapter:
                _replace(adapter, lambda partial: lora.write_adapter(adapters, causal_lm, partial))
            _replace(path, lambda partial: _write_model(weights, template, source, config, card, partial))
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"{path}: the model could not be written ({error}); start the same command again"
            ) from None

    on_first(write)


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
            sync(file)
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
