"""The steps of scripts/gpu_check.py: what each measures or compares, at sizes from one dataclass.

A step is a function of (Check, argument, save). It calls `save(**found)` whenever it knows more, so that a step that is
cut short keeps what it found. Steps import nothing that a machine with torch alone lacks.
"""

import subprocess
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from gkachat.benchmark import facts
from gkachat.machine import pick_device, pick_dtype

Save = Callable[..., None]


@dataclass(frozen=True)
class Sizes:
    """Sizes of everything that the check runs. The defaults are for a GPU of 80 GB."""

    # Models that are timed: depth 20
    depth: int = 20
    n_embd: int = 1280
    tokens: int = 2048
    vocab_size: int = 32_768
    rows: int = 16
    """Rows of a training step of the three models in one process."""
    configured_rows: int = 32
    """Rows of softmax's step alone, as configs/d20.toml has them."""
    kernel_rows: int = 32
    decode_rows: tuple[int, ...] = (1, 8, 64)
    rounds: int = 10
    compile: bool = True

    # Tensors that are compared with float64
    head_dim: int = 128
    compared_tokens: int = 1008
    """No multiple of a kernel's blocks, but of 16, as `tokens` is: Triton then compiles the same kernels for both."""
    compared_window: int = 112
    compared_vocab: int = 32_768

    # Models that are carried: trained on a CPU, for curves, tokens and scores
    carried_depth: int = 4
    carried_embd: int = 256
    carried_tokens: int = 512
    carried_vocab: int = 1024
    carried_chars: int = 6_000_000
    batch_rows: int = 8
    steps: int = 30
    prompts: int = 64
    new_tokens: int = 32


FULL = Sizes()
SMALL = Sizes(
    depth=2, n_embd=64, tokens=160, vocab_size=256, rows=2, configured_rows=2, kernel_rows=1,
    decode_rows=(1, 2), rounds=1, compile=False, head_dim=64, compared_tokens=48, compared_window=17,
    compared_vocab=512, carried_depth=2, carried_embd=64, carried_tokens=64, carried_vocab=512, carried_chars=400_000,
    batch_rows=4, steps=6, prompts=4, new_tokens=4,
)  # fmt: skip


@dataclass(frozen=True)
class Check:
    """One run of the check: its device, sizes and directories."""

    device: str
    sizes: Sizes
    carried: Path
    """Directory that `--prepare` wrote."""
    out: Path

    def start(self, save: Save) -> tuple[torch.device, torch.dtype]:
        """Select the device, save what the machine is, and return the device and its dtype of activations."""
        device = pick_device(self.device)
        found = facts(device)
        if found["commit"] == "unknown":  # a copied tree has no history
            found["commit"] = (self.carried / "commit.txt").read_text("utf-8").strip()
        with suppress(OSError, subprocess.CalledProcessError):
            query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()
            found["driver"] = driver[0] if device.type == "cuda" else "none"
        save(facts=found)
        return device, pick_dtype("auto", device)
