"""A trained model's weights as decoding wants them: a step reads all of them once, so their bytes are its time.

model = for_inference(load_model(run_dir)[0], torch.bfloat16, int8=True)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gkachat.attention.linear import Linear
from gkachat.model.gpt import GPT


class Int8Linear(nn.Module):
    """A matrix as bytes, with a scale for each of its rows; products are in the dtype of the input."""

    def __init__(self, linear: Linear):
        super().__init__()
        weight = linear.weight.detach().float()
        scale = weight.abs().amax(dim=1).clamp(min=torch.finfo(torch.float32).tiny) / 127
        self.register_buffer("weight", (weight / scale[:, None]).round().to(torch.int8))
        self.register_buffer("per_unit", 1 / scale)

    def forward(self, x: Tensor) -> Tensor:
        # Divided: torch 2.13's compiler takes a multiplication for a CPU kernel's pattern, and fails on it.
        return F.linear(x, self.weight.to(x.dtype)) / self.per_unit.to(x.dtype)


def for_inference(model: GPT, dtype: torch.dtype, int8: bool = False) -> GPT:
    """The same model, with embeddings and matrices kept in `dtype` and no longer to be trained.

    `int8`: matrices and the head as bytes with a scale a row, rounded to the nearest: half of bfloat16's bytes. On a
    GPU with a compiled step they are read as bytes; elsewhere they are widened first: that saves memory and not time.
    """
    for module in list(model.modules()):
        for name, child in module.named_children():
            if int8 and isinstance(child, Linear):
                setattr(module, name, Int8Linear(child))
            elif isinstance(child, Linear | nn.Embedding):
                child.to(dtype)
    model.prepare(dtype)
    return model.requires_grad_(False).eval()
