"""Turns texts into rows of length 1: hashed words and characters (the default), a sentence encoder, or an embeddings endpoint.

rows = embedder("tfidf", fit_on=texts)(texts)            # [N, D], a scipy matrix, or a dense one
"""

import asyncio
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastft.common.records import parse_json, read_records, repair_text
from fastft.errors import UserError
from fastft.inference.budget import OverBudget
from fastft.inference.client import Client
from fastft.inference.completion import ErrorInBody
from fastft.inference.endpoint import is_address
from fastft.inference.transport import Lost, Unreached
from fastft.judge.answer import cut_torn_line

Embedder = Callable[[Sequence[str]], Any]
TFIDF = "tfidf"
PER_REQUEST = 64  # texts


def embedder(encoder: str, fit_on: Sequence[str], cache: Path | None = None, client: Client | None = None) -> Embedder:
    """Return the function that embeds. `encoder` is "tfidf", a directory, or URL#name, for which `client` is its endpoint.

    Raises UserError if there is no such encoder.
    """
    if encoder == TFIDF:
        return _hashed(fit_on)
    if is_address(encoder):
        assert client is not None and cache is not None
        return lambda texts: _from_endpoint(client, texts, cache)
    if not Path(encoder).is_dir():
        raise UserError(
            f"--encoder {encoder}: must be tfidf, a sentence encoder's directory, or URL#name of an endpoint"
        )
    from fastft.compose.router.vectors.embeddings import embeddings_of

    return embeddings_of(encoder).transform


def _hashed(fit_on: Sequence[str]) -> Embedder:
    """The router's features. Each of their two blocks has length 1 there; here the whole row has."""
    from fastft.compose.router.vectors.features import HashedFeatures, require_packages

    require_packages()
    from sklearn.preprocessing import normalize

    features = HashedFeatures().fit(fit_on)
    return lambda texts: normalize(features.transform(texts)) if texts else features.transform(texts)


def _from_endpoint(client: Client, texts: Sequence[str], cache: Path) -> np.ndarray:
    """Ask an embeddings endpoint for the texts that `cache` does not hold. Raises UserError if it fails."""
    known = _cached(cache)
    keys = [hashlib.sha256(f"{client.url}#{client.name}\n{text}".encode()).hexdigest() for text in texts]
    missing = list({key: text for key, text in zip(keys, texts) if key not in known}.items())

    async def ask() -> None:
        if cache.is_file():
            cut_torn_line(cache)  # else the next row would stand behind it, and be lost with it
        with open(cache, "ab", buffering=0) as file:
            for begin in range(0, len(missing), PER_REQUEST):
                some = missing[begin : begin + PER_REQUEST]
                for (key, _), row in zip(some, await _ask_for(client, [text for _, text in some])):
                    known[key] = row
                    file.write(json.dumps({"key": key, "row": row}).encode() + b"\n")

    if missing:
        asyncio.run(ask())
    return _unit(np.array([known[key] for key in keys], dtype=np.float32))


async def _ask_for(client: Client, texts: list[str]) -> list[list[float]]:
    """Return the rows of a few texts, within the budget. Raises UserError."""
    connection = client.connections[0]
    most = connection.usd(sum(len(text.encode()) for text in texts), 0)
    spent = 0.0
    try:
        await client.money.reserve(most)
    except OverBudget:
        raise UserError(f"stopped before ${client.money.limit:.2f} would be exceeded by embeddings") from None
    try:
        body = json.dumps({"model": client.name, "input": texts, "encoding_format": "float"}, ensure_ascii=False)
        response = await connection.request("POST", "/embeddings", repair_text(body).encode())
        spent = most
        rows = sorted(parse_json(response.content)["data"], key=lambda each: each["index"])
        if response.status == 200 and len(rows) == len(texts):
            return [[float(value) for value in each["embedding"]] for each in rows]
    except (ValueError, TypeError, KeyError, ErrorInBody, Lost, Unreached) as error:
        raise UserError(f"{client.url}: gives no embeddings ({connection.said(error)})") from None
    finally:
        client.money.settle(most, spent)
    raise UserError(f"{client.url}: gave {len(rows)} embeddings for {len(texts)} texts (status {response.status})")


def _cached(path: Path) -> dict[str, list[float]]:
    if not path.is_file() or not path.stat().st_size:
        return {}
    records = [record.value for record in read_records(path) if not record.error]
    return {row["key"]: row["row"] for row in records if isinstance(row, dict) and {"key", "row"} <= row.keys()}


def _unit(rows_ND: np.ndarray) -> np.ndarray:
    return rows_ND / np.maximum(np.linalg.norm(rows_ND, axis=1, keepdims=True), 1e-12)
