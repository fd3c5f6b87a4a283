"""Results of evaluations in a run directory: evals/<kind>_step_000300.json, and a table .md beside it.

    write_result(run_dir, "core", meta, device, {"arc_easy": task_score(0.4, examples=500, seconds=3.1)}, n_tasks=22)
    read_results(run_dir, step=300)["core"]["scores"]["arc_easy"]["accuracy"]

Kinds in use are bpb, core, chat and lm_eval. A report replaces those of its kind that it covers: it has all of their
tasks, each on at least as many examples, or they are about other weights. Beside one that it does not cover it gets
another name, <kind>_2_step_000300 and so on. A report on some examples, or some tasks, never replaces a full one.
"""

import json
import math
import os
import re
import shlex
import sys
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

import torch

from gkachat.benchmark import facts, show, table
from gkachat.checkpoint import MODEL, tokens_dir
from gkachat.data.shards import read_manifest
from gkachat.files import read_json, write_text
from gkachat.machine import commit
from gkachat.plots import save_figure

DIRECTORY = "evals"
COLUMNS = {
    "": "{name}",
    "accuracy": "{accuracy:.4f}",
    "standard error": "{standard_error:.4f}",
    "centered": "{centered:.4f}",
    "examples": "{examples:,}",
    "seconds": "{seconds:.1f}",
}
LONGEST_FACT = 400  # characters; longer values are in the JSON only


def task_score(accuracy: float, examples: int, seconds: float, baseline: float | None = None) -> dict[str, Any]:
    """Return the figures of one task, as results store them.

    Args:
        accuracy: share of right answers, 0 to 1.
        baseline: accuracy of guessing, 0 to 1. With it, `centered` is (accuracy - baseline) / (1 - baseline): 0 for
            guessing, 1 for all right, and None where guessing is always right, as with a single example.

    `standard_error` is that of a share of independent answers, sqrt(p (1 - p) / n).
    """
    return {
        "accuracy": accuracy,
        "standard_error": math.sqrt(accuracy * (1 - accuracy) / examples),
        "examples": examples,
        "seconds": seconds,
        "baseline": baseline,
        "centered": None if baseline in (None, 1) else (accuracy - baseline) / (1 - baseline),
    }


def write_result(
    run_dir: Path,
    kind: str,
    meta: dict[str, Any],
    device: torch.device,
    scores: dict[str, dict[str, Any]] | None = None,
    **figures: Any,
) -> Path:
    """Write one evaluation of a checkpoint, which replaces those that it covers; return the path of its .json.

    Args:
        meta: the checkpoint's meta.json.
        device: where the model ran.
        scores: {task: figures}, from `task_score` and perhaps more.
        figures: everything else; must be JSON. The .md lists those that fit on a line. `metrics`, where given, is
            {task: figures}, too.
    """
    scores = scores or {}
    about = {
        "kind": kind,
        "step": meta["step"],
        "checkpoint_sha256": meta["sha256"][MODEL],
        "checkpoint_version": meta.get("version"),
        "command": _command(),
    }
    where = facts(device)
    tree = {**about, "facts": where, **figures, "scores": scores}
    if n := sum(examples_by_task(tree).values()):
        about["examples"] = tree["examples"] = n
    path = _place(run_dir / DIRECTORY, tree)
    shown = {**about, **where, **figures}
    lines = [f"- {key}: {_in_words(value)}" for key, value in shown.items() if len(str(value)) <= LONGEST_FACT]
    rows = table([{"name": task, **score} for task, score in scores.items()], COLUMNS) + "\n" if scores else ""
    write_report(path, f"# {run_dir.name}: {kind}\n\n{rows}" + "\n".join(lines) + "\n", tree)
    return path


def result_path(run_dir: Path, kind: str, meta: dict[str, Any]) -> Path:
    """Return the path of the .json of an evaluation of a checkpoint."""
    return run_dir / DIRECTORY / f"{kind}_step_{meta['step']:06d}.json"


def announce_earlier(run_dir: Path, kind: str, meta: dict[str, Any]) -> bool:
    """Return whether this very command has evaluated this very checkpoint before, and print the report if so.

    False where the code, or the text that bits per byte are taken over, may have changed since: at another commit,
    with changes that are not committed, or with other shards.
    """
    path, now = result_path(run_dir, kind, meta), commit()
    try:
        result = read_json(path, checkpoint_sha256=str, command=str, facts=dict)
        shards = read_manifest(tokens_dir(meta)).shards if kind == "bpb" else []
    except (ValueError, FileNotFoundError):
        return False
    texts = [shard.text_sha256 for shard in shards if shard.split == "val"]
    then = result["checkpoint_sha256"], result["command"], result["facts"].get("commit"), result.get("val_sha256", [])
    if now == "unknown" or now.endswith("-dirty") or then != (meta["sha256"][MODEL], _command(), now, texts):
        return False
    if int(os.environ.get("RANK", 0)) == 0:
        report = path.with_suffix(".md")
        show(report.read_text("utf-8") if report.exists() else "")
        print(f"{path} has this evaluation already; delete it to evaluate again")
    return True


def _command() -> str:
    return f"python -m scripts.{Path(sys.argv[0]).stem} {shlex.join(sys.argv[1:])}"


def _in_words(value: Any) -> str:
    """Return a JSON value as a reader of the .md expects it, not as Python writes it."""
    if isinstance(value, dict):
        return "; ".join(f"{key} {_in_words(one)}" for key, one in value.items()) or "none"
    if isinstance(value, list | tuple):
        return ", ".join(map(_in_words, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else str(value)


def write_report(path: Path, text: str, tree: dict[str, Any], figure: Any = None) -> list[str]:
    """Write PATH.md, PATH.json and, if there is a matplotlib figure, PATH.png. Return the names of these files."""
    write_text(path.with_suffix(".md"), text)
    write_text(path.with_suffix(".json"), json.dumps(tree, indent=1) + "\n")
    names = [f"{path.stem}.md", f"{path.stem}.json"]
    if figure is not None:
        names.append(f"{path.stem}.png")
        save_figure(figure, path.with_suffix(".png"))
    return names


def read_results(run_dir: Path, step: int) -> dict[str, dict[str, Any]]:
    """Return all results on the checkpoint of a step, by kind. Raises ValueError for a file that is damaged.

    Of several reports of a kind, the one on most examples is returned, with the scores of tasks that only others have,
    or have on more examples.
    """
    paths = sorted((Path(run_dir) / DIRECTORY).glob(f"*_step_{step:06d}.json"))
    reports = [read_json(path, kind=str, step=int, scores=dict) for path in paths]
    found: dict[str, dict[str, Any]] = {}
    for report in sorted(reports, key=lambda report: sum(examples_by_task(report).values()), reverse=True):
        scores = found.setdefault(report["kind"], report)["scores"]
        for task, score in report["scores"].items():
            if task not in scores or score.get("examples", 0) > scores[task].get("examples", 0):
                scores[task] = score
    return found


def examples_by_task(report: dict[str, Any]) -> dict[str, int]:
    """Return the number of examples of each task that a report has scores or other metrics of."""
    tasks = {**report.get("metrics", {}), **report["scores"]}
    return {task: figures["examples"] for task, figures in tasks.items() if figures.get("examples")}


def _place(directory: Path, report: dict[str, Any]) -> Path:
    """Return the path of a report, and delete all others that it covers."""
    kind, end = report["kind"], f"_step_{report['step']:06d}.json"
    numbers = [re.fullmatch(rf"{kind}(?:_(\d+))?{end}", path.name) for path in directory.glob(f"{kind}*{end}")]
    there = {int(match[1] or 1): directory / match[0] for match in numbers if match}
    covered = [path for _, path in sorted(there.items()) if _covers(report, path)]
    free = next(n for n in count(1) if n not in there)
    place, *others = covered or [directory / f"{kind}{'' if free == 1 else f'_{free}'}{end}"]
    for path in others:
        path.unlink()
        path.with_suffix(".md").unlink(missing_ok=True)
    return place


def _covers(report: dict[str, Any], path: Path) -> bool:
    """Return whether a report may replace the one at `path`: nothing would be lost."""
    earlier = None
    with suppress(ValueError):  # a damaged one is worth nothing
        earlier = read_json(path, scores=dict)
    if earlier is None or earlier.get("checkpoint_sha256") != report["checkpoint_sha256"]:
        return True
    examples = examples_by_task(report)
    return all(examples.get(task, 0) >= n for task, n in examples_by_task(earlier).items())
