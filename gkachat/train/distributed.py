"""The processes that train together, as torchrun starts them: one per device, all with the same weights."""

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class World:
    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        """Whether this process prints, logs and saves."""
        return self.rank == 0


def start(device_type: str) -> World:
    """Join the others when torchrun has set the environment; a world of one otherwise."""
    if "RANK" not in os.environ:
        return World()
    world = World(*(int(os.environ[key]) for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))
    if world.size > 1 and not dist.is_initialized():
        if device_type == "cuda":
            torch.cuda.set_device(world.local_rank)
        dist.init_process_group("nccl" if device_type == "cuda" else "gloo")
    return world


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def barrier(world: World) -> None:
    if world.size > 1:
        dist.barrier()


def sum_over_world(tensor: Tensor, world: World) -> Tensor:
    """In place; every process ends up with the sum."""
    if world.size > 1:
        dist.all_reduce(tensor)
    return tensor


def sum_gradients(model: nn.Module, world: World) -> None:
    """Add up all gradients over the world."""
    if world.size > 1:
        for p in model.parameters():
            dist.all_reduce(p.grad)
