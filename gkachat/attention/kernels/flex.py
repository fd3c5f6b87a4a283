"""Softmax attention with a sliding window on a GPU, through FlexAttention's block masks."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from gkachat.attention.qkv import QKV

BLOCK = 128  # a block mask's tile


def padded_length(T: int, sequence_len: int) -> int:
    """Return the smallest of 128, 256, 512, ... and sequence_len that holds T tokens."""
    power = BLOCK << max(0, (T - 1) // BLOCK).bit_length()
    return sequence_len if T <= sequence_len < power else power


class FlexAttention:
    """Causal window attention, compiled for few lengths: a text is padded at its end, which no earlier token sees.

    Uncompiled, FlexAttention would form all T x T scores, and torch.compile gives up after some 8 shapes. The lengths
    of `padded_length` are at most 1 + ceil(log2(sequence_len / 128)), and one graph serves any number of rows above 1.
    """

    def __init__(self, window: int, sequence_len: int, device: torch.device):
        self.window, self.sequence_len, self.device = window, sequence_len, device
        self.compiled = torch.compile(flex_attention, dynamic=False)
        self.masks = {sequence_len: self._mask(sequence_len)}  # made outside the graph that training compiles

    def _mask(self, T: int) -> BlockMask:
        def sees(b, h, i, j):
            return (i >= j) & (i - j < self.window)

        with torch.inference_mode(False):  # training can save no tensor that inference made
            return create_block_mask(sees, None, None, T, T, device=self.device)

    def attend(self, qkv: QKV) -> Tensor:
        """Return softmax attention over the window, (B, T, H, D)."""
        T = qkv.q.size(1)
        padded = padded_length(T, self.sequence_len)
        if padded not in self.masks:
            self.masks[padded] = self._mask(padded)
        q, k, v = (F.pad(t, (0, 0, 0, 0, 0, padded - T)) if padded > T else t for t in qkv[:3])
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        if torch.compiler.is_compiling():  # the outer graph decides which sizes are dynamic
            y = self.compiled(q, k, v, block_mask=self.masks[padded], scale=qkv.scale)
        else:
            for t in (q, k, v):
                torch._dynamo.maybe_mark_dynamic(t, 0)
            # All layers and lengths share the limit of one function. Above it, torch would run all T x T scores.
            with torch._dynamo.config.patch(recompile_limit=64):
                y = self.compiled(q, k, v, block_mask=self.masks[padded], scale=qkv.scale)
        return y.transpose(1, 2)[:, :T]
