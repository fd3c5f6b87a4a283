"""The trainer on the carried corpus: killed, resumed, evaluated, and compared with the CPU's losses."""

import math
import multiprocessing
import shutil
import signal
from pathlib import Path

from gkachat.machine import pick_device
from gkachat.train.metrics import read_metrics
from scripts.gpu_steps import Check, Save, carried
from scripts.gpu_steps.numbers import Comparisons

# Muon's iteration runs in bfloat16 on a GPU and in float32 on a CPU. On a CPU, bfloat16 there moved
# softmax's losses by 4.0e-4 at most and gka's by 2.2e-4, with activations in bfloat16 too by 1.2e-3 and 5.1e-4.
FIRST_LOSS = {"float32": 1e-5, "bfloat16": 1e-3}  # relative
LATER_LOSSES = {"float32": 2e-3, "bfloat16": 5e-3}
EXIT_OF = {signal.SIGTERM: 0, signal.SIGKILL: -signal.SIGKILL}  # a trainer saves on SIGTERM and ends well


def trainer(check: Check, attention: str, save: Save) -> None:
    """Train in float32 through a SIGTERM, a SIGKILL and two resumes; then in bfloat16, compiled, in one go.

    Each training is a process of its own. This one never touches the device, which a forked process could not use then.
    """
    comparisons, steps = Comparisons(save), check.sizes.steps
    kills = [(steps // 3, signal.SIGTERM), (2 * steps // 3, signal.SIGKILL), (-1, 0)]
    expected, curves = curve(check.carried / "runs" / attention), {}
    for dtype, runs in (("float32", kills), ("bfloat16", [(-1, 0)])):
        run_dir = check.out / f"run_{attention}_{dtype}"
        shutil.rmtree(run_dir, ignore_errors=True)
        for at, number in runs:
            process = multiprocessing.get_context("fork").Process(
                target=train, args=(check, attention, dtype, run_dir, at, number)
            )
            process.start()
            process.join()
            name = (
                f"{attention}, {dtype}: exit code {'after ' + signal.Signals(number).name if number else 'at the end'}"
            )
            comparisons.add(name, abs(process.exitcode - EXIT_OF.get(number, 0)), 0)
        curves[dtype] = got = curve(run_dir)
        shutil.rmtree(run_dir)
        save(curves=curves, cpu=expected)
        comparisons.add(f"{attention}, {dtype}: steps logged", abs(len(got["loss"]) - steps), 0)
        pairs = list(zip(got["loss"], expected["loss"], strict=False))
        errors = [abs(a / b - 1) if a else math.inf for a, b in pairs] or [math.inf]
        comparisons.add(f"{attention}, {dtype}: first loss", errors[0], FIRST_LOSS[dtype])
        comparisons.add(f"{attention}, {dtype}: all losses", max(errors), LATER_LOSSES[dtype])
        for when in (0, -1):
            error = abs(got["val_bpb"][when] / expected["val_bpb"][when] - 1) if got["val_bpb"] else math.inf
            name = f"{attention}, {dtype}: val_bpb at the {'end' if when else 'start'}"
            comparisons.add(name, error, (LATER_LOSSES if when else FIRST_LOSS)[dtype])


def train(check: Check, attention: str, dtype: str, run_dir: Path, at: int, number: int) -> None:
    """Train in this process."""
    device = pick_device(check.device)
    compile = check.sizes.compile and dtype == "bfloat16"
    config = carried.config(check.sizes, attention, device.type, dtype, compile)
    carried.train(config, device, check.carried, run_dir, (at, number))


def curve(run_dir: Path) -> dict[str, list[float]]:
    """Return the losses of all steps, and val_bpb at the start and the end."""
    records = read_metrics(run_dir)
    return {
        "loss": [r["loss"] for r in records if r["kind"] == "train"],
        "val_bpb": [r["val_bpb"] for r in records if r["kind"] == "eval"],
    }
