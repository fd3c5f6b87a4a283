"""Forget gates: how fast each head forgets, decided by every token (FoX, arXiv 2503.02130).

The weight of token j for a later token i is multiplied by f_(j+1) f_(j+2) ... f_i, where f = sigmoid(W x + b) of each
token and head is between 0 and 1. In the scores that is c_j - c_i, where c is the running sum of -log f. The query's
term cancels in the softmax, so that c_j is a bias of the key. A layer with forget gates needs no other positions.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gkachat.attention.linear import Linear
from gkachat.config import GPTConfig

MEMORY = (8, 512)  # tokens after which the first and the last head have forgotten 1 - 1/e, to start with
CHANNELS = 3  # of a key that hold its bias: with three numbers in bfloat16 it keeps the precision of float32


class ForgetGate(nn.Module):
    """Bias of each key that makes every head forget at a rate that the tokens decide."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.gate = Linear(config.n_embd, config.n_head)
        self.bias = nn.Parameter(torch.empty(config.n_head))

    def init_weights(self) -> None:
        """Start with a constant rate per head, from 1 in 8 to 1 in 512 tokens on a logarithmic scale."""
        nn.init.zeros_(self.gate.weight)
        rates = torch.logspace(*(math.log2(tokens) for tokens in MEMORY), self.bias.numel(), base=2.0)
        with torch.no_grad():
            self.bias.copy_((rates - 1).log())  # sigmoid(log(n - 1)) = 1 - 1/n

    def forward(self, x_BTC: Tensor) -> Tensor:
        """Return the running sum of -log f over the tokens, (B, T, H, 1) in float32 at least."""
        logits = self.gate(x_BTC)
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return -F.logsigmoid(wide + self.bias).cumsum(dim=1)[..., None]


def with_bias(q_BTHD: Tensor, k_BTHD: Tensor, bias_BTH1: Tensor) -> tuple[Tensor, Tensor]:
    """Return queries and keys of which the last three channels add the bias of the key to the score.

    What they held before is lost; scores are q.k. Any softmax kernel can then run the layer.
    """
    ones = q_BTHD.new_ones(*q_BTHD.shape[:-1], CHANNELS)
    parts = [part.to(k_BTHD.dtype) for part in split(bias_BTH1)]
    return torch.cat((q_BTHD[..., :-CHANNELS], ones), dim=-1), torch.cat((k_BTHD[..., :-CHANNELS], *parts), dim=-1)


def split(bias: Tensor) -> list[Tensor]:
    """Split a bias into three tensors that add up to it. Each part of a float32 bias is exact in bfloat16.

    The gradient goes to the last part. Bits are cut off, not rounded: torch.compile drops a round trip through
    bfloat16, which would leave the whole bias in the first part.
    """
    parts = []
    for _ in range(CHANNELS - 1):
        bits = bias.detach().float().view(torch.int32)
        parts.append((bits & -0x10000).view(torch.float32))  # sign, exponent and 8 significant bits
        bias = bias - parts[-1]
    return [*parts, bias]
