"""What attention layers and the model are built from."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

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
