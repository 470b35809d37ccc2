"""Duplicates: what is removed is contained in its keeper, or near to it; and the hashes of words and shingles."""

import inspect
import json
import random
import re
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from helpers.prose import VOCABULARY, prose
from hypothesis import given
from hypothesis import strategies as st

import cleaning.first_pass
import cleaning.run.workers
from cleaning.pipeline import clean
from cleaning.settings import RunSettings
from fastft.data.conversation import Conversation, Message, read_conversations
from fastft.data.dedup import duplicates
from fastft.data.dedup.duplicates import (
    Fingerprint,
    Fingerprints,
    clusters,
    families,
    find_duplicates,
    fingerprint,
    rows_per_band,
)
from fastft.data.dedup.shingles import SLICE, Shingles, Words, slices
from fastft.errors import UserError

HELLO = 6884409850674639192  # the hash of "hello", which must be the same on every machine


def talk(*texts: str, system: str | None = None) -> Conversation:
    messages = [] if system is None else [Message("system", system)]
    messages += [Message(("user", "assistant")[i % 2], text) for i, text in enumerate(texts)]
    return Conversation("x", messages)


def changed(text: str, share: float, seed: int = 0) -> str:
    rng = random.Random(seed)
    return " ".join(rng.choice(VOCABULARY) if rng.random() < share else word for word in text.split())


def removed(conversations, near=0.8, keep="longest", times=None):
    times = times or [0.0] * len(conversations)
    prints = [fingerprint(c, near > 0, time) for c, time in zip(conversations, times)]
    return {p: (d.reason, d.keeper) for p, d in find_duplicates(Fingerprints(prints), near, keep).items()}


def test_a_beginning_of_any_length_is_a_duplicate():
    long = talk("q1", "a1", "q2", "a2", "q3", "a3")
    shorter = [talk("q1", "a1"), talk("Q1 ", " a1", "q2", "a2"), talk("q1", "other"), talk("q2", "a2")]
    assert removed([*shorter, long]) == {0: ("duplicate_beginning", 4), 1: ("duplicate_beginning", 4)}
    assert removed([talk("q", "a"), talk("q", "a", system="s")]) == {}  # another system message makes another dialogue
    branches = [talk("q1", "a1", "q2", "a2"), talk("q1", "a1", "else", "b2")]
    assert removed(branches) == {}  # each has something that the other has not


def test_near_duplicates_name_their_keeper_and_similarity():
    original = talk("Please explain", prose(1, 300))
    copy = talk("Please explain", changed(prose(1, 300), 0.01) + " end")
    other = talk("Please explain", prose(2, 300))
    prints = [fingerprint(c) for c in (original, copy, other)]
    (duplicate,) = find_duplicates(Fingerprints(prints)).items()
    assert duplicate[0] == 0 and (duplicate[1].reason, duplicate[1].keeper) == ("near_duplicate", 1)
    assert 0.8 <= duplicate[1].similarity < 1
    assert find_duplicates(Fingerprints(prints), near=0) == {} == find_duplicates(Fingerprints(prints), near=0.99)
    assert clusters(find_duplicates(Fingerprints(prints))) == {1: [0]}


def test_branches_of_one_tree_are_no_near_duplicates_of_each_other(tmp_path):
    """They differ only in the last answer. A copy in another tree is removed, and so is the beginning of another branch."""
    story = [prose(i, 150) for i in range(5)]
    first, second = talk(*story, "It rises."), talk(*story, "It falls, then rises.")
    assert removed([first, second]) == {0: ("near_duplicate", 1)}
    trees = [(first, b"1"), (second, b"1"), (first, b"2"), (second, b"2"), (talk(*story[:4]), b"1"), (first, b"1")]
    found = find_duplicates(Fingerprints(fingerprint(c, tree=tree) for c, tree in trees))
    assert {p: (d.reason, d.keeper) for p, d in found.items()} == {
        2: ("duplicate", 0),
        3: ("duplicate", 1),
        4: ("duplicate_beginning", 1),
        5: ("duplicate", 0),
    }
    near = [(first, b"1"), (second, b"1"), (talk(*story, "It falls."), b"2")]
    found = find_duplicates(Fingerprints(fingerprint(c, tree=tree) for c, tree in near))
    assert list(found) == [2] and found[2].reason == "near_duplicate"

    replies: list = [{"text": text, "role": "assistant"} for text in ("It rises.", "It falls, then rises.")]
    for number, text in reversed(list(enumerate(story))):
        replies = [{"text": text, "role": ("prompter", "assistant")[number % 2], "replies": replies}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": replies[0]}))
    assert clean([tmp_path / "a.jsonl"], tmp_path / "out", every_branch=True, workers=1).kept == 2


def test_the_newest_is_known_by_the_dumps_times(tmp_path):
    text, times = prose(1, 300), ("2023-03-01T00:00:00Z", "2024-03-01T00:00:00Z", 1690000000)
    records = [
        {
            "id": str(i),
            "timestamp": time,
            "messages": [{"role": "user", "content": "q"}, {"role": "gpt", "content": answer}],
        }
        for i, (time, answer) in enumerate(zip(times, (text + " and more", text, text + " more")))
    ]
    (tmp_path / "a.json").write_text(json.dumps(records))
    for keep, kept in (("newest", "1"), ("longest", "0")):
        clean([tmp_path / "a.json"], tmp_path / keep, keep=keep, workers=1)
        assert [c.id for c in read_conversations(tmp_path / keep / "conversations.jsonl")] == [kept]


def test_two_questions_about_one_long_text_are_no_duplicates():
    pasted = prose(3, 2000)
    assert removed([talk(f"Sum up: {pasted}", prose(4, 40)), talk(f"Translate: {pasted}", prose(5, 40))]) == {}


def test_short_texts_are_compared_as_they_are():
    assert removed([talk("2 + 2", "4"), talk("2 - 2", "4"), talk("2  + 2 ", "4")]) == {2: ("duplicate", 0)}


def test_near_duplicates_in_chinese_are_found_without_spaces():
    rng = random.Random(7)
    text = [chr(rng.randrange(0x4E00, 0x9000)) for _ in range(400)]
    other = list(text)
    other[200] = "好"
    assert removed([talk("问", "".join(text)), talk("问", "".join(other))]) == {1: ("near_duplicate", 0)}


def test_the_newest_is_kept_where_asked():
    old, new = talk("q", prose(1)), talk("q", prose(1).replace("word1 ", "word2 ", 1) + " x")
    assert removed([new, old], keep="longest") == {1: ("near_duplicate", 0)}
    assert removed([new, old], keep="newest") == {0: ("near_duplicate", 1)}  # of the same time, the later in the input
    assert removed([new, old], keep="newest", times=[2.0, 1.0]) == {1: ("near_duplicate", 0)}
    assert removed([talk("q", "a", "q", "b"), talk("q", "a")], keep="newest") == {1: ("duplicate_beginning", 0)}
    with pytest.raises(AssertionError, match="oldest"):
        removed([new], keep="oldest")


ROUND = st.tuples(st.sampled_from("ab"), st.sampled_from("cd"))
BODY = st.sampled_from([prose(1, 60), changed(prose(1, 60), 0.02), prose(1, 60) + " tail", prose(2, 60)])
TALKS = st.builds(
    lambda rounds, body: talk(*(text for pair in rounds for text in pair), *body),
    st.lists(ROUND, min_size=1, max_size=3),
    st.lists(BODY, max_size=2),
)


@given(st.lists(TALKS, max_size=14), st.sampled_from([0, 0.5, 0.8]), st.sampled_from(["longest", "newest"]))
def test_every_keeper_is_kept_and_alike(conversations, near, keep):
    prints = [fingerprint(c) for c in conversations]
    duplicates = find_duplicates(Fingerprints(prints), near, keep)
    texts = [[(m.role, m.content) for m in c.messages] for c in conversations]
    for position, duplicate in duplicates.items():
        assert duplicate.keeper not in duplicates
        mine, its = texts[position], texts[duplicate.keeper]
        if duplicate.reason == "duplicate":
            assert mine == its
        elif duplicate.reason == "duplicate_beginning":
            assert len(mine) < len(its) and mine == its[: len(mine)]
        else:
            assert near <= duplicate.similarity
            assert keep == "newest" or prints[position].length <= prints[duplicate.keeper].length
    kept = [texts[i] for i in range(len(texts)) if i not in duplicates]
    assert not any(a == b[: len(a)] for a in kept for b in kept if a is not b and len(a) % 2 == 0 and len(b) % 2 == 0)


def test_planted_copies_are_found():
    """A small check of the recall that the module's documentation states; benchmarks/duplicates.py measures it in full."""
    originals = [talk("Explain", prose(seed, 400)) for seed in range(100)]
    for share, near, least in ((0.01, 0.8, 98), (0.02, 0.7, 98), (0.05, 0.5, 98)):
        copies = [talk("Explain", changed(c.messages[1].content, share, seed)) for seed, c in enumerate(originals)]
        assert least <= len(removed(originals + copies, near)) <= 100


def test_banding_misses_less_than_one_in_a_thousand():
    assert [rows_per_band(t) for t in (0.5, 0.6, 0.7, 0.8, 0.9)] == [2, 3, 4, 5, 8]


def test_families_hold_what_must_stay_on_one_side():
    branches = [talk("q1", "a1", "q2", "a2"), talk("q1", "a1", "x", "y")]
    alike = [talk("q", prose(1)), talk("p", changed(prose(1), 0.05))]
    prints = [fingerprint(c) for c in [*branches, *alike, talk("q", prose(2))]]
    assert families(Fingerprints(prints), range(5)) == [0, 0, 2, 2, 4]
    assert families(Fingerprints(prints), [1, 3, 4, 0]) == [0, 1, 2, 0]


def test_what_is_remembered_is_columns():
    """Keys and sketches are 336 bytes of each. As objects they took 480 bytes in all, and 900 while they were linked."""
    chance, count = random.Random(0), 4_000
    tracemalloc.start()
    prints = Fingerprints(Fingerprint(chance.randbytes(5 * 16), 9_000, chance.randbytes(256)) for _ in range(count))
    held = tracemalloc.get_traced_memory()[0] / count
    assert find_duplicates(prints) == {}
    peak = tracemalloc.get_traced_memory()[1] / count
    tracemalloc.stop()
    assert held < 420 and peak < 560


# --- words ------------------------------------------------------------------------------------------------------------


def test_text_is_cut_into_folded_words():
    words = Words("Straße, naïve_x2 — 你好！ ﬁn หา 한국어")
    shown = [words.text[a:b] for a, b in zip(words.starts, words.ends)]
    assert shown == ["strasse", "naïve", "x2", "你", "好", "fin", "ห", "า", "한국어"]
    assert words.wide.tolist() == [w in "你好หา" for w in shown]


@given(st.lists(st.sampled_from(["a", "b", "ab", "c"]), max_size=12), st.integers(1, 4))
def test_shingles_are_equal_where_their_words_are(words, n):
    hashes = Shingles(Words(" ".join(words)).hashes).of(n).tolist()
    tuples = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    assert len(hashes) == len(tuples)
    assert all((a == b) == (s == t) for a, s in zip(hashes, tuples) for b, t in zip(hashes, tuples))


def test_hashes_are_the_same_everywhere():
    assert Words("Hello").hashes.tolist() == [HELLO]
    assert np.array_equal(Words("x Hello").hashes[1:], Words("Hello").hashes)


def test_slices_joined_are_the_text():
    text = "".join(map(chr, range(97, 123))) * (SLICE // 20)
    assert "".join(part for _, part in slices(text)) == text
    assert all(text[start:].startswith(part) for start, part in slices(text, 100))
    assert list(slices("")) == [(0, "")]


# --- in the pipeline --------------------------------------------------------------------------------------------------


def dump(path, conversations):
    path.write_text("\n".join(
        json.dumps({"id": str(i), "messages": [{"role": m.role, "content": m.content} for m in c.messages]})
        for i, c in enumerate(conversations)
    ))  # fmt: skip
    return path


def test_near_duplicates_leave_with_keeper_and_similarity(tmp_path):
    conversations = [talk("q", prose(1)), talk("q", prose(2)), talk("q", changed(prose(1), 0.01) + " x")]
    report = clean([dump(tmp_path / "d.jsonl", conversations)], tmp_path / "out")
    assert report.rejected == {"near_duplicate": 1} and report.duplicates["clusters"] == 1
    (line,) = map(json.loads, (tmp_path / "out/rejected.jsonl").open())
    assert line["id"] == "0" and re.fullmatch(r"kept as 2, similarity 0\.[89]\d", line["detail"])
    (cluster,) = report.duplicates["largest"]
    assert cluster["kept"] == "2" and [e["id"] for e in cluster["examples"]] == ["0"]
    assert "algorithm 2" in report.duplicates["sketches"]
    report = clean([tmp_path / "d.jsonl"], tmp_path / "out", near=0)
    assert report.kept == 3


def test_hold_out_by_conversation_and_family(tmp_path):
    conversations = [talk("q", prose(i), "more", prose(1000 + i)) for i in range(200)]
    # Branches of the same first rounds.
    conversations += [talk("q", prose(i), "else", "other words") for i in range(200)]
    path = dump(tmp_path / "d.jsonl", conversations)
    report = clean([path], tmp_path / "out", holdout=0.2, seed=1)
    train, held = ([int(c.id) for c in read_conversations(tmp_path / f"out/conversations{name}.jsonl")]
                   for name in ("", ".holdout"))  # fmt: skip
    assert sorted(train + held) == list(range(400)) == list(range(report.kept))
    assert report.held_out == {"conversations": len(held), "parts": len(held)} and 40 <= len(held) <= 120
    assert {i % 200 for i in train}.isdisjoint({i % 200 for i in held})
    clean(
        [dump(tmp_path / "e.jsonl", [*conversations[:200], talk("new", prose(5000))])],
        tmp_path / "b",
        holdout=0.2,
        seed=1,
    )
    grown = [int(c.id) for c in read_conversations(tmp_path / "b/conversations.holdout.jsonl")]
    assert [i for i in grown if i < 200] == [i for i in held if i < 200]  # other data does not change the choice
    clean([path], tmp_path / "c", holdout=0.2, seed=2)
    assert [c.id for c in read_conversations(tmp_path / "c/conversations.holdout.jsonl")] != [str(i) for i in held]


def test_workers_do_not_change_what_is_near(tmp_path, monkeypatch):
    monkeypatch.setattr(cleaning.run.workers, "POOL_FROM", 0)
    monkeypatch.setattr(cleaning.first_pass, "SHARD_BYTES", 4_000)
    conversations = [talk("q", changed(prose(i % 7), 0.01 * (i % 4), seed=i)) for i in range(40)]
    path = dump(tmp_path / "d.jsonl", conversations)
    for workers in (1, 2):
        report = clean([path], tmp_path / str(workers), workers=workers, holdout=0.3)
        assert report.rejected["near_duplicate"] > 10
    for file in (tmp_path / "1").iterdir():
        assert file.read_bytes() == (tmp_path / "2" / file.name).read_bytes()


@pytest.mark.parametrize("options", [{"near": 1.5}, {"near": 0.1}, {"keep": "best"}, {"holdout": 1}])
def test_impossible_options_are_refused_by_name(tmp_path, options):
    with pytest.raises(UserError, match=f"--{next(iter(options))} is"):
        clean([dump(tmp_path / "d.jsonl", [talk("q", "a")])], tmp_path / "out", **options)


def test_white_space_makes_no_difference_and_a_superscript_does():
    def key(text: str) -> tuple[bytes, int]:
        found = fingerprint(Conversation("", [Message("user", text), Message("assistant", "yes", True)]))
        return found.beginnings, found.length

    assert key("Was  it\u2028So?\u3000 ") == key("was\nit so?") == key("wasitso?")
    assert key("Was it sö?\u2028") == key("was it\tSö?") != key("Was it so?")
    assert key("10\u00b2") != key("102")


def test_the_threshold_is_one_number_and_the_advice_about_it_one_text():
    defaults = inspect.signature(find_duplicates).parameters["near"].default, RunSettings().near
    assert defaults == (0.8, 0.8)
    page = (Path(__file__).parents[2] / "docs/cleaning.md").read_text()
    (advised,) = re.findall(r"to find such copies use `--near ([\d.]+)` \((\d+) % are found", page)
    assert advised == re.search(r"5 % of the words changed, use ([\d.]+): (\d+) % are", duplicates.__doc__).groups()
    assert "`--near` (0.8;" in page
