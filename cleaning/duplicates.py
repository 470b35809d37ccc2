"""Exact duplicates: which conversations were shared twice, and which of the two stays.

Text is compared folded (case and white space), by 16-byte BLAKE2b keys: a million conversations fit in memory. Two
conversations are the same if all their turns are, or if their first question and first answer are: people share a
dialogue, go on with it and share it again. The longest stays.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from fastft.conversation import Conversation

# Below this many characters a first round says too little: "hi" and "Hello! How can I assist you today?" begin
# thousands of different dialogues.
MIN_FIRST_ROUND = 100


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What is remembered of a conversation. Conversations with equal `first_round` are one dialogue."""

    whole: bytes
    first_round: bytes
    length: int  # characters, folded


def fingerprint(conversation: Conversation) -> Fingerprint:
    folded = [(m.role, " ".join(m.content.casefold().split())) for m in conversation.messages]
    first_round = [turn for turn in folded if turn[0] != "system"][:2]
    telling = sum(len(text) for _, text in first_round) >= MIN_FIRST_ROUND
    whole = _key(folded)
    return Fingerprint(whole, _key(first_round) if telling else whole, sum(len(text) for _, text in folded))


def find_duplicates(fingerprints: Sequence[Fingerprint]) -> dict[int, tuple[str, int]]:
    """{position of a duplicate: (reason, position of the one that stays)}.

    The longest of each group stays, the first of those equally long. The reason is `duplicate` where all turns are the
    same, else `duplicate_first_round`.
    """
    keepers: dict[bytes, int] = {}
    for position, each in enumerate(fingerprints):
        keeper = keepers.setdefault(each.first_round, position)
        if each.length > fingerprints[keeper].length:
            keepers[each.first_round] = position
    duplicates = {}
    for position, each in enumerate(fingerprints):
        keeper = keepers[each.first_round]
        if keeper != position:
            same = each.whole == fingerprints[keeper].whole
            duplicates[position] = ("duplicate" if same else "duplicate_first_round", keeper)
    return duplicates


def _key(turns: Sequence[tuple[str, str]]) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for role, text in turns:
        digest.update(f"{role}\0{text}\0".encode())
    return digest.digest()
