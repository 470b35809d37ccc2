"""Reads the generation config that an exported model inherits from its source, and repairs what transformers would refuse.

Some published files (Vicuna v1.5's, Llama 2's) set temperature or top_p without do_sample. transformers warns when it reads
such a file, and refuses to write it. So values that it refuses are repaired or left out before the first step, with a warning,
and cannot prevent the export at the end of a run.
"""

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from fastft.errors import is_ours
from fastft.model.pretrained import locate

logger = logging.getLogger(__name__)

NAME = "generation_config.json"
# transformers does not check the types of these, on which the validity of the other values depends.
MODES = {"do_sample": bool, "num_beams": int, "return_dict_in_generate": bool, "use_cache": bool}
# Set from the tokenizer; further eos ids of the file are kept.
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
METADATA = ("_commit_hash", "_from_model_config", "transformers_version")


def read_generation_config(model: str):
    """Return (transformers' GenerationConfig of a model, without its token ids; the ids at which its file says to stop).

    Warns of values that were repaired or left out.
    """
    from transformers import GenerationConfig

    path = locate(model, NAME)
    try:
        values = json.loads(path.read_bytes())
    except FileNotFoundError:
        return GenerationConfig(), []
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        logger.warning("%s: is damaged (no JSON object) and left out; the exported file only says where to stop", path)
        return GenerationConfig(), []
    ends = _token_ids(values.get("eos_token_id"))
    values = {key: value for key, value in values.items() if value is not None and key not in (*TOKENS, *METADATA)}
    with _without_warnings():
        kept, faults, sampling = usable(values)
        config = GenerationConfig(**kept)
    if sampling:
        logger.warning("%s: %s without do_sample; the exported file says do_sample true", path, _named(sampling))
    if faults:
        reasons = "; ".join(f"{_named({key: values[key]})} ({fault})" for key, fault in faults.items())
        logger.warning("%s: left out of the exported file: %s", path, reasons)
    return config, ends


def usable(values: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str], dict[str, Any]]:
    """Sort the values of a generation config into those that can be kept and those that cannot.

    Returns (values that transformers accepts and writes together, the reason against each of the others, those of the kept
    values for which do_sample had to be set).
    """
    faults = {key: fault for key in MODES if key in values and (fault := _fault({key: values[key]}))}
    modes = {key: values[key] for key in MODES if key in values and key not in faults}
    rest = {key: value for key, value in values.items() if key not in MODES}
    sampling = {}
    if values.get("temperature") == 0:  # how other libraries write greedy decoding
        modes["do_sample"] = False
    elif "do_sample" not in modes:
        sampled = {**modes, "do_sample": True}
        for key, value in rest.items():
            if _is_applied(key, value) and _fault({**modes, key: value}) and not _fault({**sampled, key: value}):
                sampling[key] = value
        modes = sampled if sampling else modes
    kept = dict(modes)
    for key, value in rest.items():
        if fault := _fault({**kept, key: value}):
            faults[key] = fault
        else:
            kept[key] = value
    return kept, faults, sampling


def _fault(values: dict[str, Any]) -> str | None:
    """The reason why transformers would not accept, apply or write these values; None if there is none."""
    from transformers import GenerationConfig

    try:
        for key, value in values.items():
            _require_alone(key, value)
        config = GenerationConfig(**values)
        config.validate(strict=True)
        config.to_json_string()
    except Exception as error:  # transformers raises a dozen kinds here
        if is_ours(error) and not isinstance(error, _RefusedAloneError):
            raise
        lines = (str(error).strip() or type(error).__name__).splitlines()
        line = next((line.partition(": ")[2] for line in lines if line.startswith("- `")), lines[0])
        return line.partition(" -- ")[2].partition(". ")[0] or line
    return None


class _RefusedAloneError(Exception):
    """A value that we refuse, because transformers accepts it and then fails when it generates."""


def _require_alone(key: str, value: Any) -> None:
    """Raise an exception, of ours or of a library, if `generate` would refuse this value, whatever the other values are."""
    from transformers import GenerationConfig

    json.dumps(value, allow_nan=False)
    if key == "self" or hasattr(GenerationConfig, key):
        raise _RefusedAloneError("is no setting of generation")
    if key in MODES and type(value) is not MODES[key]:
        raise _RefusedAloneError(f"is no {MODES[key].__name__}")
    if _is_applied(key, value):
        _appliers()[key][0](value)


def _is_applied(key: str, value: Any) -> bool:
    """Whether this value changes what `generate` does."""
    return key in _appliers() and value != _appliers()[key][1]


@lru_cache(1)
def _appliers() -> dict[str, tuple[Callable, Any]]:
    """Maps settings to (the class that applies the value to logits, and raises if it is invalid; the value that turns it off)."""
    from transformers import generation

    return {
        "temperature": (generation.TemperatureLogitsWarper, 1.0),
        "top_k": (generation.TopKLogitsWarper, 0),
        "top_p": (generation.TopPLogitsWarper, 1.0),
        "min_p": (generation.MinPLogitsWarper, None),
        "top_h": (generation.TopHLogitsWarper, None),
        "typical_p": (generation.TypicalLogitsWarper, 1.0),
        "epsilon_cutoff": (generation.EpsilonLogitsWarper, 0.0),
        "eta_cutoff": (generation.EtaLogitsWarper, 0.0),
        "repetition_penalty": (generation.RepetitionPenaltyLogitsProcessor, 1.0),
        "no_repeat_ngram_size": (generation.NoRepeatNGramLogitsProcessor, 0),
    }


def _token_ids(value: Any) -> list[int]:
    return [i for i in (value if isinstance(value, list) else [value]) if type(i) is int and i >= 0]


def _named(values: dict[str, Any]) -> str:
    return " and ".join(f"{key} {json.dumps(value)[:40]}" for key, value in values.items())


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Silence transformers' warnings about values that are repaired here."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
