"""Batches from shards: every row starts with BOS, nothing is predicted twice in an epoch, any step is reached at once.

A row has sequence_len + 1 tokens: inputs are all but the last, targets all but the first. Documents are cut into pieces
of at most sequence_len tokens, each of which gets a BOS in front; pieces are packed into rows best-fit, longest first:
a row takes the longest piece left, then again and again the longest that still fits. What stays free at its end is
not scored. Only lengths decide how rows are made up, so they are planned over a histogram of lengths and not piece by
piece; which piece of a length goes where, and the order of rows, is the seed's. An epoch takes the shards in order,
each planned by itself: nothing depends on shards that come later, and these may still be in the making.
"""

import bisect
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from gkachat.data.shards import Documents, Split

IGNORE = -1  # target of a position that is not scored

Batch = tuple[Tensor, Tensor]
"""inputs and targets, each (rows, sequence_len) int64."""

Row = tuple[Documents, "Plan", int]
"""A row of the plan of a shard's documents."""


@dataclass(frozen=True)
class Plan:
    """Which pieces of which documents fill each row: row r has pieces[row_start[r] : row_start[r + 1]]."""

    document: np.ndarray
    offset: np.ndarray  # of a piece within its document
    length: np.ndarray  # of a piece, BOS not counted
    pieces: np.ndarray
    row_start: np.ndarray

    @property
    def n_rows(self) -> int:
        return len(self.row_start) - 1

    def in_row(self, row: int) -> np.ndarray:
        """Its pieces."""
        return self.pieces[self.row_start[row] : self.row_start[row + 1]]

    def filled(self, row: int) -> int:
        """How many of its tokens there are, each piece's BOS included."""
        pieces = self.in_row(row)
        return int(self.length[pieces].sum()) + len(pieces)


def cut(lengths: np.ndarray, longest: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pieces of at most `longest` tokens: (document, offset, length) of each, in order."""
    per_document = -(-lengths // longest)
    document = np.repeat(np.arange(len(lengths)), per_document)
    first = np.cumsum(per_document) - per_document
    offset = (np.arange(len(document)) - first[document]) * longest
    return document, offset, np.minimum(lengths[document] - offset, longest)


def pack_histogram(counts: np.ndarray, capacity: int) -> list[tuple[list[int], int]]:
    """Best-fit packing of `counts[n]` items of each size n: a list of (sizes in a row, how many such rows)."""
    left = {int(size): int(count) for size, count in enumerate(counts) if count and size}
    sizes = sorted(left)
    patterns = []
    while sizes:
        room, row, used = capacity, [], {}
        while room:
            at = bisect.bisect_right(sizes, room) - 1
            while at >= 0 and used.get(sizes[at], 0) >= left[sizes[at]]:
                at -= 1
            if at < 0:
                break
            size = sizes[at]
            row.append(size)
            used[size] = used.get(size, 0) + 1
            room -= size
        times = min(left[size] // number for size, number in used.items())
        patterns.append((row, times))
        for size, number in used.items():
            left[size] -= number * times
            if not left[size]:
                sizes.remove(size)
    return patterns


def count_rows(lengths: np.ndarray, sequence_len: int) -> int:
    """Of any plan for documents of these lengths."""
    _, _, length = cut(lengths, sequence_len)
    return sum(times for _, times in pack_histogram(np.bincount(length + 1), sequence_len + 1))


def make_plan(lengths: np.ndarray, sequence_len: int, rng: np.random.Generator | None) -> Plan:
    """Pack documents of the given lengths into rows; without `rng` in the documents' own order."""
    document, offset, length = cut(lengths, sequence_len)
    order = np.arange(len(length)) if rng is None else rng.permutation(len(length))
    keys = length.astype(np.min_scalar_type(sequence_len))  # numpy sorts 16-bit keys by radix, several times faster
    by_length = order[np.argsort(keys[order], kind="stable")]
    # A piece takes its length and a BOS; only the BOS of a row's first piece lies outside the sequence_len targets.
    patterns = pack_histogram(np.bincount(length + 1), sequence_len + 1)
    following = np.searchsorted(length[by_length], np.arange(sequence_len + 2))  # next unused piece of each length
    pieces, pieces_in_row = [], []
    for row, times in patterns:
        block = np.empty((times, len(row)), dtype=np.int64)
        for column, size in enumerate(row):
            start = following[size - 1]
            block[:, column] = by_length[start : start + times]
            following[size - 1] += times
        pieces.append(block.ravel())
        pieces_in_row.append(np.full(times, len(row)))
    pieces, pieces_in_row = np.concatenate(pieces), np.concatenate(pieces_in_row)
    row_start = np.concatenate(([0], np.cumsum(pieces_in_row)))
    if rng is not None:
        rows = rng.permutation(len(pieces_in_row))
        source = np.repeat(row_start[rows], pieces_in_row[rows])
        row_start = np.concatenate(([0], np.cumsum(pieces_in_row[rows])))
        pieces = pieces[source + np.arange(len(pieces)) - np.repeat(row_start[:-1], pieces_in_row[rows])]
    return Plan(document, offset, length, pieces, row_start)


class Loader:
    """Batches of one split as a pure function of (seed, epoch, step, rank, world size)."""

    def __init__(
        self,
        split: Split,
        *,
        sequence_len: int,
        batch_rows: int,
        bos: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ):
        """`batch_rows` is what one rank gets a step. Raises ValueError when the split does not fill a single step."""
        self.split, self.sequence_len, self.batch_rows, self.bos = split, sequence_len, batch_rows, bos
        self.seed, self.rank, self.rows_a_step = seed, rank, batch_rows * world_size
        self._ends: list[int] = []  # of the shards looked at so far: their last row, counted from the epoch's start
        self._plan = lru_cache(2)(self._make_plan)  # a step may begin in one shard and end in the next
        if not self._has_rows(self.rows_a_step):
            raise ValueError(
                f"the split fills {self._n_rows} rows of {sequence_len} tokens, a step takes "
                f"{self.rows_a_step}: give more data, or a smaller train.total_batch_size"
            )

    @property
    def _n_rows(self) -> int:
        return self._ends[-1] if self._ends else 0

    def _has_rows(self, number: int) -> bool:
        """Whether an epoch has that many; looks at no more shards than it takes to say so."""
        while self._n_rows < number:
            documents = self.split.shard(len(self._ends))
            if documents is None:
                return False
            # The number of rows depends on lengths alone, so that it is the same every epoch.
            self._ends.append(self._n_rows + count_rows(documents.length, self.sequence_len))
        return True

    @property
    def steps_per_epoch(self) -> int:
        """Looks at all shards, and so waits for those that are still being made."""
        while self._has_rows(self._n_rows + 1):
            pass
        return self._n_rows // self.rows_a_step

    @property
    def knows_epoch(self) -> bool:
        """Whether all shards have been looked at."""
        return len(self._ends) == self.split.n_shards

    def _make_plan(self, epoch: int, shard: int) -> tuple[Documents, Plan]:
        documents = self.split.shard(shard)
        return documents, make_plan(
            documents.length, self.sequence_len, np.random.default_rng((self.seed, epoch, shard))
        )

    def _rows(self, step: int, first: int, number: int) -> Iterator[Row]:
        """`number` rows of a step, beginning at its row `first`."""
        epoch = 0
        if not self._has_rows((step + 1) * self.rows_a_step):
            epoch, step = divmod(step, self.steps_per_epoch)
        first += step * self.rows_a_step
        for row in range(first, first + number):
            shard = bisect.bisect_right(self._ends, row)
            yield *self._plan(epoch, shard), row - (self._ends[shard - 1] if shard else 0)

    def batch(self, step: int) -> Batch:
        """This rank's batch of any step, counted from the start of training."""
        return read_rows(self._rows(step, self.rank * self.batch_rows, self.batch_rows), self.sequence_len, self.bos)

    def n_targets(self, step: int) -> int:
        """How many targets all ranks score in a step: known from the plan, no rank needs to ask another."""
        return sum(count_targets(*row) for row in self._rows(step, 0, self.rows_a_step))

    @property
    def loss_report(self) -> dict[str, float]:
        """Shares of the shards looked at so far: tokens that the first epoch leaves out (rows at its end that fill no
        whole step), and positions not scored."""
        shards = [self._plan(0, shard) for shard in range(len(self._ends))]
        filled = sum(int(plan.length.sum()) + len(plan.length) for _, plan in shards)
        tokens, lost = sum(int(plan.length.sum()) for _, plan in shards), 0
        if self.knows_epoch:
            left = self._n_rows % self.rows_a_step
            rows = [(plan, row) for _, plan in reversed(shards) for row in reversed(range(plan.n_rows))]
            lost = sum(int(plan.length[plan.in_row(row)].sum()) for plan, row in rows[:left])
        return {
            "tokens_lost": lost / tokens,
            "positions_unused": 1 - filled / (self._n_rows * (self.sequence_len + 1)),
        }


class Prefetcher:
    """The loader's batches, the next one made while the present one is trained on."""

    def __init__(self, loader: Loader, pinned: bool):
        """`pinned`: in page-locked memory, from which copies to a GPU need no wait."""
        self.loader, self.pinned = loader, pinned
        self.pool, self.made = ThreadPoolExecutor(1), (-1, None)

    def _make(self, step: int) -> tuple[Batch, int]:
        batch, n_targets = self.loader.batch(step), self.loader.n_targets(step)
        return tuple(t.pin_memory() for t in batch) if self.pinned else batch, n_targets

    def get(self, step: int) -> tuple[Batch, int]:
        """This rank's batch of a step, and how many targets all ranks score in it; after the step before, at once."""
        at, future = self.made
        if at != step:
            future = self.pool.submit(self._make, step)  # never here: the loader has one plan, and one thread at it
        self.made = step + 1, self.pool.submit(self._make, step + 1)
        return future.result()


def val_batches(
    split: Split, *, sequence_len: int, batch_rows: int, bos: int, tokens: int | None = None
) -> Iterator[Batch]:
    """The whole split once, in a fixed order; with `tokens`, only so many rows as hold that many."""

    def rows() -> Iterator[Row]:
        for index, documents in enumerate(split):
            plan = make_plan(documents.length, sequence_len, None)
            # Rows come longest piece first: a fixed shuffle makes any first part a fair sample.
            for row in np.random.default_rng((0, index)).permutation(plan.n_rows):
                yield documents, plan, row

    chosen = rows() if tokens is None else islice(rows(), -(-tokens // sequence_len))
    while batch := list(islice(chosen, batch_rows)):
        yield read_rows(batch, sequence_len, bos)


def count_targets(documents: Documents, plan: Plan, row: int) -> int:
    """How many tokens of a row are scored."""
    if documents.scored is not None:
        return int(documents.n_scored[plan.document[plan.in_row(row)]].sum())
    return plan.filled(row) - 1  # each piece whole, and its BOS too unless it starts the row


def read_rows(rows: Iterable[Row], sequence_len: int, bos: int) -> Batch:
    """Gather rows from their shards."""
    read, scored = [], {}
    for number, (documents, plan, row) in enumerate(rows):
        read.append(into := np.full(sequence_len + 1, IGNORE, dtype=np.int64))
        if documents.scored is not None:
            scored[number] = np.zeros(sequence_len + 1, dtype=bool)
        at = 0
        for piece in plan.in_row(row):
            length = plan.length[piece]
            start = documents.start[plan.document[piece]] + plan.offset[piece]
            into[at] = bos
            into[at + 1 : at + 1 + length] = documents.tokens[start : start + length]
            if documents.scored is not None:
                scored[number][at + 1 : at + 1 + length] = documents.scored[start : start + length]
            at += 1 + length
    tokens = torch.from_numpy(np.stack(read))
    inputs, targets = tokens[:, :-1].clamp(min=0), tokens[:, 1:].contiguous()  # of one row, targets are a view
    for number, of_row in scored.items():
        targets[number].masked_fill_(torch.from_numpy(~of_row[1:]), IGNORE)
    return inputs, targets
