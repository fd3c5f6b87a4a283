"""Decode step: read the newest token of every row, and draw the next one.

    decoder = Decoder(model, cache, vocab_size)
    decoder.set_row(row, sampling, seen_ids)      # after the row's prompt was read
    drawn = decoder.first(row, logits, draw)
    drawn = decoder.step(tokens, draws)           # for the first len(tokens) rows

The device runs the model and the draw as one piece of work, and the host waits only for the drawn tokens. On a GPU the
step is recorded as a CUDA graph, once for every SamplingPlan and every ROUND tokens of context, and replayed. With
`compile`, torch.compile fuses the step.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gkachat.attention.cache import Cache, CacheStep
from gkachat.inference.sampling import TOP_LOGPROBS, Sampling, SamplingPlan, make_plan, sample, settings_tensor
from gkachat.machine import widest_float
from gkachat.model.gpt import GPT

ROUND = 256  # where shapes must not change, a step reads a multiple of this number of cache slots
RECOMPILE_LIMIT = 64  # torch's 8 are too few for three models at several batch sizes


class Drawn(NamedTuple):
    """Token that was drawn for one row."""

    token: int
    logprob: float
    """Its log-probability; 0 where no row asked for log-probabilities."""
    top: list[tuple[int, float]]
    """The TOP_LOGPROBS likeliest tokens and their log-probabilities; empty where no row asked for them."""


class Decoder:
    """Decode step for the rows of a cache."""

    def __init__(self, model: GPT, cache: Cache, vocab_size: int, compile: bool = False):
        self.model, self.cache, self.vocab_size = model, cache, vocab_size
        rows, device = len(cache.lengths), model.wte.weight.device
        self.samplings = [Sampling()] * rows
        self.settings = settings_tensor(self.samplings, device)
        self.seen: Tensor | None = None  # (rows, V), made when a row first wants a repetition penalty
        # Token, length and draw of each row, in one transfer.
        self.inputs = torch.zeros(rows, 3, dtype=widest_float(device), device=device)
        self.uses_graphs = device.type == "cuda"
        self.keeps_shapes = self.uses_graphs or compile
        # This tuning makes products with one row read their matrix as it is stored, int8 as int8.
        options = {"coordinate_descent_tuning": True} if self.uses_graphs else None
        self.decode_and_draw = _decode_and_draw
        if compile:  # the limit counts the graphs of all models and decoders, and above it nothing is compiled
            compiled = torch.compile(_decode_and_draw, options=options)
            self.decode_and_draw = torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT)(compiled)
        self.graphs: dict[tuple[int, SamplingPlan], tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self.pool = torch.cuda.graph_pool_handle() if self.uses_graphs else None

    @torch.inference_mode()
    def set_row(self, row: int, sampling: Sampling, seen_ids: Sequence[int]) -> None:
        """Assign a row to a request; `seen_ids` are the ids of its text so far."""
        self.samplings[row] = sampling
        self.settings[row] = settings_tensor([sampling], self.settings.device)[0]
        if sampling.repetition_penalty != 1:
            device = self.settings.device
            if self.seen is None:
                self.seen = torch.zeros(len(self.samplings), self.vocab_size, dtype=torch.bool, device=device)
            self.seen[row] = False
            self.seen[row, torch.tensor(list(seen_ids), dtype=torch.long, device=device)] = True

    @torch.inference_mode()
    def move(self, source: int, target: int) -> None:
        """Copy one row over another."""
        self.cache.move(source, target)
        self.samplings[target] = self.samplings[source]
        for tensor in (self.settings, self.seen):
            if tensor is not None:
                tensor[target] = tensor[source]

    @torch.inference_mode()
    def first(self, row: int, logits: Tensor, draw: float) -> Drawn:
        """Draw the first token after a prompt, from the logits (1, V) of its last token."""
        rows, plan = slice(row, row + 1), make_plan(self.samplings[row : row + 1])
        draws = torch.tensor([draw], dtype=self.inputs.dtype, device=logits.device)
        seen = self.seen[rows] if plan.penalty else None
        return _read(_draw(logits[:, : self.vocab_size], self.settings[rows], plan, draws, seen))[0]

    @torch.inference_mode()
    def step(self, tokens: Sequence[int], draws: Sequence[float]) -> list[Drawn]:
        """Read the newest token of each of the first rows, and draw the next. `draws` are numbers in [0, 1)."""
        n, cache = len(tokens), self.cache
        plan, lengths = make_plan(self.samplings[:n]), cache.lengths[:n]
        inputs = list(zip(tokens, lengths, draws, strict=True))
        longest, rows = max(lengths) + 1 - cache.first, n
        if self.keeps_shapes:  # unused rows compute too, and are overwritten when a request takes them
            rows = len(self.samplings)
            inputs += [(0, cache.first, 0.0)] * (rows - n)
            slots = max(buffers["k"].size(2) for buffers in cache.layers if "k" in buffers)
            longest = min(-(-longest // ROUND) * ROUND, slots)
        self.inputs[:rows].copy_(torch.tensor(inputs, dtype=self.inputs.dtype), non_blocking=self.uses_graphs)
        drawn = self._replay(longest, plan) if self.uses_graphs else self._run(rows, longest, plan)
        for row in range(n):
            cache.lengths[row] += 1
        return _read(drawn[:n])

    def _run(self, rows: int, longest: int, plan: SamplingPlan) -> Tensor:
        seen = self.seen[:rows] if plan.penalty else None
        return self.decode_and_draw(
            self.model, self.cache, longest, plan, self.inputs[:rows], self.settings[:rows], seen, self.vocab_size
        )

    def _replay(self, longest: int, plan: SamplingPlan) -> Tensor:
        if (longest, plan) not in self.graphs:
            self.graphs[longest, plan] = _record(lambda: self._run(len(self.samplings), longest, plan), self.pool)
        graph, drawn = self.graphs[longest, plan]
        graph.replay()
        return drawn


def _decode_and_draw(
    model: GPT,
    cache: Cache,
    longest: int,
    plan: SamplingPlan,
    inputs: Tensor,
    settings: Tensor,
    seen: Tensor | None,
    vocab_size: int,
) -> Tensor:
    """Return what `_draw` does. Idempotent, so that it can run several times before it is recorded.

    The caller counts the new tokens in cache.lengths.
    """
    idx, lengths, draws = inputs[:, :1].long(), inputs[:, 1].long(), inputs[:, 2]
    logits = model(idx, cache=CacheStep(cache, slice(0, idx.size(0)), lengths, 1, longest), logits_to_keep=1)[:, -1]
    if seen is not None:
        seen.scatter_(1, idx, True)
    return _draw(logits[:, :vocab_size], settings, plan, draws, seen)


def _draw(logits: Tensor, settings: Tensor, plan: SamplingPlan, draws: Tensor, seen: Tensor | None) -> Tensor:
    """Return (B, 2 or 2 + 2 * TOP_LOGPROBS) in the dtype of the draws.

    Columns are the drawn id, its log-probability before temperature and cuts, then the likeliest ids, then theirs.
    """
    ids = sample(logits, settings, plan, draws, seen)
    columns = [ids[:, None], torch.zeros_like(draws)[:, None]]
    if plan.logprobs:
        logprobs = logits.log_softmax(dim=-1)
        columns[1] = logprobs.gather(1, ids[:, None])
        if plan.top_logprobs:
            columns += reversed(logprobs.topk(TOP_LOGPROBS, dim=-1))
    return torch.cat([column.to(draws.dtype) for column in columns], dim=1)


def _read(drawn: Tensor) -> list[Drawn]:
    """Return the rows of what `_draw` returned. This waits for the device."""
    rows = []
    for token, logprob, *top in drawn.tolist():
        ids, logprobs = map(int, top[: len(top) // 2]), top[len(top) // 2 :]
        rows.append(Drawn(int(token), logprob, list(zip(ids, logprobs, strict=True))))
    return rows


def _record(work: Callable[[], Tensor], pool: tuple[int, int]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """Return a CUDA graph of the work, and the tensor that each replay fills."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles kernels and allocates library workspaces before the capture
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        drawn = work()
    return graph, drawn
