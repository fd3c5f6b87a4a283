"""Time several functions against each other in one run, and publish the result as a table.

    timings = benchmark({"a": run_a, "b": run_b}, device, rounds=10)
    timings["b"].median / timings["a"].median

Contestants take turns, A B A B, so that other load on the machine falls on all of them alike.
"""

import datetime
import importlib.metadata
import importlib.util
import itertools
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gkachat.files import write_text
from gkachat.machine import commit, device_name, processor, synchronize

MIN_SAMPLE_SECONDS = 0.02  # shorter runs are repeated within a sample


@dataclass(frozen=True)
class Timing:
    """Seconds per run over all rounds."""

    median: float
    low: float
    high: float
    peak_mib: float | None
    """MiB that the device's allocator held at most, beyond those held before the run; None on a CPU."""


def benchmark(contestants: dict[str, Callable[[], Any]], device: torch.device, rounds: int = 10) -> dict[str, Timing]:
    """Run each contestant once to warm up, then time each of them `rounds` times, in turns."""
    repeats, peaks, samples = {}, {}, {name: [] for name in contestants}
    for name, run in contestants.items():
        run()
        peaks[name] = _peak_mib(run, device)
        repeats[name] = max(1, round(MIN_SAMPLE_SECONDS / max(1e-6, _seconds(run, device, 1))))
    for _ in range(rounds):
        for name, run in contestants.items():
            samples[name].append(_seconds(run, device, repeats[name]))
    return {name: Timing(statistics.median(s), min(s), max(s), peaks[name]) for name, s in samples.items()}


def _seconds(run: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Return the seconds of one of several runs."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
        for _ in range(repeats):
            run()
        end.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(end) / 1000 / repeats
    synchronize(device)
    before = time.perf_counter()
    for _ in range(repeats):
        run()
    synchronize(device)
    return (time.perf_counter() - before) / repeats


def _peak_mib(run: Callable[[], Any], device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def measured_peaks(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Return FLOP/s of a large matrix product in `dtype` and bytes/s of a large copy, the best of several."""
    n = 8192 if device.type == "cuda" else 1536
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    source = torch.empty(2**30 if device.type == "cuda" else 2**26, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    timings = benchmark({"product": lambda: a @ b, "copy": lambda: target.copy_(source)}, device, rounds=5)
    return 2 * n**3 / timings["product"].low, 2 * source.numel() / timings["copy"].low


def facts(device: torch.device) -> dict[str, str]:
    """Return the machine, the date, the commit and the versions that a result was measured with."""
    found = {
        "device": device_name(device),
        "processor": processor(),
        "date": str(datetime.date.today()),
        "commit": commit(),
        "python": platform.python_version(),
    }
    for package in ("torch", "triton", "flash-attn", "flash-attn-3"):
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def table(rows: list[dict[str, Any]], columns: dict[str, str] | None = None) -> str:
    """Return a Markdown table. `columns` maps headers to format strings over a row, like "{step_ms:.1f}".

    By default, the keys of a row are the headers. A figure that is None leaves its cell empty; a column without any
    figure is left out.
    """

    def cell(template: str, row: dict[str, Any]) -> str:
        try:
            return template.format(**row)
        except TypeError:  # None has no decimals
            return ""

    if columns is None:
        cells = {header: [row[header] for row in rows] for header in rows[0]}
    else:
        cells = {header: [cell(template, row) for row in rows] for header, template in columns.items()}
    cells = {header: column for header, column in cells.items() if any(column)}
    lines = [[*cells], ["---", *["---:"] * (len(cells) - 1)], *zip(*cells.values(), strict=True)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def show(text: str) -> None:
    """Print a text. In a terminal its Markdown tables are drawn, if rich is installed; elsewhere they stay as they are.

    Benchmarks run on machines that have no rich.
    """
    if not sys.stdout.isatty() or importlib.util.find_spec("rich") is None:
        print(text, flush=True)
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, markup=False)
    for is_table, lines in itertools.groupby(text.splitlines(), lambda line: line.startswith("| ")):
        if not is_table:
            print("\n".join(lines))
            continue
        header, rule, *rows = ([cell.strip() for cell in line[1:-1].split(" | ")] for line in lines)
        table = Table(box=box.SIMPLE_HEAD)
        for name, dashes in zip(header, rule, strict=True):
            table.add_column(name, justify="right" if dashes.endswith(":") else "left")
        for row in rows:
            table.add_row(*row)
        console.print(table)


def publish(title: str, result: dict[str, Any], table: str, device: torch.device, out: str | None) -> None:
    """Print a benchmark's table; with `out`, write OUT.json and OUT.md: figures, command and machine."""
    where = facts(device)
    where_line = ", ".join(f"{key} {value}" for key, value in where.items())
    show(f"\n{table}\n{where_line}")
    if out is None:
        return
    command = f"python -m scripts.{Path(sys.argv[0]).stem} {' '.join(sys.argv[1:])}"
    published = {"command": command, "facts": where, **result}
    write_text(Path(out).with_suffix(".json"), json.dumps(published, indent=1) + "\n")
    write_text(Path(out).with_suffix(".md"), f"# {title}\n\n{table}\n`{command}`\n\n{where_line}\n")
