"""Count the tokens of a text exactly as its tokenizer does, and several times as fast.

With most tokenizers the tokens of a text are those of its words: the pre-tokenizer cuts the text (by a pattern, or at
spaces), and byte pair encoding looks at one word at a time. Words repeat, so each is tokenised once, and its count is
remembered. The same is done with chunks between spaces, which are found without the pattern.

    counter = counter_for(specification, backend)      # of tokenizer.json, and the tokenizers.Tokenizer made of it
    counter.count("some text")                         # None: not proven for this text, ask the tokenizer

Why the count is exact:

- Only two kinds of tokenizers are counted. One has byte-level pieces and a known pattern (GPT-2, Llama 3, Qwen). The other
  has U+2581 in the place of spaces, and no piece that continues after such a sign (Llama 2, Mistral). If, in addition, none
  of its pieces joins a letter to another sign, a word also ends between those two.
- Patterns speak of letters and digits, and versions of Unicode differ about some characters. A text with a character
  outside of the blocks on which all versions agree is given to the tokenizer.
- A text in which an added token is spelled is not counted (None).
- As a last guard, the first texts are counted both ways. A counter that is wrong once returns None from then on.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import tokenizers

from fastft.data.template.tokenizer_json import LLAMA_NORMALIZER

CHECKED = 64  # texts that are counted both ways
REMEMBERED = 1 << 19  # of chunks, and of words: about 150 MB in all; beyond that all are dropped
LONGEST = 64  # characters; longer chunks and words are not remembered, because they hardly ever come again
HELD = "\0"  # written for a space at which the text must not be cut into chunks

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# The patterns of Llama 3, Qwen 2 and Qwen 3, which differ in how many digits a word may have. Put together, their words are
# the whole text.
_LETTERS_FIRST = re.compile(
    r"\(\?i:'s\|'t\|'re\|'ve\|'m\|'ll\|'d\)\|\[\^\\r\\n\\p\{L\}\\p\{N\}\]\?\\p\{L\}\+\|\\p\{N\}(?:\{1,3\})?\| "
    r"\?\[\^\\s\\p\{L\}\\p\{N\}\]\+\[\\r\\n\]\*\|\\s\*\[\\r\\n\]\+\|\\s\+\(\?!\\S\)\|\\s\+"
)
# Characters whose kind (letter, digit, space, other) is the same in all versions of Unicode in use: ASCII without control
# characters; Latin, Greek, Cyrillic, Hebrew and Arabic letters; common punctuation and symbols; kana, Han, Hangul; the
# emoji of Unicode 9. No combining marks, nothing that NFC changes, and nothing that case folding makes an ASCII letter.
_STABLE = re.compile(
    "[\t\n\r -~\u00a1-\u017e\u0180-\u024f\u0386\u0388-\u03ce\u0400-\u0482\u048a-\u0527\u05d0-\u05ea\u0620-\u063f"
    "\u0641-\u064a\u2010-\u2027"
    "\u2030-\u205e\u20a0-\u20b9\u2190-\u2328\u232b-\u23f3\u2500-\u26ff\u3001-\u3003\u3008-\u301b\u3041-\u3096\u30a1-\u30fa\u30fc"
    "\u4e00-\u9fcc\uac00-\ud7a3\uff01-\uff5e\U0001f300-\U0001f53d\U0001f600-\U0001f64f]*"
)


class _Counts(dict[str, int]):
    """A dict from texts to their numbers of tokens, which counts a text when it is first asked for."""

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
class Pretokenizer:
    """How a tokenizer cuts a text into words, the pieces that it tokenises one by one."""

    cut: Callable[[str], list[str]]  # cuts a text into words, which together are the whole text
    spelled: Callable[[str], str]  # spells a word as the vocabulary does
    # Returns what the tokenizer puts before a text. The second argument says whether the text begins the conversation.
    prefix: Callable[[str, bool], str] = lambda text, begins: ""
    apart: Callable[[str, int], bool] = lambda text, position: False  # whether a word surely ends at a position
    joins: str = ""  # white space that may be in one word with a space after it
    stable: re.Pattern | None = None  # matches the texts for which `cut` is proven; None: all texts


class TokenCounter:
    """Counts the tokens of texts between control tokens."""

    def __init__(self, backend: tokenizers.Tokenizer, words: Pretokenizer, added: list[str]):
        self.backend, self.model, self.words = backend, backend.model, words
        self.word_counts, self.chunk_counts = _Counts(self._of_word), _Counts(self._of_chunk)
        self.added = re.compile("|".join(map(re.escape, sorted(added, key=len, reverse=True))))
        # Few texts hold any of these characters, which is quick to see.
        self.added_begin = {token[0] for token in added}
        self.control = added[0]
        self.to_check = CHECKED
        # The parts that the splitter tries for one dialogue have most stretches in common, and pieces of an answer a prompt.
        self.count_again = lru_cache(maxsize=256)(self.count)
        self._sum_again = lru_cache(maxsize=256)(self._sum)

    def count(self, text: str, first: bool = True, boundary: int | None = None) -> int | None:
        """Return the number of tokens of `text`, or None if it is not proven.

        `first` says that the text begins the conversation; otherwise a control token precedes it. `boundary` is a position
        in the text. With it, the number is returned only if a token ends there, and the tokens before it are those of
        text[:boundary] alone.
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
        """Return the text cut at spaces where every pattern begins a word. This takes a third less time than the pattern.

        Such a space follows a character that is not white space. No word continues across it, and the words after it do not
        depend on the text before it. The space itself is left out. There is no cut at the spaces that follow it, nor, with
        byte-level tokenizers, at spaces after other white space: HELD is written in their place.
        """
        for white in self.words.joins:
            text = text.replace(f"{white} ", f"{white}{HELD}")
        return text.replace("  ", f" {HELD}").replace(f"{HELD} ", f"{HELD}{HELD}").split(" ")

    def _of_chunk(self, chunk: str) -> int:
        words = self.words.cut(f" {chunk}".replace(HELD, " "))
        # Most chunks are a single word. Its count is remembered for the chunk, and needs no second entry for the word.
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


def counter_for(specification: dict, backend: tokenizers.Tokenizer) -> TokenCounter | None:
    """Return a counter for a tokenizer, or None if it may look at more than one word. `specification` is its tokenizer.json."""
    model, added = specification["model"], specification["added_tokens"]
    plain_model = model["type"] == "BPE" and not any(
        model.get(key) for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
    )
    # Added tokens that swallow white space beside them would change the texts that are counted.
    strange = any(t["lstrip"] or t["rstrip"] or t["single_word"] or t["normalized"] for t in added)
    if not plain_model or not added or strange:
        return None
    words = _byte_level(specification) or _by_space_marks(specification)
    return words and TokenCounter(backend, words, [token["content"] for token in added])


def _byte_level(specification: dict) -> Pretokenizer | None:
    """Return how GPT-2, Llama 3 and Qwen cut words (by a known pattern) and spell them (as bytes); None for other tokenizers."""
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
    import regex  # understands \p{L}, unlike `re`; transformers depends on it, so it is installed

    words, ascii_words, spelling = regex.compile(pattern).findall, re.compile(_for_ascii(pattern)).findall, _spelling()
    return Pretokenizer(
        cut=lambda text: ascii_words(text) if text.isascii() else words(text),
        spelled=lambda word: "".join(map(spelling.__getitem__, word.encode())),
        joins="\t\n\r",
        stable=_STABLE,
    )


def _for_ascii(pattern: str) -> str:
    """Return a pattern that finds the same words in ASCII text with the standard library's `re`, which is twice as fast."""
    kinds = {r"\p{L}": "a-zA-Z", r"\p{N}": "0-9"}

    def spelled_out(found: re.Match) -> str:
        inside = found[0] if found[0][0] == "[" else f"[{found[0]}]"
        for kind, characters in kinds.items():
            inside = inside.replace(kind, characters)
        return inside

    return re.sub(r"\[[^]]*\]|\\p\{[LN]\}", spelled_out, pattern)


def _spelling() -> list[str]:
    """Return the character for each byte as in GPT-2's encoder.py: itself if it is printable, or one from U+0100 on."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def _by_space_marks(specification: dict) -> Pretokenizer | None:
    """Return how tokenizers like SentencePiece (Llama 2, Mistral) cut words; None for other tokenizers.

    These write U+2581 for a space, and put one more before the text. Words are cut before spaces are replaced, so that
    ASCII text is still ASCII, which is searched twice as fast.
    """
    model = specification["model"]
    prefix = _prefix(specification)
    if prefix is None or model.get("ignore_merges") or not _unknown_characters_are_apart(model):
        return None
    if any("▁" in piece.lstrip("▁") for piece in model["vocab"]):
        return None  # a piece that continues after a U+2581 may span two words
    lines_apart = not any("\n" in piece and piece.strip("\n") for piece in model["vocab"])
    find = re.compile(" *[^ \n]+| +|\n+" if lines_apart else " *[^ ]+| +").findall
    finer = lines_apart and _letters_are_apart(model)
    find_ascii = re.compile(" *(?:[a-zA-Z]+|[^a-zA-Z \n]+)| +|\n+").findall if finer else find

    def apart(text: str, position: int) -> bool:
        before, after = text[position - 1 : position], text[position : position + 1]
        at_space = before not in " ▁" and after == " "
        return at_space or (lines_apart and "" not in (before, after) and (before == "\n") != (after == "\n"))

    return Pretokenizer(
        cut=lambda text: find_ascii(text) if text.isascii() else find(text.replace("▁", " ")),
        spelled=lambda word: word.replace(" ", "▁"),
        prefix=lambda text, first: prefix(text, first) if text else "",
        apart=apart,
    )


def _unknown_characters_are_apart(model: dict) -> bool:
    """Tell whether a character outside of the vocabulary is neither dropped nor joined to its neighbours.

    It must become its bytes or the unknown token, and no merge may join either of these to anything.
    """
    bytes_of_text = {f"<0x{byte:02X}>" for byte in range(256)}
    unknown = model.get("unk_token")
    as_bytes = model.get("byte_fallback") and bytes_of_text <= model["vocab"].keys()
    as_unknown = unknown in model["vocab"] and not model.get("fuse_unk")
    joined = {piece for merge in _merges(model) for piece in merge}
    return bool(as_bytes or as_unknown) and joined.isdisjoint({*bytes_of_text, unknown})


def _letters_are_apart(model: dict) -> bool:
    """Tell whether no piece has an ASCII letter beside another ASCII sign. SentencePiece makes none, as it cuts between scripts.

    Only merges make pieces of several characters, so it is enough to look at the place where each merge joins two pieces.
    If none joins them so, "(word)," can be counted as three words. Most of these are known already, and only a quarter as
    many words are left to tokenise.
    """
    joints = {left[-1:] + right[:1] for left, right in _merges(model)}
    return not any(len(joint) == 2 and joint.isascii() and joint[0].isalpha() != joint[1].isalpha() for joint in joints)


def _merges(model: dict) -> Iterator[Sequence[str]]:
    """Yield the merges as pairs of pieces; tokenizers before 0.20 wrote a pair as one string."""
    return (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])


def _prefix(specification: dict) -> Callable[[str, bool], str] | None:
    """Return a `Pretokenizer.prefix` that gives spaces for U+2581; None if the tokenizer works in another way."""
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
