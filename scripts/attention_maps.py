"""Look inside a run: what its heads attend to and how far, its bandwidths, maps of its weights over real tokens.

python -m scripts.attention_maps d4_gka
python -m scripts.attention_maps d4_softmax --prompt "def add(a, b):" --heads 0.0 3.2
"""

import sys
from pathlib import Path
from typing import Annotated

if sys.path[0] == str(Path(__file__).parent):  # run by its path: this file is not the standard library's inspect
    sys.path[0] = str(Path(__file__).parents[1])

import tyro

from gkachat.checkpoint import find_run
from gkachat.inspection.report import inspect_run, markdown, write_inspection
from gkachat.machine import pick_device
from gkachat.train.metrics import upload
from scripts.cli import run


def main(
    run_name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")],
    text: Path | None = None,
    prompt: str | None = None,
    heads: tuple[str, ...] = (),
    tokens: int = 48,
    documents: int = 8,
    step: int | None = None,
    device: str = "auto",
    out: Path | None = None,
    wandb: str = "",
) -> None:
    """Print a table, a row a head, and draw pictures and a page.

    Args:
        run_name: A run's name, or the path of its directory.
        text: A file to read instead of val documents.
        prompt: A text to read instead of val documents.
        heads: LAYER.HEAD, counted from 0, that maps are drawn of; by default 12, evenly spaced.
        tokens: How many tokens the maps show.
        documents: How many val documents are read.
        step: Which checkpoint; by default the last.
        device: A torch device, or auto.
        out: Directory to write to; by default inspect/ in the run's.
        wandb: Weights & Biases project to send all files to; empty: none.
    """
    if text is not None and prompt is not None:
        raise ValueError("given --text and --prompt, expected one of them")
    run_dir = find_run(run_name)
    if text is not None:
        try:
            prompt = text.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{text} is not UTF-8 ({error.reason} at byte {error.start:,})") from None
    inspection = inspect_run(
        run_dir, text=prompt, step=step, device=pick_device(device), documents=documents, tokens=tokens, heads=heads
    )
    directory = out or run_dir / "inspect"
    files = write_inspection(inspection, directory)
    print(markdown(inspection))
    print(f"written to {directory}: {', '.join(files)}")
    if wandb:
        upload(wandb, "inspection", inspection.run, directory, files)


if __name__ == "__main__":
    run(lambda: tyro.cli(main, description=__doc__))
