"""Synthetic texts that ask what a token can find in its past: induction, associative recall, copying, and a needle.

    idx, targets = TASKS["recall"](rows=32, length=64, pairs=8, generator=generator)
    accuracy = (model(idx).argmax(-1) == targets)[targets != -1].float().mean()

Every task returns token ids and targets, each (rows, length). A token's target is the next one, as in language models,
and -1 where nothing is asked. Ids 0 to 3 are signs of the tasks, keys and values are ids of two halves of the rest, and
every text is drawn anew, so that nothing can be learned by heart.
Axes: B rows, T time, P pairs.
"""

from collections.abc import Callable

import torch
from torch import Generator, Tensor

VOCAB_SIZE = 128
NOISE, ASK, MARK, DISTRACTOR = range(4)  # a token without meaning; a question comes; signs in front of a pair
FIRST_KEY, FIRST_VALUE = 4, 66  # 62 keys, 62 values
N_WORDS = VOCAB_SIZE - FIRST_VALUE

Batch = tuple[Tensor, Tensor]


def _distinct(rows: int, n: int, generator: Generator) -> Tensor:
    """Return n different numbers below N_WORDS for each row, (B, n)."""
    return torch.rand(rows, N_WORDS, generator=generator).argsort(dim=-1)[:, :n]


def _values(rows: int, n: int, generator: Generator) -> Tensor:
    """Return ids of values, (B, n)."""
    return FIRST_VALUE + torch.randint(N_WORDS, (rows, n), generator=generator)


def _next_tokens(idx_BT: Tensor, asked_BT: Tensor) -> Batch:
    """Return ids and targets, where `asked_BT` is true at tokens whose successor is asked for."""
    targets = torch.full_like(idx_BT, -1)
    targets[:, :-1] = idx_BT[:, 1:].masked_fill(~asked_BT[:, :-1], -1)
    return idx_BT, targets


def induction(rows: int, length: int, pairs: int, generator: Generator) -> Batch:
    """Draw random texts that are said twice; every token of the second time is asked for. `pairs` has no effect."""
    half = length // 2
    first = FIRST_KEY + torch.randint(VOCAB_SIZE - FIRST_KEY, (rows, half), generator=generator)
    idx = torch.full((rows, length), NOISE)
    idx[:, : 2 * half] = first.repeat(1, 2)
    asked = torch.zeros_like(idx, dtype=torch.bool)
    asked[:, half : 2 * half - 1] = True
    return _next_tokens(idx, asked)


def recall(rows: int, length: int, pairs: int, generator: Generator) -> Batch:
    """Draw multi-query associative recall (MQAR, Zoology, arXiv 2312.04927).

    Pairs of a key and its value come first. Then each key comes once more, at a random place among noise, and its value
    is asked for.
    """
    keys, values = FIRST_KEY + _distinct(rows, pairs, generator), _values(rows, pairs, generator)
    idx = torch.full((rows, length), NOISE)
    idx[:, 0 : 2 * pairs : 2], idx[:, 1 : 2 * pairs : 2] = keys, values
    n_places = (length - 2 * pairs) // 2  # of two tokens each
    order = torch.rand(rows, n_places, generator=generator).argsort(dim=-1)[:, :pairs]
    at, asked = 2 * pairs + 2 * order, torch.zeros_like(idx, dtype=torch.bool)
    idx.scatter_(1, at, keys).scatter_(1, at + 1, values)
    return _next_tokens(idx, asked.scatter_(1, at, True))


def copying(rows: int, length: int, pairs: int, generator: Generator) -> Batch:
    """Draw selective copying (Mamba, arXiv 2312.00752, section 4.1.1).

    `pairs` values lie among noise. After a sign they are asked for in their order, without the noise.
    """
    values = _values(rows, pairs, generator)
    idx = torch.full((rows, length), NOISE)
    start = length - pairs - 1
    at = torch.rand(rows, start, generator=generator).argsort(dim=-1)[:, :pairs].sort(dim=-1).values
    idx.scatter_(1, at, values)
    idx[:, start], idx[:, start + 1 :] = ASK, values
    asked = torch.zeros_like(idx, dtype=torch.bool)
    asked[:, start:-1] = True
    return _next_tokens(idx, asked)


def needle(rows: int, length: int, pairs: int, generator: Generator) -> Batch:
    """Draw a needle among distractors: a key and its value behind a sign, the same and other keys behind another.

    Each of `pairs` places among noise has a sign, a key and a value. One sign is MARK. Half of the others have its key.
    At the end comes that key, and its value is asked for.
    """
    keys, values = FIRST_KEY + _distinct(rows, pairs, generator), _values(rows, pairs, generator)
    marked = torch.randint(pairs, (rows, 1), generator=generator)
    key = keys.gather(1, marked)
    keys = torch.where(torch.rand(rows, pairs, generator=generator) < 0.5, key, keys).scatter(1, marked, key)
    signs = torch.full_like(keys, DISTRACTOR).scatter_(1, marked, MARK)
    idx = torch.full((rows, length), NOISE)
    order = torch.rand(rows, (length - 3) // 3, generator=generator).argsort(dim=-1)[:, :pairs]
    for n, part in enumerate((signs, keys, values)):
        idx.scatter_(1, 3 * order + n, part)
    idx[:, -3], idx[:, -2:-1], idx[:, -1:] = ASK, key, values.gather(1, marked)
    asked = torch.zeros_like(idx, dtype=torch.bool)
    asked[:, -2] = True
    return _next_tokens(idx, asked)


TASKS: dict[str, Callable[..., Batch]] = {
    "induction": induction,
    "recall": recall,
    "copying": copying,
    "needle": needle,
}
"""Draws of each task by its name: (rows, length, pairs, generator) to ids and targets."""


def check_shape(task: str, length: int, pairs: int) -> None:
    """Raise ValueError for a length that has no room for so many pairs."""
    least = {"induction": 4, "recall": 4 * pairs, "copying": 2 * pairs + 1, "needle": 3 * pairs + 3}[task]
    if length < least:
        raise ValueError(f"length: given {length}, expected at least {least} for {task} with {pairs} pairs")
    if not 1 <= pairs <= N_WORDS:
        raise ValueError(f"pairs: given {pairs}, expected 1 to {N_WORDS}")
