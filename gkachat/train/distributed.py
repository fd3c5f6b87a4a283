"""Collectives among the processes that torchrun starts, one for each device, all with the same weights."""

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

COMPILE_SECONDS = 1800.0  # at least so long may a step take that compiles and times kernels, before it counts as hung


@dataclass(frozen=True)
class World:
    """Rank of this process and number of processes. The default is a single process."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_rank0(self) -> bool:
        """Whether this process prints, logs and writes the weights."""
        return self.rank == 0


def init_process_group(device_type: str, timeout: float) -> World:
    """Join the process group that torchrun describes in the environment. Without torchrun, return a world of one.

    Select the device first (`machine.pick_device` does). `timeout` is the watchdog's, in seconds. Collectives wait
    longer, so that the watchdog, whose message names the step, is the first to end a process.
    """
    if "RANK" not in os.environ:
        return World()
    world = World(*(int(os.environ[key]) for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))
    if world.size > 1 and device_type == "mps":
        raise ValueError("run.device: mps has no collectives: start one process, or use the CPU")
    if world.size > 1 and not dist.is_initialized():
        limit = datetime.timedelta(seconds=max(2 * timeout, COMPILE_SECONDS) + 60)
        dist.init_process_group("nccl" if device_type == "cuda" else "gloo", timeout=limit)
    return world


def destroy_process_group() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def barrier(world: World) -> None:
    """Wait until every rank gets here."""
    if world.size > 1:
        dist.barrier()


def all_reduce_sum(tensor: Tensor, world: World) -> Tensor:
    """Add up `tensor` over all ranks, in place, and return it."""
    if world.size > 1:
        dist.all_reduce(tensor)
    return tensor


def all_gather(whole: Tensor, part: Tensor) -> dist.Work:
    """Start to fill `whole` with the `part` of every rank, in the order of ranks. Wait for the returned work."""
    return dist.all_gather_single(whole, part, async_op=True)


def broadcast_from_rank0(number: int, world: World, device: torch.device) -> int:
    """Broadcast an integer from rank 0 and return it on every rank."""
    if world.size == 1:
        return number
    tensor = torch.tensor(number, dtype=torch.int64, device=device)
    dist.broadcast(tensor, 0)
    return int(tensor)


class Watchdog:
    """Ends the process after `timeout` seconds without a heartbeat.

    A collective that waits for a process that is gone or stuck may never return by itself.
    """

    def __init__(self, timeout: float, world: World):
        self.timeout, self.world = timeout, world
        self.state = "start", time.monotonic(), timeout

    def heartbeat(self, doing: str, compiles: bool = False) -> None:
        """Report progress. `doing` says what goes on now, for the message of a process that hangs in it.

        With `compiles`, kernels are compiled and timed meanwhile: the limit is COMPILE_SECONDS if that is longer.
        """
        limit = max(self.timeout, COMPILE_SECONDS) if compiles else self.timeout
        self.state = doing, time.monotonic(), limit  # as one object, which the watching thread reads at once

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch from a thread for as long as the context is open."""
        done = threading.Event()

        def watch() -> None:
            while not done.wait(min(1.0, self.timeout / 4)):
                doing, since, limit = self.state
                silent = time.monotonic() - since
                if silent > limit:
                    print(
                        f"error: rank {self.world.rank}: no progress for {silent:.0f} s in {doing}; "
                        "run.timeout sets how long to wait",
                        file=sys.stderr,
                        flush=True,
                    )
                    os._exit(1)  # the main thread may be stuck where no exception reaches it

        thread = threading.Thread(target=watch, daemon=True)
        self.heartbeat(self.state[0])
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
