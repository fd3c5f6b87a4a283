"""Output head and loss on a GPU: three matrix products per chunk of rows, and one Triton kernel between them.

The kernel turns a row of logits into the row's loss and, in place, into the gradient of the logits. A logit in bfloat16
moves 10 bytes in all: the product writes it, the kernel reads and overwrites it, and the products for dx and dweight
read it. The kernel's second reading of a row finds it in a cache. One chunk of logits and one dweight are in memory.

Liger-Kernel's fused loss (github.com/linkedin/Liger-Kernel) has the same structure and the same soft-cap, but it waits
for the GPU to count the targets, and its one block of 32,768 logits leaves room for one row on a multiprocessor.
cut-cross-entropy (arXiv 2411.09009) forms no logits, which takes a fourth product of the largest matrix and sums
gradients in a varying order. Both would be optional, so that a path without them must be as good.

`head_loss` of gkachat/model/loss.py is the reference. Imported only where it is used.
Axes: N tokens, C channels, V vocabulary.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gkachat.attention.features import cast
from gkachat.attention.kernels.gaussian_triton import on_device_of_first
from gkachat.attention.kernels.gaussian_triton_kernels import rounded
from gkachat.model.loss import IGNORE, LOGIT_CAP

LOGITS_PER_CHUNK = 2**28  # 512 MiB in bfloat16; each chunk also reads the weight twice, and reads and writes dweight
# Two rows on a multiprocessor, three without gradients: a cache keeps them for their second reading.
BLOCK, WARPS = 8192, 16
ALIGNMENT = 64  # rows of logits start at multiples of it, as fast products and wide loads demand

CAP = tl.constexpr(LOGIT_CAP)
IGNORED = tl.constexpr(IGNORE)
LOG2E = tl.constexpr(1.4426950408889634)
SPAN = tl.constexpr(2 * LOGIT_CAP * 1.4426950408889634)  # of capped logits, in base 2


@triton.jit
def _load_exponents(LOGITS, v, stride):
    """Return log2(e) (capped logit - cap) of a block of logits. What stands between V and the stride is noise.

    With r = 1 / (1 + exp(2 z / cap)), the capped logit cap tanh(z / cap) is cap - 2 cap r. It is never above the cap,
    which therefore takes the place of the row's maximum in the softmax.
    """
    z = tl.load(LOGITS + v, mask=v < stride, other=0.0).to(tl.float32)
    return (1.0 / (1.0 + tl.exp2(z * (2.0 * LOG2E / CAP)))) * -SPAN


@triton.jit
def loss_kernel(LOGITS, TARGETS, LOSSES, stride, V, BLOCK: tl.constexpr, GRADIENTS: tl.constexpr):
    """Write one row's loss in nats and, with GRADIENTS, the gradient of its logits in their place."""
    row = tl.program_id(0).to(tl.int64)
    LOGITS += row * stride
    target = tl.load(TARGETS + row)
    scored = target != IGNORED
    sums = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        v = start + tl.arange(0, BLOCK)
        sums += tl.where(v < V, tl.exp2(_load_exponents(LOGITS, v, stride)), 0.0)
    log2_sum = tl.log2(tl.sum(sums, 0))
    loss = (log2_sum - _load_exponents(LOGITS, tl.maximum(target, 0), stride)) / LOG2E
    tl.store(LOSSES + row, tl.where(scored, loss, 0.0))
    if GRADIENTS:
        tl.debug_barrier()  # every thread has read the target's logit before one overwrites it
        # Backwards, so that the second reading begins with what the cache took in last.
        for block in range(tl.cdiv(V, BLOCK) - 1, -1, -1):
            v = block * BLOCK + tl.arange(0, BLOCK)
            exponents = _load_exponents(LOGITS, v, stride)
            r = exponents / -SPAN
            d = (tl.exp2(exponents - log2_sum) - tl.where(v == target, 1.0, 0.0)) * (4.0 * r * (1.0 - r))
            d = tl.where(scored, d, 0.0)
            tl.store(LOGITS + v, rounded(d, LOGITS.dtype.element_ty), mask=v < stride)


@torch.library.custom_op("gkachat::head_loss", mutates_args=())
@on_device_of_first
def head_loss_sum(x: Tensor, weight: Tensor, targets: Tensor, with_gradients: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return the sum of the losses in nats, float32, and its gradients with respect to x and weight.

    x is (N, C), weight (V, C), targets (N,) with -1 where nothing is scored. Without gradients, both are empty.
    """
    (N, C), V = x.shape, weight.size(0)
    W, targets = cast(weight, x.dtype), targets.contiguous()
    rows = max(1, min(N, LOGITS_PER_CHUNK // V))
    buffer = x.new_empty(rows, triton.cdiv(V, ALIGNMENT) * ALIGNMENT)
    losses = x.new_empty(N, dtype=torch.float32)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if with_gradients else x.new_empty(0)
    dweight = torch.zeros(V if with_gradients else 0, C, dtype=torch.float32, device=x.device)
    for start in range(0, N, rows):
        x_c, targets_c = x[start : start + rows], targets[start : start + rows]
        logits = buffer[: len(x_c), :V]
        torch.mm(x_c, W.mT, out=logits)
        loss_kernel[(len(x_c),)](
            logits, targets_c, losses[start:], logits.stride(0), V,
            BLOCK=BLOCK, GRADIENTS=with_gradients, num_warps=WARPS,
        )  # fmt: skip
        if with_gradients:
            torch.mm(logits, W, out=dx[start : start + rows])
            _add_product(dweight, logits.mT, x_c)
    return losses.sum(), dx, cast(dweight, weight.dtype)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a @ b to a float32 total, in place."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif total.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:  # torch has no such product on a CPU
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


@head_loss_sum.register_fake
def _(x, weight, targets, with_gradients):
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if with_gradients else x.new_empty(0)
    dweight = weight.new_empty(weight.shape) if with_gradients else weight.new_empty(0, weight.size(1))
    return x.new_empty((), dtype=torch.float32), dx, dweight


def _save(ctx, inputs, output) -> None:
    _, dx, dweight = output
    ctx.save_for_backward(dx, dweight)
    ctx.set_materialize_grads(False)  # zeros for the outputs dx and dweight would take as much memory as both


def _backward(ctx, dtotal: Tensor | None, *_):
    if dtotal is None:
        return None, None, None, None
    dx, dweight = ctx.saved_tensors
    return dx * dtotal, dweight * dtotal, None, None


head_loss_sum.register_autograd(_backward, setup_context=_save)


def head_loss(x_NC: Tensor, weight_VC: Tensor, targets_N: Tensor) -> Tensor:
    """Return the mean cross-entropy in nats, float32, over the targets that are not -1; NaN where there are none."""
    total, _, _ = head_loss_sum(x_NC, weight_VC, targets_N, torch.is_grad_enabled())
    return total / (targets_N != IGNORE).sum()
