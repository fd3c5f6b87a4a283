"""Muon for matrices, AdamW for everything else, their work and memory shared out over the processes of a world.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) steps along the orthogonal matrix nearest to the
Nesterov momentum, found with the five-step Polar Express iteration (arXiv 2505.16932). The step's rows, or the columns
of a wide matrix, are brought to a common variance (NorMuon, arXiv 2510.05491); weight decay is cautious: it acts
only where it pulls the same way as the step (arXiv 2411.16085).

Every process holds all weights and, after the backward, the same gradients. It steps its share of the matrices and its
rows of the large embeddings, remembers what that takes and nothing more, and hands the result round.
"""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from gkachat.config import OptimConfig
from gkachat.model.gpt import Transformer
from gkachat.train.distributed import World, gather

# Polar Express for five steps: p(X) = a X + b (X X^T) X + c (X X^T)^2 X, one triple a step.
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
VARIANCE_BETA = 0.95
ADAM_BETAS, ADAM_EPS = (0.8, 0.95), 1e-10
SMALLEST_SHARE = 2**14  # numbers; what is smaller every process steps for itself


def orthogonalize(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """Nearest (semi-)orthogonal matrix of each of a stack (n, M, N): singular values go to about 1."""
    X = matrices.to(dtype)
    tall = X.size(-2) > X.size(-1)
    if tall:
        X = X.mT
    X = X / (X.norm(dim=(-2, -1), keepdim=True) * 1.02 + 1e-6)  # 2 % room: rounding must not push a value above 1
    # Squared, small singular values drown in bfloat16's rounding, not in float32's.
    long = X.size(-1) >= 2 * X.size(-2) and dtype != torch.bfloat16
    X = _polar_by_gram(X) if long else _polar(X)
    return (X.mT if tall else X).to(matrices.dtype)


def _polar(X: Tensor) -> Tensor:
    for a, b, c in POLAR_EXPRESS:
        A = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)
    return X


def _polar_by_gram(X: Tensor) -> Tensor:
    """The same on the Gram matrix alone, which commutes with its polynomials: for N = 4 M half of the work."""
    A, P, Q = X @ X.mT, None, None
    for a, b, c in POLAR_EXPRESS:
        if P is not None:
            A = P @ (A @ P)
        P = torch.baddbmm(A, A, A, beta=b, alpha=c)
        P.diagonal(dim1=-2, dim2=-1).add_(a)
        Q = P if Q is None else P @ Q
    return Q @ X


def equalize_variance(steps: Tensor, variance: Tensor, weight: Tensor | float) -> Tensor:
    """Divide rows (columns of a wide matrix) by the root of their running mean square; the whole keeps its norm.

    `variance`, as `steps` with one number a row (column), moves by `weight` towards this step's. NorMuon, section 3.
    """
    axis = -1 if steps.size(-2) >= steps.size(-1) else -2
    variance.lerp_(steps.square().mean(dim=axis, keepdim=True), weight)
    scaled = steps * (variance + 1e-10).rsqrt()
    whole = (-2, -1)
    return scaled * (steps.norm(dim=whole, keepdim=True) / (scaled.norm(dim=whole, keepdim=True) + 1e-10))


class Muon:
    """Matrices of one shape are one stack, of which each process steps a part.

    The iteration runs in bfloat16 on cuda and in float32 elsewhere. The parameters become views of their stack.
    """

    def __init__(self, params: list[nn.Parameter], config: OptimConfig, world: World):
        self.config, self.world = config, world
        by_shape: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
        for p in params:
            by_shape[p.shape].append(p)
        self.stacks = [_Stack(group, world, config.muon_variance_norm) for group in by_shape.values()]

    @torch.no_grad()
    def step(self, lr: float, weight_decay: float, momentum: float, ok: Tensor) -> None:
        """`ok`, 1 or 0: whether to step at all. With 0 nothing changes, whatever the gradients hold."""
        handed_round = []
        for stack in self.stacks:
            if stack.own:
                self._step(stack, lr, weight_decay, momentum, ok)
            if self.world.size > 1:
                handed_round.append(gather(stack.all, stack.all[stack.mine].clone()))
        for work in handed_round:
            work.wait()

    def _step(self, stack: "_Stack", lr: float, weight_decay: float, momentum: float, ok: Tensor) -> None:
        grads = torch.stack([p.grad for p in stack.own])
        grads = torch.where(ok > 0, grads, 0)
        stack.momentum.lerp_(grads, (1 - momentum) * ok)
        steps = grads.lerp_(stack.momentum, momentum) if self.config.muon_nesterov else stack.momentum
        steps = orthogonalize(steps, torch.bfloat16 if grads.is_cuda else torch.float32)
        if stack.variance is not None:
            steps = equalize_variance(steps, stack.variance, (1 - VARIANCE_BETA) * ok)
        rows, columns = steps.shape[-2:]
        steps *= max(1.0, rows / columns) ** 0.5  # a tall matrix keeps the size of its output's change
        decay = weight_decay * stack.weights
        if self.config.muon_cautious:
            decay *= steps * stack.weights >= 0
        stack.weights.sub_(steps.add_(decay).mul_(lr * ok))


class _Stack:
    """Matrices of one shape; this process's share of them and what is remembered of that."""

    def __init__(self, params: list[nn.Parameter], world: World, variance_norm: bool):
        share = -(-len(params) // world.size)
        self.all = params[0].new_zeros(share * world.size, *params[0].shape).detach()
        for p, place in zip(params, self.all, strict=False):
            place.copy_(p.detach())
            p.data = place
        self.params = params
        self.mine = slice(share * world.rank, share * (world.rank + 1))
        self.own = params[self.mine]
        self.weights = self.all[self.mine][: len(self.own)]
        self.momentum = torch.zeros_like(self.weights)
        rows, columns = params[0].shape
        shape = (rows, 1) if rows >= columns else (1, columns)
        self.variance = self.weights.new_zeros(len(self.own), *shape) if variance_norm else None


class Optimizers:
    """Both optimizers as one."""

    def __init__(self, model: Transformer, config: OptimConfig, world: World | None = None):
        """`config` must be resolved (see schedule.resolve). Builds before the model is compiled or wrapped."""
        self.config, self.world = config, world or World()
        groups = model.parameter_groups()
        self.muon = Muon(groups.pop("matrices") + groups.pop("value_gates", []), config, self.world)
        adam_lr = {
            "embedding": config.embedding_lr,
            "value_embeddings": config.value_embedding_lr,
            "lm_head": config.lm_head_lr,
            "x0_mix": config.x0_lr,
            "residual_scale": config.residual_lr,
            "log_sigma": config.sigma_lr,
            "convolutions": config.conv_lr,
            "positions": config.position_lr,
        }
        if unknown := groups.keys() - adam_lr.keys():
            known = ", ".join(["matrices", "value_gates", *adam_lr])
            raise ValueError(f"parameter groups: given {', '.join(sorted(unknown))}, expected some of {known}")
        # Of a large tensor AdamW is given this process's rows, as a parameter that shares their memory.
        self.stepped = {p: self._rows(p) for params in groups.values() for p in params}
        self.adamw = torch.optim.AdamW(
            [
                {
                    "params": [self.stepped[p] for p in params],
                    "lr": 0.0,
                    "peak_lr": config.lr_scale * config.adam_scale * adam_lr[name],
                }
                for name, params in groups.items()
            ],
            betas=ADAM_BETAS,
            eps=ADAM_EPS,
            weight_decay=0.0,
            fused=True,
        )

    def _rows(self, p: nn.Parameter) -> nn.Parameter:
        size, rank = self.world.size, self.world.rank
        if size == 1 or p.numel() < SMALLEST_SHARE or p.size(0) % size:
            return p
        return nn.Parameter(p.detach().chunk(size)[rank])

    @torch.no_grad()
    def step(
        self, lr_multiplier: float, momentum: float, decay_multiplier: float = 1.0, ok: Tensor | None = None
    ) -> None:
        """One step with the gradients at hand, which are then forgotten.

        Args:
            lr_multiplier, decay_multiplier: of the peak learning rates, of the peak weight decay.
            momentum: Muon's.
            ok: 1 or 0, on the device: with 0 the step changes nothing, not even what is remembered.
        """
        config = self.config
        if ok is None:
            ok = torch.ones((), device=next(iter(self.stepped)).device)
        lr = lr_multiplier * config.lr_scale * config.matrix_lr
        self.muon.step(lr, decay_multiplier * config.weight_decay, momentum, ok)
        for group in self.adamw.param_groups:
            group["lr"] = lr_multiplier * group["peak_lr"]
        shared = [(p, rows) for p, rows in self.stepped.items() if rows is not p]
        for p, rows in shared:
            rows.grad = p.grad.chunk(self.world.size)[self.world.rank]
        self.adamw.found_inf = 1 - ok  # how torch's fused kernel is told to leave everything as it is
        self.adamw.step()
        works = [gather(p.data, rows.data.clone()) for p, rows in shared]
        for work in works:
            work.wait()
        for p in self.parameters():
            p.grad = None
        for _, rows in shared:
            rows.grad = None

    def parameters(self) -> list[nn.Parameter]:
        return [*(p for stack in self.muon.stacks for p in stack.params), *self.stepped]

    def state_tensors(self, model: Transformer) -> dict[str, Tensor]:
        """What this process remembers, named `parameter/what`: its matrices, its rows, and, of the main process alone,
        what all have. The parts of all processes, equal names joined by rows in their order, are the whole."""
        names = {p: name for name, p in model.named_parameters()}
        found = {}
        for stack in self.muon.stacks:
            for index, p in enumerate(stack.own):
                found[f"{names[p]}/momentum"] = stack.momentum[index]
                if stack.variance is not None:
                    found[f"{names[p]}/variance"] = stack.variance[index]
        for p, rows in self.stepped.items():
            for what, tensor in self.adamw.state.get(rows, {}).items():
                if self.world.is_main or (rows is not p and tensor.ndim):
                    found[f"{names[p]}/{what}"] = tensor
        return found

    def load_state_tensors(self, model: Transformer, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Take this process's part of the whole that `state_tensors` gave, in a world of any size."""
        named = dict(model.named_parameters())
        place = {p: (stack, index) for stack in self.muon.stacks for index, p in enumerate(stack.own)}
        for key, tensor in tensors:
            name, what = key.split("/")
            p = named[name]
            if p in place:
                stack, index = place[p]
                getattr(stack, what)[index].copy_(tensor)
            elif p in self.stepped:
                rows = self.stepped[p]
                if rows is not p and tensor.ndim:
                    tensor = tensor.chunk(self.world.size)[self.world.rank]
                self.adamw.state[rows][what] = tensor.to(p.device).clone()
