"""A tokenizer's specification, tokenizer.json, as a dict: read from a tokenizer, changed in place, made a tokenizer again.

    specification = specification_of(tokenizer)
    rename_tokens(specification, {"</s>": "end"})
    tokenizer_of(specification)                     # the same ids, the end of text by another name

The format is that of Hugging Face's tokenizers.
"""

import orjson
import tokenizers


def specification_of(tokenizer: tokenizers.Tokenizer) -> dict:
    return orjson.loads(tokenizer.to_str())


def tokenizer_of(specification: dict) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_str(orjson.dumps(specification).decode())


def rename_tokens(specification: dict, names: dict[str, str]) -> None:
    """Rename tokens in a tokenizer.json, in the vocabulary too: Unigram matches pieces in text, special or not."""
    specification["post_processor"] = specification["truncation"] = specification["padding"] = None
    for token in specification["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    model = specification["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(token, token): i for token, i in model["vocab"].items()}
    else:
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in model["vocab"]]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]


def bytes_per_byte(specification: dict) -> int | None:
    """How many bytes of text a byte-level BPE may see for one that it is given; None for other tokenizers."""
    before = specification.get("pre_tokenizer") or {}
    steps = before.get("pretokenizers", [before])
    byte_level = [step["type"] for step in steps if step.get("type") in ("ByteLevel", "Split")]
    if specification["model"]["type"] != "BPE" or "ByteLevel" not in byte_level or len(byte_level) != len(steps):
        return None
    return {None: 1, "NFC": 3}.get((specification.get("normalizer") or {}).get("type"))


def remove_prefix_space(part) -> None:
    """Take out whatever puts a space in front of a text: what is left tokenises a text that goes on."""
    if isinstance(part, list):
        part[:] = [p for p in part if not (isinstance(p, dict) and p.get("type") == "Prepend")]
        for p in part:
            remove_prefix_space(p)
    elif isinstance(part, dict):
        if (part.get("normalizer") or {}).get("type") == "Prepend":
            part["normalizer"] = None
        if part.get("type") == "Metaspace":
            part["prepend_scheme"] = "never"
        if part.get("type") == "ByteLevel":
            part["add_prefix_space"] = False
        for key in ("normalizer", "pre_tokenizer", "normalizers", "pretokenizers"):
            remove_prefix_space(part.get(key))
