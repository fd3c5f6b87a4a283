"""Comparison of evaluated runs: a table, scores on common tasks, BPB curves, and learned bandwidths.

comparison = compare_runs([baseline, another])        # run directories; ratios are over the first
markdown(comparison), draw(comparison)
"""

import math
import shlex
from pathlib import Path
from string import ascii_lowercase
from typing import Any

from scipy.stats import sem

from gkachat.benchmark import table
from gkachat.checkpoint import MODEL, load_weights, model_config, open_checkpoint
from gkachat.config import home
from gkachat.eval.results import read_results
from gkachat.machine import several
from gkachat.model.stats import PUBLISHED_FLOPS_RATIO, PUBLISHED_PARAMS_RATIO, model_stats
from gkachat.plots import heat_map, label
from gkachat.train.metrics import read_metrics

NOISE = 1.96  # standard errors; chance alone exceeds them on one task in twenty
VERDICTS = {True: "within noise", False: "more than noise"}  # by is_noise
TABLE = [  # name, key in a run's figures, format, the paper's ratio of gka over softmax at depth 20
    ("parameters", "params", "{:,.0f}", PUBLISHED_PARAMS_RATIO),
    ("training FLOPs a token", "flops_per_token", "{:.4g}", None),
    ("training tokens", "tokens", "{:,.0f}", None),
    ("tokens a step", "tokens_per_step", "{:,.0f}", None),
    ("training FLOPs", "flops", "{:.4g}", PUBLISHED_FLOPS_RATIO),
    ("val bits per byte", "val_bpb", "{:.4f}", None),
    ("train bits per byte", "train_bpb", "{:.4f}", None),
    ("val - train gap", "gap", "{:+.4f}", None),
    ("unigram bits per byte, val", "unigram_bpb", "{:.4f}", None),
    ("training tokens a second", "tokens_per_second", "{:,.0f}", None),
    ("decode cache, bytes a token", "cache_bytes_per_token", "{:,.0f}", None),
]


def compare_runs(run_dirs: list[Path]) -> dict[str, Any]:
    """Compare evaluated runs, the baseline first. Returns what comparison.json holds:

        names: names of the runs.
        table: {row: {"values": one per run, "ratios": each later run over the first or None, "published_ratio"}}. The
            published ratios are of gka over softmax at depth 20, and None unless these are among the runs.
        scores: differences on the tasks that a run has in common with the first; see `compare_scores`.
        curves: {run: tokens, FLOPs and BPB at every evaluation in training}.
        sigma: {run: bandwidths, a list per layer, a number per head}, for runs that have them.
        facts: {run: how it was made}.

    Raises FileNotFoundError or ValueError when something is missing, or when the runs have different val texts.
    """
    if len(run_dirs) < 2:
        raise ValueError(f"runs to compare: given {len(run_dirs)}, expected two or more")
    runs = [read_run(run_dir) for run_dir in run_dirs]
    for run_dir, run in zip(run_dirs, runs, strict=True):
        own, first = (one["results"]["bpb"] for one in (run, runs[0]))
        if own["val_sha256"] != first["val_sha256"] or own["packing"] != first["packing"]:
            raise ValueError(f"{run_dirs[0].name} and {run_dir.name} have different val texts and cannot be compared")
    names = [run_dir.name for run_dir in run_dirs]
    if len(set(names)) < len(names):
        names = [f"{name} ({letter})" for name, letter in zip(names, ascii_lowercase, strict=False)]
    shapes = [(run["facts"]["attention"], run["facts"]["depth"]) for run in runs]
    is_published = shapes[0] == ("softmax", 20) and ("gka", 20) in shapes
    rows = {}
    for row, key, _, published in TABLE:
        first, *others = values = [run["figures"][key] for run in runs]
        ratios = [other / first if first > 0 and other > 0 else None for other in others]
        rows[row] = {"values": values, "ratios": ratios, "published_ratio": published if is_published else None}
    by_name = dict(zip(names, runs, strict=True))
    return {
        "names": names,
        "table": rows,
        "scores": [
            {"run": name, **difference}
            for name in names[1:]
            for difference in compare_scores(runs[0]["results"], by_name[name]["results"])
        ],
        "curves": {name: run["curve"] for name, run in by_name.items()},
        "sigma": {name: run["sigma"] for name, run in by_name.items() if run["sigma"]},
        "facts": {name: run["facts"] for name, run in by_name.items()},
    }


def read_run(run_dir: Path) -> dict[str, Any]:
    """Read an evaluated run: its `results` by kind, `figures`, `curve`, `sigma` and `facts`.

    Raises FileNotFoundError or ValueError when something is missing or damaged.
    """
    directory, meta = open_checkpoint(run_dir, None, MODEL)
    if not meta["tokenizer_sha256"]:
        raise ValueError(
            f"{run_dir}: given an image model, expected language models; scripts.vision_report compares it"
        )
    results = read_results(run_dir, meta["step"])
    if "bpb" not in results:
        name = run_dir.name if run_dir.resolve().parent == (home() / "runs").resolve() else str(run_dir)
        raise FileNotFoundError(
            f"{run_dir} was not evaluated at its last checkpoint, step {meta['step']}; run python -m scripts.base_eval "
            f"{shlex.quote(name)}"
        )
    bpb, stats, config = results["bpb"], model_stats(model_config(meta)), meta["config"]
    return {
        "results": results,
        "figures": {
            "params": stats.params["total"],
            "flops_per_token": stats.flops_per_token,
            "cache_bytes_per_token": stats.cache_bytes_per_token,
            "tokens": meta["tokens"],
            "tokens_per_step": config["train"]["total_batch_size"],
            "flops": meta["tokens"] * stats.flops_per_token,
            "tokens_per_second": meta["tokens"] / meta["seconds"],
            "gap": bpb["val_bpb"] - bpb["train_bpb"],
            **{key: bpb[key] for key in ("val_bpb", "train_bpb", "unigram_bpb")},
        },
        "curve": [
            {key: r[key] for key in ("tokens", "val_bpb", "train_bpb")} | {"flops": r["tokens"] * stats.flops_per_token}
            for r in read_metrics(run_dir)
            if r["kind"] == "eval"
        ],
        "sigma": by_layer(load_weights(directory)),
        "facts": {
            "attention": config["model"]["attention"],
            "depth": config["model"]["depth"],
            "protocol": config["train"]["protocol"],
            "seed": config["run"]["seed"],
            "steps": meta["step"],
            "finished": meta["step"] == meta["n_steps"],
            "extended_at": meta.get("extended_at", []),
            **{key: meta[key] for key in ("device", "world_size", "dtype", "torch", "seconds", "peak_memory_bytes")},
        },
    }


def by_layer(weights: dict[str, Any]) -> list[list[float]]:
    """Return the bandwidths among a checkpoint's weights: a list per layer, a number per head."""
    keys = [key for key in weights if key.endswith("log_sigma")]
    return [weights[key].exp().tolist() for key in sorted(keys, key=lambda key: int(key.split(".")[1]))]


def compare_scores(a: dict[str, dict[str, Any]], b: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Compare two runs' results, {kind: result}, on the tasks that both have.

    Returns a dict per task: name, scores a and b, difference b - a, their standard errors error_a, error_b and error,
    examples (the number of each run), paired, is_noise. If both runs answered the same rows, the difference is paired:
    taken row by row, which removes what the rows' difficulty adds. Otherwise its error is that of two independent
    samples.
    """
    differences = []
    for kind in [kind for kind in a if kind in b]:
        tasks = [task for task in a[kind]["scores"] if task in b[kind]["scores"]]
        centered_errors, all_paired, examples = [], True, [0, 0]
        for task in tasks:
            score_a, score_b = a[kind]["scores"][task], b[kind]["scores"][task]
            errors = score_a["standard_error"], score_b["standard_error"]
            paired = "correct" in score_a and score_a.get("sha256") == score_b.get("sha256")
            if paired:
                answers = zip(score_a["correct"], score_b["correct"], strict=True)
                error = float(sem([int(right_b) - right_a for right_a, right_b in answers], ddof=0))
            else:
                error = math.hypot(*errors)
            accuracies = score_a["accuracy"], score_b["accuracy"]
            n = [score_a["examples"], score_b["examples"]]
            examples = [sum(pair) for pair in zip(examples, n, strict=True)]
            differences.append(_difference(f"{kind}: {task}", *accuracies, *errors, error, n, paired))
            left = 1 - (score_a["baseline"] or 0) or 1  # where guessing is always right, nothing is centered
            centered_errors.append([e / left for e in (*errors, error)])
            all_paired &= paired
        # Means are compared only where they have the same name, as CORE has; chat and lm_eval ask any tasks.
        name = a[kind].get("name")
        if tasks and name is not None and name == b[kind].get("name"):
            errors = [math.hypot(*column) / len(tasks) for column in zip(*centered_errors, strict=True)]
            means = a[kind]["mean_centered"], b[kind]["mean_centered"]
            differences.append(_difference(f"{kind}: {name}", *means, *errors, examples, all_paired))
    return differences


def _difference(
    name: str, a: float, b: float, error_a: float, error_b: float, error: float, examples: list[int], paired: bool
) -> dict[str, Any]:
    return {
        "name": name, "a": a, "b": b, "difference": b - a, "error_a": error_a, "error_b": error_b, "error": error,
        "examples": examples, "paired": paired, "is_noise": abs(b - a) <= NOISE * error,
    }  # fmt: skip


def markdown(comparison: dict[str, Any]) -> str:
    """Return a comparison's tables and facts as Markdown."""
    first, *others = comparison["names"]
    ratio_names = ["ratio"] if len(others) == 1 else [f"{name} over {first}" for name in others]
    rows = []
    for name, _, style, _ in TABLE:
        figures = comparison["table"][name]
        values, published = [style.format(value) for value in figures["values"]], figures["published_ratio"]
        rows.append({"name": name, "values": values, "ratios": figures["ratios"], "published": published})
    columns = {"": "{name}"}
    columns |= {name: f"{{values[{i}]}}" for i, name in enumerate(comparison["names"])}
    columns |= {name: f"{{ratios[{i}]:.3f}}" for i, name in enumerate(ratio_names)}
    text = table(rows, columns | {"published": "{published:.2f}"})
    published = " Published: gka over softmax at depth 20 (arXiv 2605.02144)."
    text += (
        f"\nRatios are over {first}.{published if any(row['published'] for row in rows) else ''}\n"
        "Bits per byte are taken over all of the val split, and over a quarter as many training tokens.\n"
        "Tokens per second include waits for shards that were still being made and, on CPUs, other runs of a speedrun, "
        "which share the cores; scripts.bench_step compares speeds.\n"
    )
    if len(set(comparison["table"]["tokens a step"]["values"])) > 1:
        text += "The runs differ in their batches, which follow from their token budgets unless they are set.\n"
    text += "\n"
    for name in others:
        scores = [
            score
            | {
                "verdict": VERDICTS[score["is_noise"]] + (", paired" if score["paired"] else ""),
                "n": " and ".join(f"{n:,}" for n in dict.fromkeys(score["examples"])),
            }
            for score in comparison["scores"]
            if score["run"] == name
        ]
        columns = {
            "score": "{name}",
            "examples": "{n}",
            first: "{a:.4f} ± {error_a:.4f}",
            name: "{b:.4f} ± {error_b:.4f}",
            "difference": "{difference:+.4f} ± {error:.4f}",
            "": "{verdict}",
        }
        text += table(scores, columns) + "\n" if scores else ""
    if comparison["scores"]:
        text += f"± one standard error; more than noise: more than {NOISE} of them. Paired: on the same rows.\n\n"
    for name, facts in comparison["facts"].items():
        finished = "" if facts["finished"] else " (unfinished)"
        if facts["extended_at"]:
            finished += f" (trained longer from step {', '.join(map(str, facts['extended_at']))} on)"
        devices = several(facts["world_size"], facts["device"])
        text += (
            f"- {name}: depth {facts['depth']} {facts['attention']}, {facts['steps']:,} steps{finished}, seed "
            f"{facts['seed']}, protocol {facts['protocol']}, {facts['dtype']} on {devices}, "
            f"torch {facts['torch']}, {facts['seconds']:.0f} s in training steps, "
            f"{facts['peak_memory_bytes'] / 2**30:.2f} GiB at most\n"
        )
    return text


def draw(comparison: dict[str, Any]) -> Any:
    """Return a matplotlib figure: BPB against tokens and against FLOPs, and a heat map of each run's bandwidths."""
    from matplotlib.figure import Figure

    n_panels = 2 + len(comparison["sigma"])
    figure = Figure(figsize=(5.2 * n_panels, 4.4), layout="constrained")
    axes = figure.subplots(1, n_panels)
    for axis, key, xlabel in ((axes[0], "tokens", "training tokens"), (axes[1], "flops", "training FLOPs")):
        for number, (name, curve) in enumerate(comparison["curves"].items()):
            x, color = [point[key] for point in curve], f"C{number}"
            for split, style in (("val", "-o"), ("train", ":")):
                y, shown = [point[f"{split}_bpb"] for point in curve], label(f"{name}, {split}")
                axis.plot(x, y, style, color=color, markersize=3, label=shown)
        axis.set(xlabel=xlabel, ylabel="bits per byte")
        axis.grid(alpha=0.3)
        axis.legend()
    for axis, (name, sigma) in zip(axes[2:], comparison["sigma"].items(), strict=True):
        heat_map(figure, axis, sigma, f"{name}: learned bandwidth")
    return figure
