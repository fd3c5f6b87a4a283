"""Batches from shards.

    loader = Loader(split, sequence_len=2048, rows_per_step=32, bos=tokenizer.bos, seed=42)
    inputs, targets = loader.batch(step)    # each (rows, sequence_len)

A row has sequence_len + 1 tokens: inputs are all but the last, targets all but the first. Every row starts with BOS, no
token is a target twice in an epoch, and the free end of a row has no targets. An epoch takes the shards in order and
packs each by itself (packing.py), so that later shards may still be being written.
"""

import bisect
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from gkachat.data.packing import PackingPlan, count_rows, plan_rows
from gkachat.data.shards import Documents, Split
from gkachat.model.loss import IGNORE

Batch = tuple[Tensor, Tensor]
"""Inputs and targets, each (rows, sequence_len) int64."""

Row = tuple[Documents, PackingPlan, int]
"""One row of the plan for a shard's documents."""


class Loader:
    """Batches of one split, as a pure function of (seed, step, rank, world size)."""

    def __init__(
        self,
        split: Split,
        *,
        sequence_len: int,
        rows_per_step: int,
        bos: int,
        packing: str = "cut",
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ):
        """The ranks share the rows of a step: where they do not divide evenly, some ranks have one row more.

        `packing` is that of `plan_rows`. Raises ValueError if the split is too small.
        """
        self.packing = packing
        self.split, self.sequence_len, self.rows_per_step, self.bos = split, sequence_len, rows_per_step, bos
        self.seed, self.first_row, end = seed, *(rows_per_step * r // world_size for r in (rank, rank + 1))
        self.batch_rows = end - self.first_row
        self._row_ends: list[int] = []  # number of rows up to the end of each shard that was read so far
        self._plan = lru_cache(2)(self._plan_shard)  # a step may begin in one shard and end in the next
        if not self._has_rows(self.rows_per_step):
            raise ValueError(
                f"the split fills {self._n_rows} rows of {sequence_len} tokens, a step takes "
                f"{self.rows_per_step}: give more data, or a smaller train.total_batch_size"
            )

    def batch(self, step: int) -> Batch:
        """Return this rank's batch of a step, counted from the start of training."""
        rows = list(self._rows(step, self.first_row, self.batch_rows))
        return gather_rows(rows, self.sequence_len, self.bos)

    def n_targets(self, step: int) -> int:
        """Return the number of targets of a step over all ranks. It follows from the plan, without communication."""
        return sum(count_targets(*row) for row in self._rows(step, 0, self.rows_per_step))

    @property
    def steps_per_epoch(self) -> int:
        """Number of whole steps in an epoch. Reads all shards, and so waits for those that are not written yet."""
        while self._has_rows(self._n_rows + 1):
            pass
        return self._n_rows // self.rows_per_step

    @property
    def knows_epoch(self) -> bool:
        """Whether all shards were read, so that `steps_per_epoch` returns at once."""
        return len(self._row_ends) == self.split.n_shards

    def packing_waste(self) -> dict[str, float]:
        """Return what packing wastes in the first epoch, as shares of the shards read so far.

        tokens_dropped: tokens in rows at the epoch's end that fill no whole step. positions_empty: free ends of rows.
        """
        plans = [self._plan(0, shard)[1] for shard in range(len(self._row_ends))]
        n_tokens, n_pieces = sum(int(plan.length.sum()) for plan in plans), sum(len(plan.length) for plan in plans)
        dropped = 0
        if self.knows_epoch:
            rows = [(plan, row) for plan in plans for row in range(plan.n_rows)]
            last = rows[self._n_rows - self._n_rows % self.rows_per_step :]
            dropped = sum(int(plan.length[plan.row_pieces(row)].sum()) for plan, row in last)
        n_positions = self._n_rows * (self.sequence_len + 1)
        return {"tokens_dropped": dropped / n_tokens, "positions_empty": 1 - (n_tokens + n_pieces) / n_positions}

    @property
    def _n_rows(self) -> int:
        """Number of rows in the shards read so far."""
        return self._row_ends[-1] if self._row_ends else 0

    def _has_rows(self, number: int) -> bool:
        """Return whether an epoch has `number` rows. Only as many shards are read as the answer needs."""
        while self._n_rows < number:
            documents = self.split.shard(len(self._row_ends))
            if documents is None:
                return False
            self._row_ends.append(self._n_rows + count_rows(documents.length, self.sequence_len, self.packing))
        return True

    def _plan_shard(self, epoch: int, shard: int) -> tuple[Documents, PackingPlan]:
        documents = self.split.shard(shard)
        rng = np.random.default_rng((self.seed, epoch, shard))
        return documents, plan_rows(self.packing, documents.length, self.sequence_len, rng)

    def _rows(self, step: int, first: int, number: int) -> Iterator[Row]:
        """Yield `number` rows of a step, from its row `first` on."""
        epoch = 0
        if not self._has_rows((step + 1) * self.rows_per_step):
            epoch, step = divmod(step, self.steps_per_epoch)
        first += step * self.rows_per_step
        for row in range(first, first + number):
            shard = bisect.bisect_right(self._row_ends, row)
            yield *self._plan(epoch, shard), row - (self._row_ends[shard - 1] if shard else 0)


class Prefetcher:
    """Reads a loader's next batch in a thread while the present one is trained on."""

    def __init__(self, loader: Loader, pinned: bool):
        """With `pinned`, batches are in page-locked memory, from which a GPU copies without a wait."""
        self.loader, self.pinned = loader, pinned
        self.pool = ThreadPoolExecutor(1)  # a single thread, because the loader's plans are not locked
        self.next_step, self.next_batch = -1, Future()

    def get(self, step: int) -> tuple[Batch, int]:
        """Return this rank's batch of a step, and the step's number of targets over all ranks."""
        batch = self.next_batch if step == self.next_step else self.pool.submit(self._read, step)
        self.next_step, self.next_batch = step + 1, self.pool.submit(self._read, step + 1)
        return batch.result()

    def _read(self, step: int) -> tuple[Batch, int]:
        batch, n_targets = self.loader.batch(step), self.loader.n_targets(step)
        return tuple(t.pin_memory() for t in batch) if self.pinned else batch, n_targets


def val_batches(
    split: Iterable[Documents],
    *,
    sequence_len: int,
    batch_rows: int,
    bos: int,
    packing: str = "cut",
    tokens: int | None = None,
) -> Iterator[Batch]:
    """Yield all shards of a split once, in a fixed order. `tokens` limits it to the rows that hold that many tokens."""

    def all_rows() -> Iterator[Row]:
        for index, documents in enumerate(split):
            plan = plan_rows(packing, documents.length, sequence_len, None)
            rows = np.arange(plan.n_rows)
            if packing == "cut":  # rows have the longest pieces first: a fixed shuffle makes the first a fair sample
                rows = np.random.default_rng((0, index)).permutation(rows)
            for row in rows:
                yield documents, plan, row

    rows = all_rows() if tokens is None else islice(all_rows(), -(-tokens // sequence_len))
    while batch := list(islice(rows, batch_rows)):
        yield gather_rows(batch, sequence_len, bos)


def gather_rows(rows: Sequence[Row], sequence_len: int, bos: int) -> Batch:
    """Return inputs and targets of rows, with the tokens read from their shards."""
    tokens = np.zeros((len(rows), sequence_len + 1), dtype=np.int64)
    targets = np.full(tokens.shape, IGNORE, dtype=np.int64)
    for number, (documents, plan, row) in enumerate(rows):
        at = 0
        for piece in plan.row_pieces(row):
            length = plan.length[piece]
            start = documents.start[plan.document[piece]] + plan.offset[piece]
            piece_tokens = documents.tokens[start : start + length]
            begin, end = at + 1, at + 1 + length
            tokens[number, at], tokens[number, begin:end] = bos, piece_tokens
            if documents.loss_mask is None:
                targets[number, at:end] = tokens[number, at:end]
            else:
                is_learned = documents.loss_mask[start : start + length]
                targets[number, begin:end][is_learned] = piece_tokens[is_learned]
            at = end
    return tuple(torch.from_numpy(np.ascontiguousarray(part)) for part in (tokens[:, :-1], targets[:, 1:]))


def count_targets(documents: Documents, plan: PackingPlan, row: int) -> int:
    """Return the number of targets in a row: the tokens of its loss mask, or all but its first BOS."""
    if documents.loss_mask is not None:  # such documents fit a row, so that each is one piece
        return int(documents.n_targets[plan.document[plan.row_pieces(row)]].sum())
    return plan.row_tokens(row) - 1
