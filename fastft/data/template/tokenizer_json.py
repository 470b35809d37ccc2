"""Change a tokenizer through its specification: tokenizer.json is read as a dict, changed, and turned into a tokenizer
again.

    specification = specification_of(tokenizer)
    rename_tokens(specification, {"</s>": "end"})
    tokenizer_of(specification)                     # gives the same ids, and knows the end of text by another name

The format is that of Hugging Face's tokenizers.
"""

import orjson
import tokenizers

# The normalizer of Llama 2 and Mistral: spaces become marks (U+2581), and every text gets one more in front.
LLAMA_NORMALIZER = {
    "type": "Sequence",
    "normalizers": [
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    ],
}


def specification_of(tokenizer: tokenizers.Tokenizer) -> dict:
    """Return the tokenizer.json of a tokenizer, as a dict."""
    return orjson.loads(tokenizer.to_str())


def tokenizer_of(specification: dict) -> tokenizers.Tokenizer:
    """Return the tokenizer that a tokenizer.json describes."""
    return tokenizers.Tokenizer.from_str(orjson.dumps(specification).decode())


def rename_tokens(specification: dict, names: dict[str, str]) -> None:
    """Rename tokens wherever a tokenizer.json has them, and remove what would add tokens to a text or cut a text short.

    Tokens are renamed in the vocabulary, too, because Unigram finds its pieces in a text whether they are special or not.
    """
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


def tokens_per_byte(specification: dict) -> int | None:
    """Return the most tokens that BPE makes of a byte of text; None if no number is proven.

    A token that the tokenizer puts before every text is not counted. Byte-level pieces together are the bytes that the
    normalizer leaves, and NFC makes at most three bytes of one (Unicode's FAQ on normalization). Where spaces become U+2581,
    a piece is at least one character, or one byte of a character.
    """
    model, before, normalizer = (specification.get(key) for key in ("model", "pre_tokenizer", "normalizer"))
    if model["type"] != "BPE" or any(model.get(key) for key in ("continuing_subword_prefix", "end_of_word_suffix")):
        return None
    *cuts, last = (before or {}).get("pretokenizers", [before or {}])
    if last.get("type") == "ByteLevel":
        most, prefix = {None: 1, "NFC": 3}.get((normalizer or {}).get("type")), last["add_prefix_space"]
        known = all(cut["type"] == "Split" for cut in cuts) and not (cuts and prefix) and not model.get("byte_fallback")
    else:
        most, prefix = 1, True
        by_metaspace = (
            last.get("type") == "Metaspace" and last["replacement"] == "▁" and not cuts and normalizer is None
        )
        marks = by_metaspace or (before is None and normalizer == LLAMA_NORMALIZER)
        known = marks and ("▁" in model["vocab"] or not model.get("byte_fallback"))
    # After each added token a new text begins, which gets the prefix. An added token of one byte would so give two tokens.
    short = prefix and any(len(token["content"].encode()) < 2 for token in specification["added_tokens"])
    return most if known and not short else None


def remove_prefix_space(part) -> None:
    """Remove whatever puts a space before a text, so that a text that continues another is tokenised as a continuation."""
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
