"""A model as it was published, without its weights: its files, its config, and what tells it from another.

A model is named by a directory or by its name on the Hugging Face Hub ("Qwen/Qwen2.5-7B").
"""

import copy
import hashlib
import json
import threading
from pathlib import Path

from fastft.config import TrainConfig
from fastft.errors import UserError
from fastft.model.rope_scaling import fit_seq_len

HUB_LIMIT_S = 5.0
"""A Hub that is there answers within a second."""


def load_config(model: str):
    """The config of a causal language model in transformers. Raises UserError with one line; runs no remote code."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING, AutoConfig

    path = Path(model)
    if path.is_dir() and not (path / "config.json").exists():
        raise UserError(f"{model}: the directory holds no model (config.json)")
    if not path.exists() and (model.startswith((".", "/", "~")) or model.count("/") > 1):
        raise UserError(f"{model}: no such directory")
    try:
        config = AutoConfig.from_pretrained(model)
    except Exception as error:  # transformers and the Hub raise a dozen kinds here
        raise UserError(f"{model}: the model's config cannot be read ({str(error).strip().splitlines()[0]})") from None
    # BERT and its like have a causal head, too, but were not trained for it.
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or type(config) in MODEL_FOR_MASKED_LM_MAPPING:
        raise UserError(f"{model}: {config.model_type} is no causal language model")
    return config


def require_hub(model: str) -> None:
    """Raise UserError unless the config of the Hub's `model` is in the local cache, or the Hub answers within HUB_LIMIT_S.

    huggingface_hub retries for 23 s and more, which is right for a run that has begun and too long for a question.
    """
    from huggingface_hub import constants, try_to_load_from_cache

    if constants.HF_HUB_OFFLINE or Path(model).exists():
        return
    try:
        if isinstance(try_to_load_from_cache(model, "config.json"), str):
            return
    except ValueError:  # no name that the Hub could have: load_config says so
        return
    reasons = ["no answer"]
    # In a thread, because a time limit of the request does not cover the look-up of the host's name.
    thread = threading.Thread(target=_ask_hub, args=(model, reasons), daemon=True)
    thread.start()
    thread.join(HUB_LIMIT_S)
    if reasons:
        raise UserError(f"{model}: no such directory, and the Hugging Face Hub cannot be reached ({reasons[-1]})")


def _ask_hub(model: str, reasons: list[str]) -> None:
    """Ask once for the config. Empties `reasons` if the Hub answers, whatever it says; else adds what went wrong."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError

    try:
        get_hf_file_metadata(hf_hub_url(model, "config.json"), timeout=HUB_LIMIT_S)
    except HfHubHTTPError:  # an answer, if not a good one: load_config says what it means
        pass
    except Exception as error:  # of an HTTP library that changes with huggingface_hub's version
        reasons.append((str(error).strip() or type(error).__name__).splitlines()[0])
        return
    reasons.clear()


def locate(model: str, name: str) -> Path:
    """The path of the model's file `name`, downloaded if need be; a path where nothing is, if the model has no such file."""
    from transformers.utils import cached_file

    if Path(model).is_dir():
        return Path(model, name)
    try:
        return Path(cached_file(model, name))
    except OSError:  # the repository has no such file, or the cache has none and the Hub is not reached
        return Path(model, name)


def fit_config(model_config, config: TrainConfig, vocabulary: int):
    """The config of the model to train: `model_config`, or a changed copy where the run asks for longer rows or more tokens.

    The model must know `config.seq_len` positions and the tokenizer's `vocabulary` tokens. Raises UserError where it does not and
    the configuration does not ask for a change.
    """
    fitted = fit_seq_len(model_config, config.seq_len, config.extend, config.model)
    rows = getattr(fitted, "vocab_size", vocabulary)
    if vocabulary <= rows:
        return fitted
    if not config.resize_embeddings:
        raise UserError(
            f"{config.model}: the tokenizer knows {vocabulary} tokens, the model has embeddings for {rows}; "
            "--resize_embeddings true adds some"
        )
    fitted = copy.deepcopy(fitted)
    fitted.vocab_size = -(-vocabulary // 64) * 64
    return fitted


def model_fingerprint(model: str, config) -> str:
    """A digest that tells one model from another, of its config and the names, sizes and first 64 KiB of its weight files.

    A safetensors file begins with the names, shapes and offsets of its tensors. Of a model on the Hub, the commit counts.
    """
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps(config.to_diff_dict(), sort_keys=True, default=str).encode())
    for path in sorted(p for p in Path(model).glob("*") if p.suffix in (".safetensors", ".bin")):
        digest.update(f"{path.name} {path.stat().st_size}".encode())
        with path.open("rb") as file:
            digest.update(file.read(1 << 16))
    digest.update(str(getattr(config, "_commit_hash", None)).encode())
    return digest.hexdigest()
