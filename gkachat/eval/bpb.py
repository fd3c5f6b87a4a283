"""Bits per byte (BPB): a loss that does not depend on the tokenizer, and the unigram model it has to beat.

evaluate_bpb(model, batches, tokenizer.token_bytes())
evaluate_corpus(model, tokenizer, tokens_dir, world)["val_bpb"]        # what scripts.base_eval reports
"""

import math
import sys
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gkachat.data.loader import val_batches
from gkachat.data.shards import Split, read_manifest
from gkachat.machine import widest_float
from gkachat.model.gpt import GPT
from gkachat.tokenizer import Tokenizer
from gkachat.train.distributed import World, all_reduce_sum

MAX_LOGITS = {"cpu": 2**28, "cuda": 2**30}  # in one forward pass: 1 and 4 GiB in float32
ROWS = {"cpu": 4, "cuda": 16}  # in a batch of evaluate_corpus
TRAIN_SHARE = 4  # val has this many times the training tokens: theirs is the figure that nobody compares


def evaluate_bpb(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], token_bytes: Tensor | np.ndarray) -> float:
    """Return bits per byte: nats over the targets that have bytes, divided by ln 2 and by the number of these bytes.

    Args:
        model: any module, idx (B, T) -> logits (B, T, V). It runs in eval mode, and leaves in the mode it came in.
        batches: (idx, targets) pairs, each (B, T); a target of -1 is not scored.
        token_bytes: (V,) bytes of text behind each id; ids with 0 bytes (special tokens) are not scored.

    Raises ValueError when no target has bytes.
    """
    return bits_per_byte(*bpb_sums(model, batches, token_bytes))


def bits_per_byte(nats: float, n_bytes: int) -> float:
    """Convert the sums of `bpb_sums`. Raises ValueError for zero bytes."""
    if n_bytes == 0:
        raise ValueError("bits per byte of nothing: no target stands for any bytes")
    return nats / (math.log(2) * n_bytes)


@torch.no_grad()
def bpb_sums(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], token_bytes: Tensor | np.ndarray
) -> tuple[float, int]:
    """Return (nats, bytes) of the targets, which can be added up over processes. Arguments as in `evaluate_bpb`.

    Batches with more than MAX_LOGITS logits, or that do not fit the device's memory, are split into fewer rows.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    token_bytes = torch.as_tensor(token_bytes, device=device, dtype=torch.int64)
    nats = torch.zeros((), dtype=widest_float(device), device=device)
    n_bytes = torch.zeros((), dtype=torch.int64, device=device)
    max_tokens = MAX_LOGITS.get(device.type, MAX_LOGITS["cpu"]) // len(token_bytes)
    was_training = model.training
    model.eval()
    try:
        for batch in batches:
            pending = [tuple(t.to(device) for t in batch)]
            while pending:
                idx, targets = pending.pop()
                if len(idx) > 1 and idx.numel() > max_tokens:
                    pending += reversed(list(zip(idx.chunk(2), targets.chunk(2), strict=True)))
                    continue
                if "torch._dynamo" in sys.modules:  # a compiled model has imported it, and a call here would take long
                    torch._dynamo.maybe_mark_dynamic(idx, 0)  # the last batch has fewer rows: one model serves both
                try:
                    logits = model(idx).flatten(0, 1)
                    losses = F.cross_entropy(logits, targets.flatten(), ignore_index=-1, reduction="none")
                except torch.OutOfMemoryError:
                    if len(idx) == 1:
                        raise
                    max_tokens = idx.numel() - 1  # from now on, batches of this size are split
                    pending.append((idx, targets))
                    continue
                target_bytes = torch.where(targets >= 0, token_bytes[targets.clamp(min=0)], 0)
                # Not by a mask as index: its length would have to be copied from the GPU.
                nats += torch.where(target_bytes > 0, losses.view_as(targets), 0).to(nats.dtype).sum()
                n_bytes += target_bytes.sum()
    finally:
        model.train(was_training)
    return nats.item(), int(n_bytes.item())


def evaluate_corpus(
    model: GPT,
    tokenizer: Tokenizer,
    tokens_dir: Path,
    packing: str = "cut",
    world: World = World(),  # noqa: B008 (frozen)
) -> dict[str, Any]:
    """Return a model's bits per byte on the corpus in `tokens_dir`, which holds its shards and their manifest.

    `packing` is that of `plan_rows`; figures of different ones cannot be compared. The ranks share the batches and
    return the same figures. These are val_bpb over all of val, train_bpb over a quarter as many training tokens,
    unigram_bpb (the unigram model on val), val_tokens, and val_sha256, the hashes of val's texts: runs with equal ones
    can be compared.
    """
    splits = {name: Split(tokens_dir, name, tokenizer) for name in ("train", "val")}
    val_tokens = sum(int(documents.length.sum()) for documents in splits["val"])
    token_bytes = tokenizer.token_bytes()

    def bpb(name: str, tokens: int | None) -> float:
        T, rows = model.config.sequence_len, ROWS.get(model.wte.weight.device.type, ROWS["cpu"])
        batches = val_batches(
            splits[name], sequence_len=T, batch_rows=rows, bos=tokenizer.bos, packing=packing, tokens=tokens
        )
        sums = bpb_sums(model, islice(batches, world.rank, None, world.size), token_bytes)
        device = model.wte.weight.device
        sums = torch.tensor(sums, dtype=widest_float(device), device=device)
        return bits_per_byte(*all_reduce_sum(sums, world).tolist())

    return {
        "val_bpb": bpb("val", None),
        "train_bpb": bpb("train", val_tokens // TRAIN_SHARE),
        "unigram_bpb": unigram_bpb(splits["train"], splits["val"], token_bytes),
        "val_tokens": val_tokens,
        "packing": packing,
        "val_sha256": [shard.text_sha256 for shard in read_manifest(tokens_dir).shards if shard.split == "val"],
    }


def unigram_bpb(train: Split, val: Split, token_bytes: np.ndarray, max_tokens: int = 100_000_000) -> float:
    """Return the bits per byte on val of the model that knows only token frequencies in train, with one added to each.

    Frequencies come from the first `max_tokens` tokens of each split.
    """
    train_counts, val_counts = (_token_counts(split, len(token_bytes), max_tokens) for split in (train, val))
    nats = -np.log((train_counts + 1) / (train_counts + 1).sum())
    return bits_per_byte(float((val_counts * nats).sum()), int((val_counts * token_bytes).sum()))


def _token_counts(split: Split, vocab_size: int, max_tokens: int) -> np.ndarray:
    counts = np.zeros(vocab_size, dtype=np.int64)
    for documents in split:
        counts += np.bincount(documents.tokens[: max_tokens - counts.sum()], minlength=vocab_size)
        if counts.sum() >= max_tokens:
            break
    return counts
