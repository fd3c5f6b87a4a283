"""How the next token is drawn from logits.

    ids = sample(logits, settings_of(samplings, device), plan_of(samplings), draws, seen)

Numbers of rows are a tensor, and what has to be computed for them at all a Plan: for one plan the work is the same
whatever the numbers are, so that it can be recorded.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from gkachat.config import at_least, require


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


class Plan(NamedTuple):
    """What drawing for some rows takes."""

    greedy: bool
    """All of them take the likeliest."""
    most: int | None
    """So many likeliest are enough; None: all."""
    top_p: bool
    min_p: bool
    penalty: bool
    logprobs: bool


def plan_of(samplings: Sequence[Sampling]) -> Plan:
    # Greedy is a sample from the likeliest one.
    top_k = [1 if s.temperature == 0 else s.top_k for s in samplings]
    return Plan(
        greedy=all(s.temperature == 0 for s in samplings),
        most=None if None in top_k else max(top_k),
        top_p=any(s.top_p is not None for s in samplings),
        min_p=any(s.min_p is not None for s in samplings),
        penalty=any(s.repetition_penalty != 1 for s in samplings),
        logprobs=any(s.logprobs for s in samplings),
    )


def settings_of(samplings: Sequence[Sampling], device: torch.device | str = "cpu") -> Tensor:
    """(B, 5): temperature, top_k, top_p, min_p, repetition penalty."""
    rows = [
        (s.temperature, s.top_k or 2**24, s.top_p or 1.0, s.min_p or 0.0, s.repetition_penalty)
        if s.temperature
        else (1.0, 1, 1.0, 0.0, s.repetition_penalty)
        for s in samplings
    ]
    return torch.tensor(rows, dtype=torch.float32, device=device)


def sample(logits: Tensor, settings: Tensor, plan: Plan, draws: Tensor, seen: Tensor | None = None) -> Tensor:
    """An id for each row (B,) of logits (B, V), float32.

    Args:
        draws: (B,) float64, a number in [0, 1) for each row, which decides.
        seen: (B, V), whether an id was there before, for the repetition penalty.
    """
    temperature, top_k, top_p, min_p, penalty = settings[:, :, None].unbind(dim=1)
    if plan.penalty:
        logits = torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
    if plan.greedy:
        return logits.argmax(dim=-1)
    logits = logits / temperature
    V = logits.size(-1)
    # Sorted, every cut leaves the first of them; probabilities are of the whole vocabulary.
    highest, ids = logits.topk(min(plan.most or V, V), dim=-1)
    p = (highest - logits.logsumexp(dim=-1, keepdim=True)).exp()
    p = p * (torch.arange(p.size(-1), device=p.device) < top_k)
    if plan.top_p:  # of what top_k has left
        p = p / p.sum(dim=-1, keepdim=True)
        p = p * ((p.cumsum(dim=-1) - p < top_p) | (top_p == 1))
    if plan.min_p:
        p = p * (p >= p[:, :1] * min_p)
    reached = p.double().cumsum(dim=-1)
    choice = (reached <= draws[:, None] * reached[:, -1:]).sum(dim=-1, keepdim=True).clamp(max=p.size(-1) - 1)
    return ids.gather(1, choice)[:, 0]
