"""The trained model in Hugging Face's format: gathered from all ranks, written beside, made durable, put in place by a rename.

All but the weights is read, written and read back before a run's first step (`prepare`): what cannot be exported is not
trained.
"""

import json
import os
import shutil
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError

from fastft.common.distributed import everywhere, on_first
from fastft.common.files import sync
from fastft.config import TrainConfig
from fastft.data.template.chat_template import ChatTemplate
from fastft.errors import UserError
from fastft.model import lora
from fastft.model.build import TrainedModel, without_values
from fastft.model.generation_config import read_generation_config

PROBE = "Hello  World!\n\n\t1234 é 日本 🙂 <b>x</b>"


@dataclass
class ModelFiles:
    """What an exported model has besides its weights and its card."""

    source: str
    """The model from which the run started."""
    config: Any
    """transformers' config, from which the model was built; weights get the data type that it names."""
    template: ChatTemplate
    generation: Any
    """transformers' GenerationConfig, which stops at the template's end of turn."""
    adapter: Any = None
    """peft's config of the adapters, where some are trained."""

    @property
    def dtype(self) -> torch.dtype:
        return self.config.dtype or torch.float32

    @property
    def chat_template(self) -> str:
        """As a text file gives it back; Jinja reads line ends alike."""
        return self.template.source.replace("\r\n", "\n").replace("\r", "\n")

    def write(self, path: Path, weights: dict[str, torch.Tensor] | None = None) -> None:
        """Have transformers write all of the model but its card, or all but its card and weights."""
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()
        causal_lm = without_values(self.config, self.dtype, self.source)
        causal_lm.generation_config = self.generation
        if weights:
            causal_lm.load_state_dict(weights, strict=False, assign=True)
            causal_lm.tie_weights()
        with self._saving("config, or its generation config,"):
            causal_lm.save_pretrained(path, state_dict=None if weights else {})
        with self._saving("tokenizer with its chat template"):
            self.template.tokenizer.chat_template = self.chat_template
            self.template.tokenizer.save_pretrained(path)

    def read_back(self, path: Path) -> None:
        """Raise UserError where transformers does not read what `write` has written, or reads something else."""
        from transformers import AutoConfig, AutoTokenizer, GenerationConfig

        with self._saving("config"):
            _require_json(path / "config.json")
            if AutoConfig.from_pretrained(path).to_json_string() != (path / "config.json").read_text("utf-8"):
                raise UserError("transformers reads other values than it wrote")
        with self._saving("generation config"):
            _require_json(path / "generation_config.json")
            if GenerationConfig.from_pretrained(path) != self.generation:
                raise UserError("transformers reads other values than it wrote")
        with self._saving("tokenizer"):
            _require_json(path / "tokenizer_config.json")
            ours, read = self.template.tokenizer, AutoTokenizer.from_pretrained(path)
            if read.get_vocab() != ours.get_vocab() or read(PROBE)["input_ids"] != ours(PROBE)["input_ids"]:
                raise UserError("read again, it makes other tokens")
        with self._saving("chat template"):
            if read.chat_template != self.chat_template:
                raise UserError("read again, it is another")

    @contextmanager
    def _saving(self, what: str) -> Iterator[None]:
        try:
            yield
        except SafetensorError:
            raise
        except Exception as error:  # transformers and tokenizers raise a dozen kinds here
            if (isinstance(error, OSError) and error.errno) or "(os error " in str(error):  # the latter is Rust's
                raise OSError(str(error)) from None
            why = _first_line(error)
            raise UserError(
                f"{self.source}: its {what} cannot be saved ({why}), so neither could what is trained; mend it first"
            ) from error


def prepare(config: TrainConfig, model_config, template: ChatTemplate, path: Path) -> ModelFiles:
    """Read what will be exported to `path` beside the weights, and prove, next to it, that it can be; collective.

    Raises UserError with one line. `say` is told what of the generation config is mended or left out.
    """
    files = ModelFiles(config.model, model_config, template, None)

    def prove() -> None:
        files.generation = _generation_config(config.model, template)
        if config.lora.r:
            blocks = TrainedModel(without_values(model_config, files.dtype, config.model)).blocks
            files.adapter = lora.adapter_settings(blocks, config.lora, config.model)
        with _writing(path), _partial(path) as place:
            files.write(place)
            files.read_back(place)
            if files.adapter:
                lora.prove_settings(files.adapter, place)
            shutil.rmtree(place)

    everywhere(prove if dist.get_rank() == 0 else None)
    return files


def _generation_config(model: str, template: ChatTemplate):
    generation, earlier = read_generation_config(model)
    tokenizer, stops = template.tokenizer, template.stop_token_ids
    generation.eos_token_id = [*stops, *(i for i in earlier if i not in stops)]
    generation.bos_token_id = tokenizer.bos_token_id
    generation.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stops[0]
    return generation


def export(model: TrainedModel, files: ModelFiles, path: Path, card: str, adapter: Path | None = None) -> None:
    """Write `path` as a Hugging Face model directory with `card` as its README.md; collective. It is written beside and
    renamed. Adapters are merged, and written alone to `adapter` first. Raises UserError where the disk does not take it.
    """
    weights, adapters = _gathered(model.causal_lm, files.dtype)

    def fill(partial: Path) -> None:
        files.write(partial, weights)
        (partial / "README.md").write_text(card, encoding="utf-8")

    def write() -> None:
        with _writing(path):
            if adapters and adapter:
                _replace(adapter, lambda partial: lora.write_adapter(adapters, files.adapter, partial))
            _replace(path, fill)

    on_first(write)


@contextmanager
def advising(advice: str) -> Iterator[None]:
    """Whatever goes wrong inside, `advice` is said with it."""
    try:
        yield
    except (UserError, OSError) as error:
        raise UserError(f"{error}. {advice}") from None
    except Exception:
        print(advice, file=sys.stderr, flush=True)
        raise


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


def _replace(path: Path, write: Callable[[Path], None]) -> None:
    """Have `write` fill a directory beside `path`, and put it there once it is durable. Leaves nothing half-written."""
    with _partial(path) as partial:
        write(partial)
        mode = _usual_mode(partial)
        for file in partial.iterdir():
            file.chmod(mode)  # safetensors' own are for their owner only
            sync(file)
        sync(partial)
        shutil.rmtree(path, ignore_errors=True)
        os.rename(partial, path)
        sync(path.parent)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """What the disk does not take is one line."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: the model could not be written ({error})") from None


@contextmanager
def _partial(path: Path) -> Iterator[Path]:
    """A place beside `path` for what is not whole yet: not there before, nor after something went wrong."""
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _usual_mode(directory: Path) -> int:
    """The permissions of a new file there: what the umask, or the directory's access list, makes them."""
    probe = directory / ".mode"
    probe.touch()
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    return mode


def _require_json(path: Path) -> None:
    """Raise UserError for what Python writes into JSON and other readers refuse: NaN and Infinity."""

    def refuse(name: str) -> None:
        raise UserError(f"{path.name} would hold {name}, which JSON cannot")

    json.loads(path.read_bytes(), parse_constant=refuse)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
