"""TODO docstring of fastft.model.pretrained."""

import copy
import hashlib
import json
from pathlib import Path

from fastft.config import TrainConfig
from fastft.errors import UserError
from fastft.model.rope_scaling import fit_seq_len


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


def fit_config(model_config, config: TrainConfig, words: int):
    """The config of the model to train, for `config.seq_len` positions and `words` tokens of the tokenizer: the one at
    `config.model`, or a changed copy where the configuration asks for it. Raises UserError where it does not fit.
    """
    fitted = fit_seq_len(model_config, config.seq_len, config.extend, config.model)
    rows = getattr(fitted, "vocab_size", words)
    if words <= rows:
        return fitted
    if not config.resize_embeddings:
        raise UserError(
            f"{config.model}: the tokenizer knows {words} tokens, the model has embeddings for {rows}; "
            "--resize_embeddings true adds some"
        )
    fitted = copy.deepcopy(fitted)
    fitted.vocab_size = -(-words // 64) * 64
    return fitted


def model_fingerprint(model: str, config) -> str:
    """Tells one model from another by its config and by the names, sizes and first 64 KiB of its weight files.

    (A safetensors file begins with the names, shapes and places of its tensors. For a Hub name: the commit.)
    """
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps(config.to_diff_dict(), sort_keys=True, default=str).encode())
    for path in sorted(p for p in Path(model).glob("*") if p.suffix in (".safetensors", ".bin")):
        digest.update(f"{path.name} {path.stat().st_size}".encode())
        with path.open("rb") as file:
            digest.update(file.read(1 << 16))
    digest.update(str(getattr(config, "_commit_hash", None)).encode())
    return digest.hexdigest()
