"""Write a run's checkpoint as a directory for Hugging Face's libraries: weights, model code, tokenizer, model card.

python -m scripts.export_hf d4_gka exported/d4_gka
"""

from pathlib import Path
from typing import Annotated, Literal

import tyro

from gkachat.checkpoint import find_run
from gkachat.hf.export import export
from scripts.cli import run


def main(
    run_name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")],
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")],
    step: int | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
    max_shard_size: str = "5GB",
    overwrite: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
) -> None:
    """Export a run.

    Args:
        run_name: A run's name, or the path of its directory.
        out: Directory to write, all of it or nothing.
        step: Which checkpoint; by default the last.
        dtype: Of embeddings and matrices; bandwidths and scales stay float32.
        max_shard_size: Larger weights are split into files of that size.
        overwrite: Take the place of an earlier export.
    """
    export(find_run(run_name), out, step=step, dtype=dtype, max_shard_size=max_shard_size, overwrite=overwrite)
    files = sorted(path.name for path in out.iterdir())
    print(f"written to {out}: {', '.join(files)}; README.md says how to load it (pip install transformers)")


if __name__ == "__main__":
    run(lambda: tyro.cli(main, description=__doc__))
