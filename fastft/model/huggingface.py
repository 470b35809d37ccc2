"""Exports a model in Hugging Face's format: gathers its weights from all ranks, and writes its directory whole.

Everything except the weights is written and read back before the first step of a run (`prepare`), so that no model is trained
that cannot be exported.
"""

import json
import logging
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fastft.common.distributed import everywhere, on_first
from fastft.common.files import full_disk, is_refusal, lack_of_room, machine_error, make_directory, publish_directory
from fastft.config import TrainConfig
from fastft.data.template.chat_template import ChatTemplate
from fastft.errors import PeerError, UserError, first_line, is_ours
from fastft.model import lora
from fastft.model.build import TrainedModel, without_values
from fastft.model.generation_config import read_generation_config

logger = logging.getLogger(__name__)

# Errors that transformers raises for values that cannot be saved.
LIBRARY_ERRORS = (OSError, ValueError, TypeError, RuntimeError)
OTHER_VALUES = "transformers reads other values than it wrote"
PROBE = "Hello  World!\n\n\t1234 é 日本 🙂 <b>x</b>"


@dataclass
class ModelFiles:
    """The parts of an exported model, except its weights and its card."""

    source: str
    """The model from which the run started."""
    config: Any
    """transformers' config of the model, which also names the data type of the exported weights."""
    template: ChatTemplate
    generation: Any
    """transformers' GenerationConfig, which stops at the template's end of turn."""
    adapter: Any = None
    """peft's config of the adapters, if any are trained."""

    @property
    def dtype(self) -> torch.dtype:
        return self.config.dtype or torch.float32

    @property
    def chat_template(self) -> str:
        """The template with plain line ends, as it is read from a text file. Jinja treats all line ends alike."""
        return self.template.source.replace("\r\n", "\n").replace("\r", "\n")

    def write(self, path: Path, weights: dict[str, torch.Tensor] | None = None) -> None:
        """Write everything except the card with transformers' own functions; the weights only if they are given."""
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()
        causal_lm = without_values(self.config, self.dtype, self.source)
        causal_lm.generation_config = self.generation
        if weights:
            causal_lm.load_state_dict(weights, strict=False, assign=True)
            causal_lm.tie_weights()
        with self._saving("config, or its generation config,"):
            causal_lm.save_pretrained(path, state_dict=None if weights else {})
        self.template.tokenizer.chat_template = self.chat_template
        with self._saving("tokenizer with its chat template"):
            self.template.tokenizer.save_pretrained(path)

    def read_back(self, path: Path) -> None:
        """Raise UserError if transformers does not read back what `write` has written."""
        from transformers import AutoConfig, AutoTokenizer, GenerationConfig

        with self._saving("config"):
            config = AutoConfig.from_pretrained(path)
        self._require_json("config", path / "config.json")
        self._require("config", config.to_json_string() == (path / "config.json").read_text("utf-8"), OTHER_VALUES)
        with self._saving("generation config"):
            generation = GenerationConfig.from_pretrained(path)
        self._require_json("generation config", path / "generation_config.json")
        self._require("generation config", generation == self.generation, OTHER_VALUES)
        with self._saving("tokenizer"):
            ours, read = self.template.tokenizer, AutoTokenizer.from_pretrained(path)
            same = read.get_vocab() == ours.get_vocab() and read(PROBE)["input_ids"] == ours(PROBE)["input_ids"]
        self._require_json("tokenizer", path / "tokenizer_config.json")
        self._require("tokenizer", same, "read again, it makes other tokens")
        self._require("chat template", read.chat_template == self.chat_template, "read again, it is another")

    @contextmanager
    def _saving(self, what: str) -> Iterator[None]:
        """Turn errors of transformers and tokenizers into a UserError about `what`, except errors of the disk.

        It encloses only calls of theirs, so that an error of our own code, whatever its class, still counts as a bug.
        """
        try:
            yield
        except Exception as error:
            by_library = isinstance(error, LIBRARY_ERRORS) or type(error) is Exception  # the latter by tokenizers
            if is_refusal(error) or is_ours(error) or not by_library:
                raise
            self._require(what, False, first_line(error))

    def _require(self, what: str, holds: bool, why: str) -> None:
        if not holds:
            raise UserError(
                f"{self.source}: its {what} cannot be saved ({why}), so neither could what is trained; mend it first"
            )

    def _require_json(self, what: str, path: Path) -> None:
        """Raise UserError for NaN and Infinity, which Python writes into JSON but other readers refuse."""
        names: list[str] = []
        json.loads(path.read_bytes(), parse_constant=names.append)
        self._require(what, not names, f"{path.name} would hold {' and '.join(set(names))}, which JSON cannot")


def prepare(config: TrainConfig, model_config, template: ChatTemplate, path: Path) -> ModelFiles:
    """Return what will be exported to `path` with the weights, after it was written beside `path` and read back; collective.

    Raises UserError if it cannot be written. Warns of values of the generation config that are repaired or left out.
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
    """The generation config of `model`, with the end-of-turn tokens of the template and the padding token of the tokenizer."""
    generation, earlier = read_generation_config(model)
    tokenizer, stops = template.tokenizer, template.stop_token_ids
    generation.eos_token_id = [*stops, *(i for i in earlier if i not in stops)]
    generation.bos_token_id = tokenizer.bos_token_id
    generation.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stops[0]
    return generation


def export(model: TrainedModel, files: ModelFiles, path: Path, card: str, adapter: Path | None = None) -> None:
    """Write the model to the directory `path`, with `card` as its README.md; collective.

    Adapters are merged into the weights, and also written to the directory `adapter`. Raises UserError if the disk refuses.
    """
    weights, adapters = _gathered(model.causal_lm, files.dtype)

    def fill(partial: Path) -> None:
        files.write(partial, weights)
        (partial / "README.md").write_text(card, encoding="utf-8")

    def write() -> None:
        with _writing(path, sum(tensor.nbytes for tensor in (*weights.values(), *adapters.values()))):
            if adapters and adapter:
                _replace(adapter, lambda partial: lora.write_adapter(adapters, files.adapter, partial))
            _replace(path, fill)

    on_first(write)


@contextmanager
def advising(advice: str) -> Iterator[None]:
    """Add `advice` to the message of any error inside; for a bug, log it before the error."""
    try:
        yield
    except OSError as error:
        if (mistake := machine_error(error)) is None:
            logger.warning(advice)
            raise
        raise _advised(mistake, advice) from None
    except UserError as error:
        raise _advised(error, advice) from None
    except PeerError:  # the process that met the error gives the advice
        raise
    except Exception:
        logger.warning(advice)
        raise


def _advised(error: UserError, advice: str) -> UserError:
    """The same error, with `advice` after its words."""
    error.args = (f"{error}. {advice}",)
    return error


@torch.no_grad()
def _gathered(
    causal_lm: torch.nn.Module, dtype: torch.dtype
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Gather (weights in `dtype`, adapters in fp32) whole on the CPU of rank 0, one tensor at a time."""
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
    """Let `write` fill a directory beside `path`, and publish it as `path`. After an error nothing of it is left."""
    with _partial(path) as partial:
        write(partial)
        mode = _usual_mode(partial)
        for file in partial.iterdir():
            file.chmod(mode)  # safetensors makes its files readable for their owner alone
        publish_directory(partial, path)


@contextmanager
def _writing(path: Path, needed: int | None = None) -> Iterator[None]:
    """Turn errors of the disk into a UserError of one line. `needed` is the size in bytes of the model that is written."""
    try:
        yield
    except Exception as error:  # safetensors and tokenizers have classes of their own
        if isinstance(error, UserError) or not is_refusal(error):
            raise
        number = full_disk(error)
        reason = f"{lack_of_room(number, path, needed)}; make room there" if number else error
        raise UserError(f"{path}: the model could not be written ({reason})") from None


@contextmanager
def _partial(path: Path) -> Iterator[Path]:
    """Give a path beside `path`, at which nothing exists yet. After an error, what was written there is removed."""
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    make_directory(partial)  # a place that refuses is not called a model that cannot be saved
    partial.rmdir()
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _usual_mode(directory: Path) -> int:
    """The permissions of a new file in `directory`, which the umask or the directory's access list sets."""
    probe = directory / ".mode"
    probe.touch()
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    return mode
