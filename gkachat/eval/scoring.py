"""Likelihoods of many texts under a model. Prefixes that texts share are read once. CORE and the harness use it.

    group = Group(prefix, [Continuation(0, tokens, start=1), Continuation(1, other_tokens, start=1)])
    for (number, text), score in score_texts(model, [group, ...]):    # text: all of its tokens
        score.mean_loss, score.greedy

A group's prefix is read once into a KV cache, for many groups at a time. The continuations of a group follow it one
after the other, and only their tokens get logits. Up to rounding, this equals scoring each text alone.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from gkachat.model.gpt import GPT

MAX_BATCH_TOKENS = {"cpu": 2**12, "cuda": 2**16}  # with padding; a cache of 2^16 takes 6.6 GB at depth 20 in bfloat16
MAX_SCORES = 2**26  # logits, or attention scores of one layer, in one forward pass


class Continuation(NamedTuple):
    """Tokens of one text after its group's prefix."""

    number: int
    """Number that the caller gives to the text, for example of its question."""
    tokens: tuple[int, ...]
    start: int
    """Tokens from here on are scored; 1 or more."""


@dataclass
class Group:
    """Texts that share a prefix, which is read once for all of them."""

    prefix: tuple[int, ...]
    continuations: list[Continuation]

    def __post_init__(self) -> None:
        self.continuations.sort(key=lambda continuation: -len(continuation.tokens))  # the longest first

    @classmethod
    def alone(cls, number: int, text: tuple[int, ...], start: int) -> "Group":
        """Return the group of one text, scored from token `start` on. Its prefix is all that is not scored."""
        return cls(text[: start - 1], [Continuation(number, text[start - 1 :], 1)])


@dataclass(frozen=True)
class TextScore:
    """Scores of a text's tokens from its start on."""

    mean_loss: float
    """Nats per token."""
    greedy: bool
    """Whether every token is the likeliest."""
    margin: float
    """Change of a logit that would change `greedy`."""

    @classmethod
    def of(cls, losses: Sequence[float], hits: Sequence[float], leads: Sequence[float]) -> "TextScore":
        return cls(sum(losses) / len(losses), all(hits), abs(min(leads)))


def score_texts(
    model: GPT, groups: list[Group], max_tokens: int | None = None
) -> Iterator[tuple[tuple[int, tuple[int, ...]], TextScore]]:
    """Yield ((number, the whole text's tokens), score) for every text.

    A batch has at most `max_tokens` tokens, by default the MAX_BATCH_TOKENS of the device.
    """
    device = model.wte.weight.device.type
    for batch in batch_groups(groups, max_tokens or MAX_BATCH_TOKENS.get(device, MAX_BATCH_TOKENS["cpu"])):
        yield from score_groups(model, batch).items()


def batch_groups(groups: list[Group], max_tokens: int) -> Iterator[list[Group]]:
    """Yield batches of groups of similar length, the longest first, of at most `max_tokens` tokens with padding.

    A group that is longer is a batch of its own.
    """
    batch: list[Group] = []
    longest_prefix = longest_tail = 0
    for group in sorted(groups, key=lambda group: (-len(group.prefix), -len(group.continuations[0].tokens))):
        tail = len(group.continuations[0].tokens)
        longest_tail = max(longest_tail, tail)
        if batch and (len(batch) + 1) * (longest_prefix + longest_tail) > max_tokens:
            yield batch
            batch, longest_tail = [], tail
        if not batch:
            longest_prefix = len(group.prefix)
        batch.append(group)
    if batch:
        yield batch


def score_tokens(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """Return (3, N): each target's loss, whether it is the likeliest token, and its lead over the best other one."""
    own_N = logits_NV.gather(1, targets_N[:, None])[:, 0]
    highest = logits_NV.topk(2, dim=-1).values
    lead_N = own_N - torch.where(own_N == highest[:, 0], highest[:, 1], highest[:, 0])
    return torch.stack([logits_NV.logsumexp(dim=-1) - own_N, (logits_NV.argmax(dim=-1) == targets_N).float(), lead_N])


def score_groups(model: GPT, batch: list[Group]) -> dict[tuple[int, tuple[int, ...]], TextScore]:
    """Score every text of a batch; keys are (number, the whole text's tokens)."""
    device = model.wte.weight.device
    batch = sorted(batch, key=lambda group: -len(group.continuations))
    prefix = max(len(group.prefix) for group in batch)
    length = prefix + max(len(group.continuations[0].tokens) for group in batch)
    cache = model.make_cache(len(batch), length, block=length)  # one block holds all, so that no window's slots wrap
    if prefix:
        idx = _pad([group.prefix for group in batch], prefix).to(device)
        model(idx, cache=cache.step(slice(0, len(batch)), prefix, prefill=True), logits_to_keep=1)
    texts, token_scores = [], []
    for k in range(len(batch[0].continuations)):
        groups = [group for group in batch if len(group.continuations) > k]  # the first rows of the cache
        for row, group in enumerate(groups):
            cache.lengths[row] = len(group.prefix)  # without padding and without the continuation before
        T = max(len(group.continuations[k].tokens) for group in groups) - 1
        n_rows = max(1, MAX_SCORES // (T * max(model.config.vocab_size, model.config.n_head * length)))
        for first in range(0, len(groups), n_rows):
            part = groups[first : first + n_rows]
            tokens = _pad([group.continuations[k].tokens for group in part], T + 1)
            scored = torch.zeros_like(tokens, dtype=torch.bool)
            for row, group in enumerate(part):
                number, tail, start = group.continuations[k]
                scored[row, start : len(tail)] = True
                texts.append(((number, group.prefix + tail), len(tail) - start))
            tokens, scored = tokens.to(device), scored.to(device)
            logits = model(tokens[:, :-1], cache=cache.step(slice(first, first + len(part)), T))
            token_scores.append(score_tokens(logits[scored[:, 1:]], tokens[scored]))
    numbers = iter(zip(*torch.cat(token_scores, dim=1).tolist(), strict=True))
    return {text: TextScore.of(*zip(*(next(numbers) for _ in range(n)), strict=True)) for text, n in texts}


def _pad(sequences: Sequence[Sequence[int]], length: int) -> Tensor:
    return torch.tensor([[*sequence, *[0] * (length - len(sequence))] for sequence in sequences])


def score_alone(model: GPT, text: tuple[int, ...], start: int) -> TextScore:
    """Score one text the plain way: alone, without a cache, with all its logits."""
    idx = torch.tensor([text], device=model.wte.weight.device)
    return TextScore.of(*score_tokens(model(idx)[0, start - 1 : -1], idx[0, start:]).tolist())
