"""Counting by words gives the tokenizer's own number of tokens for any text, or None."""

import json
import sys
import unicodedata
from functools import lru_cache

import pytest
from helpers.tiny import CONTROL_TOKENS, KINDS, QWEN_SPLIT
from hypothesis import assume, given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from fastft.data.conversation import Message
from fastft.data.template import token_counter as counting
from fastft.data.template.chat_template import template_for

BY_WORDS = ("byte_level", "gpt2", "sentencepiece", "metaspace")
TEMPLATES = {"byte_level": "chatml", "gpt2": "vicuna", "sentencepiece": "llama2", "metaspace": "mistral"}

SNIPPETS = ["I'll", "'S", "a'ſb", "  ", " \n", "\n\n ", "\t", "don't", "x1 22,333", "é", "e\u0301", "你好", "ﬁ", "\u2329",
            "\u00a0", "\x1c", "😀", "🦩", "▁", " ▁x", "word " * 9, "</s>", "<|im_end|>", "ß", "Å", "\u212b", "한국",
            "\u2028"]  # fmt: skip
TEXT = st.lists(st.sampled_from(SNIPPETS) | st.text(max_size=6), max_size=12).map("".join)


@pytest.fixture(scope="module")
def counters():
    made = {}
    for name in BY_WORDS:
        backend = KINDS[name]().backend_tokenizer
        specification = json.loads(backend.to_str())
        made[name] = counting.counter_for(specification, backend), backend
        assert made[name][0] is not None, name
    return made


@pytest.mark.parametrize("name", BY_WORDS)
@given(text=TEXT)
def test_a_count_is_the_tokenizers(counters, name, text):
    counter, backend = counters[name]
    counter.to_check = 0  # without the guard, which would hide a fault
    whole, after = (len(backend.encode(t, add_special_tokens=False).ids) for t in (text, f"<s>{text}"))
    assert counter.count(text) in (None, whole)
    assert counter.count(text, first=False) in (None, after - 1)


LLAMA3 = QWEN_SPLIT.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
SPACED = st.text(st.sampled_from(" \t\n\r'.1ax你"), max_size=24)  # where the patterns differ


@pytest.mark.parametrize("name", (*BY_WORDS, "llama3"))
@given(text=SPACED | TEXT)
def test_the_words_of_chunks_are_those_of_the_text(counters, name, text):
    counter = counters[name][0] if name in BY_WORDS else _with_pattern(LLAMA3)
    cut = counter.words.cut
    assume(counting.HELD not in text and "▁" not in text)
    assume(counter.words.stable is None or counter.words.stable.fullmatch(text))
    first, *others = (chunk.replace(counting.HELD, " ") for chunk in counter._chunks(text))
    words = [*cut(first), *(word for chunk in others for word in cut(f" {chunk}"))]
    # A chunk that is ASCII may be cut finer than the same characters within a text that is not.
    assert [each for word in words for each in cut(word)] == [each for word in cut(text) for each in cut(word)]


@lru_cache(maxsize=1)
def _with_pattern(pattern: str) -> counting.TokenCounter:
    backend = KINDS["byte_level"]().backend_tokenizer
    specification = json.loads(backend.to_str())
    specification["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = pattern
    return counting.counter_for(specification, backend)


@pytest.mark.parametrize("name", BY_WORDS)
def test_held_spaces_are_spaces_and_no_others_are(counters, name):
    counter, backend = counters[name]
    counter.to_check = 0
    for text in ("a   b \n  c", f"a{counting.HELD}b  c", f"{counting.HELD} a", "a ▁ b", " ", "   ", "a ", " a"):
        assert counter.count(text) == len(backend.encode(text, add_special_tokens=False).ids), text


@pytest.mark.parametrize("name", BY_WORDS)
def test_plain_text_is_counted(counters, name):
    counter, _ = counters[name]
    assert counter.count("The quick brown fox; 12 dogs — naïve, 你好\n\n\tand so on.") is not None


@pytest.mark.parametrize("name", BY_WORDS)
def test_every_stable_character_is_cut_alike(counters, name):
    """The pattern's engine and the tokenizer's agree about each of them beside letters, digits, spaces and itself."""
    counter, backend = counters[name]
    stable = [c for c in map(chr, range(sys.maxunicode + 1)) if counting._STABLE.fullmatch(c)]
    assert 30_000 < len(stable) < 60_000
    assert all(unicodedata.normalize("NFC", c) == c and unicodedata.category(c)[0] != "M" for c in stable)
    counter.to_check = 0
    for first in range(0, len(stable), 100):
        text = "".join(f"a{c}a 1{c}1 {c}{c} {c}\n{c}'s " for c in stable[first : first + 100])
        assert counter.count(text) == len(backend.encode(text, add_special_tokens=False).ids), text


TURNS = st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=4)


@pytest.mark.parametrize("name", BY_WORDS)
@given(turns=TURNS, system=st.none() | TEXT)
def test_a_conversation_has_as_many_tokens_as_its_encoding(name, turns, system):
    template = loaded(name)
    messages = [] if system is None else [Message("system", system)]
    for question, answer in turns:
        messages += [Message("user", question), Message("assistant", answer, train=True)]
    template._counter.to_check = 0
    assert template.count(messages) == len(template.encode(messages).ids)


_LOADED: dict = {}


def loaded(name: str):
    if name not in _LOADED:
        _LOADED[name] = template_for(KINDS[name](), TEMPLATES[name])
    return _LOADED[name]


def test_a_counter_that_errs_is_not_asked_again(counters):
    _, backend = counters["gpt2"]
    broken = counting.TokenCounter(backend, counting.Pretokenizer(str.split, str), list(CONTROL_TOKENS))
    assert broken.count("some words, and more") is None and broken.to_check < 0
    assert broken.count("a") is None


@pytest.mark.parametrize("name", sorted(set(KINDS) - set(BY_WORDS)))
def test_other_tokenizers_are_asked(name):
    backend = KINDS[name]().backend_tokenizer
    specification = json.loads(backend.to_str())
    counter = counting.counter_for(specification, backend)
    if counter is not None:
        text = "Hello there,\n\n you 12 "
        assert counter.count(text) in (None, len(backend.encode(text, add_special_tokens=False).ids))


def test_pieces_that_continue_after_a_mark_are_not_words(counters):
    backend = KINDS["sentencepiece"]().backend_tokenizer
    specification = json.loads(backend.to_str())
    assert counting.counter_for(specification, backend)
    specification["model"]["vocab"]["of▁the"] = len(specification["model"]["vocab"])
    assert counting.counter_for(specification, backend) is None


@pytest.mark.parametrize(
    ("joint", "apart"), [("x y", True), ("▁ (", True), ("( a", False), ("a .", False), ("1 a", False), ("• (", True)]
)  # fmt: skip
def test_words_end_where_no_piece_joins_a_letter_to_a_sign(counters, joint, apart):
    backend = KINDS["sentencepiece"]().backend_tokenizer
    specification = json.loads(backend.to_str())
    specification["model"]["merges"].append(joint.split(" "))
    cut = counting.counter_for(specification, backend).words.cut
    assert cut(" (word),\nx2") == ([" (", "word", "),", "\n", "x", "2"] if apart else [" (word),", "\n", "x2"])
    assert cut(" (wörd),") == [" (wörd),"]


def _small(merges=(), pieces=("<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b"), **model) -> dict:
    """A specification like Llama 2's, of a few pieces and those that merges make."""
    specification = json.loads(KINDS["sentencepiece"]().backend_tokenizer.to_str())
    made = [piece for left, right in merges for piece in (left, right, left + right)]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys([*pieces, *made]))}
    specification["model"] |= {"vocab": vocab, "merges": list(merges), **model}
    return specification


NO_BYTES = ("<unk>", "▁", "a", "b")


@pytest.mark.parametrize(
    "specification",
    [
        _small([("<0x71>", ".")]),  # "q." is one piece
        _small([("<0x09>", "<0x0A>")]),  # "\t\n"
        _small([("a", "b")], NO_BYTES, byte_fallback=False, fuse_unk=False, unk_token=None),  # "a.b" is "ab"
        _small([("a", "b")], NO_BYTES, unk_token=None),  # "a1b"
        _small((), NO_BYTES),  # "q.", unknown both
        _small([("<unk>", ".")], NO_BYTES, byte_fallback=False, fuse_unk=False),
        _small((), (*NO_BYTES, "▁ab"), ignore_merges=True),  # a whole text that is a piece
    ],
)
def test_unknown_characters_that_may_join_their_neighbours_are_not_counted(specification):
    alike = _small([("a", "b")])
    assert counting.counter_for(alike, Tokenizer.from_str(json.dumps(alike))) is not None
    assert counting.counter_for(specification, None) is None
