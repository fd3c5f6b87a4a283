"""Put two runs side by side: comparison.md, .json and .png, and the table on the terminal.

python -m scripts.compare d4_softmax d4_gka
"""

import datetime
import platform
import subprocess
from pathlib import Path
from typing import Annotated

import tyro

from gkachat.checkpoint import find_run
from gkachat.config import home
from gkachat.eval.compare import compare_runs, markdown, write_comparison
from scripts.cli import run


def main(
    run_a: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_A")],
    run_b: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_B")],
    out: str | None = None,
) -> None:
    """Compare two evaluated runs.

    Args:
        run_a: The baseline: a run's name, or the path of its directory.
        run_b: What is compared with it.
        out: Directory to write to; by default comparisons/<a>-<b> beside the runs.
    """
    directories = find_run(run_a), find_run(run_b)
    comparison = compare_runs(*directories)
    names = "-".join(directory.resolve().name for directory in directories)
    directory = Path(out) if out else home() / "comparisons" / names
    where = f"- {datetime.date.today()}, commit {_commit()}, {_processor()}, Python {platform.python_version()}\n"
    write_comparison(comparison, directory, where)
    print(markdown(comparison))
    print(f"written to {directory}: comparison.md, comparison.json, comparison.png")


def _commit() -> str:
    """Of the code that runs, marked when the working tree differs."""
    try:
        return subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _processor() -> str:
    """As the system names it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    run(lambda: tyro.cli(main, description=__doc__))
