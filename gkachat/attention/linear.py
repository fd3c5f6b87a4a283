"""What attention layers and the model are built from."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gkachat.config import GPTConfig

GATE_CHANNELS = 12  # block-input channels that the value gates look at

Groups = dict[str, list[nn.Parameter]]
Keep = Callable[..., None]  # given what decoding keeps of some tokens, each (B, T, H, width)


class Look(NamedTuple):
    """What a layer does with a text, written down plainly; B batch, T query time, S key time, H heads, D head_dim."""

    weights: Tensor
    """(B, H, T, S) float32. A row sums to 1, or to less where something else than a token takes a share."""
    values: Tensor
    """(B, S, H, D), what the weights are of: weights @ values through c_proj is the layer's output."""
    distances: Tensor | None
    """(B, H, T, S) float32, the squared distances that sigma is measured against, where there is one."""


class Linear(nn.Linear):
    """A matrix without bias, kept in its own dtype and multiplied in that of its input."""

    def __init__(self, n_in: int, n_out: int):
        super().__init__(n_in, n_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


def uniform_(weight: Tensor, std: float) -> None:
    """Fill from a uniform distribution around 0 with the given standard deviation."""
    nn.init.uniform_(weight, -math.sqrt(3) * std, math.sqrt(3) * std)


class ValueEmbeddings(nn.Module):
    """A layer that may add a learned vector per token to its values: parameters without a FLOP.

    Where they are wanted, every other layer has them and always the last, gated per head by 3 sigmoid(W x[:12]).
    """

    def __init__(self, config: GPTConfig, index: int, wanted: bool):
        super().__init__()
        here = wanted and (config.depth - 1 - index) % 2 == 0
        self.value_embedding = nn.Embedding(config.vocab_size, config.n_embd) if here else None
        self.value_gate = Linear(GATE_CHANNELS, config.n_head) if here else None

    def init_value_embedding(self) -> None:
        if self.value_embedding is not None:
            for module in (self.value_embedding, self.value_gate):
                uniform_(module.weight, self.value_embedding.embedding_dim**-0.5)

    def value_groups(self) -> Groups:
        if self.value_embedding is None:
            return {}
        return {"value_embeddings": [self.value_embedding.weight], "value_gates": [self.value_gate.weight]}

    def add_value_embedding(self, v_BTHD: Tensor, x_BTC: Tensor, idx_BT: Tensor) -> Tensor:
        if self.value_embedding is None:
            return v_BTHD
        gate = 3 * torch.sigmoid(self.value_gate(x_BTC[..., :GATE_CHANNELS]))
        return v_BTHD + gate[..., None] * self.value_embedding(idx_BT).to(v_BTHD.dtype).view(v_BTHD.shape)
