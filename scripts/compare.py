"""Compare evaluated runs: a table on the terminal, and comparison.md, .json and .png.

python -m scripts.compare d4_softmax d4_gka d4_gka_conv
"""

import datetime
import platform
from pathlib import Path
from typing import Annotated

import tyro

from gkachat.config import home
from scripts.cli import run


def main(
    runs: Annotated[
        tuple[str, ...],
        tyro.conf.Positional,
        tyro.conf.arg(metavar="RUN RUN [RUN ...]", help_behavior_hint="(required)"),
    ],
    out: Path | None = None,
    wandb: str = "",
) -> None:
    """Compare runs that scripts.base_eval has evaluated.

    Args:
        runs: Names or directories of runs, the baseline first.
        out: Directory to write to; by default comparisons/<a>-<b> beside runs/.
        wandb: Weights & Biases project to send the table and all files to; by default none.
    """
    from gkachat.benchmark import show
    from gkachat.checkpoint import find_run
    from gkachat.eval.compare import compare_runs, draw, markdown
    from gkachat.eval.results import write_report
    from gkachat.machine import commit, processor
    from gkachat.train.metrics import upload

    run_dirs = [find_run(name) for name in runs]
    comparison = compare_runs(run_dirs)
    title = "-".join(run_dir.resolve().name for run_dir in run_dirs)
    directory = out or home() / "comparisons" / title
    where = f"- {datetime.date.today()}, commit {commit()}, {processor()}, Python {platform.python_version()}\n"
    text = markdown(comparison)
    files = write_report(directory / "comparison", text + where, comparison, draw(comparison))
    show(text)
    print(f"written to {directory}: {', '.join(files)}")
    if wandb:
        first, *others = comparison["names"]
        header = ["", first, *others, *(f"{name} over {first}" for name in others)]
        rows = [[name, *row["values"], *row["ratios"]] for name, row in comparison["table"].items()]
        upload(wandb, "comparison", title, directory, files, table=[header, *rows])


if __name__ == "__main__":
    run(main, __doc__)
