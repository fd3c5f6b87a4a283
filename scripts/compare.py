"""Put two runs side by side: comparison.md, .json and .png, and the table on the terminal.

python -m scripts.compare d4_softmax d4_gka
"""

import datetime
import platform
from pathlib import Path
from typing import Annotated

import tyro

from gkachat.checkpoint import find_run
from gkachat.config import home
from gkachat.eval.compare import FILES, compare_runs, markdown, write_comparison
from gkachat.machine import commit, processor
from gkachat.train.metrics import upload
from scripts.cli import run


def main(
    run_a: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_A")],
    run_b: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_B")],
    out: str | None = None,
    wandb: str = "",
) -> None:
    """Compare two evaluated runs.

    Args:
        run_a: The baseline: a run's name, or the path of its directory.
        run_b: What is compared with it.
        out: Directory to write to; by default comparisons/<a>-<b> beside the runs.
        wandb: Weights & Biases project to send the table and all files to; empty: none.
    """
    directories = find_run(run_a), find_run(run_b)
    comparison = compare_runs(*directories)
    names = "-".join(directory.resolve().name for directory in directories)
    directory = Path(out) if out else home() / "comparisons" / names
    where = f"- {datetime.date.today()}, commit {commit()}, {processor()}, Python {platform.python_version()}\n"
    write_comparison(comparison, directory, where)
    print(markdown(comparison))
    print(f"written to {directory}: {', '.join(FILES)}")
    if wandb:
        rows = [[row.name, row.a, row.b, row.ratio, row.published] for row in comparison.rows]
        table = [["", *comparison.names, "ratio", "published"], *rows]
        upload(wandb, "comparison", names, directory, FILES, table=table)


if __name__ == "__main__":
    run(lambda: tyro.cli(main, description=__doc__))
