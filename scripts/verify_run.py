"""Check a whole run directory and list what is wrong with it.

python -m scripts.verify_run d4_gka
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import tyro

from gkachat.text import parse_json
from scripts.cli import run


def problems(run_dir: Path) -> Iterator[str]:
    """Yield one line for each problem: config, hashes, shapes, finite numbers, leftovers and metrics."""
    import torch

    from gkachat import checkpoint
    from gkachat.config_file import kind_of

    try:
        checkpoint.load_run_config(run_dir)
    except (ValueError, FileNotFoundError) as error:
        yield f"config.toml: {error}"
    steps = checkpoint.checkpoint_steps(run_dir)
    if not steps:
        yield "there is no checkpoint"
    for step in steps:
        directory = checkpoint.step_dir(run_dir, step)
        try:
            meta = checkpoint.verify(directory)
            if meta["step"] != step:
                raise ValueError(f"meta.json says step {meta['step']}")
            is_vision = kind_of(meta["config"]) == "image model"
            load = checkpoint.load_vision_model if is_vision else checkpoint.load_model
            names = {name for name, _ in load(run_dir, step=step)[0].named_parameters()}
            for name, tensor in checkpoint.load_optimizer(directory, meta["world_size"]):
                if name.split("/")[0] not in names or not torch.isfinite(tensor).all():
                    raise ValueError(f"optimizer state {name} belongs to no parameter or is not finite")
        except (ValueError, FileNotFoundError) as error:
            yield f"{directory.name}: {error}"
    for leftover in sorted((run_dir / checkpoint.CHECKPOINTS).glob("[.d]*")):
        yield f"{leftover.name}: set aside as damaged" if leftover.name[0] == "d" else f"{leftover.name}: a leftover"
    yield from _metrics_problems(run_dir, steps)


def _metrics_problems(run_dir: Path, steps: list[int]) -> Iterator[str]:
    """Yield a line for each record that cannot be read, comes twice or is out of order."""
    path, seen, last = run_dir / "metrics.jsonl", set(), -1
    for number, line in enumerate(path.read_bytes().splitlines() if path.exists() else [], 1):
        try:
            record = parse_json(line)
            kind, step = record["kind"], record["step"]
        except (ValueError, TypeError, KeyError):
            yield f"metrics.jsonl, line {number}: not a record"
            continue
        if (kind, step) in seen or step < last:
            yield f"metrics.jsonl, line {number}: {kind} of step {step} comes twice or late"
        seen.add((kind, step))
        last = step
    if steps and last < steps[-1]:
        yield f"metrics.jsonl ends at step {last}, the checkpoints at {steps[-1]}"


def main(run_name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]) -> int:
    """Check a run. The exit code is 1 when something is wrong.

    Args:
        run_name: Name or directory of a run.
    """
    from gkachat.checkpoint import find_run

    run_dir = find_run(run_name)
    found = list(problems(run_dir))
    for problem in found:
        print(problem)
    print(f"{run_dir}: {len(found) or 'no'} problem{'' if len(found) == 1 else 's'}")
    return 1 if found else 0


if __name__ == "__main__":
    run(main, __doc__)
