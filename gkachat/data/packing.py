"""Packing of documents into rows: best fit, the longest piece first.

    plan = plan_rows("cut", lengths, sequence_len, np.random.default_rng(seed))
    plan.row_pieces(0)    # pieces of the first row; piece p is tokens offset[p] : offset[p] + length[p] of document[p]

Documents are cut into pieces of at most sequence_len tokens, and each piece gets a BOS in front. A row has room for
sequence_len + 1 tokens. It takes the longest piece left, and then, again and again, the longest piece that still fits.
Only lengths decide how rows are composed, so the work is done on a histogram of lengths instead of piece by piece. The
random generator decides which of the pieces of one length goes where, and the order of rows.
"""

import bisect
from dataclasses import dataclass

import numpy as np

CROP_BUFFER, CROP_REFILL = 1000, 128  # documents that crop_documents chooses from, and how many arrive at a time


@dataclass(frozen=True)
class PackingPlan:
    """Pieces of documents, and the row that each of them is in."""

    document: np.ndarray
    """(n_pieces,) document that a piece was cut from."""
    offset: np.ndarray
    """(n_pieces,) position of a piece within its document."""
    length: np.ndarray
    """(n_pieces,) tokens of a piece, its BOS not included."""
    pieces: np.ndarray
    """(n_pieces,) pieces in the order of rows."""
    row_start: np.ndarray
    """(n_rows + 1,) row r has pieces[row_start[r] : row_start[r + 1]]."""

    @property
    def n_rows(self) -> int:
        return len(self.row_start) - 1

    def row_pieces(self, row: int) -> np.ndarray:
        """Return the pieces of a row, in order."""
        return self.pieces[self.row_start[row] : self.row_start[row + 1]]

    def row_tokens(self, row: int) -> int:
        """Return the number of tokens in a row, each piece's BOS included."""
        pieces = self.row_pieces(row)
        return int(self.length[pieces].sum()) + len(pieces)


def plan_rows(packing: str, lengths: np.ndarray, sequence_len: int, rng: np.random.Generator | None) -> PackingPlan:
    """Plan the rows of documents with these lengths.

    Args:
        packing: "cut" (`cut_and_pack`) or "crop" (`crop_documents`, nanochat's).
        rng: order of rows for "cut"; None keeps the documents' order, as "crop" always does.
    """
    return crop_documents(lengths, sequence_len) if packing == "crop" else cut_and_pack(lengths, sequence_len, rng)


def cut_and_pack(lengths: np.ndarray, sequence_len: int, rng: np.random.Generator | None) -> PackingPlan:
    """Plan the rows of documents with these lengths. Without `rng`, pieces stay in the documents' order."""
    document, offset, length = cut_documents(lengths, sequence_len)
    order = np.arange(len(length)) if rng is None else rng.permutation(len(length))
    keys = length.astype(np.min_scalar_type(sequence_len))  # numpy sorts 16-bit keys by radix, several times faster
    by_length = order[np.argsort(keys[order], kind="stable")]
    next_of_length = np.searchsorted(length[by_length], np.arange(sequence_len + 2))  # first unused piece of a length
    pieces, pieces_per_row = [], []
    for sizes, n_rows in pack_sizes(np.bincount(length + 1), sequence_len + 1):
        block = np.empty((n_rows, len(sizes)), dtype=np.int64)
        for column, size in enumerate(sizes):
            start = next_of_length[size - 1]
            block[:, column] = by_length[start : start + n_rows]
            next_of_length[size - 1] += n_rows
        pieces.append(block.ravel())
        pieces_per_row.append(np.full(n_rows, len(sizes)))
    pieces, pieces_per_row = np.concatenate(pieces), np.concatenate(pieces_per_row)
    row_start = np.concatenate(([0], np.cumsum(pieces_per_row)))
    if rng is not None:
        rows = rng.permutation(len(pieces_per_row))
        old_start, pieces_per_row = np.repeat(row_start[rows], pieces_per_row[rows]), pieces_per_row[rows]
        row_start = np.concatenate(([0], np.cumsum(pieces_per_row)))
        pieces = pieces[old_start + np.arange(len(pieces)) - np.repeat(row_start[:-1], pieces_per_row)]
    return PackingPlan(document, offset, length, pieces, row_start)


def crop_documents(lengths: np.ndarray, sequence_len: int) -> PackingPlan:
    """Plan rows as nanochat does: what does not fit a row is thrown away. Every row is full, none starts mid-document.

    Documents pass in their order through a buffer of about a thousand. A row takes the longest one that fits, again and
    again, and then the beginning of the shortest. The last documents, which fill no row, are left out.
    Source: nanochat's dataloader.py at 92d63d4.
    """
    sizes, arrived = lengths + 1, 0  # with their BOS
    waiting, document, length, row_start = np.empty(0, dtype=np.int64), [], [], [0]
    while True:
        room = sequence_len + 1
        while room:
            while len(waiting) < CROP_BUFFER and arrived < len(sizes):
                waiting = np.append(waiting, np.arange(arrived, min(arrived + CROP_REFILL, len(sizes))))
                arrived += CROP_REFILL
            if not len(waiting):
                last = row_start[-1]
                pieces = np.arange(last)
                return PackingPlan(
                    np.array(document[:last], dtype=np.int64), np.zeros(last, dtype=np.int64),
                    np.array(length[:last], dtype=np.int64), pieces, np.array(row_start),
                )  # fmt: skip
            left = sizes[waiting]
            fits = left <= room
            at = int(np.where(fits, left, 0).argmax() if fits.any() else left.argmin())
            size = min(int(left[at]), room)
            document.append(int(waiting[at]))
            length.append(size - 1)
            waiting = np.delete(waiting, at)
            room -= size
        row_start.append(len(document))


def count_rows(lengths: np.ndarray, sequence_len: int, packing: str = "cut") -> int:
    """Return the number of rows of every plan for documents with these lengths."""
    if packing == "crop":
        return crop_documents(lengths, sequence_len).n_rows
    _, _, length = cut_documents(lengths, sequence_len)
    return sum(n_rows for _, n_rows in pack_sizes(np.bincount(length + 1), sequence_len + 1))


def cut_documents(lengths: np.ndarray, longest: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cut documents into pieces of at most `longest` tokens. Return (document, offset, length) of the pieces."""
    per_document = -(-lengths // longest)
    document = np.repeat(np.arange(len(lengths)), per_document)
    first = np.cumsum(per_document) - per_document
    offset = (np.arange(len(document)) - first[document]) * longest
    return document, offset, np.minimum(lengths[document] - offset, longest)


def pack_sizes(counts: np.ndarray, capacity: int) -> list[tuple[list[int], int]]:
    """Pack counts[n] items of each size n into rows, best fit. Return (sizes in a row, number of such rows) pairs."""
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
        n_rows = min(left[size] // number for size, number in used.items())
        patterns.append((row, n_rows))
        for size, number in used.items():
            left[size] -= number * n_rows
            if not left[size]:
                sizes.remove(size)
    return patterns
