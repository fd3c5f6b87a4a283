"""What a run tells: metrics.jsonl, Weights & Biases, phases of the wall clock."""

import json
import math
import os
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gkachat.files import write_text


class Metrics:
    """Appends records to metrics.jsonl, and to Weights & Biases when a project is named."""

    def __init__(self, run_dir: Path, *, wandb_project: str = "", name: str = "", config: Any = None, upto: int = -1):
        """`upto`: the step a resumed run continues from; records after it are forgotten."""
        self.path = run_dir / "metrics.jsonl"
        kept = [r for r in read_metrics(run_dir) if r["step"] <= upto] if self.path.exists() else []
        self.evaluated = {r["step"] for r in kept if r["kind"] == "eval"}
        write_text(self.path, "".join(json.dumps(record) + "\n" for record in kept))
        self.file = open(self.path, "a")  # noqa: SIM115 (closed by close)
        self.wandb = None
        if wandb_project:
            import wandb

            try:
                self.wandb = wandb.init(project=wandb_project, name=name, config=config, dir=str(run_dir))
            except wandb.Error as error:
                raise ValueError(f"run.wandb: cannot log to {wandb_project!r}: {error}; WANDB_MODE=offline?") from None

    def write(self, kind: str, step: int, **values: Any) -> None:
        # JSON has no NaN; the reader of a loss that is none is told so.
        told = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        self.file.write(json.dumps({"kind": kind, "step": step, **told}) + "\n")
        self.file.flush()
        if self.wandb is not None:
            numbers = {f"{kind}/{k}": v for k, v in values.items() if isinstance(v, (int, float))}
            self.wandb.log(numbers, step=step)

    def to_disk(self) -> None:
        """Have all that was written survive a power failure, as a checkpoint does."""
        os.fsync(self.file.fileno())

    def close(self) -> None:
        self.file.close()
        if self.wandb is not None:
            self.wandb.finish()


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
