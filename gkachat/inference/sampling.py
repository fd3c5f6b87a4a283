"""Sampling: how the next token is drawn from logits.

    ids = sample(logits, settings_tensor(samplings, device), make_plan(samplings), draws, seen)

The settings of each row are numbers in a tensor. A SamplingPlan says which computations any of the rows needs. For one
plan, the work is the same whatever the numbers are, so that it can be recorded as a CUDA graph.
Axes: B rows, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from gkachat.checks import at_least, require

TOP_LOGPROBS = 20  # the most that a row may ask for
# Settings beyond these act as these do, and logits, of which none is above 15, stay finite in float32.
MIN_TEMPERATURE, MAX_PENALTY = 1e-20, 1e15


@dataclass(frozen=True)
class Sampling:
    """Settings for one text. Raises ConfigError for values out of range."""

    max_tokens: int = 256
    """Tokens to generate at most."""
    temperature: float = 1.0
    """Divides the logits; 0 takes the likeliest token each time."""
    top_k: int | None = None
    """Sample from this many likeliest tokens."""
    top_p: float | None = None
    """Sample from the likeliest tokens that together reach this probability, after top_k."""
    min_p: float | None = None
    """Drop tokens below this share of the likeliest token's probability."""
    repetition_penalty: float = 1.0
    """Divides the logits of tokens that occurred before, multiplies negative ones (CTRL, arXiv 1909.05858)."""
    seed: int = 42
    """Seeds this text's draws."""
    stop: tuple[str, ...] = ()
    """Texts that end the generation; they are not emitted."""
    stop_tokens: tuple[int, ...] = ()
    """Token ids that end the generation, besides BOS."""
    logprobs: bool = False
    """Return the log-probability of each token, before temperature and cuts."""
    top_logprobs: int = 0
    """Return this many of the likeliest tokens with their log-probabilities beside each token."""

    def __post_init__(self) -> None:
        require(
            self,
            temperature=(self.temperature >= 0, "0 or more"),
            top_p=(self.top_p is None or 0 < self.top_p <= 1, "above 0, at most 1"),
            min_p=(self.min_p is None or 0 <= self.min_p <= 1, "0 to 1"),
            repetition_penalty=(self.repetition_penalty > 0, "above 0"),
            stop=(all(self.stop), "texts that are not empty"),
            top_logprobs=(0 <= self.top_logprobs <= TOP_LOGPROBS, f"0 to {TOP_LOGPROBS}"),
            **at_least(0, self, "max_tokens"),
            **at_least(1, self, "top_k"),
        )


class SamplingPlan(NamedTuple):
    """Kinds of computation that drawing for some rows needs."""

    greedy: bool
    """All rows take the likeliest token."""
    max_top_k: int | None
    """Largest top_k of the rows; None: some row has no limit."""
    top_p: bool
    min_p: bool
    penalty: bool
    logprobs: bool
    top_logprobs: bool


def make_plan(samplings: Sequence[Sampling]) -> SamplingPlan:
    """Return the plan that covers all of these settings."""
    top_k = [1 if s.temperature == 0 else s.top_k for s in samplings]  # greedy is a sample from the likeliest one
    return SamplingPlan(
        greedy=all(s.temperature == 0 for s in samplings),
        max_top_k=None if None in top_k else max(top_k),
        top_p=any(s.top_p is not None for s in samplings),
        min_p=any(s.min_p is not None for s in samplings),
        penalty=any(s.repetition_penalty != 1 for s in samplings),
        logprobs=any(s.logprobs or s.top_logprobs for s in samplings),
        top_logprobs=any(s.top_logprobs for s in samplings),
    )


def settings_tensor(samplings: Sequence[Sampling], device: torch.device | str = "cpu") -> Tensor:
    """Return (B, 5): temperature, top_k, top_p, min_p and repetition penalty of each row."""
    rows = []
    for s in samplings:
        settings = (max(s.temperature, MIN_TEMPERATURE), s.top_k or 2**24, s.top_p or 1.0, s.min_p or 0.0)
        penalty = min(max(s.repetition_penalty, 1 / MAX_PENALTY), MAX_PENALTY)
        rows.append((*(settings if s.temperature else (1.0, 1, 1.0, 0.0)), penalty))
    return torch.tensor(rows, dtype=torch.float32, device=device)


def sample(logits: Tensor, settings: Tensor, plan: SamplingPlan, draws: Tensor, seen: Tensor | None = None) -> Tensor:
    """Draw an id for each row, (B,).

    Args:
        logits: (B, V) float32.
        settings: (B, 5), from settings_tensor.
        draws: (B,) in [0, 1), float64, or float32 where the device has nothing wider. Each decides its row's draw.
        seen: (B, V) bool, whether an id occurred before; needed for the repetition penalty.
    """
    temperature, top_k, top_p, min_p, penalty = settings[:, :, None].unbind(dim=1)
    if plan.penalty:
        logits = torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
    if plan.greedy:
        return logits.argmax(dim=-1)
    logits = logits / temperature
    V = logits.size(-1)
    # After sorting, every cut keeps the first tokens. Probabilities are those within the whole vocabulary.
    highest, ids = logits.topk(min(plan.max_top_k or V, V), dim=-1)
    p = (highest - logits.logsumexp(dim=-1, keepdim=True)).exp()
    p = p * (torch.arange(p.size(-1), device=p.device) < top_k)
    if plan.top_p:  # within what top_k has left
        p = p / p.sum(dim=-1, keepdim=True)
        p = p * ((p.cumsum(dim=-1) - p < top_p) | (top_p == 1))
    if plan.min_p:
        p = p * (p >= p[:, :1] * min_p)
    cumulative = p.to(draws.dtype).cumsum(dim=-1)
    choice = (cumulative <= draws[:, None] * cumulative[:, -1:]).sum(dim=-1, keepdim=True).clamp(max=p.size(-1) - 1)
    return ids.gather(1, choice)[:, 0]
