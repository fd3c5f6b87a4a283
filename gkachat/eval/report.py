"""What an evaluation leaves behind in a run directory: evals/<kind>_step_000300.json, and a table of the same name.

write_report(run_dir, "core", meta, {"arc_easy": Score(0.4, 0.02, 500, 3.1, centered=0.2)}, mean_centered=0.2)
read_reports(run_dir, step)["core"]["scores"]["arc_easy"]["accuracy"]
"""

import dataclasses
import datetime
import json
import platform
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gkachat.benchmark import table
from gkachat.files import read_json, write_text
from gkachat.machine import commit

DIRECTORY = "evals"
COLUMNS = {
    "": "{name}",
    "accuracy": "{accuracy:.4f}",
    "standard error": "{standard_error:.4f}",
    "centered": "{centered:.4f}",
    "examples": "{examples:,}",
    "seconds": "{seconds:.1f}",
}


@dataclass(frozen=True)
class Score:
    """Of one task."""

    accuracy: float
    """Share of the examples, 0 to 1."""
    standard_error: float
    """Of the accuracy."""
    examples: int
    seconds: float
    centered: float | None = None
    """0 where guessing gets, 1 for all: (accuracy - guess) / (1 - guess)."""


def write_report(run_dir: Path, kind: str, meta: dict[str, Any], scores: dict[str, Score], **facts: Any) -> Path:
    """Write the .json, which this returns, and the .md of an evaluation of the checkpoint whose meta.json is `meta`.

    `facts` (numbers, texts, lists, dicts) go into the JSON as they are; the .md lists those that fit on a line.
    """
    told = {
        "kind": kind,
        "step": meta["step"],
        "checkpoint_sha256": meta["sha256"]["model.safetensors"],
        "checkpoint_version": meta.get("version"),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "gkachat": commit()},
    }
    rows = {name: dataclasses.asdict(score) for name, score in scores.items()}
    path = run_dir / DIRECTORY / f"{kind}_step_{meta['step']:06d}.json"
    write_text(path, json.dumps({**told, **facts, "scores": rows}, indent=1) + "\n")
    lines = [f"- {key}: {value}" for key, value in {**told, **facts}.items() if len(str(value)) <= 400]
    shown = table([{"name": name, **row} for name, row in rows.items()], COLUMNS) + "\n" if rows else ""
    write_text(path.with_suffix(".md"), f"# {run_dir.name}: {kind}\n\n{shown}" + "\n".join(lines) + "\n")
    return path


def read_reports(run_dir: Path, step: int) -> dict[str, dict[str, Any]]:
    """All reports on the checkpoint of that step, by kind. ValueError for one that cannot be read."""
    paths = sorted((Path(run_dir) / DIRECTORY).glob(f"*_step_{step:06d}.json"))
    return {re.sub(r"_step_\d+$", "", path.stem): read_json(path, kind=str, step=int, scores=dict) for path in paths}
