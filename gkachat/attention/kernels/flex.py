"""Softmax attention with a sliding window on a GPU, through FlexAttention's block masks."""

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from gkachat.attention.qkv import QKV


class FlexAttention:
    """Causal window attention. Block masks are made once for each length, outside the compiled graph."""

    def __init__(self, window: int, sequence_len: int, device: torch.device):
        self.window, self.device = window, device
        # Uncompiled, FlexAttention would form all T x T scores.
        self.compiled = torch.compile(flex_attention, dynamic=False)
        self.masks = {sequence_len: self._mask(sequence_len)}

    def _mask(self, T: int) -> BlockMask:
        def sees(b, h, i, j):
            return (i >= j) & (i - j < self.window)

        return create_block_mask(sees, None, None, T, T, device=self.device)

    def attend(self, qkv: QKV) -> Tensor:
        """Return softmax attention over the window, (B, T, H, D)."""
        T = qkv.q.size(1)
        if T not in self.masks:
            self.masks[T] = self._mask(T)
        q, k, v = (t.transpose(1, 2) for t in qkv[:3])
        return self.compiled(q, k, v, block_mask=self.masks[T], scale=qkv.scale).transpose(1, 2)
