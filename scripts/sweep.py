"""Train and evaluate every run of a sweep file, then write its table, fits and figure to sweeps/<name>/.

python -m scripts.sweep configs/sweep_depth.toml
python -m scripts.sweep configs/sweep_depth.toml --run.device cpu

Run it again to continue: finished runs are kept. With several GPUs, each trains a run of its own. gkachat/sweep.py
describes the file.
"""

import os
import queue
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

from gkachat.config_file import to_toml
from gkachat.files import naming, write_text
from scripts.cli import run, split_args


class Scripts:
    """Runs scripts as processes with log files. The first Ctrl-C or SIGTERM lets training save, the second ends it."""

    def __init__(self) -> None:
        self.stopped, self.running = threading.Event(), set()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.stop)

    def stop(self, number: int, frame: object) -> None:
        print("stopping: runs in training save a checkpoint and end", file=sys.stderr, flush=True)
        self.stopped.set()
        for process in list(self.running):
            process.send_signal(signal.SIGINT)

    def run(self, log: Path, *words: str | Path, gpu: str | None = None) -> str:
        """Run one script to its end. Return why it failed, or an empty string."""
        if self.stopped.is_set():
            return ""
        env = os.environ | ({} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu})
        with naming(log), open(log, "a", encoding="utf-8") as file:
            command = [sys.executable, "-m", *words]
            # In a process group of its own, so that a signal reaches it once, from `stop`.
            process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=env, process_group=0)
        self.running.add(process)
        if self.stopped.is_set():
            process.send_signal(signal.SIGINT)
        code = process.wait()
        self.running.discard(process)
        last_line = log.read_text(errors="replace").strip().rpartition("\n")[2]
        return f"{words[0]} ended with {code}, {last_line} (log: {log})" if code else ""


def main() -> int:
    path, overrides, _ = split_args(sys.argv[1:], "SWEEP.toml", __doc__, {})
    if path is None:
        raise ValueError("given no sweep file, expected one, as in python -m scripts.sweep configs/sweep_depth.toml")
    import torch

    from gkachat.benchmark import facts, show
    from gkachat.checkpoint import checkpoint_steps
    from gkachat.machine import pick_device
    from gkachat.sweep import Run, load_sweep, write_sweep
    from gkachat.text import list_some
    from gkachat.train.metrics import format_duration
    from gkachat.train.setup import changed_options

    sweep, scripts = load_sweep(path, overrides), Scripts()
    configs = {one.name: sweep.directory / "runs" / f"{one.name}.toml" for one in sweep.runs}
    todo = [one for one in sweep.runs if one.result() is None]
    begun = [one for one in todo if checkpoint_steps(one.directory)]
    if changed := {one.directory: lines for one in begun if (lines := changed_options(one.directory, one.config))}:
        runs = list_some([f"{directory}: {', '.join(lines)}" for directory, lines in changed.items()])
        raise ValueError(f"runs of this sweep have other options ({runs}): take them back, delete these runs, or give "
                         "the sweep another name")  # fmt: skip
    for one in sweep.runs:
        write_text(configs[one.name], to_toml(one.config))
    total_flops = sum(one.flops for one in todo)
    n = torch.cuda.device_count()
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(n)))).split(",")[:n] or [None]
    where = "one after the other" if gpus == [None] else f"on GPUs {', '.join(gpus)}"
    counts = f"{len(sweep.runs)} runs, {len(todo)} to do"
    print(f"sweep {sweep.name}: {counts}, {total_flops:.3g} FLOPs, {where}", flush=True)
    for data_name, one in {one.config.data_name: one for one in todo}.items():
        for script in ("scripts.tok_train", "scripts.data_prep"):  # they return at once where their work is done
            if error := scripts.run(sweep.directory / f"{data_name}.log", script, configs[one.name]):
                raise ValueError(error)

    free_gpus, done_flops, errors, start = queue.Queue(), [], {}, time.perf_counter()
    for gpu in gpus:
        free_gpus.put(gpu)

    def train_and_evaluate(one: Run) -> None:
        gpu, log, error = free_gpus.get(), configs[one.name].with_suffix(".log"), ""
        try:
            if not scripts.stopped.is_set():
                print(f"{one.name} begins: {log}", flush=True)
            if not one.is_trained():
                error = scripts.run(log, "scripts.base_train", configs[one.name], "--resume", gpu=gpu)
            error = error or scripts.run(log, "scripts.base_eval", one.name, gpu=gpu)
            if scripts.stopped.is_set():
                return
            done_flops.append(one.flops)
            result, seconds = one.result(), time.perf_counter() - start
            if result is None:
                errors[one.name] = error or f"it did not finish (log: {log})"
            outcome = f"val bpb {result['val_bpb']:.4f} | {format_duration(result['seconds'])}" if result else "failed"
            left = format_duration(seconds / sum(done_flops) * (total_flops - sum(done_flops)))
            print(f"{one.name} | {outcome} | {len(done_flops)} of {len(todo)}, {left} left", flush=True)
        finally:
            free_gpus.put(gpu)

    with ThreadPoolExecutor(len(gpus)) as pool:
        futures = [pool.submit(train_and_evaluate, one) for one in todo]
        while wait(futures, timeout=0.5).not_done:  # without a timeout, a signal just before the wait would be missed
            pass
        for future in futures:
            future.result()
    if any(one.result() for one in sweep.runs):
        show(f"\n{write_sweep(sweep, facts(pick_device('auto')))}")
        print(f"written to {sweep.directory}: sweep.md, sweep.json, sweep.png")
    for name, error in errors.items():
        print(f"error: run {name}: {error}", file=sys.stderr)
    if scripts.stopped.is_set():
        print("interrupted; the same command continues it", file=sys.stderr)
        return 130
    return 1 if errors else 0


if __name__ == "__main__":
    run(main)
