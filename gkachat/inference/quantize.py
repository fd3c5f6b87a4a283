"""Models for inference: weights for decoding, and the forward pass that evaluates whole texts.

model = for_inference(load_model(run_dir)[0], torch.bfloat16, int8=True)
compiled_on_gpu(model)(idx)

A decode step reads all weights once, so that their bytes decide its time.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gkachat.attention.features import ShortConv
from gkachat.attention.linear import Linear
from gkachat.model.gpt import GPT


class Int8Linear(nn.Module):
    """Matrix in int8 with one scale per row. Products are in the dtype of the input."""

    def __init__(self, linear: Linear):
        super().__init__()
        weight = linear.weight.detach().float()
        scale = weight.abs().amax(dim=1).clamp(min=torch.finfo(torch.float32).tiny) / 127
        self.register_buffer("weight", (weight / scale[:, None]).round().to(torch.int8))
        self.register_buffer("inverse_scale", 1 / scale)

    def forward(self, x: Tensor) -> Tensor:
        # A division, because torch 2.13's compiler takes a multiplication for a CPU kernel's pattern and fails on it.
        return F.linear(x, self.weight.to(x.dtype)) / self.inverse_scale.to(x.dtype)


def for_inference(model: GPT, dtype: torch.dtype, int8: bool = False) -> GPT:
    """Convert a model in place: its large weights in `dtype`, no gradients, eval mode. Returns the model.

    `int8` keeps matrices and head in int8 with a scale per row, half of bfloat16's bytes. A compiled step on a GPU
    reads them as int8. Elsewhere they are widened first, which saves memory and no time.
    """
    for module in list(model.modules()):
        for name, child in module.named_children():
            if int8 and isinstance(child, Linear):
                setattr(module, name, Int8Linear(child))
            elif isinstance(child, Linear | nn.Embedding | ShortConv):
                child.to(dtype)
    model.prepare(dtype)
    return model.requires_grad_(False).eval()


def compiled_on_gpu(model: nn.Module) -> nn.Module:
    """Return a model on a GPU with its forward pass compiled, and any other as it is. Both have the same weights.

    Batches have one length. Where their rows are marked as dynamic, as `bpb_sums` does, one graph serves all numbers of
    rows above 1.
    """
    device = next(model.parameters()).device
    return torch.compile(model, dynamic=False) if device.type == "cuda" else model
