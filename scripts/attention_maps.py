"""Show what a run's heads attend to: statistics of each head, maps of its weights over real tokens, its bandwidths.

python -m scripts.attention_maps d4_gka
python -m scripts.attention_maps d4_softmax --prompt "def add(a, b):" --heads 0.0 3.2
"""

from pathlib import Path
from typing import Annotated

import tyro

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
    """Print a table with a row for each head; write figures and a web page.

    Args:
        run_name: Name of a run, or the path of its directory.
        text: UTF-8 file to read instead of val documents.
        prompt: Text to read instead of val documents.
        heads: Heads to map, as LAYER.HEAD counted from 0; by default 12, evenly spaced.
        tokens: Number of tokens that the maps show.
        documents: Number of val documents to read.
        step: Checkpoint to load; by default the last.
        device: A torch device, or auto.
        out: Directory to write to; by default attention_maps/ in the run's directory.
        wandb: Weights & Biases project that receives all files; empty: none.
    """
    from gkachat.benchmark import show
    from gkachat.checkpoint import find_run
    from gkachat.data.readers import read_text
    from gkachat.inspection.report import markdown, write_inspection
    from gkachat.inspection.statistics import inspect_run
    from gkachat.machine import pick_device
    from gkachat.train.metrics import upload

    if text is not None and prompt is not None:
        raise ValueError("given --text and --prompt, expected one of them")
    run_dir = find_run(run_name)
    if text is not None:
        prompt = read_text(text)
    inspection = inspect_run(
        run_dir, text=prompt, step=step, device=pick_device(device), documents=documents, tokens=tokens, heads=heads
    )
    directory = out or run_dir / "attention_maps"
    files = write_inspection(inspection, directory)
    show(markdown(inspection))
    print(f"written to {directory}: {', '.join(files)}")
    if wandb:
        upload(wandb, "attention_maps", inspection.run, directory, files)


if __name__ == "__main__":
    run(main, __doc__)
