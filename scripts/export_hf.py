"""Export a run's checkpoint to a directory for Hugging Face transformers: weights, model code, tokenizer, model card.

python -m scripts.export_hf d4_gka exported/d4_gka
"""

from pathlib import Path
from typing import Annotated, Literal

import tyro

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
        run_name: Name of a run, or the path of its directory.
        out: Directory to write, completely or not at all.
        step: Checkpoint to export; by default the last.
        dtype: Dtype of embeddings and matrices; bandwidths and scales stay float32.
        max_shard_size: Size at which weights are split into several files.
        overwrite: Replace an earlier export.
    """
    from gkachat.checkpoint import find_run
    from gkachat.hf.export import export

    export(find_run(run_name), out, step=step, dtype=dtype, max_shard_size=max_shard_size, overwrite=overwrite)
    files = sorted(path.name for path in out.iterdir())
    print(f"written to {out}: {', '.join(files)}; README.md says how to load it (pip install 'transformers>=5')")


if __name__ == "__main__":
    run(main, __doc__)
