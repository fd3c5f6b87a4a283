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
from functools import cached_property

import torch
from torch import Tensor

from gkachat.attention.cache import Cache
from gkachat.inference.decoder import Decoder
from gkachat.inference.sampling import Sampling
from gkachat.model.gpt import GPT
from gkachat.tokenizer import Tokenizer

BLOCK = 256  # tokens of a prompt that are read at a time


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
    """Generates with a model, in eval mode; `compile` fuses the step that is repeated, which takes a minute first."""

    def __init__(self, model: GPT, tokenizer: Tokenizer, compile: bool = False):
        self.model, self.tokenizer, self.compile = model, tokenizer, compile
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
                yield pool.join(*request)
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

    def __init__(self, number: int, sampling: Sampling, tokenizer: Tokenizer):
        self.number, self.sampling = number, sampling
        self.random = random.Random(sampling.seed)
        self.stops = {tokenizer.bos, *sampling.stop_tokens}
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.token, self.n_tokens, self.held = None, 0, ""

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
    """The texts that are being answered, one a row of the cache."""

    def __init__(self, engine: Engine, rows: int, prefix: Prefix | None, slide: bool):
        self.engine, self.prefix, self.slide, self.n_rows = engine, prefix, slide, rows
        self.limit = engine.model.config.sequence_len
        self.texts: list[_Text] = []

    @cached_property
    def decoder(self) -> Decoder:
        first = 0 if self.prefix is None else self.prefix.cache.lengths[0]
        cache = self.engine.model.make_cache(
            self.n_rows,
            self.limit + BLOCK if self.slide else self.limit - first,
            block=BLOCK,
            slide=self.slide,
            prefix=None if self.prefix is None else self.prefix.cache,
        )
        return Decoder(self.engine.model, cache, self.engine.tokenizer.vocab_size, self.engine.compile)

    @torch.inference_mode()
    def join(self, number: int, request: Request) -> Piece:
        """Read a prompt into a free row, and draw what follows it."""
        tokens, first, seen = list(request.tokens), 0, set(request.tokens)
        if self.prefix is None:
            tokens = [self.engine.tokenizer.bos, *tokens]
        else:
            first = self.prefix.cache.lengths[0]
            seen.update(self.prefix.tokens)
        if not self.slide and first + len(tokens) > self.limit:
            raise ValueError(
                f"the prompt: given {first + len(tokens)} tokens, expected at most sequence_len {self.limit}"
            )
        if not tokens:
            raise ValueError("the prompt: given no token after the prefix, expected one or more")
        if request.sampling.max_tokens == 0:
            return Piece(number, None, "", finished="max_tokens")
        row, text = len(self.texts), _Text(number, request.sampling, self.engine.tokenizer)
        self.decoder.cache.lengths[row] = self.decoder.cache.first  # whoever was there before
        logits = self.engine._prefill(self.decoder.cache, row, tokens)
        self.decoder.place(row, request.sampling, seen)
        piece = self._piece(row, text, *self.decoder.first(row, logits, text.random.random()))
        if not piece.finished:
            self.texts.append(text)
        return piece

    def step(self) -> list[Piece]:
        """A token for each row; rows that have ended leave."""
        drawn = self.decoder([text.token for text in self.texts], [text.random.random() for text in self.texts])
        pieces = [self._piece(row, self.texts[row], *of_row) for row, of_row in enumerate(drawn)]
        for row in reversed(range(len(pieces))):  # the last row takes the place of one that has ended
            if pieces[row].finished:
                last = self.texts.pop()
                if row < len(self.texts):
                    self.decoder.move(len(self.texts), row)
                    self.texts[row] = last
        return pieces

    def _piece(self, row: int, text: _Text, token: int, logprob: float) -> Piece:
        tokenizer, logprob = self.engine.tokenizer, logprob if text.sampling.logprobs else None
        if token in text.stops:
            tail = text.decoder.decode(b"", final=True)
            why = "bos" if token == tokenizer.bos else "stop"
            return Piece(text.number, None, text.say(tail, last=True)[0], logprob, why)
        text.token, text.n_tokens = token, text.n_tokens + 1
        why = ""
        if text.n_tokens >= text.sampling.max_tokens:
            why = "max_tokens"
        elif not self.slide and self.decoder.cache.lengths[row] >= self.limit:
            why = "sequence_len"
        decoded = text.decoder.decode(tokenizer.decode_bytes([token]), final=bool(why))
        said, stopped = text.say(decoded, last=bool(why))
        return Piece(text.number, token, said, logprob, "stop" if stopped else why)
