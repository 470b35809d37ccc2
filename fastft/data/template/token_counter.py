"""How many tokens a text has, exactly as its tokenizer counts them, and several times as fast.

The tokens of most tokenizers are those of its words: a pattern (or the mark for a space) cuts the text, and byte pair
encoding looks at one piece at a time. Words come again and again, so each is tokenised once and its count remembered, and
so is that of each chunk between spaces, which is found without the pattern.

    counter = counter_for(specification, backend)      # of tokenizer.json, and the tokenizers.Tokenizer made of it
    counter.count("some text")                         # None: not proven here, ask the tokenizer

What makes the count exact is checked on the specification: a known pattern and byte-level pieces (GPT-2, Llama 3, Qwen), or
pieces of which none goes on behind a space mark (Llama 2, Mistral); where none joins a letter to a sign, words end there,
too. Where the pattern speaks of letters and digits, texts with characters outside of blocks that all versions of Unicode
agree on go to the tokenizer; those with an added token written in them are left alone. As a last guard the first texts are
counted both ways, and a counter that errs once is not asked again.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import tokenizers

from fastft.data.template.tokenizer_json import LLAMA_NORMALIZER

CHECKED = 64  # texts that are counted both ways
REMEMBERED = 1 << 19  # chunks, and as many words, about 150 MB in all; then all are forgotten
LONGEST = 64  # characters of a chunk or word that is worth remembering
HELD = "\0"  # stands for a space that does not begin a chunk

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# The patterns of Llama 3, Qwen 2 and 3 (which differ in how many digits they take), by which a text is tiled with words.
_LETTERS_FIRST = re.compile(
    r"\(\?i:'s\|'t\|'re\|'ve\|'m\|'ll\|'d\)\|\[\^\\r\\n\\p\{L\}\\p\{N\}\]\?\\p\{L\}\+\|\\p\{N\}(?:\{1,3\})?\| "
    r"\?\[\^\\s\\p\{L\}\\p\{N\}\]\+\[\\r\\n\]\*\|\\s\*\[\\r\\n\]\+\|\\s\+\(\?!\\S\)\|\\s\+"
)
# Characters whose kind (letter, digit, space, other) has been the same in all versions of Unicode that are in use: ASCII
# without control characters, Latin, Greek, Cyrillic, Hebrew and Arabic letters, usual punctuation and symbols, kana,
# Han, Hangul, the emoji of Unicode 9. No marks, and nothing that NFC changes or that folds to an ASCII letter.
_STABLE = re.compile(
    "[\t\n\r -~\u00a1-\u017e\u0180-\u024f\u0386\u0388-\u03ce\u0400-\u0482\u048a-\u0527\u05d0-\u05ea\u0620-\u063f"
    "\u0641-\u064a\u2010-\u2027"
    "\u2030-\u205e\u20a0-\u20b9\u2190-\u2328\u232b-\u23f3\u2500-\u26ff\u3001-\u3003\u3008-\u301b\u3041-\u3096\u30a1-\u30fa\u30fc"
    "\u4e00-\u9fcc\uac00-\ud7a3\uff01-\uff5e\U0001f300-\U0001f53d\U0001f600-\U0001f64f]*"
)


class _Counts(dict[str, int]):
    """Text -> tokens; what is not there yet is counted."""

    def __init__(self, count: Callable[[str], int]):
        self.count = count

    def __missing__(self, text: str) -> int:
        count = self.count(text)
        if len(text) <= LONGEST:
            if len(self) >= REMEMBERED:
                self.clear()
            self[text] = count
        return count


@dataclass(frozen=True)
class Words:
    """How a tokenizer cuts a text into the pieces that it looks at one by one."""

    cut: Callable[[str], list[str]]  # a text into words; they tile it
    spelled: Callable[[str], str]  # a word as the vocabulary writes it
    prefix: Callable[[str, bool], str] = lambda text, first: ""  # what is put before a text
    apart: Callable[[str, int], bool] = lambda text, position: False  # whether words are cut there, for sure
    joins: str = ""  # white space that a word may share with a space behind it
    stable: re.Pattern | None = None  # texts whose words are known to be the tokenizer's; None: all are


class Counter:
    """Counts the tokens of texts between control tokens."""

    def __init__(self, backend: tokenizers.Tokenizer, words: Words, added: list[str]):
        self.backend, self.model, self.words = backend, backend.model, words
        self.word_counts, self.chunk_counts = _Counts(self._of_word), _Counts(self._of_chunk)
        self.added = re.compile("|".join(map(re.escape, sorted(added, key=len, reverse=True))))
        self.added_begin = {token[0] for token in added}  # few texts hold one
        self.control = added[0]
        self.to_check = CHECKED
        # The candidates of one dialogue share most of their pieces, and the pieces of one answer their prompt.
        self.count_again = lru_cache(maxsize=256)(self.count)
        self._sum_again = lru_cache(maxsize=256)(self._sum)

    def count(self, text: str, first: bool = True, boundary: int | None = None) -> int | None:
        """The tokens of `text`, or None. `first`: it stands at the beginning; otherwise behind an added token.

        With a `boundary`, a position in the text, only where a token ends there and those before are the tokens of
        text[:boundary] on its own.
        """
        if self.to_check < 0 or (any(map(text.__contains__, self.added_begin)) and self.added.search(text)):
            return None
        if self.words.stable and not self.words.stable.fullmatch(text):
            return self._asked(text, first, boundary)
        prefix = self.words.prefix(text, first)
        whole, at = prefix + text, None if boundary is None else len(prefix) + boundary
        if at is None:
            count = self._sum(whole)
        elif self.words.apart(whole, at):
            count = self._sum_again(whole[:at]) + self._sum_again(whole[at:])
        elif self.words.cut(whole)[: len(before := self.words.cut(whole[:at]))] == before:
            count = self._sum(whole)
        else:
            return None
        if self.to_check:
            self.to_check -= 1
            if count != self._asked(text, first):
                self.to_check = -1
                return None
        return count

    def _sum(self, text: str) -> int:
        if HELD in text or "▁" in text:
            return self._of_words(text)
        first, *others = self._chunks(text)
        return sum(map(self.chunk_counts.__getitem__, others), self._of_words(first.replace(HELD, " ")))

    def _chunks(self, text: str) -> list[str]:
        """The text cut, for a third less than the pattern takes, where a space begins a word in every pattern.

        That is at a space behind something else than white space: no word goes on over it, and what stands before it
        changes nothing behind it. That space is left out; those that follow it are held, and those behind other white
        space of a byte-level tokenizer.
        """
        for white in self.words.joins:
            text = text.replace(f"{white} ", f"{white}{HELD}")
        return text.replace("  ", f" {HELD}").replace(f"{HELD} ", f"{HELD}{HELD}").split(" ")

    def _of_chunk(self, chunk: str) -> int:
        words = self.words.cut(f" {chunk}".replace(HELD, " "))
        # Most chunks are one word, and are remembered themselves.
        return self._of_word(words[0]) if len(words) == 1 else sum(map(self.word_counts.__getitem__, words))

    def _of_words(self, text: str) -> int:
        return sum(map(self.word_counts.__getitem__, self.words.cut(text)))

    def _of_word(self, word: str) -> int:
        return len(self.model.tokenize(self.words.spelled(word)))

    def _asked(self, text: str, first: bool, boundary: int | None = None) -> int | None:
        before = "" if first else self.control
        whole = self.backend.encode(before + text, add_special_tokens=False)
        if boundary is not None:
            left = self.backend.encode(before + text[:boundary], add_special_tokens=False).ids
            at = len(before) + boundary
            split = sum(start < at for start, _ in whole.offsets)
            if not split or whole.ids[:split] != left or whole.offsets[split - 1][1] > at:
                return None
        return len(whole.ids) - (not first)


def counter_for(specification: dict, backend: tokenizers.Tokenizer) -> Counter | None:
    """The counter of a tokenizer, `specification` being its tokenizer.json; None where words are not proven to be apart."""
    model, added = specification["model"], specification["added_tokens"]
    plain_model = model["type"] == "BPE" and not any(
        model.get(key) for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
    )
    # Tokens that take white space along would change the texts beside them.
    strange = any(t["lstrip"] or t["rstrip"] or t["single_word"] or t["normalized"] for t in added)
    if not plain_model or not added or strange:
        return None
    words = _byte_level(specification) or _by_space_marks(specification)
    return words and Counter(backend, words, [token["content"] for token in added])


def _byte_level(specification: dict) -> Words | None:
    before = specification.get("pre_tokenizer") or {}
    steps = before.get("pretokenizers", [before])
    last = steps[-1]
    if specification.get("normalizer") not in (None, {"type": "NFC"}) or last.get("type") != "ByteLevel":
        return None
    if last["add_prefix_space"]:
        return None
    if len(steps) == 1 and last.get("use_regex", True):
        pattern = _GPT2
    elif len(steps) == 2 and not last.get("use_regex", True) and steps[0].get("type") == "Split":
        split = steps[0]
        pattern = split["pattern"].get("Regex", "")
        if split["behavior"] != "Isolated" or split["invert"] or not _LETTERS_FIRST.fullmatch(pattern):
            return None
    else:
        return None
    import regex  # knows \p{L}; transformers needs it, too

    words, ascii_words, spelling = regex.compile(pattern).findall, re.compile(_for_ascii(pattern)).findall, _spelling()
    return Words(
        cut=lambda text: ascii_words(text) if text.isascii() else words(text),
        spelled=lambda word: "".join(map(spelling.__getitem__, word.encode())),
        joins="\t\n\r",
        stable=_STABLE,
    )


def _for_ascii(pattern: str) -> str:
    """The same words of ASCII text, for the standard library's engine: twice as fast."""
    kinds = {r"\p{L}": "a-zA-Z", r"\p{N}": "0-9"}

    def spelled_out(found: re.Match) -> str:
        inside = found[0] if found[0][0] == "[" else f"[{found[0]}]"
        for kind, characters in kinds.items():
            inside = inside.replace(kind, characters)
        return inside

    return re.sub(r"\[[^]]*\]|\\p\{[LN]\}", spelled_out, pattern)


def _spelling() -> list[str]:
    """The character that stands for each byte (GPT-2's encoder.py): printable ones for themselves, others from U+0100 on."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def _by_space_marks(specification: dict) -> Words | None:
    """SentencePiece's way: spaces are marks (U+2581), with one more before the text.

    Words are cut with spaces in the place of marks: what is ASCII stays so, and is searched twice as fast.
    """
    model = specification["model"]
    prefix = _prefix(specification)
    if prefix is None or model.get("ignore_merges") or not _unknown_characters_are_apart(model):
        return None
    if any("▁" in piece.lstrip("▁") for piece in model["vocab"]):
        return None  # a piece goes on behind a mark: words are not apart
    lines_apart = not any("\n" in piece and piece.strip("\n") for piece in model["vocab"])
    find = re.compile(" *[^ \n]+| +|\n+" if lines_apart else " *[^ ]+| +").findall
    finer = lines_apart and _letters_are_apart(model)
    find_ascii = re.compile(" *(?:[a-zA-Z]+|[^a-zA-Z \n]+)| +|\n+").findall if finer else find

    def apart(text: str, position: int) -> bool:
        before, behind = text[position - 1 : position], text[position : position + 1]
        at_space = before not in " ▁" and behind == " "
        return at_space or (lines_apart and "" not in (before, behind) and (before == "\n") != (behind == "\n"))

    return Words(
        cut=lambda text: find_ascii(text) if text.isascii() else find(text.replace("▁", " ")),
        spelled=lambda word: word.replace(" ", "▁"),
        prefix=lambda text, first: prefix(text, first) if text else "",
        apart=apart,
    )


def _unknown_characters_are_apart(model: dict) -> bool:
    """Whether what is not in the vocabulary stays by itself, as its bytes or as the unknown token, and stays at all."""
    bytes_of_text = {f"<0x{byte:02X}>" for byte in range(256)}
    unknown = model.get("unk_token")
    as_bytes = model.get("byte_fallback") and bytes_of_text <= model["vocab"].keys()
    as_unknown = unknown in model["vocab"] and not model.get("fuse_unk")
    joined = {piece for merge in _merges(model) for piece in merge}
    return bool(as_bytes or as_unknown) and joined.isdisjoint({*bytes_of_text, unknown})


def _letters_are_apart(model: dict) -> bool:
    """Whether no piece has an ASCII letter beside an ASCII character that is none (SentencePiece cuts between scripts).

    Pieces of several characters are made by merges only, so it is enough to look at where each of them joins its two.
    Then "(word)," is three words, of which most are known: a quarter as many are left to tokenise.
    """
    joints = {left[-1:] + right[:1] for left, right in _merges(model)}
    return not any(len(joint) == 2 and joint.isascii() and joint[0].isalpha() != joint[1].isalpha() for joint in joints)


def _merges(model: dict) -> Iterator[Sequence[str]]:
    """Pairs of pieces; tokenizers before 0.20 wrote each in one string."""
    return (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])


def _prefix(specification: dict) -> Callable[[str, bool], str] | None:
    """What is put before a text with spaces for marks; None where the tokenizer works in another way."""
    before = specification.get("pre_tokenizer")
    if specification.get("normalizer") is None and before and before.get("type") == "Metaspace":
        scheme = before["prepend_scheme"]
        if before["replacement"] != "▁" or before["split"]:
            return None
        return lambda text, first: (
            " " if text[0] not in " ▁" and (scheme == "always" or (scheme == "first" and first)) else ""
        )
    if before is None and specification.get("normalizer") == LLAMA_NORMALIZER:
        return lambda text, first: " "
    return None
