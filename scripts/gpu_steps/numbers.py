"""Numbers on the device against float64 on the CPU: operators, decode kernels, and whole models of each attention.

Whatever a layer or a model chooses on the device is compared, so that nothing here names a kernel that it must choose.
Errors of a tensor are relative to the norm of the exact one. Tolerances: float32 sums over some hundred terms; in
bfloat16 2^-9 for each rounded operand, and several times that through the layers of a model.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from gkachat.attention import QKV, gaussian_kernel_attention
from gkachat.attention.features import rope_table
from gkachat.attention.kernels import decode, reference
from gkachat.attention.kernels.choose import KernelSpec, choose_decode_kernel, choose_kernel
from gkachat.attention.kernels.flex import FlexAttention
from gkachat.attention.qkv import KVSlice
from gkachat.config import GPTConfig
from gkachat.model.gpt import GPT
from scripts.gpu_steps import Check, Save, Sizes

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}  # of an operator: output and gradients
MODEL_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 6e-2}  # of a model: logits, loss and gradients
ROWS = 3  # of a model's batch: enough tokens that the head's loss takes more than one part of them
MAX_SCALARS = 16  # elements of a parameter of single numbers: some for each layer or head
# The gradient of a single number, such as a bandwidth, sums terms of both signs and can be nearly 0, with any relative
# error. The batch's gradients and those of a part of each row are compared as one tensor, for they are rarely nearly 0
# at once: over 60 seeds on a CPU, bfloat16 is at most 0.14 off.
SCALAR_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.3}


class Comparisons:
    """Collects comparisons, and saves them after each. An exception is a comparison that is wrong."""

    def __init__(self, save: Save):
        self.save, self.found = save, []

    def add(self, name: str, error: float, tolerance: float) -> None:
        """Record an error; NaN is wrong."""
        self._append({"name": name, "error": error, "tolerance": tolerance, "right": error <= tolerance})

    def tensor(self, name: str, got: Tensor, exact: Tensor, tolerance: float) -> None:
        """Record the error of a tensor relative to the norm of the exact one."""
        error = (got.detach().cpu().double() - exact.detach().double()).norm() / exact.detach().double().norm()
        self.add(name, error.item(), tolerance)

    def attempt(self, name: str, compare: Callable[..., None], *arguments: Any, **options: Any) -> None:
        """Call a function that compares; record its exception, if any, under the name."""
        try:
            compare(*arguments, **options)
        except Exception as error:
            text = (str(error).strip() or "no message").splitlines()[0]
            self._append({"name": name, "right": False, "raised": f"{type(error).__name__}: {text}"[:300]})

    def _append(self, comparison: dict[str, Any]) -> None:
        self.found.append(comparison)
        self.save(comparisons=self.found)


def features(sizes: Sizes, seed: int = 0) -> Tensor:
    """Return (2, T, 2, D) float32 in which neighbours resemble each other: otherwise a token sees itself alone."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, sizes.compared_tokens, 2, sizes.head_dim, generator=generator)
    for t in range(1, x.size(1)):
        x[:, t] = 0.8 * x[:, t - 1] + 0.6 * x[:, t]
    return x


def operator(check: Check, case: str, save: Save) -> None:
    """Compare the operators: GKA in one dtype or variant, softmax, or the decode kernel."""
    device, _ = check.start(save)
    comparisons = Comparisons(save)
    if case == "softmax":
        softmax(comparisons, check.sizes, device)
    elif case == "decode":
        for dtype in (torch.float32, torch.bfloat16):
            for shared in (True, False):
                name = f"decode, {dtype}, {'keys are values' if shared else 'keys and values'}"
                comparisons.attempt(name, decode_kernel, comparisons, name, check.sizes, device, dtype, shared)
    else:
        dtype = torch.float32 if case == "float32" else torch.bfloat16
        for window in (None, check.sizes.compared_window):
            name = f"gka, {case}, window {window or 'full'}"
            comparisons.attempt(name, gka, comparisons, name, check.sizes, device, dtype, window, case)


def gka(
    comparisons: Comparisons, name: str, sizes: Sizes, device: torch.device, dtype: torch.dtype, window: int | None,
    case: str,
) -> None:  # fmt: skip
    """Compare output and gradients twice: the first backward of a process also tunes the kernel."""
    x = features(sizes).to(dtype)
    dy = torch.randn(x.shape, generator=torch.Generator().manual_seed(7)).to(dtype)
    sigma = sizes.head_dim**0.5 * torch.tensor([0.5, 0.8])
    rope = rope_table(sizes.compared_tokens, sizes.head_dim) if case == "rope" else None

    def run(device: torch.device, dtype: torch.dtype, backend: str) -> tuple[Tensor, ...]:
        wide = torch.promote_types(dtype, torch.float32)
        tables = None if rope is None else tuple(t.to(device, wide) for t in rope)
        inputs = x.to(device, dtype, copy=True).requires_grad_(), sigma.to(device, wide, copy=True).requires_grad_()
        options = {"window": window, "rope": tables, "include_self": case != "no_self", "backend": backend}
        y = gaussian_kernel_attention(*inputs, **options)
        return y, *torch.autograd.grad(y, inputs, dy.to(device, dtype))

    exact = run(torch.device("cpu"), torch.float64, "reference")
    terms = (dy.double() * exact[0]).abs().sum((0, 1, 3)) / sigma  # what the bandwidth's gradient sums
    for turn in ("first", "second"):
        y, dx, dsigma = run(device, dtype, "auto")
        comparisons.tensor(f"{name}, {turn}: y", y, exact[0], TOLERANCE[dtype])
        comparisons.tensor(f"{name}, {turn}: dx", dx, exact[1], 2 * TOLERANCE[dtype])
        error = ((dsigma.cpu().double() - exact[2]).abs() / terms).max().item()
        comparisons.add(f"{name}, {turn}: dsigma", error, TOLERANCE[dtype])


def softmax(comparisons: Comparisons, sizes: Sizes, device: torch.device) -> None:
    """Compare the kernels that softmax layers choose, FlexAttention, and on a GPU each of torch's SDPA backends."""
    T, D, candidates = sizes.compared_tokens, sizes.head_dim, []
    for dtype in (torch.bfloat16, torch.float32):
        for window in (None, sizes.compared_window):
            kernel = choose_kernel(KernelSpec(D, T, window), device, dtype)
            candidates.append((f"chosen: {kernel.name}", dtype, window, kernel.attend))
            if window is not None and device.type == "cuda":
                candidates.append(("flex", dtype, window, FlexAttention(window, T, device).attend))
    if device.type == "cuda":
        for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION):
            attend = partial(_sdpa, backend=backend)
            candidates.append((f"sdpa {backend.name}", torch.bfloat16, None, attend))
    for candidate, dtype, window, attend in candidates:
        name = f"softmax, {candidate}, {dtype}, window {window or 'full'}"
        comparisons.attempt(name, _softmax, comparisons, name, sizes, device, dtype, window, attend)


def _sdpa(qkv: QKV, backend: SDPBackend) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in qkv[:3])
    with sdpa_kernel([backend]):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=qkv.scale).transpose(1, 2)


def _softmax(
    comparisons: Comparisons, name: str, sizes: Sizes, device: torch.device, dtype: torch.dtype, window: int | None,
    attend: Callable[[QKV], Tensor],
) -> None:  # fmt: skip
    inputs = [features(sizes, seed).to(dtype) for seed in range(3)]
    dy = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(7)).to(dtype)

    def run(device: torch.device, dtype: torch.dtype, attend: Callable[[QKV], Tensor]) -> tuple[Tensor, ...]:
        qkv = [t.to(device, dtype, copy=True).requires_grad_() for t in inputs]
        y = attend(QKV(*qkv, scale=sizes.head_dim**-0.5))
        return y, *torch.autograd.grad(y, qkv, dy.to(device, dtype))

    options = {"window": window, "causal": True, "include_self": True}
    exact = run(torch.device("cpu"), torch.float64, lambda qkv: reference.attend(qkv, **options))
    for label, got, wanted in zip(("y", "dq", "dk", "dv"), run(device, dtype, attend), exact, strict=True):
        comparisons.tensor(f"{name}: {label}", got, wanted, 2 * TOLERANCE[dtype])


def decode_kernel(
    comparisons: Comparisons, name: str, sizes: Sizes, device: torch.device, dtype: torch.dtype, shared: bool
) -> None:
    """Compare attention of one new token per row to cached ones: with one tensor of keys and values, Gaussian."""
    x, v = (features(sizes, seed).to(dtype).transpose(1, 2).contiguous() for seed in range(2))
    B, H, S, _ = x.shape
    mask = torch.zeros(B, 1, 1, S)
    mask[0, ..., : S // 3] = mask[1, ..., S // 2 :] = -torch.inf
    q = x[:, :, S // 3 : S // 3 + 1].transpose(1, 2)
    sigma = torch.full((H,), sizes.head_dim**0.5) if shared else None

    def run(device: torch.device, dtype: torch.dtype, attend: Callable[..., Tensor]) -> Tensor:
        wide = torch.promote_types(dtype, torch.float32)
        keys, query = x.to(device, dtype), q.to(device, dtype)
        values = keys if shared else v.to(device, dtype)
        norms = keys.to(wide).square().sum(-1, keepdim=True) if shared else None
        qkv = QKV(query, query, query, sizes.head_dim**-0.5, None if sigma is None else sigma.to(device, wide))
        return attend(qkv, [KVSlice(keys, values, mask.to(device), norms)])

    kernel = choose_decode_kernel(sizes.head_dim, device, dtype)
    exact = run(torch.device("cpu"), torch.float64, decode.attend)
    comparisons.tensor(f"{name} ({kernel.name})", run(device, dtype, kernel.attend), exact, TOLERANCE[dtype])


def layers(check: Check, attention: str, save: Save) -> None:
    """Compare a model of two layers: logits, loss, all gradients, and decoding from a cache."""
    device, _ = check.start(save)
    comparisons, sizes = Comparisons(save), check.sizes
    config = GPTConfig(
        depth=2, attention=attention, vocab_size=sizes.compared_vocab, sequence_len=sizes.compared_tokens,
        n_embd=2 * sizes.head_dim, head_dim=sizes.head_dim,
    )  # fmt: skip
    torch.manual_seed(0)
    initial = GPT(config)
    for name, p in initial.named_parameters():  # what starts at 0 would hide what it multiplies
        if not p.any() or ".conv" in name:
            torch.nn.init.normal_(p, std=0.1)
        elif name == "lm_head.weight":
            torch.nn.init.normal_(p, std=0.02)
    idx = torch.randint(config.vocab_size, (ROWS, config.sequence_len))
    idx[:, 1::2] = idx[:, ::2][:, : idx[:, 1::2].size(1)]  # repeated tokens give the attention something to find
    targets = idx.roll(-1, 1).masked_fill(torch.rand(idx.shape) < 0.1, -1)
    exact = _results(initial, idx, targets, torch.device("cpu"), torch.float64)
    for dtype in (torch.float32, torch.bfloat16):
        comparisons.attempt(
            f"{attention}, {dtype}", _layers, comparisons, initial, exact, idx, targets, device, dtype
        )  # fmt: skip


def _results(
    initial: GPT, idx: Tensor, targets: Tensor, device: torch.device, dtype: torch.dtype
) -> tuple[GPT, dict[str, Tensor]]:
    """Return a copy of the model on a device, and its logits, loss and gradients.

    Gradients of single numbers have those of each row's first quarter behind them.
    """
    model = GPT(initial.config, dtype)
    model.load_state_dict(initial.state_dict())
    model = (model.double() if dtype == torch.float64 else model).to(device)
    idx, targets = idx.to(device), targets.to(device)
    loss = model(idx, targets)
    loss.backward()
    with torch.no_grad():
        found = {"logits": model(idx), "loss": loss.detach()}
    found |= {f"d {name}": p.grad for name, p in model.named_parameters()}
    scalars = {f"d {name}": p for name, p in model.named_parameters() if p.numel() <= MAX_SCALARS}
    T = idx.size(1) // 4  # whole rows take as long as the batch, on a CPU in float64
    for row in range(len(idx)):
        gradients = torch.autograd.grad(model(idx[row, None, :T], targets[row, None, :T]), list(scalars.values()))
        for name, gradient in zip(scalars, gradients, strict=True):
            found[name] = torch.cat((found[name].flatten(), gradient.flatten()))
    return model, found


def _layers(
    comparisons: Comparisons, initial: GPT, exact: tuple[GPT, dict[str, Tensor]], idx: Tensor, targets: Tensor,
    device: torch.device, dtype: torch.dtype,
) -> None:  # fmt: skip
    name = f"{initial.config.attention}, {dtype}"
    model, found = _results(initial, idx, targets, device, dtype)
    for label, got in found.items():
        of_scalars = label.startswith("d ") and model.get_parameter(label[2:]).numel() <= MAX_SCALARS
        tolerance = (SCALAR_TOLERANCE if of_scalars else MODEL_TOLERANCE)[dtype]
        comparisons.tensor(f"{name}: {label}", got, exact[1][label], tolerance)
    T, decoded = idx.size(1), []
    first = T - 8  # the last tokens are decoded one by one
    with torch.inference_mode():
        cache, rows = model.make_cache(ROWS, T, block=first), slice(0, ROWS)
        model(idx[:, :first].to(device), cache=cache.step(rows, first), logits_to_keep=1)
        for t in range(first, T):
            decoded.append(model(idx[:, t : t + 1].to(device), cache=cache.step(rows, 1)))
    logits = exact[1]["logits"][:, first:]
    comparisons.tensor(f"{name}: decoded logits", torch.cat(decoded, dim=1), logits, MODEL_TOLERANCE[dtype])
