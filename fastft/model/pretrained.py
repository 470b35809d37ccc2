"""Reads the config and finds the files of a published model, in a directory or on the Hugging Face Hub ("Qwen/Qwen2.5-7B")."""

import copy
import hashlib
import json
from pathlib import Path

from fastft.common.hub import require_found
from fastft.config import TrainConfig
from fastft.errors import UserError, first_line, is_ours
from fastft.model.rope_scaling import fit_seq_len


def load_config(model: str):
    """Read the config of a causal language model. Raises UserError if there is none; runs no code from the repository."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING, AutoConfig

    path = Path(model)
    if path.is_dir() and not (path / "config.json").exists():
        raise UserError(f"{model}: the directory holds no model (config.json)")
    require_found(model)
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
