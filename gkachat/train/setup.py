"""Setup of a training run: its directory, and the model on its device."""

import dataclasses
import os
import platform
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from gkachat.checkpoint import CHECKPOINTS, check_format, checkpoint_steps, load_run_config
from gkachat.config import Config, GPTConfig, home
from gkachat.config_file import C, kind_of
from gkachat.files import lock, write_text
from gkachat.machine import check_compiler, check_installed, device_name, is_nvidia, physical_memory, pick_dtype
from gkachat.model.gpt import Transformer
from gkachat.model.stats import state_bytes
from gkachat.train.distributed import World

Model = TypeVar("Model", bound=Transformer)

# Options that may change when a run is resumed, because they do not change what it learns.
FREE_TO_CHANGE = ("device_batch_size", "recompute_blocks", "eval_every", "eval_tokens", "max_skipped")
# Options that may change with the token budget, when it grows.
LENGTH = ("total_tokens", "baseline_tokens", "tokens_per_param", "protocol", "epochs", "weight_decay")


@dataclass(frozen=True)
class Run:
    """A run directory, locked by rank 0 so that no other process trains it."""

    directory: Path
    resume: bool
    report: Callable[[str], None]
    """Prints a line, on rank 0 only."""
    lock: AbstractContextManager
    """Held already; leaving its context releases it."""


def keep_batch(config: C, resume: bool) -> C:
    """Return a config, not yet resolved, with the batch of the run that it resumes, where it sets none.

    A larger token budget would derive a larger batch, and a run that is trained longer cannot change it.
    """
    directory = home() / "runs" / config.run_name
    if not resume or config.train.total_batch_size is not None or not checkpoint_steps(directory):
        return config
    batch = load_run_config(directory).train.total_batch_size
    return dataclasses.replace(config, train=dataclasses.replace(config.train, total_batch_size=batch))


def open_run(config: Config, world: World, *, resume: bool = False, overwrite: bool = False) -> Run:
    """Lock the directory of a run with a resolved config. Nothing in it is changed yet.

    Args:
        resume: continue the run of this name, or start it where it does not exist.
        overwrite: delete the run of this name when training starts.

    Raises:
        FileExistsError: the run has checkpoints and neither flag is given, or another process trains it.
        ValueError: the run to resume was trained with other options (a larger token budget is allowed, and trains it
            longer), is of another kind, or was written by an incompatible version.
    """
    directory = home() / "runs" / config.run_name
    if not world.is_rank0:
        return Run(directory, resume, lambda line: None, nullcontext())
    held = _lock_run(directory)
    steps = checkpoint_steps(directory)
    damaged = any(directory.glob(f"{CHECKPOINTS}/damaged_*"))
    if (steps or damaged) and not (resume or overwrite):  # one without checkpoints has failed, and is not in the way
        raise FileExistsError(
            f"run {directory.name!r} exists in {directory.parent}: give --resume to go on with it, "
            "--overwrite to start anew, or another --run.name"
        )
    if resume and steps:
        check_format(directory)
        _check_options(directory, config)
    return Run(directory, resume, print, held)


def _lock_run(directory: Path) -> AbstractContextManager:
    owner = directory.with_name(f".{directory.name}.owner")
    by = owner.read_text("utf-8") if owner.exists() else "another process"
    busy = f"run {directory.name!r} is in use by {by}; wait for it, stop it, or choose another name"
    held = lock(directory, busy=busy)
    write_text(owner, f"process {os.getpid()} on {platform.node()}")
    return held


def changed_options(directory: Path, config: Config) -> list[str]:
    """Return a line for each option that differs from those of a run, and that must not when it is resumed."""
    stored = load_run_config(directory)
    if type(stored) is not type(config):
        kind = kind_of(dataclasses.asdict(stored))
        raise ValueError(f"cannot resume {directory.name!r}: it is of another kind ({kind}); give another --run.name")
    free = FREE_TO_CHANGE + (LENGTH if config.train.total_tokens > stored.train.total_tokens else ())
    return [
        f"{section}.{f.name}: given {given!r}, the run has {found!r}"
        for section in vars(stored)
        if section != "run"
        for f in dataclasses.fields(getattr(stored, section))
        if (given := getattr(getattr(config, section), f.name)) != (found := getattr(getattr(stored, section), f.name))
        and f.name not in free
    ]


def _check_options(directory: Path, config: Config) -> None:
    if changed := changed_options(directory, config):
        raise ValueError(
            f"cannot resume {directory.name!r} with other options ({'; '.join(changed)}): take them back, "
            "give --overwrite to start anew, or another --run.name; only a larger token budget can be given"
        )


def build_model(cls: type[Model], config: Any, device: torch.device) -> Model:
    """Build a model on its device from a training config. The seed gives every rank the same weights.

    Raises ValueError where `run.fp8` asks for what the device or the installation cannot do, or where kernels must be
    compiled and no compiler is installed, or where a CPU's machine has less memory than weights, gradients and
    optimizer state take.
    """
    if device.type == "cpu" and isinstance(config.model, GPTConfig):
        check_memory(config.model)
    torch.manual_seed(config.run.seed)
    with device:
        model = cls(config.model, pick_dtype(config.run.dtype, device))
    compiled = config.run.compile is not False or any("triton" in name or "flex" in name for name in model.kernels())
    if device.type == "cuda" and compiled:
        check_compiler()
    if config.run.fp8:
        if not is_nvidia(device) or torch.cuda.get_device_capability(device) < (8, 9):
            raise ValueError(
                f"run.fp8: {device_name(device)} has no fp8 arithmetic that this package can use: leave it out"
            )
        use_fp8(model)
    model.recompute_blocks = config.train.recompute_blocks
    return model


def check_memory(config: GPTConfig) -> None:
    """Raise ValueError where this machine's memory cannot hold what training keeps, activations not counted.

    Linux grants memory that it does not have, and ends the process later, without a message.
    """
    needed, there = state_bytes(config), physical_memory()
    if needed > there:
        raise ValueError(
            f"model.depth: depth {config.depth} takes {needed / 2**30:,.1f} GiB for weights, gradients and optimizer "
            f"state, and this machine has {there / 2**30:,.1f} GiB: give a smaller model.depth or model.n_embd"
        )


def use_fp8(model: Transformer, emulate: bool = False) -> None:
    """Make the matrices of the blocks multiply in fp8 with one scale per tensor. Weights stay in float32.

    `emulate` rounds in the same way on any device. Raises ValueError where torchao is not installed.
    """
    check_installed("torchao", "fp8", "run.fp8: ")
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    def has_kernel(module: nn.Module, name: str) -> bool:  # the head's loss reads its weight in parts
        return name != "lm_head" and module.in_features % 16 == 0 and module.out_features % 16 == 0

    convert_to_float8_training(model, module_filter_fn=has_kernel, config=Float8LinearConfig(emulate=emulate))


def largest_device_batch(
    model: Transformer, optimizers: list[torch.optim.Optimizer], rows: int, device: torch.device, world: World
) -> int:
    """Return how many rows, up to `rows`, fit the GPU memory of every rank in one forward and backward.

    The number is doubled until memory runs out. On a CPU it is 32, since a CPU swaps to disk instead of failing.
    Raises ValueError when not even one row fits.
    """
    if device.type != "cuda":
        return min(32, rows)
    fits = 1
    for n in [*(2**i for i in range(rows.bit_length()) if 2**i < rows), rows]:
        try:
            model(*model.example_batch(n)).backward()
        except torch.cuda.OutOfMemoryError as error:
            if n == 1:
                raise ValueError(
                    f"train.device_batch_size: not even one row of {model.config.sequence_len} tokens fits "
                    f"{device_name(device)}; set train.recompute_blocks, or a smaller model"
                ) from error
            break
        if n == 1:  # allocates the optimizers' state; with found_inf = 1 the step changes nothing
            for optimizer in optimizers:
                optimizer.found_inf = torch.ones((), device=device)
                optimizer.step()
            model.zero_grad(set_to_none=True)
        fits = n
    model.zero_grad(set_to_none=True)
    torch.cuda.empty_cache()
    smallest = torch.tensor(fits, device=device)
    if world.size > 1:
        dist.all_reduce(smallest, dist.ReduceOp.MIN)
    return int(smallest)
