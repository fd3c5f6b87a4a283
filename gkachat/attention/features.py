"""What is done to a head's channels before tokens are compared: norm, rotation.

Axes: B batch, T time, H heads, D head_dim.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

ROPE_BASE = 100_000.0

Rope = tuple[Tensor, Tensor]
"""(cos, sin), each (T, D/2)."""


def rms_norm(x: Tensor) -> Tensor:
    """Divide the last axis by its root mean square; no learned scale."""
    return F.rms_norm(x, (x.size(-1),))


def rope_table(seq_len: int, head_dim: int, device: torch.device | str | None = None) -> Rope:
    """Angles of positions 0 .. seq_len-1, float32: position times base^(-2i/D) (RoFormer, arXiv 2104.09864)."""
    frequencies = ROPE_BASE ** (-torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim)
    angles = torch.outer(torch.arange(seq_len, dtype=torch.float32, device=device), frequencies)
    return angles.cos(), angles.sin()


def apply_rope(x_BTHD: Tensor, rope: Rope) -> Tensor:
    """Rotate channel i against channel i + D/2 by the position's angle; norms and dot products at a distance stay."""
    cos, sin = (table[:, None, :] for table in rope)
    a, b = x_BTHD.chunk(2, dim=-1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1).to(x_BTHD.dtype)
