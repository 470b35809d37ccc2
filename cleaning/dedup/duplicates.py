"""Duplicates: which conversations were shared twice, which of them stays, and how alike the two are.

Three kinds, all compared on folded text (case and white space do not count):

    duplicate            all turns are the same, and the same answers are learned
    duplicate_beginning  all its rounds are the first rounds of another: people share a dialogue, go on and share it again
    near_duplicate       `near` (0.8) of the runs of five words are common to both, and hardly fewer (0.7) of those of
                         the answers alone: two questions about one long pasted text are no duplicates. Runs of five
                         characters where a script writes no spaces. Branches of one tree are no near duplicates of
                         each other: they share all but their end, and who asked for them wants the ends

Similarity is Jaccard's, |common| / |either|, estimated from MinHash sketches (rensa, 128 values: standard error 0.035 at
0.8). Changing one word changes five runs: 2 % of words changed leave 0.83, 5 % leave 0.63, 10 % leave 0.42. Pairs to
compare are those that agree in a whole band of their sketches; bands are as selective as they can be while they miss
less than one pair in a thousand at the threshold (25 bands of 5 for 0.8).

benchmarks/duplicates.py plants copies of 500 real conversations. At 0.8 with 2 % of the words changed, 85 % of the pairs
at or above the threshold are found and 99 % of those above 0.85 (most lie within the estimate's error of 0.8); 99.7 % of
what is removed is right. To find copies with 5 % changed, use 0.5: 98 % found, 100 % right. 7 MB/s on one core, and
140,000 conversations/s to link.

Conversations are judged one by one, the preferred first (the longest, or the newest): one that is contained in, or near
to, a conversation that has been kept is removed and names it. So every keeper is kept, is alike itself and not by way of
others, and the result depends on the input's order only.

What is remembered of a conversation is 16 bytes a round and 256 bytes of sketches, computed where it is read (pure
functions of its text); linking happens in one place, on numpy arrays: 0.5 GB for a million conversations of 4.5 rounds.
"""

import hashlib
import itertools
from array import array
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from rensa import RMinHash

from cleaning.dedup.shingles import Runs, Words, fold, slices
from fastft.data.conversation import Conversation, Message
from fastft.data.split import rounds_of
from fastft.errors import UserError

NEAR = 0.8
RUN = 5  # words
MIN_WORDS = 20  # below, runs of words say too little ("2 + 2" is "2 - 2"): only the same text is a duplicate
MAX_WORDS = 1 << 20  # a conversation of more is known by its first million

VALUES = 128  # of a sketch; 8 of their 32 bits are kept, and two different values agree once in 256 (`_similarity`)
SEED = 42
SKETCHER = f"rensa R-MinHash, algorithm {RMinHash.ALGORITHM_VERSION}"  # sketches of another are others
# Answers may be less alike by this much: about three standard errors of the estimate. Asking the same of both lost a
# fifth of the copies at the threshold to the second estimate's noise alone.
ANSWERS_BELOW = 0.1
MISSED = 1e-3  # share of pairs at the threshold that banding may miss

KEY = 16  # bytes of a BLAKE2b key
_WHITE_SPACE = b" \t\n\r\v\f\x1c\x1d\x1e\x1f"  # that of ASCII, as `str.split` has it
SLICE = 1 << 20  # keys looked up at a time


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What is remembered of a conversation."""

    beginnings: bytes  # a key for the first round, the first two, … all turns
    length: int  # characters, folded, white space left out
    sketch: bytes = b""  # of all turns and of the answers, 2 x VALUES bytes; empty where near duplicates do not apply
    time: float = 0.0  # when it took place, where the dump says so
    tree: bytes = b""  # the same for the branches of one tree that were asked for (`--branches all`)


class Fingerprints:
    """Those of many conversations, in columns: as objects, two millions would take another 500 MB."""

    def __init__(self, fingerprints: Iterable[Fingerprint] = ()):
        self.beginnings, self.ends = bytearray(), array("q")  # the keys of all; how many there are up to each position
        self.lengths, self.times = array("q"), array("d")
        self.sketches, self.sketched = bytearray(), array("q")  # the positions that have one
        self.trees: dict[int, bytes] = {}
        for each in fingerprints:
            self.append(each)

    def __len__(self) -> int:
        return len(self.ends)

    def append(self, each: Fingerprint) -> None:
        if each.sketch:
            self.sketched.append(len(self))
            self.sketches += each.sketch
        if each.tree:
            self.trees[len(self)] = each.tree
        self.beginnings += each.beginnings
        self.ends.append(len(self.beginnings) // KEY)
        self.lengths.append(each.length)
        self.times.append(each.time)

    def whole(self, position: int) -> bytes:
        """The key of all its turns."""
        end = self.ends[position] * KEY
        return bytes(self.beginnings[end - KEY : end])

    def columns(self) -> tuple[np.ndarray, np.ndarray]:
        """(halves of the keys uint64[K, 2], behind which of them each position ends int64[N]); nothing is copied."""
        return np.frombuffer(self.beginnings, np.uint64).reshape(-1, 2), np.frombuffer(self.ends, np.int64)

    def sketches_of(self) -> tuple[np.ndarray, np.ndarray]:
        """(positions of those that have one int64[S], their sketches uint8[S, 2, VALUES])"""
        return (
            np.frombuffer(self.sketched, np.int64),
            np.frombuffer(self.sketches, np.uint8).reshape(-1, 2, VALUES),
        )


@dataclass(frozen=True, slots=True)
class Duplicate:
    """Why a conversation is removed."""

    reason: str
    keeper: int  # position of the one that stays
    similarity: float  # 1 for what is wholly in its keeper


def fingerprint(conversation: Conversation, near: bool = True, time: float = 0.0, tree: bytes = b"") -> Fingerprint:
    """`near`: sketch the conversation, too (most of the work)."""
    messages = conversation.messages
    lead, rounds = rounds_of(messages)
    folded = [fold(message.content) for message in messages]
    texts, length = zip(messages, folded), 0
    digest, beginnings = hashlib.blake2b(digest_size=KEY), []
    for part in [lead, *rounds]:
        for message, text in itertools.islice(texts, len(part)):
            bare = _bare(text if message.content.isascii() else message.content.casefold())  # x² is not x2 here
            # Context is no duplicate of what is learned: else a part would go for the next, which begins with it.
            context = message.role == "assistant" and not message.train
            digest.update(f"{message.role}{' (context)' if context else ''}\0{bare}\0".encode())
            length += len(bare)
        beginnings.append(digest.digest())
    beginnings = beginnings[1:] or beginnings  # the system message alone is no beginning
    return Fingerprint(b"".join(beginnings), length, _sketch(messages, folded) if near else b"", time, tree)


def _bare(text: str) -> str:
    """`text` without white space."""
    if text.isascii():  # four times as fast
        return text.encode().translate(None, _WHITE_SPACE).decode()
    return "".join(text.split())


def find_duplicates(fingerprints: Fingerprints, near: float = NEAR, keep: str = "longest") -> dict[int, Duplicate]:
    """{position: why it is removed}.

    `near` is the similarity from which conversations are near duplicates, 0 for none. `keep` is "longest" or "newest":
    of two newest, the later in the input. A conversation always gives way to one that goes on from it.
    """
    supersets = _supersets(fingerprints)
    nearby = _Nearby(fingerprints, near) if near else None
    repeated = _repeated(fingerprints)
    by_text: dict[bytes, int] = {}  # whole text -> the one that is kept, where there are several
    duplicates: dict[int, Duplicate] = {}
    for position in _in_order_of_preference(fingerprints, supersets, keep):
        whole = fingerprints.whole(position)
        longer = next((s for s in supersets.get(whole, ()) if s not in duplicates), None)
        if whole in by_text:
            duplicates[position] = Duplicate("duplicate", by_text[whole], 1.0)
        elif longer is not None:
            duplicates[position] = Duplicate("duplicate_beginning", longer, 1.0)
        elif nearby and (found := nearby.nearest_kept(position)):
            duplicates[position] = Duplicate("near_duplicate", *found)
        else:
            if repeated[position]:
                by_text[whole] = position
            if nearby:
                nearby.keep(position)
    return duplicates


def clusters(duplicates: dict[int, Duplicate]) -> dict[int, list[int]]:
    """{keeper: the positions removed for it}, the largest first."""
    found = defaultdict(list)
    for position, duplicate in sorted(duplicates.items()):
        found[duplicate.keeper].append(position)
    return dict(sorted(found.items(), key=lambda item: (-len(item[1]), item[0])))


def families(fingerprints: Fingerprints, positions: Sequence[int], near: float = 0.5) -> list[int]:
    """For each of `positions`, the first of them that it is related to, by any number of steps.

    Related are conversations with the same first round, and those as alike as `near`. Held-out data must not hold the
    sisters of what is trained on.
    """
    parent = list(range(len(positions)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    def join(a: int, b: int) -> None:
        a, b = root(a), root(b)
        parent[max(a, b)] = min(a, b)

    at = np.asarray(positions, np.int64)
    keys, ends = fingerprints.columns()
    first_rounds = keys[np.append(0, ends[:-1])[at]]
    for a, b in _alike(first_rounds[:, 0], first_rounds[:, 1]):
        join(a, b)
    sketched, sketches = fingerprints.sketches_of()
    _, rows, of = np.intersect1d(sketched, at, assume_unique=True, return_indices=True)
    of = of.tolist()
    for band in _band_keys(sketches[:, 0], near):
        # Each is compared with the first of its band only: enough to join clusters, and linear in their size.
        for a, b in _alike(band[rows]):
            if root(of[a]) != root(of[b]) and _similarity(sketches[rows[a]], sketches[rows[b]]) >= near:
                join(of[a], of[b])
    return [root(i) for i in range(len(positions))]


def _alike(*columns: np.ndarray) -> Iterator[tuple[int, int]]:
    """(the first of them, another) of the rows that agree in all columns."""
    order = np.lexsort(columns)
    begins = np.zeros(len(order), bool)
    begins[:1] = True
    for column in columns:
        begins[1:] |= np.diff(column[order]) != 0
    firsts = order[np.maximum.accumulate(np.where(begins, np.arange(len(order)), 0))]
    yield from zip(firsts[~begins].tolist(), order[~begins].tolist())


# --- beginnings -------------------------------------------------------------------------------------------------------


def _repeated(fingerprints: Fingerprints) -> np.ndarray:
    """Which have the text of another (bool[N]). By half a key: one too many does no harm."""
    keys, ends = fingerprints.columns()
    return _shared(keys[ends - 1, 0])


def _supersets(fingerprints: Fingerprints) -> dict[bytes, list[int]]:
    """{whole text: positions of the conversations that begin with it and go on}, for those that have any.

    By half a key: an entry that is nobody's whole text is asked for by nobody.
    """
    keys, ends = fingerprints.columns()
    found = defaultdict(list)
    if not len(ends):
        return found
    wholes = np.sort(keys[ends - 1, 0])
    goes_on = np.ones(len(keys), bool)
    goes_on[ends - 1] = False
    for start in range(0, len(keys), SLICE):  # in slices: a search copies what it looks for
        part = keys[start : start + SLICE, 0]
        same = wholes[np.searchsorted(wholes, part).clip(max=len(wholes) - 1)] == part
        for row in (start + np.flatnonzero(same & goes_on[start : start + SLICE])).tolist():
            found[keys[row].tobytes()].append(int(np.searchsorted(ends, row, side="right")))
    rounds = np.diff(ends, prepend=0)
    for positions in found.values():
        positions.sort(key=lambda p: (-rounds[p], -fingerprints.lengths[p], p))
    return found


def _in_order_of_preference(fingerprints: Fingerprints, supersets: dict[bytes, list[int]], keep: str) -> Iterator[int]:
    """All positions, the preferred first, and each after those that go on from it."""
    if keep == "longest":
        preferred = np.argsort(-np.frombuffer(fingerprints.lengths, np.int64), kind="stable")
    elif keep == "newest":
        preferred = np.argsort(np.frombuffer(fingerprints.times), kind="stable")[::-1]
    else:
        raise UserError(f"--keep {keep}: it is longest or newest")
    done = bytearray(len(fingerprints))
    for position in map(int, preferred):
        for each in (*supersets.get(fingerprints.whole(position), ()), position):
            if not done[each]:
                done[each] = True
                yield each


# --- sketches ---------------------------------------------------------------------------------------------------------


def _sketch(messages: Sequence[Message], folded: Sequence[str]) -> bytes:
    everything, ends = _words(folded)
    if len(everything) < MIN_WORDS:
        return b""
    spans = [(a, b) for a, b, message in zip([0, *ends], ends, messages) if message.role == "assistant"]
    answers = np.concatenate([everything[a:b] for a, b in spans] or [everything[:0]])[:MAX_WORDS]
    everything = everything[:MAX_WORDS]
    sets = [Runs(each).of(min(RUN, max(len(each), 1))) for each in (everything, answers)]
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(
        np.concatenate(sets), np.array([0, len(sets[0]), len(sets[0]) + len(sets[1])], np.uint64), VALUES, SEED
    )
    values = np.array(matrix.to_rows(), np.uint32) * np.uint32(0x9E3779B1)  # a minimum's high bits are mostly zero
    return (values >> np.uint32(24)).astype(np.uint8).tobytes()


def _words(folded: Sequence[str]) -> tuple[np.ndarray, list[int]]:
    """The hashes of all words (uint64[W]), and behind which of them each text ends."""
    hashes, starts = [], []
    for start, part in slices("\n".join(folded)):  # all messages at once: most are too short for numpy one by one
        words = Words(part, folded=True)
        hashes.append(words.hashes)
        starts.append(words.starts + start)
    ends = np.fromiter(itertools.accumulate(len(text) + 1 for text in folded), np.int64, len(folded))
    return np.concatenate(hashes), np.concatenate(starts).searchsorted(ends).tolist()


def rows_per_band(threshold: float) -> int:
    """The most rows with which less than MISSED of the pairs at `threshold` agree in no band."""
    rows = range(1, VALUES + 1)
    return max((r for r in rows if (1 - threshold**r) ** (VALUES // r) <= MISSED), default=1)


def _band_keys(sketches: np.ndarray, threshold: float) -> Iterator[np.ndarray]:
    """For each band, the key of every sketch (uint64[N])."""
    rows = rows_per_band(threshold)
    for first in range(0, VALUES - rows + 1, rows):
        yield _row_hashes(sketches[:, first : first + rows])


def _row_hashes(band: np.ndarray) -> np.ndarray:
    """A hash for each row of `band` (uint8[N, rows])."""
    keys = np.zeros(len(band), np.uint64)
    for column in band.T:
        keys = (keys ^ column) * np.uint64(0x9E3779B97F4A7C15)
        keys ^= keys >> np.uint64(29)
    return keys


def _shared(keys: np.ndarray) -> np.ndarray:
    """Which keys occur more than once (bool[N])."""
    _, which, counts = np.unique(keys, return_inverse=True, return_counts=True)
    return counts[which] > 1


def _similarity(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of one sketch [2, VALUES] with another or several [N, 2, VALUES]: that of the whole, or of answers that differ."""
    equal = (a == b).mean(axis=-1)
    whole, answers = np.moveaxis((equal - 1 / 256) / (1 - 1 / 256), -1, 0)
    return np.minimum(whole, answers + ANSWERS_BELOW)


class _Nearby:
    """The sketches of the conversations that are kept so far, by band."""

    def __init__(self, fingerprints: Fingerprints, threshold: float):
        self.threshold = threshold
        sketched, sketches = fingerprints.sketches_of()
        # A key that no other conversation has finds nothing. Most conversations have only such: they are done with here,
        # on whole arrays, and the tables below hold the few that are left.
        busy = np.zeros(len(sketched), bool)
        for keys in _band_keys(sketches[:, 0], threshold):
            busy |= _shared(keys)
        self.sketches = sketches[busy]
        self.positions = sketched[busy].tolist()
        self.row = {position: row for row, position in enumerate(self.positions)}
        self.trees = [fingerprints.trees.get(position, b"") for position in self.positions]
        self.keys = np.stack(list(_band_keys(self.sketches[:, 0], threshold)), axis=1)
        self.shared = np.stack([_shared(keys) for keys in self.keys.T], axis=1)
        self.tables: list[dict[int, list[int]]] = [defaultdict(list) for _ in range(self.keys.shape[1])]

    def nearest_kept(self, position: int) -> tuple[int, float] | None:
        """(position, similarity) of the kept conversation most alike, if it is alike enough."""
        row = self.row.get(position)
        if row is None:
            return None
        keys, tree = self.keys[row].tolist(), self.trees[row]
        found = {kept for table, key in zip(self.tables, keys) for kept in table.get(key, ())}
        candidates = sorted(kept for kept in found if not tree or self.trees[kept] != tree)
        if not candidates:
            return None
        similarities = _similarity(self.sketches[candidates], self.sketches[row])
        best = int(similarities.argmax())
        if similarities[best] < self.threshold:
            return None
        return self.positions[candidates[best]], round(float(similarities[best]), 3)

    def keep(self, position: int) -> None:
        row = self.row.get(position)
        if row is not None:
            keys = self.keys[row].tolist()
            for band in np.flatnonzero(self.shared[row]).tolist():
                self.tables[band][keys[band]].append(row)
