"""Bits per byte: a loss that does not depend on the tokenizer, and the unigram model it has to beat."""

import math
from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gkachat.data.shards import Split

LOGITS_AT_A_TIME = 2**28  # numbers: a GiB in float32


@torch.no_grad()
def evaluate_bpb(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], token_bytes: Tensor | np.ndarray) -> float:
    """Nats over the targets that have bytes, divided by ln 2 and by their bytes.

    Args:
        model: idx (B, T) -> logits (B, T, V).
        batches: (idx, targets) pairs, each (B, T); a target of -1 is not scored.
        token_bytes: (V,) bytes of text behind each id; 0 (special tokens): not scored.

    Raises ValueError when no target has bytes.
    """
    nats, n_bytes = bpb_sums(model, batches, token_bytes)
    if n_bytes == 0:
        raise ValueError("bits per byte of nothing: no target stands for any bytes")
    return nats / (math.log(2) * n_bytes)


@torch.no_grad()
def bpb_sums(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], token_bytes: Tensor | np.ndarray
) -> tuple[float, int]:
    """Nats and bytes, for adding up over processes."""
    parameter = next(model.parameters(), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    token_bytes = torch.as_tensor(token_bytes, device=device, dtype=torch.int64)
    nats = torch.zeros((), dtype=torch.float64, device=device)
    n_bytes = torch.zeros((), dtype=torch.int64, device=device)
    was_training = model.training
    model.eval()
    most = LOGITS_AT_A_TIME // len(token_bytes)  # positions
    try:
        for whole in batches:
            pending = [tuple(t.to(device) for t in whole)]
            while pending:
                idx, targets = pending.pop()
                if len(idx) > 1 and idx.numel() > most:
                    pending += reversed(list(zip(idx.chunk(2), targets.chunk(2), strict=True)))
                    continue
                try:
                    logits = model(idx).flatten(0, 1)
                    losses = F.cross_entropy(logits, targets.flatten(), ignore_index=-1, reduction="none")
                except torch.OutOfMemoryError:
                    if len(idx) == 1:
                        raise
                    most = idx.numel() - 1  # from now on in halves
                    pending.append((idx, targets))
                    continue
                target_bytes = torch.where(targets >= 0, token_bytes[targets.clamp(min=0)], 0)
                nats += losses.view_as(targets)[target_bytes > 0].double().sum()
                n_bytes += target_bytes.sum()
    finally:
        model.train(was_training)
    return nats.item(), int(n_bytes.item())


def unigram_bpb(train: Split, val: Split, token_bytes: np.ndarray, max_tokens: int = 100_000_000) -> float:
    """Bits per byte on val of the model that knows only how often each token occurs in train (one added to each count).

    Frequencies come from the first `max_tokens` tokens of each split.
    """
    counts = [_counts(split, len(token_bytes), max_tokens) for split in (train, val)]
    nats = -np.log((counts[0] + 1) / (counts[0] + 1).sum())
    return float((counts[1] * nats).sum() / (math.log(2) * (counts[1] * token_bytes).sum()))


def _counts(split: Split, vocab_size: int, max_tokens: int) -> np.ndarray:
    counts = np.zeros(vocab_size, dtype=np.int64)
    for documents in split:
        counts += np.bincount(documents.tokens[: max_tokens - counts.sum()], minlength=vocab_size)
        if counts.sum() >= max_tokens:
            break
    return counts
