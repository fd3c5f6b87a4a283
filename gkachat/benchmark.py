"""Timing contestants against each other in one run, and what the machine could do at best.

    timings = benchmark({"a": run_a, "b": run_b}, device, rounds=10)
    timings["b"].median / timings["a"].median

Contestants take turns, A B A B, so that whatever else the machine does falls on all of them alike.
"""

import datetime
import importlib.metadata
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gkachat.files import write_text
from gkachat.machine import commit, device_name, processor

SHORTEST = 0.02  # seconds a sample takes at least: shorter runs are repeated within it


@dataclass(frozen=True)
class Timing:
    """Seconds of one run, over all rounds."""

    median: float
    low: float
    high: float
    peak_bytes: int | None
    """Most bytes the device's allocator held beyond what was there before; None on a CPU."""


def benchmark(contestants: dict[str, Callable[[], Any]], device: torch.device, rounds: int = 10) -> dict[str, Timing]:
    """Time each of them `rounds` times, in turns, after a run to warm up."""
    repeats, peaks, samples = {}, {}, {name: [] for name in contestants}
    for name, run in contestants.items():
        run()
        peaks[name] = _peak(run, device)
        repeats[name] = max(1, round(SHORTEST / max(1e-6, _seconds(run, device, 1))))
    for _ in range(rounds):
        for name, run in contestants.items():
            samples[name].append(_seconds(run, device, repeats[name]))
    return {name: Timing(statistics.median(s), min(s), max(s), peaks[name]) for name, s in samples.items()}


def _seconds(run: Callable[[], Any], device: torch.device, repeats: int) -> float:
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
        for _ in range(repeats):
            run()
        end.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(end) / 1000 / repeats
    before = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - before) / repeats


def _peak(run: Callable[[], Any], device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def measured_peaks(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """(FLOP/s of a large matrix product in this dtype, bytes/s of a large copy), the best of several."""
    n = 8192 if device.type == "cuda" else 1536
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    source = torch.empty(2**30 if device.type == "cuda" else 2**26, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    timings = benchmark({"product": lambda: a @ b, "copy": lambda: target.copy_(source)}, device, rounds=5)
    return 2 * n**3 / timings["product"].low, 2 * source.numel() / timings["copy"].low


def facts(device: torch.device) -> dict[str, str]:
    """Where and with what a result was measured."""
    versions = {}
    for package in ("torch", "triton", "flash-attn", "flash-attn-3"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "device": device_name(device),
        "processor": processor(),
        "date": str(datetime.date.today()),
        "commit": commit(),
        "python": platform.python_version(),
        **versions,
    }


def table(rows: list[dict[str, Any]], columns: dict[str, str]) -> str:
    """Markdown. `columns` has, under its header, how a row's figures are shown: "{step_ms:.1f}". One that no row has
    figures for is left out."""

    def show(template: str, row: dict[str, Any]) -> str:
        try:
            return template.format(**row)
        except TypeError:  # None has no decimals
            return ""

    shown = {header: [show(template, row) for row in rows] for header, template in columns.items()}
    shown = {header: column for header, column in shown.items() if any(column)}
    lines = [[*shown], ["---", *["---:"] * (len(shown) - 1)], *zip(*shown.values(), strict=True)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def publish(title: str, result: dict[str, Any], table: str, device: torch.device, out: str | None) -> None:
    """Print a benchmark's table; with `out`, write OUT.json and OUT.md: the figures, the command, the machine."""
    where = facts(device)
    print(f"\n{table}\n{', '.join(f'{key} {value}' for key, value in where.items())}")
    if out is None:
        return
    command = f"python -m scripts.{Path(sys.argv[0]).stem} {' '.join(sys.argv[1:])}"
    told = {"command": command, "facts": where, **result}
    write_text(Path(out).with_suffix(".json"), json.dumps(told, indent=1) + "\n")
    where = ", ".join(f"{key} {value}" for key, value in where.items())
    write_text(Path(out).with_suffix(".md"), f"# {title}\n\n{table}\n`{command}`\n\n{where}\n")
