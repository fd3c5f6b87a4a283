"""The processes that train together, as torchrun starts them: one per device, all with the same weights."""

import datetime
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class World:
    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        """Whether this process prints, logs and saves."""
        return self.rank == 0


def start(device_type: str, timeout: float) -> World:
    """Join the others when torchrun has set the environment; a world of one otherwise."""
    if "RANK" not in os.environ:
        return World()
    world = World(*(int(os.environ[key]) for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))
    if world.size > 1 and not dist.is_initialized():
        if device_type == "cuda":
            torch.cuda.set_device(world.local_rank)
        # The watchdog speaks first: what it says names the step.
        limit = datetime.timedelta(seconds=2 * timeout + 60)
        dist.init_process_group("nccl" if device_type == "cuda" else "gloo", timeout=limit)
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


def gather(whole: Tensor, part: Tensor) -> dist.Work:
    """Have the parts of all processes, one after the other, in `whole`; to be waited for."""
    gather_single = (
        getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    )  # its name before torch 2.13
    return gather_single(whole, part, async_op=True)


def told_by_main(number: int, world: World, device: torch.device) -> int:
    """The main process's number, in all of them."""
    if world.size == 1:
        return number
    told = torch.tensor(number, dtype=torch.int64, device=device)
    dist.broadcast(told, 0)
    return int(told)


class Watchdog:
    """Ends the process when nothing was heard for too long: a collective that waits for a process that is gone or
    stuck never returns by itself, least of all on a GPU."""

    def __init__(self, timeout: float, world: World):
        self.timeout, self.world = timeout, world
        self.doing, self.since = "start", time.monotonic()

    def heard(self, doing: str) -> None:
        """Something goes on: what it is."""
        self.doing, self.since = doing, time.monotonic()

    @contextmanager
    def watching(self) -> Iterator[None]:
        done = threading.Event()

        def watch() -> None:
            while not done.wait(min(1.0, self.timeout / 4)):
                silent = time.monotonic() - self.since
                if silent > self.timeout:
                    print(
                        f"error: rank {self.world.rank}: no progress for {silent:.0f} s in {self.doing}; "
                        "run.timeout sets how long to wait",
                        file=sys.stderr,
                        flush=True,
                    )
                    os._exit(1)  # the main thread may be stuck where no exception reaches it

        thread = threading.Thread(target=watch, daemon=True)
        self.heard(self.doing)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
