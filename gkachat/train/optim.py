"""Muon for matrices, AdamW for everything else.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) steps along the orthogonal matrix nearest to the
Nesterov momentum, found with the five-step Polar Express iteration (arXiv 2505.16932); weight decay is cautious: it
acts only where it pulls the same way as the step (arXiv 2411.16085).
"""

from collections import defaultdict

import torch
from torch import Tensor

from gkachat.config import OptimConfig
from gkachat.gpt import GPT

# Polar Express for five steps: p(X) = a X + b (X X^T) X + c (X X^T)^2 X, one triple a step.
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
ADAM_BETAS, ADAM_EPS = (0.8, 0.95), 1e-10


def orthogonalize(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """Nearest (semi-)orthogonal matrix of each of a stack (..., M, N): singular values go to about 1."""
    X = matrices.to(dtype)
    tall = X.size(-2) > X.size(-1)
    if tall:
        X = X.mT
    X = X / (X.norm(dim=(-2, -1), keepdim=True) * 1.02 + 1e-6)  # 2 % room: rounding must not push a value above 1
    for a, b, c in POLAR_EXPRESS:
        A = X @ X.mT
        X = a * X + (b * A + c * (A @ A)) @ X
    return (X.mT if tall else X).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """Matrices of one shape are stepped as one stack. The iteration runs in bfloat16 on cuda and float32 elsewhere."""

    def __init__(self, params: list[torch.nn.Parameter], lr: float, weight_decay: float):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": 0.95})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            by_shape = defaultdict(list)
            for p in group["params"]:
                by_shape[p.shape].append(p)
            for params in by_shape.values():
                self._step_stack(params, **{k: group[k] for k in ("lr", "weight_decay", "momentum")})

    def _step_stack(self, params: list[Tensor], lr: float, weight_decay: float, momentum: float) -> None:
        grads = torch.stack([p.grad for p in params])
        for p in params:
            if "momentum" not in self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
        buffers = [self.state[p]["momentum"] for p in params]
        torch._foreach_lerp_(buffers, list(grads.unbind()), 1 - momentum)
        nesterov = grads.lerp_(torch.stack(buffers), momentum)
        steps = orthogonalize(nesterov, torch.bfloat16 if grads.is_cuda else torch.float32)
        rows, columns = steps.shape[-2:]
        steps *= max(1.0, rows / columns) ** 0.5  # a tall matrix keeps the size of its output's change
        weights = torch.stack(params)
        decay = weight_decay * weights * (steps * weights >= 0)
        torch._foreach_sub_(params, list((lr * (steps + decay)).unbind()))


class Optimizers:
    """Both optimizers as one, with each group's learning rate times a common multiplier."""

    def __init__(self, model: GPT, config: OptimConfig):
        """`config` must be resolved (see recipe.resolve)."""
        groups = model.parameter_groups()
        adam_lr = {
            "embedding": config.embedding_lr,
            "value_embeddings": config.value_embedding_lr,
            "lm_head": config.lm_head_lr,
            "x0_mix": config.x0_lr,
            "residual_scale": config.residual_lr,
            "log_sigma": config.sigma_lr,
        }
        muon = groups.pop("matrices") + groups.pop("value_gates", [])
        self.muon = Muon(muon, config.lr_scale * config.matrix_lr, config.weight_decay)
        self.adamw = torch.optim.AdamW(
            [
                {"params": params, "lr": config.lr_scale * config.adam_scale * adam_lr[name]}
                for name, params in groups.items()
            ],
            betas=ADAM_BETAS,
            eps=ADAM_EPS,
            weight_decay=0.0,
            fused=True,
        )
        for group in self._groups():
            group["peak_lr"] = group["lr"]

    def _groups(self) -> list[dict]:
        return self.muon.param_groups + self.adamw.param_groups

    def step(self, lr_multiplier: float, momentum: float) -> None:
        for group in self._groups():
            group["lr"] = lr_multiplier * group["peak_lr"]
        self.muon.param_groups[0]["momentum"] = momentum
        self.muon.step()
        self.adamw.step()
        self.muon.zero_grad(set_to_none=True)
        self.adamw.zero_grad(set_to_none=True)

    def state_tensors(self, model: GPT) -> dict[str, Tensor]:
        """Everything the optimizers remember, named `parameter/what`."""
        state = {**self.muon.state, **self.adamw.state}
        return {f"{name}/{key}": t for name, p in model.named_parameters() for key, t in state.get(p, {}).items()}

    def load_state_tensors(self, model: GPT, tensors: dict[str, Tensor]) -> None:
        muon = {id(p) for p in self.muon.param_groups[0]["params"]}
        for key, tensor in tensors.items():
            name, what = key.split("/")
            p = model.get_parameter(name)
            (self.muon if id(p) in muon else self.adamw).state[p][what] = tensor.to(p.device)
