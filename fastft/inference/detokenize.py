"""Turn the tokens of an answer into text as they are generated, never emitting half a character or part of a stop string.

    token_bytes = TokenBytes(tokenizer)
    text = AnswerText(token_bytes, stops=("\\nUser:",))
    piece = text.add(token)          # what is certain by now; "" while a character or a stop string may be incomplete
    if text.stopped: …               # a stop string is complete; the text before it has been returned
    piece = text.end()               # the rest, when no token follows

The pieces together are what the tokenizer makes of all tokens at once, special tokens left out. Decoding all of them again
for every token would cost the square of the answer's length, so every token is looked up as bytes here. When a model is
loaded, a sample text proves that the result equals the tokenizer's own.
"""

import codecs
import re

from fastft.errors import UserError

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
# Various scripts, with tokens of several characters and characters of several tokens.
PROBE = "Hello  World!\n\n\t1234 é 日本 🙂👩\u200d👩\u200d👧 <b>x</b> don't"


class TokenBytes:
    """The bytes that each token stands for, by its id."""

    def __init__(self, tokenizer, name: str = "tokenizer"):
        """`name` is the model's in messages. Raises UserError if the bytes do not add up to the tokenizer's text."""
        import orjson

        backend = tokenizer.backend_tokenizer
        decoder = orjson.dumps(orjson.loads(backend.to_str()).get("decoder"))
        added = backend.get_added_tokens_decoder()
        self._tokens, self._added = backend.id_to_token, {i: token.content.encode() for i, token in added.items()}
        self._special = {i for i, token in added.items() if token.special}
        self._byte_level = b'"ByteLevel"' in decoder
        # SentencePiece's decoders drop the space that the encoder has put before the text.
        drops_space = b'"Strip"' in decoder or b'"Metaspace"' in decoder
        self.leading_space = " " if drops_space and not self._byte_level else ""
        self._known: dict[int, bytes] = {}
        self._prove(tokenizer, name)

    def _prove(self, tokenizer, name: str) -> None:
        ids = tokenizer.encode(PROBE, add_special_tokens=False)
        ours = b"".join(map(self.of, ids)).decode("utf-8", "replace").removeprefix(self.leading_space)
        if ours != tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False):
            raise UserError(
                f"{name}: its tokenizer decodes in a way that cannot be streamed; serve it with another engine (vLLM)"
            )

    def of(self, token: int) -> bytes:
        """The bytes of a token; none for special tokens and for ids that the tokenizer does not know."""
        return b"" if token in self._special else self.spelled(token)

    def spelled(self, token: int) -> bytes:
        """The same, with special tokens by their names."""
        if token not in self._known:
            self._known[token] = self._look_up(token)
        return self._known[token]

    def _look_up(self, token: int) -> bytes:
        if token in self._added:
            return self._added[token]
        piece = self._tokens(token)
        if piece is None:  # models have more embeddings than their tokenizers have tokens
            return b""
        if self._byte_level:
            return bytes(map(_BYTES.__getitem__, piece)) if _BYTES.keys() >= set(piece) else piece.encode()
        if found := _BYTE_TOKEN.fullmatch(piece):
            return bytes([int(found[1], 16)])
        return piece.replace("▁", " ").encode()


def _byte_level_bytes() -> dict[str, int]:
    """The byte that each character of a byte-level token stands for, as in GPT-2's encoder.py."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTES = _byte_level_bytes()


class AnswerText:
    """The text of one answer, given out piece by piece."""

    def __init__(self, token_bytes: TokenBytes, stops: tuple[str, ...] = (), separator: str = ""):
        """`separator` is what the chat template puts before an answer; it is not part of the answer."""
        self._bytes_of, self._stops = token_bytes.of, stops
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._before = separator or token_bytes.leading_space  # may still come first; not part of the answer
        self._held = ""
        self.decoded = 0
        """Characters of the answer known so far."""
        self.given = 0
        """Characters of the answer that were returned so far; once a stop string is complete, all of the answer."""
        self.stopped = False

    def add(self, token: int) -> str:
        """Return the text that is certain after `token`; "" while a character or a stop string may be incomplete."""
        return self._take(self._decoder.decode(self._bytes_of(token)))

    def end(self) -> str:
        """Return the rest when no more tokens follow: text held back as a possible stop string, and U+FFFD for half a
        character."""
        return self._take(self._decoder.decode(b"", final=True), last=True)

    def _take(self, new: str, last: bool = False) -> str:
        if self.stopped:
            return ""
        self._held += new
        self.decoded += len(new)
        if self._before:
            if len(self._held) < len(self._before) and self._before.startswith(self._held) and not last:
                return ""
            without = self._held.removeprefix(self._before)
            self.decoded -= len(self._held) - len(without)
            self._held, self._before = without, ""
        end = self._first_stop()
        self.stopped = end is not None
        if end is None:
            end = len(self._held) - (0 if last else self._possible_stop())
        text, self._held = self._held[:end], self._held[end:]
        self.given += len(text)
        return text

    def _first_stop(self) -> int | None:
        """The beginning of the stop string that ends first, so that the cut does not depend on the boundaries of tokens."""
        found = [(at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        return min(found)[1] if found else None

    def _possible_stop(self) -> int:
        """Length of the longest suffix of the text that is a prefix of a stop string."""
        longest = min(len(self._held), max(map(len, self._stops), default=1) - 1)
        ends = (n for n in range(longest, 0, -1) if any(stop.startswith(self._held[-n:]) for stop in self._stops))
        return next(ends, 0)
