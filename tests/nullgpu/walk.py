"""Walk the GPU branch on the null GPU; scripts/gpu_walk.sh calls this after it has built what is needed.

python walk.py LIBRARY WORK [--only PART ...] [--full] [--out FILE.md]

Every step has its row in the table at the end, its log and its processes' reports in WORK. Parts that are not walked
this time are taken from WORK if they were walked at the same commit. The exit code is 1 if any step has a fault.
The environment's GPU_WALK_WITH is put before every command, such as "nice -n 5".
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from steps import HERE, Step, null_gpu_environment, read_steps, run_step

from gkachat.machine import commit, processor

ROOT = HERE.parents[1]
ATTENTIONS = ("softmax", "gka", "gka_conv")
ROWS, T = 32, 2048  # rows of a pass, as configs/d20.toml has them, and tokens of a row
STEPS = 6
DDP_LOGGED = 10  # steps whose times DistributedDataParallel takes for its log, each with some host waits
MAX_PEAK_GIB = 79.0
GOOD_PEAK_GIB = 72.0
DEPTH = 2
SMALL = [
    f"--model.depth={DEPTH}", "--model.n_embd=256", "--train.max_skipped=100000", "--train.eval_every=3",
    f"--train.eval_tokens={ROWS * T}", "--run.log_every=3", "--run.timeout=1500",
]  # fmt: skip


@dataclass
class Row:
    """A line of the table."""

    part: str
    step: str
    code: int
    seconds: float
    measured: list[str]
    faults: list[str]


class Walk:
    """The folders and the environment of a walk."""

    def __init__(self, library: Path, work: Path):
        self.library, self.work = library, work
        self.tree, self.home, self.logs = (work / name for name in ("tree", "home", "logs"))

    def environment(self, gpus: int = 1) -> dict[str, str]:
        return null_gpu_environment(self.library, gpus) | {"GKACHAT_HOME": str(self.home)}

    def folder(self, part: str) -> Path:
        folder = self.logs / part
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def run(self, part: str, label: str, command: list[str], gpus: int = 1, stop_at: str | None = None) -> Step:
        """Run a command of this repository in the tree, on so many null GPUs."""
        print(f"== {label}", flush=True)
        wrapped = os.environ.get("GPU_WALK_WITH", "").split()
        if gpus > 1:
            torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={gpus}"]
            command = [*torchrun, *command]
        step = run_step(
            self.folder(part), label, [*wrapped, sys.executable, *command], self.environment(gpus), self.tree, stop_at
        )
        print(f"   exit code {step.code}, {step.seconds:.0f} s", flush=True)
        return step


def make_tree(walk: Walk) -> None:
    """Make the folder that speedrun.sh runs in: links to this repository, and stand-ins for downloads and nvidia-smi.

    The interpreter in its .venv is a stand-in too, which records each command of the speedrun as a step.
    """
    shutil.rmtree(walk.tree, ignore_errors=True)
    (walk.tree / ".venv/bin").mkdir(parents=True)
    for name in ("speedrun.sh", "scripts", "configs", "gkachat", "tests", "pyproject.toml"):
        (walk.tree / name).symlink_to(ROOT / name)
    shutil.copy(ROOT / "pyproject.toml", walk.tree / ".venv/installed")  # so that scripts/setup.sh installs nothing
    write_program(
        walk.tree / ".venv/bin/python",
        f'export NULL_LIBRARY="{walk.library}"',
        f'step="$GPU_WALK_WITH {sys.executable} {HERE}/steps.py $NULL_STEPS"',
        f'if [ "$1" = -m ]; then exec $step "{sys.executable}" "$@"; fi',
        f'LD_PRELOAD="{walk.library}" PYTHONPATH= exec "{sys.executable}" "$@"',
    )
    list_gpus = 'for i in $(seq 1 "$NULL_GPUS"); do echo "GPU $i: a null GPU (UUID: GPU-$i)"; done'
    write_program(walk.tree / "bin/nvidia-smi", list_gpus)
    subprocess.run([sys.executable, HERE / "data.py", walk.tree, walk.home], check=True)


def write_program(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(["#!/usr/bin/env bash", "# Written by tests/nullgpu/walk.py.", *lines]) + "\n")
    path.chmod(0o755)


# ---- the parts ----


def speedrun(walk: Walk, gpus: int) -> list[Row]:
    """speedrun.sh from its first command to its last line, three trainings of a few steps and what follows them."""
    part = f"speedrun_{gpus}"
    folder, tokens = walk.folder(part), STEPS * gpus * ROWS * T
    shutil.rmtree(folder)
    folder.mkdir()
    options = [
        "--overwrite", *SMALL, f"--train.total_batch_size={gpus * ROWS * T}", f"--train.total_tokens={tokens}",
        "--chat.conversations", "1200",
    ]  # fmt: skip
    env = os.environ | {
        "PATH": f"{walk.tree / 'bin'}:{os.environ['PATH']}", "NULL_STEPS": str(folder), "NULL_GPUS": str(gpus),
        "GKACHAT_HOME": str(walk.home), "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    start, log = time.monotonic(), walk.logs / f"{part}.log"
    with open(log, "wb") as output:
        command = ["bash", str(walk.tree / "speedrun.sh"), *options]
        code = subprocess.run(command, env=env, stdout=output, stderr=subprocess.STDOUT).returncode
    rows = [row_of(part, step) for step in read_steps(folder)]
    rows.append(Row(part, "speedrun.sh, to its last line", code, time.monotonic() - start, [], []))
    if "Talk to them" not in log.read_text(errors="replace"):
        rows[-1].faults.append("its last line was not reached")
    return rows


def resume(walk: Walk) -> list[Row]:
    """A run that is interrupted on one GPU and resumed on two, each step with gradients of 64 rows."""
    command = [
        "-m", "scripts.base_train", "configs/d20.toml", "--model.attention=gka", "--run.name=interrupted", *SMALL,
        f"--train.total_batch_size={2 * ROWS * T}", f"--train.total_tokens={60 * 2 * ROWS * T}", "--train.eval_every=0",
    ]  # fmt: skip
    first = walk.run("resume", "base_train interrupted", [*command, "--overwrite"], stop_at="step      3/")
    second = walk.run("resume", "base_train resumed", [*command, "--resume"], gpus=2)
    rows = [row_of("resume", first), row_of("resume", second)]
    if "interrupted at step" not in first.output:
        rows[0].faults.append("it did not stop at the signal")
    if "resumes at step" not in second.output or "100 %" not in second.output:
        rows[1].faults.append("it did not go on to the end")
    return rows


def chat(walk: Walk) -> list[Row]:
    """Answers of the tuned models that the speedrun has left."""
    rows = []
    for attention in ATTENTIONS:
        command = ["-m", "scripts.chat_cli", f"d{DEPTH}_{attention}_chat", "-p", "Say 7.", "--max-tokens", "20"]
        step = walk.run("chat", f"chat_cli {attention}", command)
        rows.append(row_of("chat", step))
    return rows


def decode(walk: Walk) -> list[Row]:
    """Decoding, compiled and recorded as CUDA graphs."""
    command = ["-m", "scripts.bench_decode", "--depth", "4", "--tokens", "300", "--batch", "1", "4", "--rounds", "1"]
    rows = []
    for label, more in (("bench_decode", []), ("bench_decode --compile", ["--compile"])):
        step = walk.run("decode", label, [*command, *more])
        row = row_of("decode", step)
        replays, kernels = total(step, "graph_launches"), total(step, "graph_kernels")
        row.measured.append(f"{kernels} kernels recorded, {replays} replays")
        if not (replays and kernels):
            row.faults.append("nothing was recorded")
        rows.append(row)
    return rows


def options(walk: Walk) -> list[Row]:
    """Options of training that only a GPU has."""
    batch = [f"--train.total_batch_size={ROWS * T}", f"--train.total_tokens={2 * ROWS * T}"]
    command = ["-m", "scripts.base_train", "configs/d20.toml", "--model.attention=gka", "--overwrite", *SMALL, *batch]
    fp8 = walk.run("options", "base_train run.fp8", [*command, "--run.name=fp8", "--run.fp8=true"])
    auto = [*command, "--run.name=auto", "--train.device_batch_size=auto"]
    return [row_of("options", fp8), row_of("options", walk.run("options", "base_train batch auto", auto))]


def peaks(walk: Walk, full: bool) -> list[Row]:
    """Memory of a training step at depth 20 and the configured rows: measured, or extrapolated from depths 2 and 4."""
    rows = []
    for attention in ATTENTIONS:
        found: dict[int, tuple[float, float]] = {}
        for depth in (20,) if full else (2, 4):
            width = ["--model.n_embd=1280"]
            command = [str(HERE / "peak.py"), attention, f"--model.depth={depth}", *width]
            step = walk.run("peaks", f"peak {attention} depth {depth}", command)
            rows.append(row_of("peaks", step))
            if step.code == 0:
                found[depth] = tuple(max(r[key][0] for r in step.reports) for key in ("allocated_gib", "reserved_gib"))
        if len(found) == 2:  # every block adds the same; what the allocator reserves on top does not grow evenly
            (two, reserved_two), (four, reserved_four) = found[2], found[4]
            allocated = two + (four - two) * (20 - 2) / (4 - 2)
            reserved = allocated + max(reserved_two - two, reserved_four - four)
            label = f"peak {attention} depth 20, extrapolated"
            rows.append(Row("peaks", label, 0, 0, [memory(allocated, reserved)], over(reserved)))
        elif full and 20 in found:
            rows[-1].faults += over(found[20][1])
    return rows


# ---- what a step shows ----


def total(step: Step, counter: str) -> int:
    return sum(report["counters"][counter] for report in step.reports)


def memory(allocated: float, reserved: float) -> str:
    mark = f" (above the mark of {GOOD_PEAK_GIB:.0f})" if reserved > GOOD_PEAK_GIB else ""
    return f"peak {allocated:.1f} GiB, {reserved:.1f} reserved{mark}"


def over(reserved: float) -> list[str]:
    return [f"peak of {reserved:.1f} GiB, at most {MAX_PEAK_GIB:.0f} fit"] if reserved > MAX_PEAK_GIB else []


def row_of(part: str, step: Step) -> Row:
    """Return a step's row: what is measured and what is held to of every command, by what its processes report."""
    measured, faults = [], []
    several_ranks = len({report["rank"] for report in step.reports} - {None}) > 1
    if step.code != 0:
        lines = [line for line in step.output.splitlines() if line.strip()]
        faults.append(f"exit code {step.code}: {lines[-1].strip()[:160]}" if lines else f"exit code {step.code}")
    for counter, what in (("bad_launches", "launches refused"), ("capture_waits", "host waits within a capture")):
        if n := total(step, counter):
            faults.append(f"{n} {what}")
    if by_step := [report["waits_by_step"] for report in step.reports if report["waits_by_step"]]:
        waits, later = (max((n for steps in by_step for n in steps[first:]), default=0) for first in (0, DDP_LOGGED))
        measured.append(f"{waits} host waits a step")
        if several_ranks and waits:
            measured[-1] += f" in the first {DDP_LOGGED}, which DistributedDataParallel times, and {later} later"
        if later if several_ranks else waits:
            faults.append(f"{later if several_ranks else waits} host waits a step")
    if step.reports:
        measured.append(memory(*(max(max(r[key]) for r in step.reports) for key in ("allocated_gib", "reserved_gib"))))
    if graphs := max((report["graphs"].get("unique_graphs", 0) for report in step.reports), default=0):
        measured.append(f"{graphs} compiled graphs")
    # torch.compile splits the graph at DistributedDataParallel's calls by design: gradients travel meanwhile.
    breaks = {why for report in step.reports for why in report["graph_breaks"]}
    breaks = {why for why in breaks if "DistributedDataParallel" not in why and "set_runtime_stats_and_log" not in why}
    if breaks:
        faults.append(f"{len(breaks)} graph breaks: {' '.join(next(iter(breaks)).split())[:100]}")
    for report in step.reports:
        # A compile worker has the rank of its process, and holds no device.
        if report["rank"] is not None and set(report["devices"]) - {report["rank"]}:
            faults.append(f"rank {report['rank']} holds devices {report['devices']}")
    return Row(part, step.label, step.code, step.seconds, measured, faults)


# ---- the table ----


def table(rows: list[Row]) -> str:
    lines = ["| part | step | exit code | s | measured | |", "| --- | --- | ---: | ---: | --- | --- |"]
    for row in rows:
        verdict = "ok" if not row.faults else "FAULT: " + "; ".join(row.faults).replace("|", "/")
        measured = "; ".join(row.measured)
        lines.append(f"| {row.part} | {row.step} | {row.code} | {row.seconds:.0f} | {measured} | {verdict} |")
    return "\n".join(lines) + "\n"


def machine() -> str:
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "triton", "torchao"))
    return f"{processor()}, {os.cpu_count()} cores, Python {platform.python_version()}, {versions}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--only", nargs="+", default=None, help="parts to walk")
    parser.add_argument("--full", action="store_true", help="peaks at depth 20, not extrapolated")
    parser.add_argument("--out", type=Path, help="write the table to this file")
    arguments = parser.parse_args()
    walk = Walk(arguments.library.resolve(), arguments.work.resolve())
    parts: dict[str, Callable[[], list[Row]]] = {
        "speedrun_1": lambda: speedrun(walk, 1), "chat": lambda: chat(walk), "speedrun_2": lambda: speedrun(walk, 2),
        "resume": lambda: resume(walk), "decode": lambda: decode(walk), "options": lambda: options(walk),
        "peaks": lambda: peaks(walk, arguments.full),
    }  # fmt: skip
    if unknown := set(arguments.only or []) - set(parts):
        sys.exit(f"--only: given {', '.join(unknown)}, expected some of {', '.join(parts)}")
    make_tree(walk)
    rows, here = [], commit()
    for name, part in parts.items():
        record = walk.work / f"{name}.json"
        if arguments.only is None or name in arguments.only:
            walked: list[dict[str, Any]] = [asdict(row) for row in part()]
            record.write_text(json.dumps({"commit": here, "rows": walked}, indent=1))
        if record.exists() and (found := json.loads(record.read_text()))["commit"] == here:
            rows += [Row(**row) for row in found["rows"]]
    text = table(rows)
    print(f"\n{text}\nlogs: {walk.logs}")
    if arguments.out:
        header = f"`bash scripts/gpu_walk.sh`, {datetime.date.today()}, commit {here}, {machine()}"
        arguments.out.write_text(f"# The GPU branch on a null GPU\n\n{header}\n\n{text}")
    sys.exit(any(row.faults for row in rows))


if __name__ == "__main__":
    main()
