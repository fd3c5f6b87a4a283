"""Batches from shards: every row starts with BOS, nothing is predicted twice in an epoch, any step is reached at once.

A row has sequence_len + 1 tokens: inputs are all but the last, targets all but the first. Documents are cut into pieces
of at most sequence_len tokens, each of which gets a BOS in front; pieces are packed into rows best-fit, longest first:
a row takes the longest piece left, then again and again the longest that still fits. What stays free at its end is
not scored. Only lengths decide how rows are made up, so an epoch is planned over a histogram of lengths and not piece
by piece; which piece of a length goes where, and the order of rows, is the seed's.
"""

import bisect
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gkachat.data.shards import Split

IGNORE = -1  # target of a position that is not scored

Batch = tuple[Tensor, Tensor]
"""inputs and targets, each (rows, sequence_len) int64."""


@dataclass(frozen=True)
class Plan:
    """Which pieces of which documents fill each row of an epoch: row r has pieces[row_start[r] : row_start[r + 1]]."""

    document: np.ndarray
    offset: np.ndarray  # of a piece within its document
    length: np.ndarray  # of a piece, BOS not counted
    pieces: np.ndarray
    row_start: np.ndarray

    @property
    def n_rows(self) -> int:
        return len(self.row_start) - 1


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
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self._epoch, self._plan = 0, self._make_plan(0)
        if self._plan.n_rows < batch_rows * world_size:
            raise ValueError(
                f"the split fills {self._plan.n_rows} rows of {sequence_len} tokens, a step takes "
                f"{batch_rows * world_size}: give more data, or a smaller train.total_batch_size"
            )
        # The number of rows depends on lengths alone, so that it is the same every epoch.
        self.steps_per_epoch = self._plan.n_rows // (batch_rows * world_size)

    def _make_plan(self, epoch: int) -> Plan:
        return make_plan(self.split.length, self.sequence_len, np.random.default_rng((self.seed, epoch)))

    def _seek(self, step: int) -> int:
        """Have the plan of the step's epoch at hand; the first row of the step, over all ranks."""
        epoch, step = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._plan = epoch, self._make_plan(epoch)
        return step * self.world_size * self.batch_rows

    def batch(self, step: int) -> Batch:
        """This rank's batch of any step, counted from the start of training."""
        first = self._seek(step) + self.rank * self.batch_rows
        return read_rows(self.split, self._plan, range(first, first + self.batch_rows), self.sequence_len, self.bos)

    def n_targets(self, step: int) -> int:
        """How many targets all ranks score in a step: known from the plan, no rank needs to ask another."""
        first, n_rows = self._seek(step), self.world_size * self.batch_rows
        start, end = self._plan.row_start[first], self._plan.row_start[first + n_rows]
        # Each piece is scored whole, and its BOS too unless it starts the row.
        return int(self._plan.length[self._plan.pieces[start:end]].sum() + (end - start) - n_rows)

    @property
    def loss_report(self) -> dict[str, float]:
        """Shares of an epoch: tokens never trained on (rows that fill no whole step), and positions not scored."""
        plan = self._plan
        used = self.steps_per_epoch * self.batch_rows * self.world_size
        in_rows = np.add.reduceat(plan.length[plan.pieces], plan.row_start[:-1])
        filled = in_rows + np.diff(plan.row_start)
        return {
            "tokens_lost": 1 - in_rows[:used].sum() / in_rows.sum(),
            "positions_unused": 1 - filled.sum() / (plan.n_rows * (self.sequence_len + 1)),
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
    plan = make_plan(split.length, sequence_len, None)
    # Rows come longest piece first: a fixed shuffle makes any first part a fair sample.
    order = np.random.default_rng(0).permutation(plan.n_rows)
    if tokens is not None:
        order = order[: -(-tokens // sequence_len)]
    for first in range(0, len(order), batch_rows):
        yield read_rows(split, plan, order[first : first + batch_rows], sequence_len, bos)


def read_rows(split: Split, plan: Plan, rows: range | np.ndarray, sequence_len: int, bos: int) -> Batch:
    """Gather rows of a plan from the shards."""
    tokens = np.full((len(rows), sequence_len + 1), IGNORE, dtype=np.int64)
    for into, row in zip(tokens, rows, strict=True):
        at = 0
        for piece in plan.pieces[plan.row_start[row] : plan.row_start[row + 1]]:
            document, length = plan.document[piece], plan.length[piece]
            start = split.start[document] + plan.offset[piece]
            into[at] = bos
            into[at + 1 : at + 1 + length] = split.shards[split.shard_of[document]][start : start + length]
            at += 1 + length
    tokens = torch.from_numpy(tokens)
    inputs, targets = tokens[:, :-1], tokens[:, 1:].contiguous()
    return inputs.clamp(min=0), targets
