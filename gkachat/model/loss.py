"""Output head and loss in one operation, which forms the logits of only a few rows at a time.

A batch of 32 x 2,048 tokens over a vocabulary of 32,768 has 8.6 GB of float32 logits, and as much again for their
gradient. Here the gradient of each part is computed while its logits exist, in the forward; the backward only scales.
`head_loss` is plain PyTorch, for every device; loss_triton.py is its fast form on CUDA. `choose_head_loss` takes one.
Axes: N tokens, C channels, V vocabulary.
"""

import importlib.util
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from gkachat.attention.features import cast
from gkachat.machine import no_triton

LOGIT_CAP = 15.0
IGNORE = -1  # target that is not scored
LOGITS_PER_PART = 2**26
LOGITS_IN_CACHE = 2**20  # 4 MiB in float32: on a CPU, passes over so many are 1.3 to 2 times as fast as over a part


def soft_cap(logits: Tensor) -> Tensor:
    """Return 15 tanh(logits) in float32. The caller has divided the logits by 15. The input may be overwritten."""
    return logits.float().tanh_() * LOGIT_CAP


def head_loss(x_NC: Tensor, weight_VC: Tensor, targets_N: Tensor) -> Tensor:
    """Return the mean cross-entropy in nats, float32, over the targets that are not -1; NaN where there are none."""
    return _HeadLoss.apply(x_NC, weight_VC, targets_N, torch.is_grad_enabled())


def scored_head_loss(x_NC: Tensor, weight_VC: Tensor, targets_N: Tensor) -> Tensor:
    """Return the mean cross-entropy of the scored targets, as `head_loss` does, without logits for the others.

    Tuning does not score what the user says. For CPUs alone: a GPU would have to wait for the number of scored targets,
    and a compiled graph needs shapes that do not depend on it.
    """
    scored_N = targets_N != IGNORE
    if torch.compiler.is_compiling() or isinstance(x_NC, FakeTensor) or scored_N.all() or not scored_N.any():
        return head_loss(x_NC, weight_VC, targets_N)
    return head_loss(x_NC[scored_N], weight_VC, targets_N[scored_N])


class HeadLoss(NamedTuple):
    """A function that computes the head's loss, its name, and why it was chosen."""

    name: str
    reason: str
    compute: Callable[[Tensor, Tensor, Tensor], Tensor]
    """Takes what `head_loss` takes, and returns the same."""


def choose_head_loss(device: torch.device, dtype: torch.dtype) -> HeadLoss:
    """Return the fastest function for the head's loss on a device, for activations of a dtype."""
    obstacles = list(filter(None, [no_triton(device)]))
    obstacles += [f"the dtype is {dtype}"] if dtype not in (torch.bfloat16, torch.float16, torch.float32) else []
    obstacles += ["triton is not installed"] if importlib.util.find_spec("triton") is None else []
    if obstacles:
        compute = scored_head_loss if device.type == "cpu" else head_loss
        return HeadLoss("torch", f"no triton kernel: {'; '.join(obstacles)}", compute)
    from gkachat.model import loss_triton

    return HeadLoss("triton", "one kernel makes loss and gradient of the logits in place", loss_triton.head_loss)


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_NC: Tensor, weight_VC: Tensor, targets_N: Tensor, with_gradients: bool) -> Tensor:
        weight = cast(weight_VC, x_NC.dtype)
        scored_N = targets_N != IGNORE
        count = scored_N.sum()
        total = torch.zeros((), dtype=torch.float32, device=x_NC.device)
        dx, dweight = [], torch.zeros_like(weight_VC) if with_gradients else None
        few = rows = max(1, LOGITS_PER_PART // weight.size(0))
        if x_NC.device.type == "cpu":  # a compiled graph holds every piece, so that there are 64 at most
            few = max(1, LOGITS_IN_CACHE // weight.size(0), len(x_NC) // 64)
        for part in zip(x_NC.split(rows), targets_N.split(rows), scored_N.split(rows), strict=True):
            dlogits_NV = x_NC.new_empty(len(part[0]), weight.size(0)) if with_gradients else None
            done = 0
            for x, targets, scored in zip(*(t.split(few) for t in part), strict=True):
                # In place wherever possible: allocating memory for each of these passes takes as long as the passes.
                # 15 tanh(u / 15) is 30 sigmoid(u / 7.5) - 15. The 15 cancels in the softmax, and a CPU takes half as
                # long for a sigmoid as for a tanh.
                sigmoid = ((x / (LOGIT_CAP / 2)) @ weight.mT).float().sigmoid_()
                target = targets.clamp(min=0)[:, None]
                # Exponents are at most 30, so that they need no maximum subtracted to stay finite.
                p = (2 * LOGIT_CAP * sigmoid).exp_()
                p_sum = p.sum(dim=-1, keepdim=True)
                sigmoid_target = sigmoid.gather(-1, target)
                losses = p_sum.log() - 2 * LOGIT_CAP * sigmoid_target
                total += torch.where(scored, losses[:, 0], 0).sum()
                if with_gradients:
                    # Through the cap: the derivative of 30 sigmoid(u / 7.5) is 4 sigmoid (1 - sigmoid).
                    p.mul_(sigmoid.addcmul_(sigmoid, sigmoid, value=-1)).mul_(4 * scored[:, None] / p_sum)
                    p.scatter_add_(-1, target, 4 * (sigmoid_target.square() - sigmoid_target) * scored[:, None])
                    dlogits = dlogits_NV[done : done + len(x)].copy_(p)
                    dx.append(dlogits @ weight)
                    done += len(x)
            if with_gradients:
                dweight += dlogits_NV.mT @ part[0]
        if with_gradients:
            ctx.save_for_backward(torch.cat(dx), dweight, count)
        return total / count

    @staticmethod
    def backward(ctx, dloss: Tensor) -> tuple[Tensor | None, ...]:
        dx, dweight, count = ctx.saved_tensors
        scale = dloss / count
        return dx * cast(scale, dx.dtype), dweight * cast(scale, dweight.dtype), None, None
