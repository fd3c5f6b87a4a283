"""What a run tells: metrics.jsonl, Weights & Biases, phases of the wall clock."""

import json
import math
import os
import re
import secrets
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gkachat.files import write_text

WANDB_ID = "wandb_id"  # the file that keeps it, in a run's directory
# nanochat's names for what it logs too, and how many of its units ours has.
WANDB_NAMES = {
    "train/tokens_per_second": ("train/tok_per_sec", 1),
    "train/mfu": ("train/mfu", 100),
    "train/lr": ("train/lrm", 1),
    "train/seconds": ("total_training_time", 1),
    "eval/seconds": ("total_training_time", 1),
    "eval/val_bpb": ("val/bpb", 1),
    "eval/train_bpb": ("train/bpb", 1),
}


class Metrics:
    """Appends records to metrics.jsonl, and to Weights & Biases when a project is named."""

    def __init__(self, run_dir: Path, *, wandb_project: str = "", config: Any = None, upto: int = -1):
        """`upto`: the step a resumed run continues from; records after it are forgotten.

        It goes on with the same run on Weights & Biases, whose id is kept in the run's directory. That has no way of
        forgetting: steps it has seen stay as they are, and are the same anyway.
        """
        self.path = run_dir / "metrics.jsonl"
        kept = [r for r in read_metrics(run_dir) if r["step"] <= upto] if self.path.exists() else []
        self.evaluated = {r["step"] for r in kept if r["kind"] == "eval"}
        write_text(self.path, "".join(json.dumps(record) + "\n" for record in kept))
        self.file = open(self.path, "a")  # noqa: SIM115 (closed by close)
        self.wandb = None
        if wandb_project:
            path = run_dir / WANDB_ID
            if not path.exists():
                write_text(path, secrets.token_hex(4))
            self.wandb = start_wandb(
                wandb_project, run_dir, name=run_dir.name, config=config, id=path.read_text(), resume="allow"
            )

    def write(self, kind: str, step: int, **values: Any) -> None:
        # JSON has no NaN; the reader of a loss that is none is told so.
        told = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        self.file.write(json.dumps({"kind": kind, "step": step, **told}) + "\n")
        self.file.flush()
        if self.wandb is not None:
            numbers = {f"{kind}/{k}": v for k, v in values.items() if isinstance(v, (int, float))}
            names = {key: WANDB_NAMES.get(key, (key, 1)) for key in numbers}
            self.wandb.log({name: numbers[key] * units for key, (name, units) in names.items()}, step=step)

    def to_disk(self) -> None:
        """Have all that was written survive a power failure, as a checkpoint does."""
        os.fsync(self.file.fileno())

    def close(self) -> None:
        self.file.close()
        if self.wandb is not None:
            self.wandb.finish()


def start_wandb(project: str, directory: Path, **options: Any) -> Any:
    """A wandb run that keeps its files in this directory. ValueError where it cannot be."""
    import wandb

    try:
        return wandb.init(project=project, dir=str(directory), **options)
    except wandb.Error as error:
        raise ValueError(f"wandb: cannot log to {project!r}: {error}; WANDB_MODE=offline?") from None


def upload(
    project: str, kind: str, name: str, directory: Path, files: Sequence[str], **tables: list[list[Any]]
) -> None:
    """Send files of a directory to Weights & Biases as one artefact, in a run of its own.

    Pictures among them, and tables (a row of headings first), are shown on the run's page besides.
    """
    with start_wandb(project, directory, name=name, job_type=kind) as run:
        import wandb

        pictures = {Path(file).stem: wandb.Image(str(directory / file)) for file in files if file.endswith(".png")}
        shown = {title: wandb.Table(columns=rows[0], data=rows[1:]) for title, rows in tables.items()}
        run.log(pictures | shown)
        artifact = wandb.Artifact(re.sub(r"[^A-Za-z0-9._-]+", "-", f"{kind}-{name}")[:128], type=kind)
        for file in files:
            artifact.add_file(str(directory / file))
        run.log_artifact(artifact)


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Records of a run, up to a line that a crash cut short. FileNotFoundError where there are none."""
    path = run_dir / "metrics.jsonl"
    if not path.exists():
        raise FileNotFoundError(f"no metrics at {path}; train the run first")
    records = []
    for line in path.read_bytes().splitlines():
        try:
            record = json.loads(line)
            records.append(record | {"kind": str(record["kind"]), "step": int(record["step"])})
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
            break
    return records


class Phases:
    """Seconds of wall clock by phase. On cuda, where calls return early, only sums over whole steps mean something."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] += time.perf_counter() - start


def duration(seconds: float) -> str:
    """1h02m, 3m04s or 5s."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}h{m:02d}m" if hours else f"{m}m{s:02d}s" if m else f"{s}s"
