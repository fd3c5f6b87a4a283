"""One command of the walk, run on the null GPU: its exit code, its seconds, and what its processes reported.

python steps.py FOLDER COMMAND ...

is what the stand-in interpreter of a speedrun calls. It records the step in FOLDER and exits with 0 whatever happened,
so that a fault does not end the speedrun.
"""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SECONDS = 1800  # that a step may take


@dataclass
class Step:
    """A command that has ended."""

    label: str
    code: int
    seconds: float
    log: str
    """Path of its output."""
    reports: list[dict[str, Any]] = field(default_factory=list)
    """What each of its Python processes did to the null GPU: see site/sitecustomize.py."""

    @property
    def output(self) -> str:
        return Path(self.log).read_text(errors="replace")


def null_gpu_environment(library: Path, gpus: int = 1) -> dict[str, str]:
    """Return the environment of a process that sees so many null GPUs."""
    return {
        **os.environ,
        "LD_PRELOAD": str(library),
        "TRITON_LIBCUDA_PATH": str(library.parent),
        "PYTHONPATH": str(HERE / "site"),
        "NULL_GPUS": str(gpus),
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
    }


def run_step(
    folder: Path,
    label: str,
    command: list[str],
    env: dict[str, str],
    cwd: Path,
    stop_at: str | None = None,
    echo: bool = False,
) -> Step:
    """Run a command and record it in `folder`. With `stop_at`, send it SIGTERM once its output has this text.

    With `echo`, its output appears on stdout too, as it comes.
    """
    name = label.replace(" ", "_").replace("/", "_")
    log, reports = folder / f"{name}.log", folder / f"{name}.reports"
    reports.mkdir(parents=True, exist_ok=True)
    for old in reports.iterdir():
        old.unlink()
    start = time.monotonic()
    with open(log, "wb") as output, open(log, errors="replace") as written:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, cwd=cwd,
            env={**env, "NULL_REPORT": str(reports)}, start_new_session=True,
        )  # fmt: skip
        try:
            while process.poll() is None:
                time.sleep(0.1)
                if echo:
                    print(written.read(), end="", flush=True)
                if stop_at and stop_at in log.read_text(errors="replace"):
                    process.send_signal(signal.SIGTERM)
                    stop_at = None
                if time.monotonic() - start > SECONDS:
                    break
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if echo:
            print(written.read(), end="", flush=True)
    found = [json.loads(path.read_text()) for path in sorted(reports.iterdir())]
    step = Step(label, process.returncode, time.monotonic() - start, str(log), found)
    (folder / f"{name}.json").write_text(json.dumps(asdict(step) | {"ended": time.time()}))
    return step


def read_steps(folder: Path) -> list[Step]:
    """Return the recorded steps of a folder, in the order in which they ended."""
    trees = sorted((json.loads(path.read_text()) for path in folder.glob("*.json")), key=lambda tree: tree.pop("ended"))
    return [Step(**tree) for tree in trees]


def label_of(arguments: list[str]) -> str:
    """Return the script and the run of a command: "base_train d20_gka" for -m scripts.base_train --run.name d20_gka."""
    start = next(i for i, word in enumerate(arguments) if word.startswith("scripts."))
    script, rest = arguments[start].removeprefix("scripts."), arguments[start + 1 :]
    runs = [word for word in takewhile(lambda word: not word.startswith("-"), rest) if not word.endswith(".toml")]
    named = [value for option, value in pairwise(rest) if option in ("--run.name", "--eval")]
    return " ".join([script, *runs, *named])


def main() -> None:
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # ends the command too
    folder, *command = sys.argv[1:]
    library = Path(os.environ["NULL_LIBRARY"])
    env = null_gpu_environment(library, int(os.environ["NULL_GPUS"]))
    label = label_of(command[1:])
    # The speedrun waits for a line of the tokenization in the background.
    step = run_step(Path(folder), label, command, env, Path.cwd(), echo=label.startswith("data_prep"))
    print(f"   exit code {step.code}, {step.seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
