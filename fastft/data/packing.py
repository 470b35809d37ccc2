"""Plan which conversations share a packed row, and in which order the rows are trained on.

The plan is a pure function of (lengths, sequence length, seed, epoch); it does not depend on the number of GPUs. Every
conversation appears once per epoch, and whole. The algorithm is best-fit decreasing: conversations are taken from long to
short, and each is put into the fullest row that still has room for it. Two seeded shuffles make epochs differ: of
conversations with equal lengths, and of rows.
"""

import numpy as np


def pack(lengths: np.ndarray, seq_len: int, seed: int, epoch: int) -> list[np.ndarray]:
    """Return the rows of one epoch, each an int64 array of conversation numbers whose tokens are at most `seq_len` in sum.

    No conversation may be longer than `seq_len`; fastft.data.dataset.fit_to_seq_len sees to that.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    assert not len(lengths) or lengths.max() <= seq_len, f"{lengths.max()} tokens do not fit into a row of {seq_len}"
    random = np.random.default_rng([seed, epoch])
    shuffled = random.permutation(len(lengths))
    order = shuffled[np.argsort(-lengths[shuffled], kind="stable")]

    rows: list[list[int]] = []
    rows_with_space: list[list[int]] = [[] for _ in range(seq_len + 1)]  # rows by how many tokens they have room for
    occupied = (
        0  # bit s is set if rows_with_space[s] is not empty. A shift and the lowest bit set then give the best fit
    )
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
    """Return a number of rows that every plan needs at least (bound L2 of Martello and Toth, 1990, for bin packing).

    A bound is computed for every threshold k, and the largest is returned. Conversations longer than half a row need a row
    each. In these rows there is room for k tokens or more only if the long conversation has at most seq_len - k tokens. The
    conversations from k tokens up to half a row fill that room, and need further rows for the tokens that do not fit.
    """
    lengths = np.sort(np.asarray(lengths, dtype=np.int64))
    if not len(lengths):
        return 0
    sums = np.concatenate([[0], np.cumsum(lengths)])
    best = -(-int(sums[-1]) // seq_len)
    half = np.searchsorted(lengths, seq_len // 2, side="right")  # first conversation longer than half a row
    for k in np.unique(lengths[:half]):
        whole = np.searchsorted(lengths, seq_len - k, side="right")  # first that leaves no room for k tokens
        small = np.searchsorted(lengths, k, side="left")
        volume = int(sums[half] - sums[small])
        room = int((whole - half) * seq_len - (sums[whole] - sums[half]))
        best = max(best, int(len(lengths) - half) + max(0, -(-(volume - room) // seq_len)))
    return best
