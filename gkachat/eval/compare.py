"""Runs side by side: a table, scores on tasks, curves of bits per byte, learned bandwidths.

comparison = compare_runs(baseline, another, ...)     # ratios are over the first
write_comparison(comparison, directory)               # comparison.md, .json, .png
"""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from string import ascii_lowercase
from typing import Any

from gkachat.checkpoint import MODEL, load_weights, model_config, open_checkpoint
from gkachat.eval.report import read_reports
from gkachat.files import atomic_write, write_text
from gkachat.model.stats import PUBLISHED_FLOPS_RATIO, PUBLISHED_PARAMS_RATIO, model_stats
from gkachat.train.metrics import read_metrics

EVAL_FILE = "eval.json"
FILES = ("comparison.md", "comparison.json", "comparison.png")


@dataclass(frozen=True)
class Row:
    """A line of the table, a value for each run; `published` is the paper's ratio of gka over softmax, at depth 20."""

    name: str
    values: tuple[float, ...]
    style: str
    published: float | None = None

    @property
    def ratios(self) -> list[float | None]:
        """Of each other run over the first."""
        first, *others = self.values
        return [other / first if first > 0 and other > 0 else None for other in others]


@dataclass(frozen=True)
class Difference:
    """The first run's score on a task, a, and another's, b; errors are standard errors.

    A difference counts as more than noise where it is more than 1.96 of its standard errors, which chance alone brings
    about in one of twenty tasks. Where both runs answered the very same rows it is taken over the pairs, whose
    difficulty cancels: the error is that of the mean of b's answer (1 or 0) less a's. Else it is that of two samples,
    the root of the sum of both squared errors.
    """

    run: str
    """That b is of."""
    name: str
    a: float
    b: float
    error_a: float
    error_b: float
    error: float
    """Of b - a."""
    paired: bool

    @property
    def is_noise(self) -> bool:
        return abs(self.b - self.a) <= 1.96 * self.error


@dataclass(frozen=True)
class Comparison:
    names: tuple[str, ...]
    rows: list[Row]
    scores: list[Difference]
    """On the tasks of evals/ that a run has in common with the first."""
    curves: dict[str, list[dict[str, float]]]
    """Of each run: tokens, FLOPs and BPB at every evaluation."""
    sigma: dict[str, list[list[float]]]
    """Of each run that has them: bandwidths, a list a layer, a number a head."""
    facts: dict[str, Any]
    """What the runs were made with."""


def compare_runs(*run_dirs: Path) -> Comparison:
    """Read finished runs, the baseline first. FileNotFoundError or ValueError where something is missing or they
    cannot be compared."""
    if len(run_dirs) < 2:
        raise ValueError(f"given {len(run_dirs)} run to compare, expected two or more")
    runs = [read_run(run) for run in run_dirs]
    for run_dir, run in zip(run_dirs, runs, strict=True):
        if run["eval"]["val_sha256"] != runs[0]["eval"]["val_sha256"]:
            raise ValueError(
                f"{run_dirs[0].name} and {run_dir.name} were evaluated on different val texts: nothing to compare"
            )
    names = tuple(run_dir.name for run_dir in run_dirs)
    if len(set(names)) < len(names):
        names = tuple(f"{name} ({letter})" for name, letter in zip(names, ascii_lowercase, strict=False))

    def row(name: str, key: str, style: str, published: float | None = None) -> Row:
        return Row(name, tuple(run["figures"][key] for run in runs), style, published)

    return Comparison(
        names=names,
        rows=[
            row("parameters", "params", "{:,.0f}", PUBLISHED_PARAMS_RATIO),
            row("training FLOPs a token", "flops_per_token", "{:.4g}"),
            row("training tokens", "tokens", "{:,.0f}"),
            row("training FLOPs", "flops", "{:.4g}", PUBLISHED_FLOPS_RATIO),
            row("val bits per byte", "val_bpb", "{:.4f}"),
            row("train bits per byte", "train_bpb", "{:.4f}"),
            row("val - train gap", "gap", "{:+.4f}"),
            row("unigram bits per byte, val", "unigram_bpb", "{:.4f}"),
            row("training tokens a second", "tokens_per_second", "{:,.0f}"),
            row("decode cache, bytes a token", "cache_bytes_per_token", "{:,.0f}"),
        ],
        scores=[
            difference
            for name, run in zip(names[1:], runs[1:], strict=True)
            for difference in _differences(name, runs[0]["reports"], run["reports"])
        ],
        curves={name: run["curve"] for name, run in zip(names, runs, strict=True)},
        sigma={name: run["sigma"] for name, run in zip(names, runs, strict=True) if run["sigma"]},
        facts={name: run["facts"] for name, run in zip(names, runs, strict=True)},
    )


def _differences(run: str, a: dict[str, dict[str, Any]], b: dict[str, dict[str, Any]]) -> list[Difference]:
    found: list[Difference] = []
    for kind in [kind for kind in a if kind in b]:
        sides, centered = (a[kind], b[kind]), []
        for task in [task for task in a[kind]["scores"] if task in b[kind]["scores"]]:
            scores = [side["scores"][task] for side in sides]
            errors = [score["standard_error"] for score in scores]
            rows = [side.get("sha256", {}).get(task) for side in sides]
            answers = [side.get("correct", {}).get(task) for side in sides]
            paired = None not in answers and rows[0] == rows[1] is not None
            error = _paired_error(*answers) if paired else math.hypot(*errors)
            found.append(Difference(run, f"{kind}: {task}", *(s["accuracy"] for s in scores), *errors, error, paired))
            centered.append([e / (1 - a[kind].get("baseline", {}).get(task, 0)) for e in (*errors, error)])
        # Only what has a name for its mean, CORE, and the same one: other kinds are asked as many tasks as one likes.
        names = [side.get("name") for side in sides]
        if centered and names[0] is not None and names[0] == names[1]:
            # The mean of independent tasks, each stretched by what guessing gets.
            errors = [math.hypot(*column) / len(centered) for column in zip(*centered, strict=True)]
            means, paired = [side["mean_centered"] for side in sides], all(d.paired for d in found[-len(centered) :])
            found.append(Difference(run, f"{kind}: {names[0]}", *means, *errors, paired))
    return found


def _paired_error(a: list[bool], b: list[bool]) -> float:
    n, differences = len(a), [y - x for x, y in zip(a, b, strict=True)]
    mean = sum(differences) / n
    return math.sqrt(sum((d - mean) ** 2 for d in differences)) / n


def read_run(run_dir: Path) -> dict[str, Any]:
    """What an evaluated run comes to. FileNotFoundError or ValueError where something is missing."""
    directory, meta = open_checkpoint(run_dir, None, MODEL)
    if not (run_dir / EVAL_FILE).exists():
        raise FileNotFoundError(f"{run_dir} was not evaluated; run python -m scripts.base_eval {run_dir.name}")
    evaluated = json.loads((run_dir / EVAL_FILE).read_text())
    if evaluated["step"] != meta["step"]:
        raise ValueError(f"{run_dir} has trained on since it was evaluated; run python -m scripts.base_eval again")
    counted = model_stats(model_config(meta))
    train = meta["config"]["train"]
    return {
        "eval": evaluated,
        "reports": read_reports(run_dir, meta["step"]),
        "figures": {
            "params": counted.params["total"],
            "flops_per_token": counted.flops_per_token,
            "cache_bytes_per_token": counted.cache_bytes_per_token,
            "tokens": meta["tokens"],
            "flops": meta["tokens"] * counted.flops_per_token,
            "tokens_per_second": meta["tokens"] / meta["seconds"],
            "gap": evaluated["val_bpb"] - evaluated["train_bpb"],
            **{key: evaluated[key] for key in ("val_bpb", "train_bpb", "unigram_bpb")},
        },
        "curve": [
            {"tokens": r["tokens"], "flops": r["tokens"] * counted.flops_per_token}
            | {key: r[key] for key in ("val_bpb", "train_bpb")}
            for r in read_metrics(run_dir)
            if r["kind"] == "eval"
        ],
        "sigma": by_layer(load_weights(directory)),
        "facts": {
            "attention": meta["config"]["model"]["attention"],
            "depth": meta["config"]["model"]["depth"],
            "protocol": train["protocol"],
            "seed": meta["config"]["run"]["seed"],
            "steps": meta["step"],
            "finished": meta["step"] == meta["n_steps"],
            **{key: meta[key] for key in ("device", "world_size", "dtype", "torch", "seconds", "peak_memory_bytes")},
        },
    }


def by_layer(weights: dict[str, Any]) -> list[list[float]]:
    """The bandwidths among a checkpoint's weights, a list a layer, a number a head."""
    keys = [key for key in weights if key.endswith("log_sigma")]
    return [weights[key].exp().tolist() for key in sorted(keys, key=lambda key: int(key.split(".")[1]))]


def markdown(comparison: Comparison) -> str:
    """The table, and what it was made with."""
    first, *others = comparison.names
    over = ["ratio"] if len(others) == 1 else [f"{name} over {first}" for name in others]
    header = [first, *others, *over, "published"]
    lines = [f"| | {' | '.join(header)} |", f"| --- |{' ---: |' * len(header)}"]
    for row in comparison.rows:
        cells = [row.style.format(value) for value in row.values]
        cells += ["" if ratio is None else f"{ratio:.3f}" for ratio in row.ratios]
        cells.append("" if row.published is None else f"{row.published:.2f}")
        lines.append(f"| {row.name} | {' | '.join(cells)} |")
    lines += [
        "",
        f"Ratios are over {first}. Published: gka over softmax at depth 20 (arXiv 2605.02144).",
        "Bits per byte are taken over all of the val split, and over as many training tokens.",
        "",
    ]
    for name in others:
        if scores := [d for d in comparison.scores if d.run == name]:
            lines += [f"| score | {first} | {name} | difference | |", "| --- | ---: | ---: | ---: | --- |"]
            for d in scores:
                shown = [f"{value:{sign}.4f} ± {error:.4f}" for value, sign, error in (
                    (d.a, "", d.error_a), (d.b, "", d.error_b), (d.b - d.a, "+", d.error))]  # fmt: skip
                words = ("within noise" if d.is_noise else "more than noise") + (", paired" if d.paired else "")
                lines.append(f"| {d.name} | {' | '.join(shown)} | {words} |")
            lines.append("")
    if comparison.scores:
        lines += ["± one standard error; more than noise: more than 1.96 of them. Paired: on the same rows.", ""]
    for name, facts in comparison.facts.items():
        words = (
            f"depth {facts['depth']} {facts['attention']}, {facts['steps']:,} steps"
            f"{'' if facts['finished'] else ' (unfinished)'}, seed {facts['seed']}, protocol {facts['protocol']}, "
            f"{facts['dtype']} on {facts['device']} x {facts['world_size']}, torch {facts['torch']}, "
            f"{facts['seconds']:.0f} s in training steps, {facts['peak_memory_bytes'] / 2**30:.2f} GiB at most"
        )
        lines.append(f"- {name}: {words}")
    return "\n".join(lines) + "\n"


def write_comparison(comparison: Comparison, directory: Path, notes: str = "") -> None:
    """comparison.md, comparison.json and comparison.png; `notes` goes below the table."""
    write_text(directory / "comparison.md", markdown(comparison) + notes)
    tree = {
        "names": comparison.names,
        "table": {
            row.name: {"values": row.values, "ratios": row.ratios, "published_ratio": row.published}
            for row in comparison.rows
        },
        "scores": [{**asdict(d), "is_noise": d.is_noise} for d in comparison.scores],
        "curves": comparison.curves,
        "sigma": comparison.sigma,
        "facts": comparison.facts,
    }
    write_text(directory / "comparison.json", json.dumps(tree, indent=1) + "\n")
    with atomic_write(directory / "comparison.png") as file:
        draw(comparison).savefig(file, format="png", dpi=120)


def draw(comparison: Comparison) -> Any:
    """A matplotlib figure: BPB against tokens, against FLOPs, and each run's heat map of bandwidths."""
    from matplotlib.figure import Figure

    panels = 2 + len(comparison.sigma)
    figure = Figure(figsize=(5.2 * panels, 4.4), layout="constrained")
    axes = figure.subplots(1, panels)
    for axis, key, label in ((axes[0], "tokens", "training tokens"), (axes[1], "flops", "training FLOPs")):
        for number, (name, curve) in enumerate(comparison.curves.items()):
            for what, style in (("val_bpb", "-o"), ("train_bpb", ":")):
                axis.plot(
                    [point[key] for point in curve],
                    [point[what] for point in curve],
                    style,
                    color=f"C{number}",
                    markersize=3,
                    label=f"{name}, {what.removesuffix('_bpb')}",
                )
        axis.set(xlabel=label, ylabel="bits per byte")
        axis.grid(alpha=0.3)
        axis.legend()
    for axis, (name, sigma) in zip(axes[2:], comparison.sigma.items(), strict=True):
        heat_map(figure, axis, sigma, f"{name}: learned bandwidth")
    return figure


def heat_map(figure: Any, axis: Any, values: list[list[float]], title: str, *limits: float) -> None:
    """A number for each layer and head, on a scale between `limits` where they are given; written out where few."""
    low, high = limits or (None, None)
    image = axis.imshow(values, aspect="auto", cmap="viridis", vmin=low, vmax=high)
    axis.set(xlabel="head", ylabel="layer", title=title)
    axis.set_xticks(range(len(values[0])))
    axis.set_yticks(range(len(values)))
    if len(values) * len(values[0]) <= 64:
        middle = (image.norm.vmin + image.norm.vmax) / 2
        for layer, heads in enumerate(values):
            for head, value in enumerate(heads):
                color = "black" if value > middle else "white"
                axis.text(head, layer, f"{value:.2f}", ha="center", va="center", color=color)
    figure.colorbar(image, ax=axis)
