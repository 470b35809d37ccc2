"""Packing plan: which conversations share a row, and in which order rows are trained.

A pure function of (lengths, window, seed, epoch); it does not know how many GPUs there are. Every conversation appears
once per epoch, ends included. Best-fit decreasing: conversations from long to short, each into the fullest row that
still takes it. Two seeded shuffles make epochs differ: conversations of equal length change places, and so do rows.
"""

import numpy as np

from fastft.errors import UserError


def pack(lengths: np.ndarray, seq_len: int, seed: int, epoch: int) -> list[np.ndarray]:
    """Rows of one epoch: each an int64 array of conversation indices whose lengths (in tokens) sum to <= window.

    Raises UserError when a conversation is longer than the window.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    if len(lengths) and lengths.max() > seq_len:
        raise UserError(f"a conversation of {lengths.max()} tokens does not fit the window of {seq_len}")
    random = np.random.default_rng([seed, epoch])
    shuffled = random.permutation(len(lengths))
    order = shuffled[np.argsort(-lengths[shuffled], kind="stable")]

    rows: list[list[int]] = []
    rows_with_space: list[list[int]] = [[] for _ in range(seq_len + 1)]  # rows by how many tokens they still take
    occupied = 0  # bit s is set when rows_with_space[s] is not empty; the best fit is then one shift and one lowest bit
    for conversation in order.tolist():
        length = int(lengths[conversation])
        fitting = occupied >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1
            row = rows_with_space[space].pop()
            if not rows_with_space[space]:
                occupied ^= 1 << space
        else:
            space, row = seq_len, len(rows)
            rows.append([])
        rows[row].append(conversation)
        rows_with_space[space - length].append(row)
        occupied |= 1 << (space - length)
    return [np.asarray(rows[row], dtype=np.int64) for row in random.permutation(len(rows))]


def lower_bound(lengths: np.ndarray, seq_len: int) -> int:
    """Fewest rows that any plan could need (bound L2 of Martello and Toth, 1990, for bin packing).

    For every threshold k: conversations longer than window - k need a row each and leave too little room for those of
    at least k tokens; what those need beyond the room that the others leave is counted by volume.
    """
    lengths = np.sort(np.asarray(lengths, dtype=np.int64))
    if not len(lengths):
        return 0
    sums = np.concatenate([[0], np.cumsum(lengths)])
    best = -(-int(sums[-1]) // seq_len)
    half = np.searchsorted(lengths, seq_len // 2, side="right")  # first conversation longer than half a window
    for k in np.unique(lengths[:half]):
        whole = np.searchsorted(lengths, seq_len - k, side="right")  # first that shares with nothing of k tokens
        small = np.searchsorted(lengths, k, side="left")
        volume = int(sums[half] - sums[small])
        room = int((whole - half) * seq_len - (sums[whole] - sums[half]))
        best = max(best, int(len(lengths) - half) + max(0, -(-(volume - room) // seq_len)))
    return best
