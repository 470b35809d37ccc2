"""Find duplicates: which conversations were shared more than once, which of them is kept, and how similar the two are.

Texts are compared folded: letter case and white space do not count. There are three kinds of duplicates.

    duplicate            All turns are the same, and the same answers are learned.
    duplicate_beginning  All its rounds are the first rounds of another conversation: people share a dialogue, continue
                         it, and share it again.
    near_duplicate       Its similarity to another conversation is at least `near` (0.8), and that of the answers alone is
                         at most 0.1 less. Without the second condition, two questions about one long pasted text would
                         be near duplicates.

Similarity is Jaccard's of the two sets of shingles, |A and B| / |A or B|. A shingle is five words in a row, or five
characters in scripts without spaces. Branches of one tree (`--branches all`) are never near duplicates of each other: they
share everything but their ends, and a user who asks for all branches wants those ends.

The similarity is estimated from MinHash sketches (rensa) of 128 values, with a standard error of 0.035 at 0.8. Changing
one word changes the five shingles that hold it: 2 % of the words changed leave a similarity of 0.83, 5 % leave 0.63, and
10 % leave 0.42. Only pairs that agree in a whole band of their sketches are compared (locality-sensitive hashing). The
bands are as long, and so as selective, as they can be while they miss less than one in a thousand of the pairs at the
threshold: 25 bands of 5 values for 0.8.

benchmarks/duplicates.py plants changed copies of 500 real conversations. At a threshold of 0.8 and with 2 % of the words
changed, 87 % of the pairs at or above the threshold are found (most of them lie within the estimate's error of 0.8) and
all of those above 0.85; 99 % of what is removed is right. To find copies with 5 % of the words changed, use 0.5: 98 % are
found (at 0.6 it is 84 %), and all of what is removed is right.

One core makes the sketches of 7 MB/s and links 140,000 conversations/s.

Conversations are judged one by one, the preferred ones (the longest or the newest) first. One that is contained in, or near
to, a conversation that was kept before is removed, and names that one as its keeper. So every keeper is itself kept, and is
directly similar to what it replaces, not through a third conversation. The result depends on the order of the input only,
not on the number of processes.

Each conversation is remembered as 16 bytes a round and 256 bytes of sketches. They are a pure function of its text and are
computed where it is read; the linking is done in one process, on numpy arrays, and takes 0.5 GB for a million
conversations of 4.5 rounds.
"""

import hashlib
import itertools
from array import array
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from rensa import RMinHash

from fastft.data.conversation import Conversation, Message, rounds_of
from fastft.data.dedup.shingles import Shingles, Words, fold, slices

SHINGLE = 5  # words
# A conversation with fewer words has no sketch, and is a duplicate only of the same text, because there a small
# difference matters ("2 + 2", "2 - 2").
MIN_WORDS = 20
MAX_WORDS = 1 << 20  # of a longer conversation, only the first MAX_WORDS are sketched

# Values of a sketch. Of the 32 bits of each value 8 are kept, so that two different values agree once in 256 times;
# `_similarity` corrects for that.
VALUES = 128
SEED = 42
SKETCHER = f"rensa R-MinHash, algorithm {RMinHash.ALGORITHM_VERSION}"  # another algorithm makes other sketches
# By how much the similarity of the answers may be below the threshold: about three standard errors of the estimate. With
# one threshold for both, the noise of the second estimate alone lost a fifth of the copies at the threshold.
ANSWERS_BELOW = 0.1
RELATED = 0.5  # the similarity from which conversations are of one family
MISSED = 1e-3  # the share of the pairs at the threshold that may agree in no band

KEY = 16  # bytes of a BLAKE2b key
_WHITE_SPACE = b" \t\n\r\v\f\x1c\x1d\x1e\x1f"  # the ASCII part of what `str.split` takes for white space
SLICE = 1 << 20  # keys looked up at a time


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What the search for duplicates remembers of a conversation."""

    beginnings: bytes  # a key for the first round, a key for the first two rounds, …, a key for all turns
    length: int  # characters of the folded text, without white space
    # 2 x VALUES bytes, for all turns and for the answers alone; empty if the conversation is short or near duplicates are off.
    sketch: bytes = b""
    time: float = 0.0  # when it took place, in unix seconds; 0 if the dump does not say so
    tree: bytes = b""  # the same for all branches of one tree and for all parts of one conversation; empty for others


class Fingerprints:
    """The fingerprints of many conversations, as columns: as objects, two million would take 500 MB more."""

    def __init__(self, fingerprints: Iterable[Fingerprint] = ()):
        self.beginnings = bytearray()  # the keys of all conversations, one after the other
        self.ends = array("q")  # for each conversation, how many keys there are up to its end
        self.lengths, self.times = array("q"), array("d")
        self.sketches = bytearray()
        self.sketched = array("q")  # the positions of the conversations that have a sketch
        self.trees: dict[int, bytes] = {}  # position -> tree
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
        """Return the key of all turns of a conversation."""
        end = self.ends[position] * KEY
        return bytes(self.beginnings[end - KEY : end])

    def columns(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the keys as halves, uint64[K, 2], and where those of each conversation end, int64[N]. Nothing is copied."""
        return np.frombuffer(self.beginnings, np.uint64).reshape(-1, 2), np.frombuffer(self.ends, np.int64)

    def sketches_of(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the positions that have a sketch, int64[S], and the sketches, uint8[S, 2, VALUES]."""
        return (
            np.frombuffer(self.sketched, np.int64),
            np.frombuffer(self.sketches, np.uint8).reshape(-1, 2, VALUES),
        )


@dataclass(frozen=True, slots=True)
class Duplicate:
    """Why a conversation is removed."""

    reason: str  # "duplicate", "duplicate_beginning" or "near_duplicate"
    keeper: int  # position of the conversation that is kept in its place
    similarity: float  # 1 if it is wholly contained in its keeper


def fingerprint(conversation: Conversation, near: bool = True, time: float = 0.0, tree: bytes = b"") -> Fingerprint:
    """Return the fingerprint of a conversation. With `near` it includes the sketch, which is most of the work."""
    messages = conversation.messages
    lead, rounds = rounds_of(messages)
    folded = [fold(message.content) for message in messages]
    texts, length = zip(messages, folded), 0
    digest, beginnings = hashlib.blake2b(digest_size=KEY), []
    for part in [lead, *rounds]:
        for message, text in itertools.islice(texts, len(part)):
            # Compatibility forms count here, unlike in a sketch: x² is not x2.
            bare = _without_white_space(text if message.content.isascii() else message.content.casefold())
            # An answer that is only context counts as different from the same answer that is learned. Otherwise a part of
            # a split conversation would count as the beginning of the next part, which repeats its last round as context.
            context = message.role == "assistant" and not message.train
            digest.update(f"{message.role}{' (context)' if context else ''}\0{bare}\0".encode())
            length += len(bare)
        beginnings.append(digest.digest())
    beginnings = beginnings[1:] or beginnings  # the system message alone is not a beginning
    return Fingerprint(b"".join(beginnings), length, _sketch(messages, folded) if near else b"", time, tree)


def _without_white_space(text: str) -> str:
    if text.isascii():  # four times as fast
        return text.encode().translate(None, _WHITE_SPACE).decode()
    return "".join(text.split())


def find_duplicates(fingerprints: Fingerprints, near: float = 0.8, keep: str = "longest") -> dict[int, Duplicate]:
    """Return {position: why it is removed} for all duplicates.

    `near` is the similarity from which conversations are near duplicates; 0 turns those off. `keep` says which of several is
    kept, the "longest" or the "newest" (of two of the same time, the later in the input). Whatever `keep` says, a
    conversation that is the beginning of a longer one is removed, and the longer one kept.
    """
    continuations = _continuations(fingerprints)
    nearby = _Nearby(fingerprints, near) if near else None
    repeated = _repeated(fingerprints)
    by_text: dict[bytes, int] = {}  # key of all turns that several have -> position of the one that is kept
    duplicates: dict[int, Duplicate] = {}
    for position in _in_order_of_preference(fingerprints, continuations, keep):
        whole = fingerprints.whole(position)
        longer = next((s for s in continuations.get(whole, ()) if s not in duplicates), None)
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
    """Return {keeper: the positions removed for it}, the largest cluster first."""
    found = defaultdict(list)
    for position, duplicate in sorted(duplicates.items()):
        found[duplicate.keeper].append(position)
    return dict(sorted(found.items(), key=lambda item: (-len(item[1]), item[0])))


def families(fingerprints: Fingerprints, positions: Sequence[int]) -> list[int]:
    """Return, for each of `positions`, the first of them in its family, as an index into `positions`.

    Two conversations are related if they have the same first round or a similarity of at least RELATED. A family is a
    conversation with all that are related to it in any number of steps. Held-out and training data must not share one.
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
    for a, b in _same(first_rounds[:, 0], first_rounds[:, 1]):
        join(a, b)
    sketched, sketches = fingerprints.sketches_of()
    _, rows, of = np.intersect1d(sketched, at, assume_unique=True, return_indices=True)
    of = of.tolist()
    for band in _band_keys(sketches[:, 0], RELATED):
        # Each is compared only with the first that has the same key, so that the time grows with the number of rows.
        for a, b in _same(band[rows]):
            if root(of[a]) != root(of[b]) and _similarity(sketches[rows[a]], sketches[rows[b]]) >= RELATED:
                join(of[a], of[b])
    return [root(i) for i in range(len(positions))]


def _same(*columns: np.ndarray) -> Iterator[tuple[int, int]]:
    """Yield (the first row, another row) for all rows that agree in all columns."""
    order = np.lexsort(columns)
    begins = np.zeros(len(order), bool)
    begins[:1] = True
    for column in columns:
        begins[1:] |= np.diff(column[order]) != 0
    firsts = order[np.maximum.accumulate(np.where(begins, np.arange(len(order)), 0))]
    yield from zip(firsts[~begins].tolist(), order[~begins].tolist())


# --- beginnings -------------------------------------------------------------------------------------------------------


def _repeated(fingerprints: Fingerprints) -> np.ndarray:
    """Tell which conversations have the same text as another, bool[N].

    Only half of each key is compared: a rare false match does no harm.
    """
    keys, ends = fingerprints.columns()
    return _shared(keys[ends - 1, 0])


def _continuations(fingerprints: Fingerprints) -> dict[bytes, list[int]]:
    """Return {key of all turns: positions of the conversations that begin with these turns and continue, the longest first}.

    Keys with which no other conversation begins are left out. Candidates are found by half of the key. This can add
    superfluous entries, but they do no harm, because no conversation has them as its key of all turns.
    """
    keys, ends = fingerprints.columns()
    found = defaultdict(list)
    if not len(ends):
        return found
    wholes = np.sort(keys[ends - 1, 0])
    continues = np.ones(len(keys), bool)
    continues[ends - 1] = False
    for start in range(0, len(keys), SLICE):  # in slices, because a search copies what it looks for
        part = keys[start : start + SLICE, 0]
        same = wholes[np.searchsorted(wholes, part).clip(max=len(wholes) - 1)] == part
        for row in (start + np.flatnonzero(same & continues[start : start + SLICE])).tolist():
            found[keys[row].tobytes()].append(int(np.searchsorted(ends, row, side="right")))
    rounds = np.diff(ends, prepend=0)
    for positions in found.values():
        positions.sort(key=lambda p: (-rounds[p], -fingerprints.lengths[p], p))
    return found


def _in_order_of_preference(
    fingerprints: Fingerprints, continuations: dict[bytes, list[int]], keep: str
) -> Iterator[int]:
    """Yield all positions, the preferred first, but each only after the conversations that continue it."""
    assert keep in ("longest", "newest"), keep
    if keep == "longest":
        preferred = np.argsort(-np.frombuffer(fingerprints.lengths, np.int64), kind="stable")
    else:
        preferred = np.argsort(np.frombuffer(fingerprints.times), kind="stable")[::-1]
    done = bytearray(len(fingerprints))
    for position in map(int, preferred):
        for each in (*continuations.get(fingerprints.whole(position), ()), position):
            if not done[each]:
                done[each] = True
                yield each


# --- sketches ---------------------------------------------------------------------------------------------------------


def _sketch(messages: Sequence[Message], folded: Sequence[str]) -> bytes:
    """Return the sketches of all turns and of the answers alone; empty for a conversation of fewer than MIN_WORDS."""
    everything, ends = _words(folded)
    if len(everything) < MIN_WORDS:
        return b""
    spans = [(a, b) for a, b, message in zip([0, *ends], ends, messages) if message.role == "assistant"]
    answers = np.concatenate([everything[a:b] for a, b in spans] or [everything[:0]])[:MAX_WORDS]
    everything = everything[:MAX_WORDS]
    sets = [Shingles(each).of(min(SHINGLE, max(len(each), 1))) for each in (everything, answers)]
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(
        np.concatenate(sets), np.array([0, len(sets[0]), len(sets[0]) + len(sets[1])], np.uint64), VALUES, SEED
    )
    # Only the highest 8 bits are kept. In a minimum these are mostly zero, so the multiplication mixes the others into them.
    values = np.array(matrix.to_rows(), np.uint32) * np.uint32(0x9E3779B1)
    return (values >> np.uint32(24)).astype(np.uint8).tobytes()


def _words(folded: Sequence[str]) -> tuple[np.ndarray, list[int]]:
    """Return the hashes of all words, uint64[W], and how many of them there are up to the end of each text."""
    hashes, starts = [], []
    # All messages are hashed together, because most are too short for numpy to be fast.
    for start, part in slices("\n".join(folded)):
        words = Words(part, folded=True)
        hashes.append(words.hashes)
        starts.append(words.starts + start)
    ends = np.fromiter(itertools.accumulate(len(text) + 1 for text in folded), np.int64, len(folded))
    return np.concatenate(hashes), np.concatenate(starts).searchsorted(ends).tolist()


def rows_per_band(threshold: float) -> int:
    """Return the largest number of values in a band with which at most MISSED of the pairs at `threshold` agree in no band.

    Two sketches agree in one value with probability `threshold`, and so in a band of r values with `threshold`^r.
    """
    rows = range(1, VALUES + 1)
    return max((r for r in rows if (1 - threshold**r) ** (VALUES // r) <= MISSED), default=1)


def _band_keys(sketches: np.ndarray, threshold: float) -> Iterator[np.ndarray]:
    """Yield, for each band, the key of every sketch, uint64[N]."""
    rows = rows_per_band(threshold)
    for first in range(0, VALUES - rows + 1, rows):
        yield _row_hashes(sketches[:, first : first + rows])


def _row_hashes(band: np.ndarray) -> np.ndarray:
    """Return a hash of each row of `band`, uint8[N, rows]."""
    keys = np.zeros(len(band), np.uint64)
    for column in band.T:
        keys = (keys ^ column) * np.uint64(0x9E3779B97F4A7C15)
        keys ^= keys >> np.uint64(29)
    return keys


def _shared(keys: np.ndarray) -> np.ndarray:
    """Tell which keys occur more than once, bool[N]."""
    _, which, counts = np.unique(keys, return_inverse=True, return_counts=True)
    return counts[which] > 1


def _similarity(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the similarity of one sketch [2, VALUES] to another, or to several [N, 2, VALUES].

    It is the similarity of all turns, or that of the answers plus ANSWERS_BELOW if that is less. Values that agree by chance
    (once in 256) are subtracted.
    """
    equal = (a == b).mean(axis=-1)
    whole, answers = np.moveaxis((equal - 1 / 256) / (1 - 1 / 256), -1, 0)
    return np.minimum(whole, answers + ANSWERS_BELOW)


class _Nearby:
    """An index, by band, of the sketches of the conversations that are kept so far."""

    def __init__(self, fingerprints: Fingerprints, threshold: float):
        self.threshold = threshold
        sketched, sketches = fingerprints.sketches_of()
        # Most conversations have only keys that no other conversation has, so nothing can be found by them. They are
        # left out here, by arithmetic on whole arrays, and the tables below serve the few others.
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
        """Return (position, similarity) of the most similar kept conversation, or None if none reaches the threshold."""
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
        """Add a conversation to the index."""
        row = self.row.get(position)
        if row is not None:
            keys = self.keys[row].tolist()
            for band in np.flatnonzero(self.shared[row]).tolist():
                self.tables[band][keys[band]].append(row)
