"""Train and evaluate every run of a sweep file, then write its table, fits and figure to sweeps/<name>/.

python -m scripts.sweep configs/sweep_depth.toml
python -m scripts.sweep configs/sweep_depth.toml --run.device cpu

Run again it goes on: what is finished is kept. Where there are GPUs, each trains a run of its own.
"""

import os
import queue
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait

from gkachat.config import Config
from gkachat.config_file import to_toml
from gkachat.files import write_text
from scripts.cli import print_help, run, split_args


class Jobs:
    """Processes that Ctrl-C and SIGTERM end well; each writes to the log of its run."""

    def __init__(self) -> None:
        self.stopped, self.under_way = threading.Event(), set()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.stop)

    def stop(self, number: int, frame: object) -> None:
        """What trains saves and ends; once more, and it ends at once."""
        print("stopping: what trains saves and ends", file=sys.stderr, flush=True)
        self.stopped.set()
        for process in list(self.under_way):
            process.send_signal(signal.SIGINT)

    def run(self, log, *words: str, gpu: str | None = None) -> str:
        """One script; why it failed, or nothing."""
        if self.stopped.is_set():
            return ""
        env = os.environ | ({} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu})
        with open(log, "a") as file:  # of a group of its own: a signal reaches it once, from here
            command = [sys.executable, "-m", *words]
            process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=env, process_group=0)
        self.under_way.add(process)
        if self.stopped.is_set():
            process.send_signal(signal.SIGINT)
        code = process.wait()
        self.under_way.discard(process)
        last = log.read_text(errors="replace").strip().rpartition("\n")[2]
        return f"{words[0]} ended with {code}, {last} (all of it: {log})" if code else ""


def main() -> int:
    path, words, _ = split_args(sys.argv[1:], {})
    if {"-h", "--help"} & set(words):
        print_help("SWEEP.toml", Config(), __doc__, {})
    if path is None:
        raise ValueError("given no sweep file, expected one, as in python -m scripts.sweep configs/sweep_depth.toml")
    import torch  # takes seconds, --help should not

    from gkachat.benchmark import facts
    from gkachat.machine import pick_device
    from gkachat.sweep import Run, load_sweep, write_sweep
    from gkachat.train.metrics import duration

    sweep, jobs = load_sweep(path, words), Jobs()
    options = {one.name: sweep.directory / "runs" / f"{one.name}.toml" for one in sweep.runs}
    for one in sweep.runs:
        write_text(options[one.name], to_toml(one.config))
    todo = [one for one in sweep.runs if one.result() is None]
    n, total = torch.cuda.device_count(), sum(one.flops for one in todo)
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(n)))).split(",")[:n] or [None]
    where = "one after the other" if gpus == [None] else f"on GPUs {', '.join(gpus)}"
    print(f"sweep {sweep.name}: {len(sweep.runs)} runs, {len(todo)} to do, {total:.3g} FLOPs, {where}", flush=True)
    for data_name, one in {one.config.data_name: one for one in todo}.items():
        for script in ("scripts.tok_train", "scripts.data_prep"):  # nothing, where it is done already
            if why := jobs.run(sweep.directory / f"{data_name}.log", script, str(options[one.name])):
                raise ValueError(why)
    free, done, failed, start = queue.Queue(), [], {}, time.perf_counter()
    for gpu in gpus:
        free.put(gpu)

    def work(one: Run) -> None:
        gpu, log = free.get(), options[one.name].with_suffix(".log")
        try:
            if not jobs.stopped.is_set():
                print(f"{one.name} begins: {log}", flush=True)
            why = (
                "" if one.is_trained() else jobs.run(log, "scripts.base_train", options[one.name], "--resume", gpu=gpu)
            )
            why = why or jobs.run(log, "scripts.base_eval", one.name, gpu=gpu)
            if jobs.stopped.is_set():
                return
            done.append(one.flops)
            result, seconds = one.result(), time.perf_counter() - start
            if result is None:
                failed[one.name] = why or f"it did not finish: {log}"
            told = f"val bpb {result['val_bpb']:.4f} | {duration(result['seconds'])}" if result else "failed"
            left = duration(seconds / sum(done) * (total - sum(done)))
            print(f"{one.name} | {told} | {len(done)} of {len(todo)}, {left} left", flush=True)
        finally:
            free.put(gpu)

    with ThreadPoolExecutor(len(gpus)) as pool:
        futures = [pool.submit(work, one) for one in todo]
        while wait(futures, timeout=0.5).not_done:  # a signal that comes right before a wait is heard after it
            pass
        for future in futures:
            future.result()
    if any(one.result() for one in sweep.runs):
        print(f"\n{write_sweep(sweep, facts(pick_device('auto')))}")
        print(f"written to {sweep.directory}: sweep.md, sweep.json, sweep.png")
    for name, why in failed.items():
        print(f"error: run {name}: {why}", file=sys.stderr)
    if jobs.stopped.is_set():
        print("interrupted; the same command goes on with it", file=sys.stderr)
        return 130
    return 1 if failed else 0


if __name__ == "__main__":
    run(main)
