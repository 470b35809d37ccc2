"""Turn the rows of a step into the tensors of a rank's micro-batches, and do that ahead of the steps that need them."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from fastft.data.dataset import TokenizedData
from fastft.data.step_plan import Step


@dataclass
class Batch:
    """A micro-batch: R packed rows laid end to end, N = R x seq_len tokens, n of which predict a trained token."""

    input_ids: Tensor  # [1, N] int64
    position_ids: Tensor  # [1, N] int64, counted from 0 in every conversation
    cu_seqlens: Tensor  # [R x (max_per_row + 1) + 1] int32: where each document begins; N, repeated, fills the rest
    max_seqlen: int  # seq_len, however long the longest conversation is: a constant, so that nothing is compiled again
    loss_index: Tensor  # [n] int64: positions whose next token is trained
    targets: Tensor  # [n] int64: those next tokens

    def pinned(self) -> "Batch":
        """Return the same batch in page-locked memory, from which a GPU copies while the host does other work."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "max_seqlen"}
        return replace(self, **{name: tensor.pin_memory() for name, tensor in tensors.items()})

    def to(self, device: torch.device) -> dict[str, Tensor | int]:
        """Return the arguments of TrainedModel.forward, on `device`."""
        move = lambda t: t.to(device, non_blocking=True)  # noqa: E731
        return {
            "input_ids": move(self.input_ids),
            "position_ids": move(self.position_ids),
            "cu_seqlens": move(self.cu_seqlens),
            "max_seqlen": self.max_seqlen,
            "loss_index": move(self.loss_index),
            "targets": move(self.targets),
        }


def build_batch(
    data: TokenizedData, rows: Sequence[np.ndarray], row_count: int, seq_len: int, max_per_row: int
) -> Batch:
    """Lay `rows` end to end, with empty ones added up to `row_count`. Padding is a separate document and never trained.

    `max_per_row` is the most conversations that any row of the run holds. It gives `cu_seqlens` the same size in every
    batch of the run, so that nothing is compiled again.
    """
    total = row_count * seq_len
    input_ids, position_ids = np.zeros(total, np.int64), np.zeros(total, np.int64)
    edges, loss_index, targets = [0], [], []
    for r in range(row_count):
        at = r * seq_len
        for conversation in rows[r] if r < len(rows) else ():
            ids, trained = data.ids[conversation], data.trained[conversation]
            length = len(ids)
            input_ids[at : at + length], position_ids[at : at + length] = ids, np.arange(length)
            predicts = np.flatnonzero(trained[1:])
            loss_index.append(at + predicts)
            targets.append(ids[1:][predicts])
            at += length
            edges.append(at)
        if at < (r + 1) * seq_len:
            padding = (r + 1) * seq_len - at
            position_ids[at : at + padding] = np.arange(padding)
            edges.append((r + 1) * seq_len)
    size = row_count * (max_per_row + 1) + 1
    edges += [total] * (size - len(edges))
    return Batch(
        input_ids=torch.from_numpy(input_ids)[None],
        position_ids=torch.from_numpy(position_ids)[None],
        cu_seqlens=torch.tensor(edges, dtype=torch.int32),
        max_seqlen=seq_len,
        loss_index=torch.from_numpy(np.concatenate(loss_index) if loss_index else np.zeros(0, np.int64)),
        targets=torch.from_numpy(np.concatenate(targets).astype(np.int64) if targets else np.zeros(0, np.int64)),
    )


def rank_batches(step: Step, rank: int, world: int, micro: int, seq_len: int, max_per_row: int) -> Iterator[Batch]:
    """Yield a rank's micro-batches of `micro` rows each.

    A rank takes the step's rows rank, rank + world, …; all ranks have equally many.
    """
    mine = step.rows[rank::world]
    count = -(-len(step.rows) // (world * micro))
    for i in range(count):
        yield build_batch(step.data, mine[i * micro : (i + 1) * micro], micro, seq_len, max_per_row)


def ahead(steps: Iterator[Step], batches: Callable[[Step], list[Batch]]) -> Iterator[tuple[Step, list[Batch]]]:
    """Yield each step with its batches, which a thread builds while the two steps before it run.

    Building takes a few milliseconds a row, which one short step might not cover; two do.
    """
    with ThreadPoolExecutor(1) as worker:
        waiting = deque((step, worker.submit(batches, step)) for step in islice(steps, 2))
        while waiting:
            step, built = waiting.popleft()
            found = built.result()
            waiting.extend((later, worker.submit(batches, later)) for later in islice(steps, 1))
            yield step, found
