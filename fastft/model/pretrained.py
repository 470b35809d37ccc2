"""Reads the config and finds the files of a published model, in a directory or on the Hugging Face Hub ("Qwen/Qwen2.5-7B")."""

import copy
import hashlib
import json
import threading
from pathlib import Path

from fastft.config import TrainConfig
from fastft.errors import UserError, first_line, is_ours
from fastft.model.rope_scaling import fit_seq_len

HUB_LIMIT_S = 5.0
"""Seconds to wait for the Hub, which usually answers within one."""


def load_config(model: str):
    """Read the config of a causal language model. Raises UserError if there is none; runs no code from the repository."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING, AutoConfig

    path = Path(model)
    if path.is_dir() and not (path / "config.json").exists():
        raise UserError(f"{model}: the directory holds no model (config.json)")
    if not path.exists() and (model.startswith((".", "/", "~")) or model.count("/") > 1):
        raise UserError(f"{model}: no such directory")
    try:
        config = AutoConfig.from_pretrained(model)
    except Exception as error:  # transformers and the Hub raise a dozen kinds here
        if is_ours(error):
            raise
        raise UserError(f"{model}: the model's config cannot be read ({first_line(error)})") from None
    # BERT and similar models have a causal head as well, but were not trained for it.
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or type(config) in MODEL_FOR_MASKED_LM_MAPPING:
        raise UserError(f"{model}: {config.model_type} is no causal language model")
    return config


def require_hub(model: str) -> None:
    """Raise UserError unless the config of the Hub's `model` is in the local cache, or the Hub answers within HUB_LIMIT_S.

    huggingface_hub itself tries for at least 23 s, which is too long for a command that only answers a question.
    """
    from huggingface_hub import constants, try_to_load_from_cache

    if constants.HF_HUB_OFFLINE or Path(model).exists():
        return
    try:
        if isinstance(try_to_load_from_cache(model, "config.json"), str):
            return
    except ValueError:  # not a valid name on the Hub, which load_config reports
        return
    reasons = ["no answer"]
    # In a thread, because the time limit of a request does not include the look-up of the host's name.
    thread = threading.Thread(target=_ask_hub, args=(model, reasons), daemon=True)
    thread.start()
    thread.join(HUB_LIMIT_S)
    if reasons:
        raise UserError(f"{model}: no such directory, and the Hugging Face Hub cannot be reached ({reasons[-1]})")


def _ask_hub(model: str, reasons: list[str]) -> None:
    """Ask the Hub for the config, once. Empty `reasons` if it answers anything at all, else add what went wrong."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError

    try:
        get_hf_file_metadata(hf_hub_url(model, "config.json"), timeout=HUB_LIMIT_S)
    except HfHubHTTPError:  # also an answer; load_config explains it
        pass
    except Exception as error:  # from an HTTP library that depends on huggingface_hub's version
        reasons.append(first_line(error))
        return
    reasons.clear()


def locate(model: str, name: str) -> Path:
    """The path of the model's file `name`, which is downloaded if necessary.

    If the model has no such file, the returned path does not exist.
    """
    from transformers.utils import cached_file

    if Path(model).is_dir():
        return Path(model, name)
    try:
        return Path(cached_file(model, name))
    except OSError:  # the repository has no such file, or the Hub cannot be reached and the cache has none
        return Path(model, name)


def fit_config(model_config, config: TrainConfig, vocabulary: int):
    """The config of the model to train: `model_config`, or a copy with more positions or embeddings if the run asks for them.

    Raises UserError if the model has fewer positions than `config.seq_len`, or fewer embeddings than the tokenizer has tokens
    (`vocabulary`), and the run does not ask for more.
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
    """A digest that differs between models: of the config, and of the names, sizes and first 64 KiB of the weight files.

    A safetensors file begins with the names, shapes and offsets of its tensors. For a model on the Hub, it is a digest of the
    config and the commit.
    """
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps(config.to_diff_dict(), sort_keys=True, default=str).encode())
    for path in sorted(p for p in Path(model).glob("*") if p.suffix in (".safetensors", ".bin")):
        digest.update(f"{path.name} {path.stat().st_size}".encode())
        with path.open("rb") as file:
            digest.update(file.read(1 << 16))
    digest.update(str(getattr(config, "_commit_hash", None)).encode())
    return digest.hexdigest()
