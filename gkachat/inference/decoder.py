"""The step that decoding repeats: every row's newest token is read and the next one drawn.

    decoder = Decoder(model, cache, vocab_size)
    decoder.place(row, sampling, seen)        # after the row's prompt was read
    token, logprob = decoder.first(row, logits, draw)
    drawn = decoder(tokens, draws)            # for the first len(tokens) rows

The whole step with its draw is one piece of work for the device, and its answer the only thing waited for. On a GPU it
is recorded as a CUDA graph, once for every plan and every ROUND tokens of context, and replayed; `compile` has
torch.compile fuse it too.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gkachat.attention.cache import Cache, Step
from gkachat.inference.sampling import Plan, Sampling, plan_of, sample, settings_of
from gkachat.model.gpt import GPT

ROUND = 256  # slots: where shapes are to stay, so many more are looked at than needed, at most
Drawn = tuple[int, float]
"""A token, and its log-probability (0 where no row asked for one)."""


class Decoder:
    """For the rows of a cache."""

    def __init__(self, model: GPT, cache: Cache, vocab_size: int, compile: bool = False):
        self.model, self.cache, self.vocab_size = model, cache, vocab_size
        rows, device = len(cache.lengths), model.wte.weight.device
        self.samplings = [Sampling()] * rows
        self.settings, self.seen = settings_of(self.samplings, device), None
        self.inputs = torch.zeros(rows, 3, dtype=torch.float64, device=device)  # token, length, draw: one transfer
        self.is_recorded = device.type == "cuda"
        self.keep_shapes = self.is_recorded or compile
        # The tuning has products of one row read their matrix as it is stored, bytes as bytes.
        options = {"coordinate_descent_tuning": True} if self.is_recorded else None
        self.advance = torch.compile(_advance, options=options) if compile else _advance
        self.graphs: dict[tuple[int, Plan], tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self.pool = torch.cuda.graph_pool_handle() if self.is_recorded else None

    @torch.inference_mode()
    def place(self, row: int, sampling: Sampling, seen: Sequence[int]) -> None:
        """Who is in a row now, and the ids its text has so far."""
        self.samplings[row] = sampling
        self.settings[row] = settings_of([sampling], self.settings.device)[0]
        if sampling.repetition_penalty != 1:
            if self.seen is None:
                self.seen = torch.zeros(
                    len(self.samplings), self.vocab_size, dtype=torch.bool, device=self.settings.device
                )
            self.seen[row] = False
            self.seen[row, torch.tensor(list(seen), dtype=torch.long, device=self.seen.device)] = True

    @torch.inference_mode()
    def move(self, source: int, target: int) -> None:
        """Put one row in the place of another."""
        self.cache.move(source, target)
        self.samplings[target] = self.samplings[source]
        for tensor in (self.settings, self.seen):
            if tensor is not None:
                tensor[target] = tensor[source]

    @torch.inference_mode()
    def first(self, row: int, logits: Tensor, draw: float) -> Drawn:
        """What follows a prompt with these logits (1, V) after it."""
        rows, plan = slice(row, row + 1), plan_of(self.samplings[row : row + 1])
        draws = torch.tensor([draw], dtype=torch.float64, device=logits.device)
        seen = self.seen[rows] if plan.penalty else None
        [(token, logprob)] = _draw(logits[:, : self.vocab_size], self.settings[rows], plan, draws, seen).tolist()
        return int(token), logprob

    @torch.inference_mode()
    def __call__(self, tokens: Sequence[int], draws: Sequence[float]) -> list[Drawn]:
        """Read `tokens`, the newest of the first rows, and draw what follows each, by numbers in [0, 1)."""
        n, cache = len(tokens), self.cache
        plan, lengths = plan_of(self.samplings[:n]), cache.lengths[:n]
        inputs = list(zip(tokens, lengths, draws, strict=True))
        longest = max(lengths) + 1 - cache.first
        rows = n
        if self.keep_shapes:  # rows that nobody is in work too: what they leave is overwritten when someone comes
            rows = len(self.samplings)
            inputs += [(0, cache.first, 0.0)] * (rows - n)
            longest = min(-(-longest // ROUND) * ROUND, max(layer[0].size(2) for layer in cache.layers))
        self.inputs[:rows].copy_(torch.tensor(inputs, dtype=torch.float64), non_blocking=True)
        drawn = self._replayed(longest, plan) if self.is_recorded else self._run(rows, longest, plan)
        for row in range(n):
            cache.lengths[row] += 1
        return [(int(token), logprob) for token, logprob in drawn[:n].tolist()]

    def _run(self, rows: int, longest: int, plan: Plan) -> Tensor:
        seen = self.seen[:rows] if plan.penalty else None
        return self.advance(
            self.model, self.cache, longest, plan, self.inputs[:rows], self.settings[:rows], seen, self.vocab_size
        )

    def _replayed(self, longest: int, plan: Plan) -> Tensor:
        if (longest, plan) not in self.graphs:
            self.graphs[longest, plan] = _recorded(lambda: self._run(len(self.samplings), longest, plan), self.pool)
        graph, drawn = self.graphs[longest, plan]
        graph.replay()
        return drawn


def _advance(
    model: GPT, cache: Cache, longest: int, plan: Plan, inputs: Tensor, settings: Tensor, seen: Tensor | None, V: int
) -> Tensor:
    """Doing it twice changes nothing: which is what a recording's rehearsals do."""
    idx, before, draws = inputs[:, :1].long(), inputs[:, 1].long(), inputs[:, 2]
    logits = model.decode_step(idx, Step(cache, slice(0, idx.size(0)), before, 1, longest))
    if seen is not None:
        seen.scatter_(1, idx, True)
    return _draw(logits[:, :V], settings, plan, draws, seen)


def _draw(logits: Tensor, settings: Tensor, plan: Plan, draws: Tensor, seen: Tensor | None) -> Tensor:
    """(B, 2) float64, which holds both: ids, and log-probabilities before temperature and cuts."""
    ids = sample(logits, settings, plan, draws, seen)
    logprobs = torch.zeros_like(draws)
    if plan.logprobs:
        logprobs = logits.log_softmax(dim=-1).gather(1, ids[:, None])[:, 0].double()
    return torch.stack((ids.double(), logprobs), dim=1)


def _recorded(work: Callable[[], Tensor], pool: tuple[int, int]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """A CUDA graph of the work, and the tensor that each replay fills."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # kernels are compiled, and libraries make their workspaces, before recording
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        drawn = work()
    return graph, drawn
