"""The language task: batches from tokenized shards or conversations, evaluated in bits per byte."""

import math
from collections.abc import Callable, Iterable
from itertools import count, islice, takewhile

import numpy as np
import torch
from torch import Tensor, nn

from gkachat.config import Config
from gkachat.data.conversations import ChatSplit
from gkachat.data.loader import Batch, Loader, Prefetcher, val_batches
from gkachat.data.shards import Split
from gkachat.model.gpt import GPT
from gkachat.model.stats import model_stats
from gkachat.tokenizer import Tokenizer
from gkachat.train.distributed import World, broadcast_from_rank0

BpbSums = Callable[[nn.Module, Iterable[Batch], np.ndarray], tuple[float, int]]
"""(model, batches, token_bytes) -> nats and bytes: gkachat.eval.bpb.bpb_sums, passed in as eval builds on train."""


class LanguageTask:
    """Trains on one split of a corpus, and measures bits per byte on parts of both."""

    metrics = ("val_bpb", "train_bpb")

    def __init__(
        self,
        config: Config,
        tokenizer: Tokenizer,
        train: Split | ChatSplit,
        val: Split | ChatSplit,
        *,
        bpb_sums: BpbSums,
        device: torch.device,
        world: World,
    ):
        """`config` must be resolved.

        Raises ValueError when the tokenizer has more tokens than the model, or train does not fill a single step.
        """
        if tokenizer.vocab_size > config.model.vocab_size:
            raise ValueError(
                f"model.vocab_size: given {config.model.vocab_size}, expected {tokenizer.vocab_size} or more: "
                "the tokenizer has so many tokens"
            )
        self.config, self.tokenizer, self.bpb_sums = config, tokenizer, bpb_sums
        self.device, self.world = device, world
        self.stats = model_stats(config.model)
        self.splits = {"val_bpb": val, "train_bpb": train}
        self.loader = Loader(
            train,
            sequence_len=config.model.sequence_len,
            rows_per_step=config.train.total_batch_size // config.model.sequence_len,
            bos=tokenizer.bos,
            packing=config.data.loader,
            seed=config.run.seed,
            rank=world.rank,
            world_size=world.size,
        )
        self.prefetcher = Prefetcher(self.loader, pinned=device.type == "cuda")
        self.eval_batches: dict[str, list[Batch]] = {}

    def batch(self, step: int) -> tuple[tuple[Tensor, Tensor], int]:
        """Return this rank's inputs and targets (rows, T) of a step, and the number of targets over all ranks."""
        return self.prefetcher.get(step)

    def evaluate(self, step: int, model: GPT, rows: int, proceed: Callable[[], bool]) -> dict[str, tuple[float, float]]:
        """Return nats, and bytes times ln 2, of this rank's share of val and train: their quotient is bits per byte.

        At step 0 only shards that exist are read, so that training can begin. Later evaluations wait for those that
        `train.eval_tokens` tokens are in.
        """
        found = {}
        for name in self.metrics:
            if (batches := self.eval_batches.get(name)) is None:
                batches = self._read_eval_batches(step, name, rows, proceed)
            nats, n_bytes = self.bpb_sums(model, takewhile(lambda _: proceed(), batches), self.tokenizer.token_bytes())
            found[name] = nats, math.log(2) * n_bytes
        return found

    def _read_eval_batches(self, step: int, name: str, rows: int, proceed: Callable[[], bool]) -> list[Batch]:
        split, n_shards = self.splits[name], None
        if step == 0:  # rank 0 decides for all, since a shard may be finished between their looks; 0: all shards
            written = split.n_written()
            written = 0 if written is None else max(1, written)
            n_shards = broadcast_from_rank0(written, self.world, self.device) or None
        shards = (split.shard(index, proceed) for index in count())
        batches = val_batches(
            islice(takewhile(lambda documents: documents is not None, shards), n_shards),
            sequence_len=self.config.model.sequence_len,
            batch_rows=rows,
            bos=self.tokenizer.bos,
            packing=self.config.data.loader,
            tokens=self.config.train.eval_tokens,
        )
        mine = [
            batch
            for index, batch in enumerate(takewhile(lambda _: proceed(), batches))
            if index % self.world.size == self.world.rank
        ]
        if n_shards is None and proceed():  # planning the rows of a large corpus takes seconds
            self.eval_batches[name] = mine
        return mine

    def describe(self) -> str:
        """Return the protocol and how much of the corpus an epoch uses."""
        loader, waste = self.loader, self.loader.packing_waste()
        epoch = "in the first shard"  # reading all shards of a large corpus takes long, and some may not exist yet
        if loader.knows_epoch:
            dropped = 100 * waste["tokens_dropped"]
            epoch = f"an epoch has {loader.steps_per_epoch:,} steps, {dropped:.2f} % of its tokens are left out"
        empty = f"{100 * waste['positions_empty']:.2f} % of the positions stay empty"
        return f"{self.config.train.protocol}; data: {epoch}, {empty}"
