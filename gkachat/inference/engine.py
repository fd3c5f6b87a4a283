"""Engine: generates text for many requests at a time. Each takes one row of a batch and of its key/value cache.

engine = Engine(model, tokenizer)
for token in engine.generate(tokenizer.encode("def add("), max_tokens=64, temperature=0.8, seed=1): ...
for output in engine.run([Request(ids, Sampling(seed=seed)) for seed in range(64)], rows=16): ...

Requests that come and go take a Batch, which `run` is a loop over:

batch = engine.batch(rows=16)
output = batch.add(7, Request(ids))    # into a free row
outputs = batch.step()                 # the next token of every row; a row that ends is free
batch.cancel(7)
"""

import codecs
import dataclasses
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gkachat.attention.cache import Cache
from gkachat.inference.decoder import Decoder, Drawn
from gkachat.inference.sampling import Sampling
from gkachat.model.gpt import GPT
from gkachat.tokenizer import Tokenizer

BLOCK = 256  # tokens of a prompt that are read at a time


@dataclass(frozen=True)
class Request:
    """A prompt as ids, without BOS, and how to continue it."""

    tokens: Sequence[int]
    sampling: Sampling = field(default_factory=Sampling)


@dataclass(frozen=True)
class Prefix:
    """BOS and tokens that the model has read once, for any number of requests that begin with them."""

    tokens: Sequence[int]
    cache: Cache


@dataclass(frozen=True)
class TokenOutput:
    """Output of one decode step for one request: its next token, its end, or both."""

    request: int
    """Number of the request: its index in `Engine.run`."""
    token: int | None
    """Token id; None where the request ends without one."""
    text: str
    """Text that is certain by now. Bytes of an unfinished character, and what may become a stop text, are held back."""
    logprob: float | None = None
    """Log-probability of the token, where the request asked for it."""
    top_logprobs: Sequence[tuple[int, float]] = ()
    """The likeliest tokens and their log-probabilities, as many as the request asked for."""
    finished: str = ""
    """Reason in the last output of a request: bos, stop, max_tokens or sequence_len. Empty in earlier outputs."""


class Engine:
    """Generates text with a model in eval mode. `compile` fuses the decode step; compilation takes about a minute."""

    def __init__(self, model: GPT, tokenizer: Tokenizer, compile: bool = False):
        self.model, self.tokenizer, self.compile = model, tokenizer, compile
        self.device = model.wte.weight.device

    def generate(self, tokens: Sequence[int], **sampling) -> Iterator[int]:
        """Yield the ids that follow BOS and `tokens`; the options are the fields of Sampling."""
        for output in self.run([Request(tokens, Sampling(**sampling))], rows=1):
            if output.token is not None:
                yield output.token

    def samples(self, tokens: Sequence[int], n: int, *, rows: int = 64, **sampling) -> list[list[int]]:
        """Return n continuations of one prompt, which is read and cached once; seeds are seed, seed + 1, ..."""
        tokens, first = list(tokens), Sampling(**sampling)
        prefix = self.read(tokens[:-1]) if tokens else None
        settings = [dataclasses.replace(first, seed=first.seed + i) for i in range(n)]
        continuations: list[list[int]] = [[] for _ in settings]
        for output in self.run([Request(tokens[-1:], s) for s in settings], rows=min(n, rows), prefix=prefix):
            if output.token is not None:
                continuations[output.request].append(output.token)
        return continuations

    @torch.inference_mode()
    def read(self, tokens: Sequence[int]) -> Prefix:
        """Read BOS and `tokens` once; all rows of `run` share the result without a copy."""
        cache = self.model.make_cache(1, len(tokens) + 1, block=BLOCK)
        self._read_prompt(cache, 0, [self.tokenizer.bos, *tokens])
        return Prefix(tokens, cache)

    def run(self, requests: Iterable[Request], *, rows: int = 8, prefix: Prefix | None = None) -> Iterator[TokenOutput]:
        """Answer requests, up to `rows` at a time. When one ends, the next request takes its row.

        The answer to a request depends neither on the others nor on `rows`, except for rounding.

        Args:
            prefix: tokens that all requests continue, from `read`.

        Raises:
            ValueError: a prompt leaves no room for a token.
        """
        waiting, batch = enumerate(requests), self.batch(rows, prefix)
        while True:
            while batch.has_room and (numbered := next(waiting, None)) is not None:
                yield batch.add(*numbered)
            if not len(batch):
                return
            yield from batch.step()

    def batch(self, rows: int, prefix: Prefix | None = None) -> "Batch":
        """Return an empty batch of this many rows, at least one, with a cache of its own."""
        return Batch(self, max(1, rows), prefix)

    def _read_prompt(self, cache: Cache, row: int, tokens: Sequence[int]) -> Tensor:
        """Return the logits (1, V) after the last of the tokens."""
        for start in range(0, len(tokens), cache.block):
            idx = torch.tensor([tokens[start : start + cache.block]], device=self.device)
            logits = self.model(idx, cache=cache.step(slice(row, row + 1), idx.size(1)), logits_to_keep=1)
        return logits[:, -1]


class _Text:
    """State of one request that is being answered."""

    def __init__(self, request: int, sampling: Sampling, tokenizer: Tokenizer):
        self.request, self.sampling, self.tokenizer = request, sampling, tokenizer
        self.random = random.Random(sampling.seed)
        self.stop_tokens = {tokenizer.bos, *sampling.stop_tokens}
        self.utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.token, self.n_tokens, self.held_back = None, 0, ""

    def output(self, drawn: Drawn, is_full: bool) -> TokenOutput:
        """Add the next token to the text, and return the output. `is_full`: the context has no room for another."""
        token, finished, data = drawn.token, "", b""
        if token in self.stop_tokens:
            finished = "bos" if token == self.tokenizer.bos else "stop"
            token = None
        else:
            data, self.token, self.n_tokens = self.tokenizer.decode_bytes([token]), token, self.n_tokens + 1
            if self.n_tokens >= self.sampling.max_tokens:
                finished = "max_tokens"
            elif is_full:
                finished = "sequence_len"
        text, stopped = self._emit(self.utf8.decode(data, final=bool(finished)), is_last=bool(finished))
        if stopped and token is not None:
            finished = "stop"
        logprob = drawn.logprob if self.sampling.logprobs else None
        return TokenOutput(self.request, token, text, logprob, drawn.top[: self.sampling.top_logprobs], finished)

    def _emit(self, text: str, is_last: bool) -> tuple[str, bool]:
        """Return the text that can be emitted now, and whether a stop text has come."""
        text = self.held_back + text
        positions = [at for stop in self.sampling.stop if (at := text.find(stop)) >= 0]
        if positions:
            return text[: min(positions)], True
        prefixes = (stop[:n] for stop in self.sampling.stop for n in range(1, min(len(stop), len(text) + 1)))
        hold = 0 if is_last else max((len(prefix) for prefix in prefixes if text.endswith(prefix)), default=0)
        text, self.held_back = text[: len(text) - hold], text[len(text) - hold :]
        return text, False


class Batch:
    """The requests that are being answered, one in each row of the cache. `len(batch)` counts them.

    They join and leave between steps. What a row draws depends on its own prompt and seed alone, except for rounding.
    """

    def __init__(self, engine: Engine, n_rows: int, prefix: Prefix | None):
        self.engine, self.prefix, self.n_rows = engine, prefix, n_rows
        self.sequence_len = engine.model.config.sequence_len
        length, shared = self.sequence_len, None
        if prefix is not None:
            length, shared = max(0, length - prefix.cache.lengths[0]), prefix.cache
        self.cache = engine.model.make_cache(n_rows, length, block=BLOCK, prefix=shared)
        self.decoder = Decoder(engine.model, self.cache, engine.tokenizer.vocab_size, engine.compile)
        self.texts: list[_Text] = []

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def has_room(self) -> bool:
        """Whether a row is free."""
        return len(self.texts) < self.n_rows

    @torch.inference_mode()
    def add(self, number: int, request: Request) -> TokenOutput:
        """Read a prompt into a free row, and draw its first token. `number` names the request in all outputs.

        Raises ValueError for a prompt that leaves no room for a token. The batch is then as it was.
        """
        cache, row, tokenizer = self.cache, len(self.texts), self.engine.tokenizer
        tokens, seen = list(request.tokens), set(request.tokens)
        if self.prefix is None:
            tokens = [tokenizer.bos, *tokens]
        else:
            seen.update(self.prefix.tokens)
        if (n := cache.first + len(tokens)) > self.sequence_len:
            raise ValueError(f"the prompt: given {n} tokens, expected at most sequence_len {self.sequence_len}")
        if not tokens:
            raise ValueError("the prompt: given no token after the prefix, expected one or more")
        if request.sampling.max_tokens == 0:
            return TokenOutput(number, None, "", finished="max_tokens")
        cache.lengths[row] = cache.first  # forget the row's last request
        logits = self.engine._read_prompt(cache, row, tokens)
        self.decoder.set_row(row, request.sampling, seen)
        text = _Text(number, request.sampling, tokenizer)
        output = text.output(self.decoder.first(row, logits, text.random.random()), self._is_full(row))
        if not output.finished:
            self.texts.append(text)
        return output

    def step(self) -> list[TokenOutput]:
        """Draw a token for each row, and remove the rows that have ended."""
        drawn = self.decoder.step([text.token for text in self.texts], [text.random.random() for text in self.texts])
        outputs = [self.texts[row].output(one, self._is_full(row)) for row, one in enumerate(drawn)]
        for row in reversed(range(len(outputs))):
            if outputs[row].finished:
                self._remove(row)
        return outputs

    def cancel(self, number: int) -> None:
        """Free the row of a request. Nothing happens if it has none."""
        for row, text in enumerate(self.texts):
            if text.request == number:
                self._remove(row)
                return

    def _remove(self, row: int) -> None:
        """Move the last row over this one."""
        last = self.texts.pop()
        if row < len(self.texts):
            self.decoder.move(len(self.texts), row)
            self.texts[row] = last

    def _is_full(self, row: int) -> bool:
        return self.cache.lengths[row] >= self.sequence_len
