"""Put runs side by side: comparison.md, .json and .png, and the table on the terminal.

python -m scripts.compare d4_softmax d4_gka d4_gka_plus
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
    runs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN")],
    out: str | None = None,
    wandb: str = "",
) -> None:
    """Compare evaluated runs.

    Args:
        runs: Their names, or the paths of their directories; the baseline first.
        out: Directory to write to; by default comparisons/<a>-<b> beside the runs.
        wandb: Weights & Biases project to send the table and all files to; empty: none.
    """
    directories = [find_run(name) for name in runs]
    comparison = compare_runs(*directories)
    names = "-".join(directory.resolve().name for directory in directories)
    directory = Path(out) if out else home() / "comparisons" / names
    where = f"- {datetime.date.today()}, commit {commit()}, {processor()}, Python {platform.python_version()}\n"
    write_comparison(comparison, directory, where)
    print(markdown(comparison))
    print(f"written to {directory}: {', '.join(FILES)}")
    if wandb:
        rows = [[row.name, *row.values, *row.ratios, row.published] for row in comparison.rows]
        over = [f"{name} over {comparison.names[0]}" for name in comparison.names[1:]]
        table = [["", *comparison.names, *over, "published"], *rows]
        upload(wandb, "comparison", names, directory, FILES, table=table)


if __name__ == "__main__":
    run(lambda: tyro.cli(main, description=__doc__))
