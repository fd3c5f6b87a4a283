"""The log of a run: metrics.jsonl, Weights & Biases, and the wall clock by phase."""

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

from gkachat.files import naming, write_text
from gkachat.machine import check_installed

WANDB_ID = "wandb_id"  # file of a run directory that holds the run's id on Weights & Biases
# nanochat's name for a metric, and the factor from our unit to nanochat's. Other metrics keep their name.
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
    """Appends records to metrics.jsonl, and to Weights & Biases when a project is given."""

    def __init__(self, run_dir: Path, *, wandb_project: str = "", config: Any = None, last_step: int = -1):
        """Keep the records up to `last_step`, the step that a run resumes from, and delete later ones.

        A resumed run continues its run on Weights & Biases, whose id is in the run directory. Steps cannot be deleted
        there: those that are repeated keep their values, which are the same.
        """
        self.path = run_dir / "metrics.jsonl"
        kept = [r for r in read_metrics(run_dir) if r["step"] <= last_step] if self.path.exists() else []
        self.evaluated = {r["step"] for r in kept if r["kind"] == "eval"}
        write_text(self.path, "".join(json.dumps(record) + "\n" for record in kept))
        self.file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (closed by close)
        self.wandb = None
        if wandb_project:
            path = run_dir / WANDB_ID
            if not path.exists():
                write_text(path, secrets.token_hex(4))
            self.wandb = start_wandb(
                wandb_project, run_dir, name=run_dir.name, config=config, id=path.read_text("utf-8"), resume="allow"
            )

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Append one record. A float that is not finite is written as null, since JSON has no NaN."""
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        with naming(self.path):
            self.file.write(json.dumps({"kind": kind, "step": step, **finite}) + "\n")
            self.file.flush()
        if self.wandb is not None:
            numbers = {f"{kind}/{k}": v for k, v in values.items() if isinstance(v, (int, float))}
            names = {key: WANDB_NAMES.get(key, (key, 1)) for key in numbers}
            self.wandb.log({name: numbers[key] * factor for key, (name, factor) in names.items()}, step=step)

    def flush_to_disk(self) -> None:
        """Make all records survive a power failure, as a checkpoint does."""
        with naming(self.path):
            os.fsync(self.file.fileno())

    def close(self) -> None:
        self.file.close()
        if self.wandb is not None:
            self.wandb.finish()


def start_wandb(project: str, directory: Path, **options: Any) -> Any:
    """Start a Weights & Biases run that keeps its files in `directory`. Raises ValueError where that fails."""
    check_installed("wandb", "wandb")
    import wandb

    try:
        return wandb.init(project=project, dir=str(directory), **options)
    except wandb.Error as error:
        raise ValueError(f"wandb: cannot log to {project!r}: {error}; WANDB_MODE=offline?") from None


def upload(
    project: str, kind: str, name: str, directory: Path, files: Sequence[str], **tables: list[list[Any]]
) -> None:
    """Send files of a directory to Weights & Biases as one artifact, in a run of its own.

    The run's page also shows the pictures among them, and the tables (the first row holds the headings).
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
    """Return the records of a run, up to the first line that a crash cut short.

    Raises FileNotFoundError where there is no metrics.jsonl.
    """
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


class Timers:
    """Seconds of wall clock by phase: `with timers("forward"): ...`.

    On cuda, where calls return before the work is done, only the sum over phases of whole steps is meaningful.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] += time.perf_counter() - start


def format_duration(seconds: float) -> str:
    """Format a duration as 1h02m, 3m04s or 5s."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}h{m:02d}m" if hours else f"{m}m{s:02d}s" if m else f"{s}s"
