"""Muon for matrices and AdamW for everything else, with their work and memory divided among the ranks.

    optimizers = make_optimizers(model, config.optim, world)        # a list: Muon, AdamW
    for optimizer in optimizers:
        optimizer.param_groups[0]["lr"] = 0.01
        optimizer.step()

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) steps along the orthogonal matrix nearest to the
Nesterov momentum, found with the five-step Polar Express iteration (arXiv 2505.16932). Before it, rows are scaled to a
common norm (MuonEq, arXiv 2603.28254); after it, the matrix is scaled to the norm of an orthogonal one (Muon+, arXiv
2602.21545). Rows of the step, or columns of a wide matrix, are then scaled to a common variance (NorMuon, arXiv
2510.05491). Weight decay is cautious: it acts only where it has the sign of the step (arXiv 2411.16085). All constants
are nanochat's (commit 92d63d4), as far as nanochat has them.

Every rank holds all weights and, after the backward, the same gradients. It steps its share of the matrices and its
rows of the large embeddings, keeps the optimizer state of these alone, and sends the new weights to the other ranks.

Both optimizers follow torch's convention for skipping a step without a host sync: when their attribute `found_inf` is a
tensor that holds 1, `step` changes neither weights nor state, whatever the gradients hold.
"""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from gkachat.config import OptimConfig
from gkachat.model.gpt import Transformer
from gkachat.train.distributed import World, all_gather

# Polar Express for five steps: p(X) = a X + b (X X^T) X + c (X X^T)^2 X, one triple for each step.
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
VARIANCE_BETA = 0.9
ADAM_EPS = 1e-10
# Betas and weight decay of AdamW's parameter groups: nanochat's, gpt.py at 92d63d4.
ADAMW = {
    "embedding": ((0.8, 0.995), 0.001),
    "value_embeddings": ((0.8, 0.995), 0.01),
    "lm_head": ((0.8, 0.96), 0.01),
    "x0_mix": ((0.96, 0.95), 0.0),
    "residual_scale": ((0.8, 0.95), 0.05),
}
# All other groups. Of these, nanochat has smear and backout alone.
ADAMW_DEFAULT = ((0.8, 0.95), 0.0)
SCALED_BY_WIDTH = ("embedding", "value_embeddings", "lm_head")  # rates that fall with the width, as (C / 768)^-1/2
UNSCALED = ("smear", "backout")  # rates that do not follow the batch
MIN_SHARDED_SIZE = 2**14  # elements; every rank steps smaller parameters whole


def orthogonalize(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the (semi-)orthogonal matrix nearest to each row-normalised matrix of a stack (n, M, N).

    Rows are scaled to a common norm first, and the result to the norm of an orthogonal matrix, sqrt(min(M, N)): its
    singular values end near 1. The iteration runs in `dtype`.
    """
    matrix, (M, N) = (-2, -1), matrices.shape[-2:]
    row_norms = torch.linalg.vector_norm(matrices, dim=-1, keepdim=True)
    row_scales = torch.linalg.vector_norm(row_norms, dim=-2, keepdim=True) * M**-0.5 / row_norms.clamp(min=1e-6)
    norm = torch.linalg.vector_norm(row_norms * row_scales, dim=-2, keepdim=True)  # smaller where a row is zero
    X = (matrices * (row_scales / (norm * 1.01 + 1e-6))).to(dtype)  # 1 % room: rounding must not push a value above 1
    if tall := M > N:
        X = X.mT
    # The Gram matrix squares singular values; in bfloat16 the small ones would drown in rounding.
    use_gram = X.size(-1) >= 2 * X.size(-2) and dtype != torch.bfloat16
    X = (_polar_express_gram(X) if use_gram else _polar_express(X)).to(matrices.dtype)
    X *= min(M, N) ** 0.5 / torch.linalg.vector_norm(X, dim=matrix, keepdim=True).clamp(min=1e-6)
    return X.mT if tall else X


def _polar_express(X: Tensor) -> Tensor:
    for a, b, c in POLAR_EXPRESS:
        A = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)
    return X


def _polar_express_gram(X: Tensor) -> Tensor:
    """Polar Express on the Gram matrix, which commutes with its polynomials: half the work for N = 4 M."""
    A, P, Q = X @ X.mT, None, None
    for a, b, c in POLAR_EXPRESS:
        if P is not None:
            A = P @ (A @ P)
        P = torch.baddbmm(A, A, A, beta=b, alpha=c)
        P.diagonal(dim1=-2, dim2=-1).add_(a)
        Q = P if Q is None else P @ Q
    return Q @ X


def equalize_variance(steps: Tensor, variance: Tensor, weight: Tensor | float) -> Tensor:
    """Divide rows (columns of a wide matrix) by the root of their running mean square, and keep each matrix's norm.

    `variance` (n, M, 1) or (n, 1, N) is updated in place: it moves by `weight` towards the mean square of this step.
    Source: NorMuon, section 3.
    """
    axis, other = (-1, -2) if steps.size(-2) >= steps.size(-1) else (-2, -1)
    mean_square = torch.linalg.vector_norm(steps, dim=axis, keepdim=True).square() / steps.size(axis)
    variance.lerp_(mean_square, weight)
    scale = (variance + 1e-10).rsqrt()
    norm, scaled_norm = (
        square.sum(dim=other, keepdim=True).sqrt() for square in (mean_square, mean_square * scale.square())
    )
    return steps * (scale * (norm / (scaled_norm + 1e-10)))


class Muon(torch.optim.Optimizer):
    """Muon with variance normalisation and cautious weight decay.

    Matrices of one shape form a parameter group. They become views of one stack, of which each rank steps a part. The
    iteration runs in `dtype`, float32 or bfloat16. The state of a parameter, `momentum` and `variance`, exists on the
    rank that steps it.
    """

    found_inf: Tensor | None = None

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        *,
        nesterov: bool = True,
        variance_norm: bool = True,
        cautious: bool = True,
        dtype: torch.dtype = torch.float32,
        world: World = World(),  # noqa: B008 (frozen)
    ):
        self.world, self.dtype = world, dtype
        self.nesterov, self.variance_norm, self.cautious = nesterov, variance_norm, cautious
        by_shape: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
        for p in params:
            by_shape[p.shape].append(p)
        groups = [
            {"params": group, "name": f"matrices {rows} x {columns}"} for (rows, columns), group in by_shape.items()
        ]
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.stacks = [_Stack(group["params"], world, variance_norm) for group in self.param_groups]
        for stack in self.stacks:
            self.state.update(zip(stack.own, stack.states(), strict=True))

    def model_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that all ranks together step."""
        return [p for group in self.param_groups for p in group["params"]]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update all matrices. The ranks exchange the first stacks while they step the next."""
        ok = torch.ones((), device=self.stacks[0].all.device) if self.found_inf is None else 1 - self.found_inf
        sent = []
        for group, stack in zip(self.param_groups, self.stacks, strict=True):
            if stack.own:
                self._step_stack(stack, group, ok)
            if self.world.size > 1:
                sent.append(all_gather(stack.all, stack.all[stack.share].clone()))
        for work in sent:
            work.wait()

    def _step_stack(self, stack: "_Stack", group: dict[str, Any], ok: Tensor) -> None:
        """Update the matrices of one stack; with `ok` 0 instead of 1, all products below come to no change."""
        momentum = group["momentum"]
        grads = torch.stack([p.grad for p in stack.own])
        grads.masked_fill_(ok <= 0, 0)
        stack.momentum.lerp_(grads, (1 - momentum) * ok)
        steps = grads.lerp_(stack.momentum, momentum) if self.nesterov else stack.momentum
        steps = orthogonalize(steps, self.dtype)
        if self.variance_norm:
            steps = equalize_variance(steps, stack.variance, (1 - VARIANCE_BETA) * ok)
        rows, columns = steps.shape[-2:]
        # A tall matrix, whose rows are longer, then changes its output as much as a square one.
        lr = group["lr"] * max(1.0, rows / columns) ** 0.5
        decayed = stack.weights
        if self.cautious:
            decayed = decayed * (steps * decayed).ge_(0)
        steps.add_(decayed, alpha=group["weight_decay"])
        stack.weights.addcmul_(steps, lr * ok, value=-1)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned on this rank, in a world of the same size."""
        super().load_state_dict(state_dict)
        loaded = dict(self.state)
        for stack in self.stacks:  # back to the views of the stacks, which `step` works on
            self.state.update(zip(stack.own, stack.states(), strict=True))
        for p, state in loaded.items():
            for name, tensor in state.items():
                self.state[p][name].copy_(tensor)

    def load_parameter_state(self, p: nn.Parameter, name: str, tensor: Tensor) -> None:
        """Load one state tensor, if this rank keeps it."""
        if p in self.state:
            self.state[p][name].copy_(tensor)


class _Stack:
    """All matrices of one shape, and the state of this rank's share of them."""

    def __init__(self, params: list[nn.Parameter], world: World, variance_norm: bool):
        share = -(-len(params) // world.size)  # rounded up: the last rank may have fewer
        self.all = params[0].new_zeros(share * world.size, *params[0].shape).detach()
        for p, view in zip(params, self.all, strict=False):
            view.copy_(p.detach())
            p.data = view
        self.share = slice(share * world.rank, share * (world.rank + 1))
        self.own = params[self.share]
        self.weights = self.all[self.share][: len(self.own)]
        self.momentum = torch.zeros_like(self.weights)
        rows, columns = params[0].shape
        shape = (rows, 1) if rows >= columns else (1, columns)
        self.variance = self.weights.new_zeros(len(self.own), *shape) if variance_norm else None

    def states(self) -> list[dict[str, Tensor]]:
        """Return the state of each own parameter, as views of the stacked tensors."""
        names = ("momentum",) if self.variance is None else ("momentum", "variance")
        return [{name: getattr(self, name)[index] for name in names} for index in range(len(self.own))]


class ShardedAdamW(torch.optim.AdamW):
    """AdamW of which each rank steps its rows of large parameters.

    Where the rows of a large parameter divide evenly by the world size, `param_groups` holds this rank's rows of it: a
    parameter that shares their memory. Smaller parameters are stepped whole on every rank.
    """

    def __init__(self, groups: list[dict[str, Any]], world: World = World(), **defaults: Any):  # noqa: B008 (frozen)
        self.world = world
        self.shard = {p: self._own_rows(p) for group in groups for p in group["params"]}
        sharded = [group | {"params": [self.shard[p] for p in group["params"]]} for group in groups]
        super().__init__(sharded, fused=True, **defaults)

    def _own_rows(self, p: nn.Parameter) -> nn.Parameter:
        size = self.world.size
        if size == 1 or p.numel() < MIN_SHARDED_SIZE or p.size(0) % size:
            return p
        return nn.Parameter(p.detach().chunk(size)[self.world.rank])

    def model_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that all ranks together step."""
        return list(self.shard)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update all parameters."""
        shared = [(p, rows) for p, rows in self.shard.items() if rows is not p]
        for p, rows in shared:
            rows.grad = p.grad.chunk(self.world.size)[self.world.rank]
        super().step()
        for work in [all_gather(p.data, rows.data.clone()) for p, rows in shared]:
            work.wait()
        for _, rows in shared:
            rows.grad = None

    def load_parameter_state(self, p: nn.Parameter, name: str, tensor: Tensor) -> None:
        """Load one state tensor of a whole parameter, or this rank's rows of it."""
        rows = self.shard[p]
        if rows is not p and tensor.ndim:
            tensor = tensor.chunk(self.world.size)[self.world.rank]
        self.state[rows][name] = tensor.to(p.device).clone()


def make_optimizers(
    model: Transformer,
    config: OptimConfig,
    world: World = World(),  # noqa: B008 (frozen)
) -> list[Muon | ShardedAdamW]:
    """Return Muon for a model's matrices and gates, and AdamW for its other parameters.

    Call it before the model is compiled or wrapped. `config` must be resolved (schedule.resolve). Each parameter group
    has its highest learning rate in "initial_lr", as torch's own schedulers expect. Raises ValueError for a parameter
    group of the model that has no learning rate.
    """
    groups = model.parameter_groups()
    muon = Muon(
        groups.pop("matrices") + groups.pop("gates", []),
        lr=config.lr_scale * config.matrix_lr,
        weight_decay=config.weight_decay,
        nesterov=config.muon_nesterov,
        variance_norm=config.muon_variance_norm,
        cautious=config.muon_cautious,
        dtype=model.compute_dtype,
        world=world,
    )
    lr = {
        "embedding": config.embedding_lr,
        "value_embeddings": config.value_embedding_lr,
        "lm_head": config.lm_head_lr,
        "x0_mix": config.x0_lr,
        "residual_scale": config.residual_lr,
        "smear": config.smear_lr,
        "backout": config.smear_lr,
        "log_sigma": config.sigma_lr,
        "forget_bias": config.sigma_lr,
        "input_mix": config.sigma_lr,
        "convolutions": config.conv_lr,
        "positions": config.position_lr,
    }
    if unknown := groups.keys() - lr.keys():
        known = ", ".join(["matrices", "gates", *lr])
        raise ValueError(f"parameter groups: given {', '.join(sorted(unknown))}, expected some of {known}")
    adamw_groups = []
    for name, params in groups.items():
        scale = 1.0 if name in UNSCALED else config.lr_scale
        scale *= config.width_scale if name in SCALED_BY_WIDTH else 1.0
        betas, decay = ADAMW.get(name, ADAMW_DEFAULT)
        adamw_groups.append(
            {"params": params, "name": name, "lr": scale * lr[name], "betas": betas, "weight_decay": decay}
        )
    adamw = ShardedAdamW(adamw_groups, world, eps=ADAM_EPS)
    for group in (*muon.param_groups, *adamw.param_groups):
        group["initial_lr"] = group["lr"]
    return [muon, adamw]


def named_state(optimizers: list[Muon | ShardedAdamW], model: nn.Module) -> dict[str, Tensor]:
    """Return the optimizer state that this rank writes to a checkpoint, named `parameter/what`.

    It is the state of its matrices and of its rows; rank 0 adds the state that every rank has. Tensors of equal name,
    joined by rows in the order of ranks, make up the state of the whole model.
    """
    muon, adamw = optimizers
    names = {p: name for name, p in model.named_parameters()}
    found = {f"{names[p]}/{what}": tensor for p, state in muon.state.items() for what, tensor in state.items()}
    for p, rows in adamw.shard.items():
        for what, tensor in adamw.state.get(rows, {}).items():
            if adamw.world.is_rank0 or (rows is not p and tensor.ndim):
                found[f"{names[p]}/{what}"] = tensor
    return found


def load_named_state(
    optimizers: list[Muon | ShardedAdamW], model: nn.Module, tensors: Iterable[tuple[str, Tensor]]
) -> None:
    """Load this rank's part of the state of a whole model, which a world of any size has written."""
    named = dict(model.named_parameters())
    owner = {p: optimizer for optimizer in optimizers for p in optimizer.model_parameters()}
    for key, tensor in tensors:
        name, what = key.split("/")
        owner[named[name]].load_parameter_state(named[name], what, tensor)
