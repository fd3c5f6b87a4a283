"""Check everything that only a GPU can show, within minutes, on a machine that has torch and little else.

python -m scripts.gpu_check --prepare                                  # on a CPU: writes the carried folder
python -m scripts.gpu_check --seconds 480 --out results/gpu/h100       # on the GPU machine
python -m scripts.gpu_check --step kernels --out results/gpu/h100      # one step again

Steps run in the order of their worth. Each is a process with its own seconds and its own JSON; one that fails or takes
too long stops nothing. The report is written again after each: OUT/page.md, OUT/summary.json, and OUT/report.tar, which
holds all that the steps wrote.
"""

import argparse
import io
import json
import multiprocessing
import os
import shlex
import signal
import sys
import tarfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from gkachat.files import atomic_write, write_text
from gkachat.text import expand
from scripts.cli import run

ATTENTIONS = ("softmax", "gka", "gka_conv")
CARRIED, CACHE = Path("build/gpu_check"), Path("build/gpu_cache")  # ignored by git
BACKGROUND_SECONDS = 150
POLL_SECONDS = 0.1
LEAST_SECONDS = 5  # no step starts with less


class Stage(NamedTuple):
    """Steps that run at the same time. A step's name is "kind" or "kind-argument"."""

    steps: tuple[str, ...]
    seconds: int
    """Planned. A step is ended after twice as many."""
    background: tuple[str, ...] = ()
    """Steps that start now and may go on into the next stages, for BACKGROUND_SECONDS at most."""
    waits: bool = False
    """Whether the background must have ended, because this stage needs the GPU's memory or times something."""


def of_each(kind: str) -> tuple[str, ...]:
    return tuple(f"{kind}-{attention}" for attention in ATTENTIONS)


# Compiling a step of depth 20 takes about a minute on one core, which the machine has 16 of.
PLAN = (
    Stage(
        (*(f"operator-{case}" for case in ("bfloat16", "float32", "no_self", "rope", "softmax", "decode")),
         *of_each("layers")),
        50, background=of_each("warm"),
    ),
    Stage(of_each("trainer"), 75, background=("warm_memory",)),
    Stage(("kernels",), 60, waits=True),
    Stage(("steps",), 75, waits=True),
    Stage(("memory",), 30, waits=True),
    Stage(of_each("tokens"), 45, background=("warm_decode-softmax", "warm_decode-gka"), waits=True),
    Stage(("decode",), 75, waits=True),
    Stage(("prefill",), 30),
    Stage(("profile",), 40),
)  # fmt: skip


def step_functions() -> dict[str, Callable]:
    """Return the function of each kind of step. Importing them imports torch."""
    from scripts.gpu_steps import decoding, numbers, speed, training

    return {
        "operator": numbers.operator, "layers": numbers.layers, "warm": speed.warm, "kernels": speed.kernels,
        "steps": speed.steps, "warm_memory": speed.warm_memory, "memory": speed.memory, "trainer": training.trainer,
        "tokens": decoding.tokens, "warm_decode": decoding.warm_decode, "decode": decoding.decode,
        "prefill": decoding.prefill, "profile": speed.profiles,
    }  # fmt: skip


def run_step(name: str, function: Callable, check: Any) -> None:
    """Run one step in this process; write OUT/NAME.json as it goes on."""
    argument = name.partition("-")[2]
    record, start = {"step": name, "status": "running"}, time.monotonic()

    def save(**found: Any) -> None:
        record.update(found, seconds=round(time.monotonic() - start, 1))
        write_text(check.out / f"{name}.json", json.dumps(record, indent=1) + "\n")

    save()
    try:
        function(check, argument, save)
        save(status="done")
    except BaseException as error:
        traceback.print_exc()
        save(status="failed", error=f"{type(error).__name__}: {error}".strip()[:2000])


class Running:
    """A step in a process of its own, forked from this one, which has imported torch and never uses the device."""

    def __init__(self, name: str, function: Callable, check: Any, seconds: float):
        self.name, self.check, self.seconds, self.start = name, check, seconds, time.monotonic()
        (check.out / f"{name}.json").unlink(missing_ok=True)  # of an earlier check
        self.process = multiprocessing.get_context("fork").Process(target=self._work, args=(function,))
        self.process.start()

    def _work(self, function: Callable) -> None:
        os.setsid()  # so that its own processes end with it
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        log = os.open(self.check.out / f"{self.name}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(log, stream)
        run_step(self.name, function, self.check)

    def ended(self) -> bool:
        """Return whether the step has ended; end it where its seconds are over."""
        late = time.monotonic() - self.start > self.seconds
        if self.process.is_alive() and not late:
            return False
        status = None
        if self.process.is_alive():
            status = f"ended after {self.seconds:.0f} s"
        self.kill()
        self.process.join()
        record = read_record(self.check.out, self.name)
        if record["status"] == "running":
            record["status"] = status or f"died with exit code {self.process.exitcode}"
            record["seconds"] = round(time.monotonic() - self.start, 1)
            write_text(self.check.out / f"{self.name}.json", json.dumps(record, indent=1) + "\n")
        return True

    def kill(self) -> None:
        with suppress(ProcessLookupError):  # also what a step has left behind
            os.killpg(self.process.pid, signal.SIGKILL)
        if self.process.is_alive():
            self.process.kill()  # it may not have had the time to start a session


def read_record(out: Path, name: str) -> dict[str, Any]:
    """Return what a step has written so far."""
    path = out / f"{name}.json"
    return json.loads(path.read_text("utf-8")) if path.exists() else {"step": name, "status": "running"}


def write_archive(out: Path) -> None:
    """Write OUT/report.tar: page, JSON and logs. Steps may go on writing meanwhile."""
    with atomic_write(out / "report.tar") as file, tarfile.open(fileobj=file, mode="w") as archive:
        for path in sorted(path for path in out.iterdir() if path.suffix in (".md", ".json", ".log")):
            content = path.read_bytes()
            member = tarfile.TarInfo(path.name)
            member.size, member.mtime = len(content), int(time.time())
            archive.addfile(member, io.BytesIO(content))


def run_plan(plan: tuple[Stage, ...], functions: dict[str, Callable], check: Any, seconds: float) -> dict[str, dict]:
    """Run all stages within `seconds`, and write the report after each step. Return what the steps wrote."""
    from scripts.gpu_steps.page import count_right, page

    start, records, alive = time.monotonic(), {}, []
    command = "python -m scripts.gpu_check " + shlex.join(sys.argv[1:])

    def left() -> float:
        return seconds - (time.monotonic() - start)

    def begin(names: tuple[str, ...], limit: float) -> list[Running]:
        started = []
        for name in names:
            if left() < LEAST_SECONDS:
                records[name] = {"step": name, "status": "not started: no time left"}
            else:
                records[name] = {"step": name, "status": "running"}
                started.append(Running(name, functions[name.partition("-")[0]], check, min(limit, left())))
        alive.extend(started)
        return started

    def report() -> None:
        for name, record in records.items():
            if record["status"] == "running":
                records[name] = read_record(check.out, name)
        write_text(check.out / "summary.json", json.dumps(records, indent=1) + "\n")
        write_text(check.out / "page.md", page(records, command, time.monotonic() - start))
        write_archive(check.out)

    def wait(steps: list[Running]) -> None:
        while any(step in alive for step in steps):
            for step in [step for step in alive if step.ended()]:
                alive.remove(step)
                report()
                record = records[step.name]
                told = [f"{seconds - left():5.0f} s", step.name, record["status"], count_right(record)]
                print(" | ".join(filter(None, [*told, record.get("error", "")[:200]])), flush=True)
            time.sleep(POLL_SECONDS)

    try:
        for stage in plan:
            if stage.waits:
                wait([*alive])
            begin(stage.background, BACKGROUND_SECONDS)
            wait(begin(stage.steps, 2 * stage.seconds))
        wait([*alive])
    finally:
        for step in alive:
            step.kill()
    report()
    return records


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.gpu_check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prepare", action="store_true", help="write the carried folder, on a CPU, in some minutes")
    parser.add_argument("--seconds", type=float, default=480.0, help="of all steps together")
    parser.add_argument("--out", type=expand, help="directory of the report and of the steps' JSON")
    names = [name for stage in PLAN for name in (*stage.background, *stage.steps)]
    parser.add_argument("--step", help="run only this step, in this process: " + ", ".join(names))
    parser.add_argument("--device", default="cuda", help="a torch device")
    parser.add_argument("--carried", type=expand, default=CARRIED, help="the carried folder")
    parser.add_argument("--small", action="store_true", help="tiny sizes, to try the check itself on a CPU")
    options = parser.parse_args()
    if not options.seconds > 0:
        raise ValueError(f"--seconds: given {options.seconds}, expected a number above 0")
    if not options.prepare and options.out is None:
        raise ValueError("--out: given nothing, expected a directory for the report")
    if options.step and options.step not in names:
        raise ValueError(f"--step: given {options.step}, expected one of {', '.join(names)}")
    if not options.prepare and not (options.carried / "commit.txt").exists():
        raise FileNotFoundError(
            f"no carried folder {options.carried}; write it with --prepare on any machine, and copy it"
        )

    start = time.monotonic()
    # Shared by all steps: what one compiles, later ones find, and so does a second run.
    for variable, folder in (("TORCHINDUCTOR_CACHE_DIR", "inductor"), ("TRITON_CACHE_DIR", "triton")):
        os.environ.setdefault(variable, str(CACHE.resolve() / folder))
    if not options.prepare:  # a dozen steps share the cores
        os.environ.setdefault("OMP_NUM_THREADS", "2")
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "4")
    from gkachat.machine import check_compiler
    from scripts.gpu_steps import FULL, SMALL, Check

    sizes = SMALL if options.small else FULL
    if options.prepare:
        from scripts.gpu_steps.carried import prepare

        prepare(sizes, options.carried)
        return 0
    if options.device.startswith("cuda"):
        check_compiler()  # here, where one line says what is missing, instead of in every step
    options.out.mkdir(parents=True, exist_ok=True)
    check, functions = Check(options.device, sizes, options.carried, options.out), step_functions()
    if options.step:
        run_step(options.step, functions[options.step.partition("-")[0]], check)
        return read_record(options.out, options.step)["status"] != "done"
    for stage in PLAN:
        beside = f", in the background {', '.join(stage.background)}" if stage.background else ""
        print(f"planned {stage.seconds:3d} s: {', '.join(stage.steps)}{beside}")
    print(f"planned {sum(stage.seconds for stage in PLAN)} s of {options.seconds:.0f} s", flush=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # which ends the steps too
    records = run_plan(PLAN, functions, check, options.seconds - (time.monotonic() - start))
    print((options.out / "page.md").read_text("utf-8"))
    right = all(c["right"] for record in records.values() for c in record.get("comparisons", []))
    return not (right and all(record["status"] == "done" for record in records.values()))


if __name__ == "__main__":
    run(main)
