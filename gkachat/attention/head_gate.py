"""Head gates: each head's output times 2 sigmoid(W x[:12]) of the token (arXiv 2505.06708, "head-wise")."""

import torch
from torch import Tensor, nn

from gkachat.attention.linear import Linear
from gkachat.config import GPTConfig

GATE_CHANNELS = 12  # channels of the block input that the gates read


class HeadGate(nn.Module):
    """Multiplies the output of each head by a number from 0 to 2 that the token decides. It starts at 1."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.gate = Linear(GATE_CHANNELS, config.n_head)

    def init_weights(self) -> None:
        """Start with every gate at 1."""
        nn.init.zeros_(self.gate.weight)

    def forward(self, y_BTHD: Tensor, x_BTC: Tensor) -> Tensor:
        """Return the gated heads (B, T, H, D)."""
        return (2 * torch.sigmoid(self.gate(x_BTC[..., :GATE_CHANNELS])))[..., None] * y_BTHD
