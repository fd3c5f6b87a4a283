"""Loaded by every Python process whose PYTHONPATH names this folder. It reports what a process did to the null GPU.

Where a number from the device decides what the host does next, that number is replaced: on a GPU that computes nothing
it is whatever the memory held. These are the only replacements:

- aten::zero_ writes zeros to contiguous tensors, and aten::nonzero, whose size depends on data, finds what the memory
  holds. A stale number would be a size of terabytes.
- Trainer.train_step: loss and gradient norm are 1, no step is skipped, and the request to stop is what the ranks' hosts
  say. Host waits are counted around the real step, before the replacement.
- bpb_sums: runs on the real batches, then returns one nat per byte.
"""

import atexit
import faulthandler
import importlib.abc
import importlib.util
import json
import os
import signal
import sys
import warnings
import weakref
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # counters.py

waits_by_step: list[int] = []  # of every trainer, without its first step, which compiles


def replace_in_torch(torch) -> None:
    import counters

    def zero_(tensor):
        if tensor.is_contiguous():
            counters.fill_zero(tensor.data_ptr(), tensor.nbytes)
        return tensor

    def nonzero(tensor):
        whole = tensor.as_strided((tensor.untyped_storage().nbytes() // tensor.itemsize,), (1,), 0)
        whole = whole.cpu()  # one copy: no kernel gathers a slice
        return whole.as_strided(tensor.size(), tensor.stride(), tensor.storage_offset()).nonzero().to(tensor.device)

    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of an operator that has a kernel already
        library.impl("zero_", zero_, "CUDA")
        library.impl("nonzero", nonzero, "CUDA")
    torch._null_gpu_library = library  # lives as long as its operators


def replace_in_trainer(module) -> None:
    import counters
    import torch

    real_step, compiled = module.Trainer.train_step, weakref.WeakSet()

    def train_step(self) -> None:
        before = counters.read()["host_waits"]
        real_step(self)
        if self in compiled:
            waits_by_step.append(counters.read()["host_waits"] - before)
        compiled.add(self)
        stop = torch.tensor(float(self.stop_requested > 0))
        stop = module.all_reduce_sum(stop.to(self.device), self.world).cpu()
        step, _, event = self.pending[-1]
        self.pending[-1] = step, torch.tensor([1.0, float(stop), 1.0, 1.0]), event  # loss, stop, norm, ok

    module.Trainer.train_step = train_step


def replace_in_bpb(module) -> None:
    real_sums = module.bpb_sums

    def bpb_sums(*args, **kwargs):
        real_sums(*args, **kwargs)
        return 1000.0, 1000

    module.bpb_sums = bpb_sums


REPLACEMENTS = {
    "torch": replace_in_torch,
    "gkachat.train.trainer": replace_in_trainer,
    "gkachat.eval.bpb": replace_in_bpb,
}


class Replacer(importlib.abc.MetaPathFinder):
    """Runs a replacement right after its module is imported, before anyone else sees the module."""

    def find_spec(self, name, path, target=None):
        replacement = REPLACEMENTS.pop(name, None)
        if replacement is None:
            return None
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module) -> None:
            execute(module)
            replacement(module)

        spec.loader.exec_module = exec_module
        return spec


def report() -> None:
    """Write what this process did to the null GPU to $NULL_REPORT/<pid>.json, if it used torch on it."""
    import counters

    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return
    dynamo = sys.modules.get("torch._dynamo.utils")
    breaks = dict(dynamo.counters["graph_break"]) if dynamo else {}
    graphs = dict(dynamo.counters["stats"]) if dynamo else {}
    memory = {
        f"{what}_gib": [
            getattr(torch.cuda, f"max_memory_{what}")(device) / 2**30 for device in range(torch.cuda.device_count())
        ]
        for what in ("allocated", "reserved")
    }
    found = {
        "argv": sys.argv, "rank": int(os.environ["RANK"]) if "RANK" in os.environ else None,
        "counters": counters.read(), "devices": counters.devices_touched(), "waits_by_step": waits_by_step,
        "graph_breaks": breaks, "graphs": graphs, **memory,
    }  # fmt: skip
    path = Path(os.environ["NULL_REPORT"]) / f"{os.getpid()}.json"
    path.write_text(json.dumps(found, indent=1))


if os.environ.get("NULL_REPORT"):
    sys.meta_path.insert(0, Replacer())
    atexit.register(report)
if os.environ.get("NULL_TRACE"):  # the library raises SIGUSR2 where the host waits
    faulthandler.register(signal.SIGUSR2, chain=False)
