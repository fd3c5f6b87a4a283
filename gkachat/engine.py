"""Decoding: from prompts to what follows them, row by row of a batch, with a cache.

engine = Engine(model, tokenizer)
for token in engine.generate(tokenizer.encode("def add("), max_tokens=64, temperature=0.8, seed=1): ...
for piece in engine.run([Request(tokens, Sampling(seed=seed)) for seed in range(64)], rows=16): ...
"""

import codecs
import dataclasses
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gkachat.attention.cache import Cache
from gkachat.config import at_least, require
from gkachat.gpt import GPT
from gkachat.tokenizer import Tokenizer

BLOCK = 256  # tokens of a prompt that are read at a time


@dataclass(frozen=True)
class Sampling:
    """How one text is continued. Raises ConfigError for settings out of range."""

    max_tokens: int = 256
    temperature: float = 1.0
    """0 takes the likeliest token each time."""
    top_k: int | None = None
    """Sample among so many likeliest only ..."""
    top_p: float | None = None
    """... of these among the likeliest that together reach this probability ..."""
    min_p: float | None = None
    """... and that have this share of the likeliest one's."""
    repetition_penalty: float = 1.0
    """Divides the logits of tokens that were there before (multiplies negative ones; CTRL, arXiv 1909.05858)."""
    seed: int = 42
    stop: tuple[str, ...] = ()
    """Texts at which to end; they are not given out."""
    stop_tokens: tuple[int, ...] = ()
    """Ids at which to end, besides BOS."""
    logprobs: bool = False
    """Tell the log-probability of each token, before temperature and cuts."""

    def __post_init__(self) -> None:
        require(
            self,
            temperature=(self.temperature >= 0, "0 or more"),
            top_p=(self.top_p is None or 0 < self.top_p <= 1, "above 0, at most 1"),
            min_p=(self.min_p is None or 0 <= self.min_p <= 1, "0 to 1"),
            repetition_penalty=(self.repetition_penalty > 0, "above 0"),
            stop=(all(self.stop), "texts that are not empty"),
            **at_least(0, self, "max_tokens"),
            **at_least(1, self, "top_k"),
        )


@dataclass(frozen=True)
class Request:
    """A text's ids, BOS not among them, and how to go on."""

    tokens: Sequence[int]
    sampling: Sampling = field(default_factory=Sampling)


@dataclass(frozen=True)
class Prefix:
    """BOS and tokens that were read once, for any number of texts that begin with them."""

    tokens: Sequence[int]
    cache: Cache


@dataclass(frozen=True)
class Piece:
    """The next token of a request, or its end."""

    request: int
    """Its number."""
    token: int | None
    text: str
    """What is certain by now: bytes of an unfinished character, or what may yet become a stop text, are held back."""
    logprob: float | None = None
    finished: str = ""
    """Why it ended, in the last piece: bos, stop, max_tokens, or sequence_len."""


class Engine:
    """Generates with a model, in eval mode."""

    def __init__(self, model: GPT, tokenizer: Tokenizer):
        self.model, self.tokenizer = model, tokenizer
        self.device = model.wte.weight.device

    def generate(self, tokens: Sequence[int], *, slide: bool = False, **sampling) -> Iterator[int]:
        """Yield the ids that follow BOS and `tokens`; the options are those of Sampling, and `slide` that of `run`."""
        for piece in self.run([Request(tokens, Sampling(**sampling))], rows=1, slide=slide):
            if piece.token is not None:
                yield piece.token

    def samples(self, tokens: Sequence[int], n: int, *, rows: int = 64, **sampling) -> list[list[int]]:
        """`n` continuations of one prompt, which is read and kept once; their seeds are `seed`, `seed` + 1 ..."""
        tokens, first = list(tokens), Sampling(**sampling)
        prefix = self.read(tokens[:-1]) if tokens else None
        settings = [dataclasses.replace(first, seed=first.seed + i) for i in range(n)]
        found: list[list[int]] = [[] for _ in settings]
        for piece in self.run([Request(tokens[-1:], s) for s in settings], rows=min(n, rows), prefix=prefix):
            if piece.token is not None:
                found[piece.request].append(piece.token)
        return found

    @torch.inference_mode()
    def read(self, tokens: Sequence[int]) -> Prefix:
        """What texts have in common, read once; all rows share it without a copy."""
        cache = self.model.make_cache(1, len(tokens) + 1, block=BLOCK)
        self._prefill(cache, 0, [self.tokenizer.bos, *tokens])
        return Prefix(tokens, cache)

    def run(
        self, requests: Iterable[Request], *, rows: int = 8, prefix: Prefix | None = None, slide: bool = False
    ) -> Iterator[Piece]:
        """Answer requests, `rows` of them at a time; when one has ended, the next takes its row.

        What a request is answered depends neither on the others nor on `rows`, rounding aside.

        Args:
            prefix: from `read`: what all requests go on from.
            slide: go on beyond sequence_len, each token seeing the last sequence_len ones; otherwise that is the end.

        Raises ValueError for a prompt that leaves no place for a token.
        """
        waiting, rows = enumerate(requests), max(1, rows)
        pool = _Rows(self, rows, prefix, slide)
        while True:
            while len(pool.texts) < rows and (request := next(waiting, None)) is not None:
                yield from pool.join(*request)
            if not pool.texts:
                return
            yield from pool.step()

    def _prefill(self, cache: Cache, row: int, tokens: Sequence[int]) -> Tensor | None:
        """Logits (1, V) after the last of the tokens."""
        logits = None
        for at in range(0, len(tokens), cache.block):
            idx = torch.tensor([tokens[at : at + cache.block]], device=self.device)
            logits = self.model.decode(idx, cache, slice(row, row + 1))
        return logits


class _Text:
    """A request that is being answered."""

    def __init__(self, number: int, request: Request, tokenizer: Tokenizer):
        self.number, self.sampling = number, request.sampling
        self.random = random.Random(request.sampling.seed)
        self.stops = {tokenizer.bos, *request.sampling.stop_tokens}
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.seen, self.n_tokens, self.held = set(request.tokens), 0, ""

    def say(self, text: str, last: bool) -> tuple[str, bool]:
        """What of the text so far can be given out, and whether a stop text has come."""
        self.held += text
        found = [at for stop in self.sampling.stop if (at := self.held.find(stop)) >= 0]
        if found:
            return self.held[: min(found)], True
        keep = 0 if last else max(
            (n for stop in self.sampling.stop for n in range(1, len(stop)) if self.held.endswith(stop[:n])), default=0
        )  # fmt: skip
        said, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return said, False


class _Rows:
    """The texts that are being answered, one a row of the cache, and the logits after each."""

    def __init__(self, engine: Engine, rows: int, prefix: Prefix | None, slide: bool):
        self.engine, self.prefix, self.slide, self.n_rows = engine, prefix, slide, rows
        self.limit = engine.model.config.sequence_len
        self.texts: list[_Text] = []
        self.cache: Cache | None = None
        self.logits: Tensor | None = None  # (rows, V)

    @torch.inference_mode()
    def join(self, number: int, request: Request) -> Iterator[Piece]:
        """Read a prompt into a free row."""
        tokens, first = list(request.tokens), 0 if self.prefix is None else self.prefix.cache.lengths[0]
        if self.prefix is None:
            tokens = [self.engine.tokenizer.bos, *tokens]
        if not self.slide and first + len(tokens) > self.limit:
            raise ValueError(
                f"the prompt: given {first + len(tokens)} tokens, expected at most sequence_len {self.limit}"
            )
        if not tokens:
            raise ValueError("the prompt: given no token after the prefix, expected one or more")
        if request.sampling.max_tokens == 0:
            yield Piece(number, None, "", finished="max_tokens")
            return
        if self.cache is None:
            self.cache = self.engine.model.make_cache(
                self.n_rows,
                self.limit + BLOCK if self.slide else self.limit - first,
                block=BLOCK,
                slide=self.slide,
                prefix=None if self.prefix is None else self.prefix.cache,
            )
        row = len(self.texts)
        self.cache.lengths[row] = self.cache.first  # whoever was there before
        logits = self.engine._prefill(self.cache, row, tokens)
        if self.logits is None:
            self.logits = logits.new_zeros(self.n_rows, logits.size(-1))
        self.logits[row] = logits[0]
        text = _Text(number, request, self.engine.tokenizer)
        text.seen.update([] if self.prefix is None else self.prefix.tokens)
        self.texts.append(text)

    @torch.inference_mode()
    def step(self) -> Iterator[Piece]:
        """A token for each row; rows that have ended leave."""
        n = len(self.texts)
        # Padding of the vocabulary stands for nothing.
        logits = self.logits[:n, : self.engine.tokenizer.vocab_size]
        drawn = sample(
            logits,
            [text.sampling for text in self.texts],
            [text.random.random() for text in self.texts],
            [text.seen for text in self.texts],
        )
        logprobs = [None] * n
        if any(text.sampling.logprobs for text in self.texts):
            logprobs = logits.log_softmax(dim=-1).gather(1, drawn[:, None])[:, 0].tolist()
        tokens, pieces = drawn.tolist(), []
        for row, (text, token) in enumerate(zip(self.texts, tokens, strict=True)):
            pieces.append(self._piece(row, text, token, logprobs[row] if text.sampling.logprobs else None))
        for row in reversed(range(n)):  # the last row takes the place of one that has ended
            if pieces[row].finished:
                last = len(self.texts) - 1
                if row != last:
                    self.cache.move(last, row)
                    tokens[row] = tokens[last]
                self.texts[row] = self.texts[last]
                self.texts.pop()
        if self.texts:
            n = len(self.texts)
            idx = torch.tensor(tokens[:n], device=self.engine.device)[:, None]
            self.logits[:n] = self.engine.model.decode(idx, self.cache, slice(0, n))
        yield from pieces

    def _piece(self, row: int, text: _Text, token: int, logprob: float | None) -> Piece:
        if token in text.stops:
            tail = text.decoder.decode(b"", final=True)
            why = "bos" if token == self.engine.tokenizer.bos else "stop"
            return Piece(text.number, None, text.say(tail, last=True)[0], logprob, why)
        text.n_tokens += 1
        text.seen.add(token)
        why = ""
        if text.n_tokens >= text.sampling.max_tokens:
            why = "max_tokens"
        elif not self.slide and self.cache.lengths[row] >= self.limit:
            why = "sequence_len"
        decoded = text.decoder.decode(self.engine.tokenizer.decode_bytes([token]), final=bool(why))
        said, stopped = text.say(decoded, last=bool(why))
        return Piece(text.number, token, said, logprob, "stop" if stopped else why)


def sample(
    logits: Tensor, settings: Sequence[Sampling], draws: Sequence[float], seen: Sequence[set[int]] = ()
) -> Tensor:
    """An id for each row (B,) of logits (B, V), float32.

    Args:
        draws: a number in [0, 1) for each row, which decides.
        seen: ids that were there before, for the repetition penalty.
    """
    if any(s.repetition_penalty != 1 for s in settings):
        logits = logits.clone()
        for row, s in enumerate(settings):
            if s.repetition_penalty != 1 and seen[row]:
                ids = torch.tensor(sorted(seen[row]), device=logits.device)
                old = logits[row, ids]
                logits[row, ids] = torch.where(old > 0, old / s.repetition_penalty, old * s.repetition_penalty)
    if all(s.temperature == 0 for s in settings):
        return logits.argmax(dim=-1)

    def column(values: Iterable[float]) -> Tensor:
        return torch.tensor(list(values), dtype=torch.float32, device=logits.device)[:, None]

    V = logits.size(-1)
    # Greedy is a sample from the likeliest one.
    top_k = [1 if s.temperature == 0 else min(s.top_k or V, V) for s in settings]
    logits = logits / column(s.temperature or 1.0 for s in settings)
    # Sorted, every cut leaves the first of them; probabilities are of the whole vocabulary.
    highest, ids = logits.topk(max(top_k), dim=-1)
    p = (highest - logits.logsumexp(dim=-1, keepdim=True)).exp()
    p = p * (torch.arange(p.size(-1), device=p.device) < column(top_k))
    if any(s.top_p is not None for s in settings):  # of what top_k has left
        p = p / p.sum(dim=-1, keepdim=True)
        p = p * (p.cumsum(dim=-1) - p < column(1.0 if s.top_p is None else s.top_p for s in settings))
    if any(s.min_p is not None for s in settings):
        p = p * (p >= p[:, :1] * column(s.min_p or 0.0 for s in settings))
    reached = p.double().cumsum(dim=-1)
    target = column(draws).double() * reached[:, -1:]
    choice = (reached <= target).sum(dim=-1, keepdim=True).clamp(max=p.size(-1) - 1)
    return ids.gather(1, choice)[:, 0]
