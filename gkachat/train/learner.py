"""Model and optimizers, and what a step does to them: gradients over a batch, whether these are sound, the update.

Nothing in a step makes the host wait for the device: what came of it is read when the next one is under way.
"""

from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gkachat.config import Config
from gkachat.data.loader import Batch
from gkachat.machine import device_name, pick_dtype
from gkachat.model.gpt import Transformer
from gkachat.train import schedule
from gkachat.train.distributed import World, sum_over_world
from gkachat.train.metrics import Phases
from gkachat.train.optim import Optimizers


@dataclass(frozen=True)
class Outcome:
    """What came of a step, the same in every process."""

    step: int
    loss: float
    grad_norm: float
    skipped: bool
    """Loss or gradient were not finite, and neither weights nor the optimizers' memory have changed."""
    interrupted: bool
    """Some process has been asked to stop."""


def use_fp8(model: Transformer, emulate: bool = False) -> None:
    """Have the blocks' matrices multiplied in fp8, scaled tensor by tensor; weights stay in float32.

    `emulate`: with the same rounding, on any device. Raises ValueError where torchao is not installed.
    """
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError:
        raise ValueError("run.fp8: torchao is not installed; pip install 'gkachat[fp8]'") from None

    def has_kernel(module: nn.Module, name: str) -> bool:  # the head's loss takes its weight in parts
        return name != "lm_head" and module.in_features % 16 == 0 and module.out_features % 16 == 0

    convert_to_float8_training(model, module_filter_fn=has_kernel, config=Float8LinearConfig(emulate=emulate))


class Learner:
    def __init__(
        self,
        config: Config,
        model: Callable[..., Transformer],
        rows: int,
        device: torch.device,
        world: World,
        phases: Phases,
    ):
        """`config` resolved; `model` made of its section of that name; `rows` of a step in this process."""
        self.config, self.device, self.world, self.phases = config, device, world, phases
        torch.manual_seed(config.run.seed)  # the same weights in every process
        with device:
            self.model = model(config.model, pick_dtype(config.run.dtype, device))
        if config.run.fp8:
            if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
                raise ValueError(f"run.fp8: {device_name(device)} has no fp8 arithmetic: leave it out")
            use_fp8(self.model)
        self.model.recompute_blocks = config.train.recompute_blocks
        self.optimizers = Optimizers(self.model, config.optim, world)
        size = config.train.device_batch_size
        self.device_batch_size = self._largest_batch(rows) if size == "auto" else size
        self.forward: nn.Module = self.model
        if world.size > 1:  # averages gradients while the backward still goes on
            self.forward = DistributedDataParallel(self.model, gradient_as_bucket_view=True)
        compiled = device.type == "cuda" if config.run.compile is None else config.run.compile
        if compiled:
            self.forward = torch.compile(self.forward, dynamic=False)
        self.under_way: deque[tuple[int, Tensor, torch.cuda.Event | None]] = deque()

    def _largest_batch(self, rows: int) -> int:
        """Rows that fit a GPU's memory in every process: doubled until they do not, or are all there are."""
        if self.device.type != "cuda":
            return min(32, rows)  # what a CPU lacks in memory it takes from its disk, without a word
        fits, T = 1, self.config.model.sequence_len
        for n in [*(2**i for i in range(rows.bit_length()) if 2**i < rows), rows]:
            try:
                self.model(*self.model.example_batch(n)).backward()
            except torch.cuda.OutOfMemoryError as error:
                if n == 1:
                    raise ValueError(
                        f"train.device_batch_size: not even one row of {T} tokens fits {device_name(self.device)}; "
                        "set train.recompute_blocks, or a smaller model"
                    ) from error
                break
            if n == 1:  # what the optimizers remember takes memory too; with ok = 0 the step does nothing else
                self.optimizers.step(0.0, 0.0, ok=torch.zeros((), device=self.device))
            fits = n
        self.model.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
        least = torch.tensor(fits, device=self.device)
        if self.world.size > 1:
            dist.all_reduce(least, dist.ReduceOp.MIN)
        return int(least)

    def step(self, step: int, batch: Batch, n_targets: int, interrupted: bool) -> list[Outcome]:
        """Take a step with this process's batch, of `n_targets` over all of them; outcomes that are known by now."""
        losses = torch.zeros((), device=self.device)
        pieces = list(zip(*(t.split(self.device_batch_size) for t in batch), strict=True))
        for number, (idx, targets) in enumerate(pieces, 1):
            # A mean over all targets, however rows are split up; the average over processes divides by their number.
            share = int((targets >= 0).sum()) * self.world.size / n_targets
            with self.phases("data"):
                idx, targets = (t.to(self.device, non_blocking=True) for t in (idx, targets))
            with self._exchange(number == len(pieces)):
                with self.phases("forward"):
                    loss = self.forward(idx, targets) * share
                    losses += loss.detach()
                with self.phases("backward"):
                    loss.backward()
        with self.phases("optimizer"):
            self._optimize(step, losses / self.world.size, interrupted)
        # On a CPU the step is done; a GPU is still at it, and is asked about the one before.
        return self.outcomes(len(self.under_way) - (1 if self.device.type == "cuda" else 0))

    def _exchange(self, last: bool) -> AbstractContextManager:
        """Gradients travel with the last piece of a batch only."""
        return nullcontext() if last or self.world.size == 1 else self.forward.no_sync()

    def _optimize(self, step: int, loss: Tensor, interrupted: bool) -> None:
        config = self.config
        gradients = [p.grad for p in self.optimizers.parameters()]
        norm = torch.nn.utils.get_total_norm(gradients)
        status = sum_over_world(torch.stack((loss, loss.new_tensor(float(interrupted)))), self.world)
        ok = (torch.isfinite(status[0]) & torch.isfinite(norm)).float()
        if config.train.clip_norm is not None:
            torch._foreach_mul_(gradients, (config.train.clip_norm / norm).clamp(max=1.0).nan_to_num())
        self.optimizers.step(
            schedule.lr_multiplier(step, config),
            schedule.muon_momentum(step, config),
            schedule.decay_multiplier(step, config),
            ok,
        )
        told, event = torch.cat((status, norm[None], ok[None])), None
        if self.device.type == "cuda":
            told = torch.empty(4, pin_memory=True).copy_(told, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self.under_way.append((step, told, event))

    def outcomes(self, n: int | None = None) -> list[Outcome]:
        """Of the `n` oldest steps that were not asked about yet; by default of all, which waits for the device."""
        found = []
        for _ in range(len(self.under_way) if n is None else n):
            step, told, event = self.under_way.popleft()
            if event is not None:
                event.synchronize()
            loss, interrupted, norm, ok = told.tolist()
            found.append(Outcome(step, loss, norm, skipped=ok == 0, interrupted=interrupted > 0))
        return found
