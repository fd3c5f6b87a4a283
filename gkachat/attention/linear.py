"""What attention layers and the model are built from."""

import math
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

Groups = dict[str, list[nn.Parameter]]
Keep = Callable[..., None]  # given what decoding keeps of some tokens, each (B, T, H, width)


class Linear(nn.Linear):
    """A matrix without bias, kept in its own dtype and multiplied in that of its input."""

    def __init__(self, n_in: int, n_out: int):
        super().__init__(n_in, n_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


def uniform_(weight: Tensor, std: float) -> None:
    """Fill from a uniform distribution around 0 with the given standard deviation."""
    nn.init.uniform_(weight, -math.sqrt(3) * std, math.sqrt(3) * std)
