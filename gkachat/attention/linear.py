"""Linear layer without bias, and embedding, which models are built from."""

import math

import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Linear):
    """Matrix without bias. Its weight stays in float32 and is cast to the dtype of its input."""

    def __init__(self, n_in: int, n_out: int):
        super().__init__(n_in, n_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class Embedding(nn.Embedding):
    """Table of learned vectors, looked up by id."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:  # torch would import its compiler, which takes as long as torch, to draw nothing
            super().reset_parameters()


def uniform_(weight: Tensor, std: float) -> None:
    """Fill with a uniform distribution around 0 of the given standard deviation."""
    nn.init.uniform_(weight, -math.sqrt(3) * std, math.sqrt(3) * std)
