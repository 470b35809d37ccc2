"""Turns queries into embeddings of a local model, which stays as it is: a table of token embeddings, or a sentence encoder.

    features = embeddings_of("models/all-MiniLM-L6-v2")
    matrix = features.transform(queries)          # [N, d], rows of length 1

A router keeps the directory's name and the digest of its weights, not the weights.
"""

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fastft.errors import UserError, first_line

TOKENS = 256  # of a query that are read
BATCH = 32
PIECE = 1 << 20  # bytes of a file that are hashed at a time


class _Embeddings:
    """What both kinds share: the directory, its digest, and the mean over tokens."""

    kind: str

    def __init__(self, directory: str, digest: str | None = None):
        self.directory = str(Path(directory).absolute())
        self.digest = _digest(Path(directory))
        if digest not in (None, self.digest):
            raise UserError(
                f"{directory}: holds other weights than the router was trained with; train it again, or put them back"
            )

    def state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        return {"kind": self.kind, "directory": self.directory, "digest": self.digest}, {}

    def dense(self, matrix: np.ndarray) -> np.ndarray:
        return matrix


class StaticFeatures(_Embeddings):
    """The mean of the embeddings of a query's tokens: a tokenizer.json and one table, [vocabulary, d], in safetensors."""

    kind = "static"

    @cached_property
    def tokenizer(self) -> Any:
        from tokenizers import Tokenizer

        try:
            tokenizer = Tokenizer.from_file(str(Path(self.directory) / "tokenizer.json"))
        except Exception as error:  # tokenizers raises nothing narrower
            raise UserError(f"{self.directory}/tokenizer.json: cannot be read ({first_line(error)})") from None
        tokenizer.no_padding()
        tokenizer.enable_truncation(TOKENS)
        return tokenizer

    @cached_property
    def table(self) -> np.ndarray:
        table = _table_of(Path(self.directory))
        if table is None:
            raise UserError(f"{self.directory}: its safetensors file must hold one table, [vocabulary, dimensions]")
        if len(table) < self.tokenizer.get_vocab_size():
            raise UserError(
                f"{self.directory}: the tokenizer knows {self.tokenizer.get_vocab_size():,} tokens, the table {len(table):,}"
            )
        return table

    def transform(self, queries: Sequence[str]) -> np.ndarray:
        table = self.table
        rows = np.zeros((len(queries), table.shape[1]), dtype=np.float32)
        for row, encoding in zip(rows, self.tokenizer.encode_batch(list(queries), add_special_tokens=False)):
            if encoding.ids:
                row[:] = table[encoding.ids].astype(np.float32).mean(0)
        return _unit(rows)


class EncoderFeatures(_Embeddings):
    """The mean of a sentence encoder's last hidden states over a query's tokens."""

    kind = "encoder"

    @cached_property
    def model(self) -> tuple[Any, Any]:
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()
        try:
            tokenizer = AutoTokenizer.from_pretrained(self.directory, local_files_only=True, trust_remote_code=False)
            model = AutoModel.from_pretrained(
                self.directory, local_files_only=True, trust_remote_code=False, use_safetensors=True
            )
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{self.directory}: cannot be loaded as an encoder ({first_line(error)})") from None
        return tokenizer, model.float().eval()

    def transform(self, queries: Sequence[str]) -> np.ndarray:
        import torch

        tokenizer, model = self.model
        ids = [tokenizer(query, truncation=True, max_length=TOKENS)["input_ids"] for query in queries]
        order = sorted((i for i in range(len(ids)) if ids[i]), key=lambda i: len(ids[i]))  # little padding
        rows = np.zeros((len(queries), model.config.hidden_size), dtype=np.float32)  # a query without a token stays 0
        for start in range(0, len(order), BATCH):
            batch = order[start : start + BATCH]
            inputs = tokenizer.pad({"input_ids": [ids[i] for i in batch]}, return_tensors="pt")
            with torch.inference_mode():
                states_BTD = model(**inputs).last_hidden_state
            mask_BT1 = inputs["attention_mask"][..., None]
            rows[batch] = ((states_BTD * mask_BT1).sum(1) / mask_BT1.sum(1)).numpy()
        return _unit(rows)


def embeddings_of(directory: str) -> StaticFeatures | EncoderFeatures:
    """Tell what a directory holds. Raises UserError if it is neither a static table nor an encoder."""
    path = Path(directory)
    if not path.is_dir():
        raise UserError(
            f"{directory}: no such directory; an encoder is a directory with tokenizer.json and *.safetensors"
        )
    if (path / "config.json").is_file():
        features: StaticFeatures | EncoderFeatures = EncoderFeatures(directory)
        features.model  # noqa: B018  loaded now, so that a mistake is reported before the work
        return features
    if not (path / "tokenizer.json").is_file():
        raise UserError(f"{directory}: holds neither config.json (an encoder) nor tokenizer.json (static embeddings)")
    features = StaticFeatures(directory)
    features.table  # noqa: B018
    return features


def _weights(directory: Path) -> list[Path]:
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise UserError(
            f"{directory}: holds no *.safetensors; weights of other kinds are not read, because they can run code"
        )
    return files


def _digest(directory: Path) -> str:
    """A hash of the weights and the tokenizer."""
    if not directory.is_dir():
        raise UserError(f"{directory}: the encoder that this router was trained with is not there")
    known = hashlib.sha256()
    for path in (*_weights(directory), directory / "tokenizer.json"):
        if path.is_file():
            own = hashlib.sha256()
            with path.open("rb") as file:
                while piece := file.read(PIECE):
                    own.update(piece)
            known.update(own.digest())
    return known.hexdigest()


def _table_of(directory: Path) -> np.ndarray | None:
    """The only two-dimensional tensor of the directory, or None."""
    from safetensors import SafetensorError, safe_open

    tables = []
    for path in _weights(directory):
        try:
            with safe_open(path, framework="np") as file:
                names = list(file.keys())
                tables += [file.get_tensor(name) for name in names if len(file.get_slice(name).get_shape()) == 2]
        except SafetensorError as error:
            raise UserError(f"{path}: cannot be read ({first_line(error)})") from None
    return tables[0] if len(tables) == 1 else None


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
