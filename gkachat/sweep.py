"""Many runs that differ in a few options: planned from a file, read back, fitted, tabled, drawn.

sweep = load_sweep("configs/sweep_depth.toml")      # scripts.sweep trains and evaluates sweep.runs
write_sweep(sweep)                                  # sweep.json, .md, .png of what is finished by now

[sweep]
name = "depth"
base = "laptop.toml"            # a config, beside this file or from the repo's root
flops = [1e13, 3e13]            # if given, iso-FLOP: every run trains until such a budget is spent
[sweep.grid]                    # a run for every combination; any field of a config
"model.depth" = [2, 3, 4]
"run.seed" = [42, 43]
[sweep.set]                     # the same in all runs; "none", as on the command line: derived
"model.n_embd" = "none"
"""

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gkachat.benchmark import table
from gkachat.checkpoint import checkpoint_steps
from gkachat.config import Config, ConfigError, home, is_plain
from gkachat.config_file import load_config, read_toml
from gkachat.eval.compare import read_run
from gkachat.files import atomic_write, write_text
from gkachat.model.stats import model_stats
from gkachat.train.schedule import n_steps, resolve

FIELDS = {"name": str, "base": str, "flops": list, "grid": dict, "set": dict}
SHORT = {"model.depth": "d", "run.seed": "s", "model.attention": "", "train.protocol": ""}  # in a run's name
# Axes along which runs grow, or are repeated; what differs in another is of another series, with fits of its own.
SIZES = {"model.depth", "model.n_embd", "flops", "train.total_tokens", "train.baseline_tokens", "run.seed"}
COLUMNS = {
    "seeds": "{seeds:d}", "parameters": "{params:,.0f}", "tokens": "{tokens:,.0f}", "FLOPs": "{flops:.3g}",
    "val BPB": "{val_bpb:.4f}", "±": "{val_bpb_spread:.4f}", "train BPB": "{train_bpb:.4f}", "gap": "{gap:+.4f}",
    "± gap": "{gap_spread:.4f}", "seconds": "{seconds:,.0f}",
}  # fmt: skip
AVERAGED = ("params", "tokens", "flops", "val_bpb", "train_bpb", "gap", "seconds")


@dataclass(frozen=True)
class Run:
    name: str
    axes: dict[str, Any]
    """What sets it apart: a value of each axis of the grid, and of "flops" where there are budgets."""
    config: Config
    """Resolved."""

    @property
    def directory(self) -> Path:
        return home() / "runs" / self.name

    @property
    def flops(self) -> int:
        tokens = n_steps(self.config) * self.config.train.total_batch_size
        return tokens * model_stats(self.config.model).flops_per_token

    @property
    def series(self) -> str:
        others = [axis for axis in self.axes if axis not in SIZES | {"model.attention"}]
        return ", ".join([self.config.model.attention, *(f"{_leaf(axis)} {self.axes[axis]}" for axis in others)])

    def is_trained(self) -> bool:
        """To the end, with these very options."""
        if checkpoint_steps(self.directory)[-1:] != [n_steps(self.config)]:
            return False
        try:
            return load_config(self.directory / "config.toml") == self.config
        except (FileNotFoundError, ConfigError):
            return False  # training will say what is wrong

    def result(self) -> dict[str, Any] | None:
        """Its row of the table, with the bandwidths' median in each layer; None until it is trained and evaluated."""
        try:
            read = read_run(self.directory) if self.is_trained() else None
        except (FileNotFoundError, ValueError):
            return None
        return read and {
            "run": self.name, "series": self.series, "axes": self.axes, "seed": self.config.run.seed,
            "depth": self.config.model.depth, **read["figures"], "seconds": read["facts"]["seconds"],
            "sigma": [float(np.median(heads)) for heads in read["sigma"]], "val_sha256": read["eval"]["val_sha256"],
        }  # fmt: skip


@dataclass(frozen=True)
class Sweep:
    name: str
    runs: list[Run]

    @property
    def directory(self) -> Path:
        return home() / "sweeps" / self.name


def load_sweep(path: str | Path, overrides: Sequence[str] = ()) -> Sweep:
    """Plan the runs; `--section.field value` overrides hold for all of them.

    FileNotFoundError for a missing file; ConfigError with every problem, and the runs that have it.
    """
    tree = read_toml(path)
    problems = [f"{key}: unknown table, expected [sweep], [sweep.grid], [sweep.set]" for key in tree if key != "sweep"]
    sweep = tree.get("sweep")
    if not isinstance(sweep, dict):
        raise ConfigError([*problems, "sweep: expected a table with name, base and grid"])
    for key, value in sweep.items():
        if key not in FIELDS:
            problems.append(f"sweep.{key}: unknown field, expected one of {', '.join(FIELDS)}")
        elif not isinstance(value, FIELDS[key]):
            problems.append(f"sweep.{key}: given {value!r}, expected a {FIELDS[key].__name__}")
    sound = {key: value for key, value in sweep.items() if isinstance(value, FIELDS.get(key, ()))}
    name, grid, fixed = sound.get("name", ""), _flat(sound.get("grid", {})), _flat(sound.get("set", {}))
    if not name or not is_plain(name):
        problems.append(f"sweep.name: given {sweep.get('name')!r}, expected a directory name")
    places = (Path(path).parent, Path(__file__).parents[2])
    base = next((place / sound["base"] for place in places if (place / sound.get("base", "")).is_file()), None)
    if base is None:
        where = " or ".join(map(str, places))
        problems.append(f"sweep.base: given {sweep.get('base')!r}, expected a config file in {where}")
    if "flops" in sound:
        if not all(type(budget) in (int, float) and 0 < budget < math.inf for budget in sound["flops"]):
            problems.append(f"sweep.flops: given {sound['flops']}, expected numbers above 0")
        grid = {"flops": sound["flops"], **grid}
    for axis, values in grid.items():
        if not isinstance(values, list) or not values or any(value in values[:i] for i, value in enumerate(values)):
            problems.append(f"sweep.grid.{axis}: given {values!r}, expected a list of different values")
    flags = [word.partition("=")[0][2:].replace("-", "_") for word in overrides if word.startswith("--")]
    decided = {"run.name": "every run has its own"}
    if "flops" in sound:
        decided |= dict.fromkeys(("train.total_tokens", "train.protocol"), "sweep.flops decides")
    taken = dict.fromkeys(grid, "it is an axis of the grid") | decided
    problems += [f"sweep.grid.{key}: cannot vary: {decided[key]}" for key in grid if key in decided]
    for where, keys in (("sweep.set.", fixed), ("--", flags)):
        problems += [f"{where}{key}: cannot be set: {taken[key]}" for key in keys if key in taken]
    if problems:
        raise ConfigError(problems)
    return Sweep(name, _plan(name, base, grid, fixed, overrides))


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted names, whether they were written in quotes or not."""
    flat = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _leaf(axis: str) -> str:
    return axis.rpartition(".")[2]


def _plan(name: str, base: Path, grid: dict[str, list], fixed: dict[str, Any], overrides: Sequence[str]) -> list[Run]:
    runs: list[Run] = []
    refused: dict[str, list[str]] = {}
    combinations = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    for axes in combinations:
        given = {axis: value for axis, value in (fixed | axes).items() if axis != "flops"}
        words = [w for axis, v in given.items() for w in (f"--{axis}", *map(str, v if isinstance(v, list) else [v]))]
        parts = [name, *(SHORT.get(axis, _leaf(axis)) + _word(value) for axis, value in axes.items())]
        try:
            config = load_config(base, [*words, *overrides])
            if "run.seed" not in axes:  # going on with a run, the trainer does not ask for its seed: the name tells
                parts.append(f"s{config.run.seed}")
            config = dataclasses.replace(config, run=dataclasses.replace(config.run, name="_".join(parts)))
            runs.append(Run(config.run.name, axes, _resolve(config, axes.get("flops"))))
        except ConfigError as error:
            for problem in error.problems:
                refused.setdefault(problem, []).append("_".join(parts))
    names = [run.name for run in runs]
    for twice in {one for one in names if names.count(one) > 1}:
        refused.setdefault("two runs of one name: write their values differently", []).append(twice)
    if refused:
        where = {p: "all runs" if len(of) == len(combinations) else ", ".join(of) for p, of in refused.items()}
        raise ConfigError([f"{problem} (in {runs})" for problem, runs in where.items()])
    return runs


def _word(value: Any) -> str:
    """A value as part of a directory's name."""
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return "".join(c if c.isalnum() or c in ".-" else "-" for c in text.replace("e+0", "e").replace("e+", "e"))


def _resolve(config: Config, budget: float | None) -> Config:
    """With the horizon that takes so many FLOPs, if given."""
    if budget is None:
        return resolve(config)
    tokens = max(1, round(budget / model_stats(config.model).flops_per_token))
    config = resolve(dataclasses.replace(config, train=dataclasses.replace(config.train, total_tokens=tokens)))
    step = config.train.total_batch_size
    if tokens < step:
        raise ConfigError([f"sweep.flops: given {budget:g}, {tokens:,} tokens, expected a step of {step:,} or more"])
    return config


def student_t(dof: int) -> float:
    """The 97.5 % quantile of Student's t; from 11 degrees of freedom on a series in 1 / dof (Abramowitz and Stegun,
    26.7.5), right to four digits."""
    known = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281)
    if dof <= len(known):
        return known[dof - 1]
    z = 1.959964
    return (
        z + (z**3 + z) / (4 * dof) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * dof**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * dof**3)
    )  # fmt: skip


def fit_power_law(x: Sequence[float], y: Sequence[float]) -> dict[str, Any] | None:
    """y = a x^-b by least squares of log y on log x, with 95 % intervals of a and b; None with fewer than three
    different x, or all within a fifth, which tell no power law from another."""
    if len(set(x)) < 3 or max(x) < 1.2 * min(x):
        return None
    u, v = np.log(x), np.log(y)
    n, mean, spread = len(u), u.mean(), ((u - u.mean()) ** 2).sum()
    slope = ((u - mean) * v).sum() / spread
    intercept = v.mean() - slope * mean
    error = student_t(n - 2) * math.sqrt(((v - intercept - slope * u) ** 2).sum() / (n - 2))
    wide, high = error / math.sqrt(spread), error * math.sqrt(1 / n + mean**2 / spread)
    return {
        "a": math.exp(intercept), "a_interval": [math.exp(intercept - high), math.exp(intercept + high)],
        "b": -slope, "b_interval": [-slope - wide, -slope + wide], "points": n,
    }  # fmt: skip


def fit_parabola(params: Sequence[float], bpb: Sequence[float]) -> dict[str, Any] | None:
    """bpb = a parabola in log params, and its minimum; None with fewer than three different sizes, or where it does
    not open upward. `inside`: the minimum is between the smallest and the largest size, not made up beyond them."""
    if len(set(params)) < 3:
        return None
    u = np.log(params)
    second, first, constant = np.polyfit(u - u.mean(), bpb, 2)
    if second <= 0:
        return None
    at = u.mean() - first / (2 * second)
    return {
        "params": math.exp(at), "bpb": constant - first**2 / (4 * second), "curvature": second,
        "inside": bool(u.min() <= at <= u.max()),
    }  # fmt: skip


def analyse(sweep: Sweep) -> dict[str, Any]:
    """Rows of the finished runs, their means over seeds, the minimum at each budget, fits."""
    found = {run.name: run.result() for run in sweep.runs}
    rows = [row for row in found.values() if row]
    means = []
    for same in _grouped(rows, lambda row: {axis: v for axis, v in row["axes"].items() if axis != "run.seed"}):
        axes = {axis: v for axis, v in same[0]["axes"].items() if axis != "run.seed"}
        mean = {key: float(np.mean([row[key] for row in same])) for key in AVERAGED}
        for key in ("val_bpb", "gap"):
            mean[f"{key}_spread"] = float(np.std([r[key] for r in same], ddof=1)) if len(same) > 1 else None
        means.append({"series": same[0]["series"], "axes": axes, "seeds": len(same), **mean})
    minima = []
    for same in _grouped([row for row in rows if "flops" in row["axes"]], lambda r: [r["series"], r["axes"]["flops"]]):
        fitted = fit_parabola([row["params"] for row in same], [row["val_bpb"] for row in same])
        minima.append({"series": same[0]["series"], "flops": same[0]["axes"]["flops"], **(fitted or {})})
    # At one budget models differ in size alone: what falls with the budget is the best of them.
    points = [one | {"val_bpb": one["bpb"]} for one in minima if one.get("inside")] if minima else rows
    fits = {
        series: {
            x: fit_power_law(*([p[key] for p in points if p["series"] == series] for key in (x, "val_bpb")))
            for x in ("flops", "params")
        }
        for series in dict.fromkeys(row["series"] for row in rows)
    }
    texts = {json.dumps(row.pop("val_sha256")) for row in rows}
    return {
        "sweep": sweep.name, "runs": rows, "means": means, "minima": minima, "fits": fits,
        "missing": [name for name, row in found.items() if not row], "same_val_text": len(texts) < 2,
    }  # fmt: skip


def _grouped(rows: list[dict[str, Any]], key: Callable[[dict[str, Any]], Any]) -> list[list[dict[str, Any]]]:
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(json.dumps(key(row)), []).append(row)
    return list(groups.values())


def markdown(results: dict[str, Any]) -> str:
    """Tables of runs, means and minima, and the fits in words."""

    def shown(rows: list[dict[str, Any]], first: str) -> str:
        axes = {f"axis{i}": axis for i, axis in enumerate(rows[0]["axes"])}
        rows = [
            dict.fromkeys(("seeds", "val_bpb_spread", "gap_spread")) | row
            | {column: _word(row["axes"][axis]) for column, axis in axes.items()}
            for row in rows
        ]  # fmt: skip
        headers = {"budget" if axis == "flops" else _leaf(axis): f"{{{column}}}" for column, axis in axes.items()}
        return table(rows, {first: f"{{{first}}}"} | headers | COLUMNS)

    lines = [f"# Sweep {results['sweep']}", "", shown(results["runs"], "run")]
    if len(results["means"]) < len(results["runs"]):
        lines += ["Means over seeds, ± their standard deviation:", "", shown(results["means"], "series")]
    for one in results["minima"]:
        least = "no parabola that opens upward: more sizes are needed, or larger and smaller ones"
        if "params" in one:
            where = "" if one["inside"] else " (beyond the sizes that were trained, and not among the fitted)"
            least = f"least bits per byte {one['bpb']:.4f} at {one['params']:,.0f} parameters{where}"
        lines.append(f"- {one['series']}, {one['flops']:.3g} FLOPs: {least}")
    for (series, fits), x in itertools.product(results["fits"].items(), ("flops", "params")):
        lines.append(f"- {series}: bits per byte {_law(fits[x], {'flops': 'FLOPs', 'params': 'parameters'}[x])}")
    if results["minima"]:
        lines.append("- fits are over the minima of the budgets")
    if not results["same_val_text"]:
        lines.append("- the runs were evaluated on different val texts: their bits per byte do not compare")
    if results["missing"]:
        lines.append(f"- not finished: {', '.join(results['missing'])}")
    return "\n".join(lines) + "\n"


def _law(fit: dict[str, Any] | None, x: str) -> str:
    if fit is None:
        return f"against {x}: too few points to fit (three are needed, of different {x})"
    (a_low, a_high), (b_low, b_high) = fit["a_interval"], fit["b_interval"]
    return (
        f"= {fit['a']:.4g} {x}^{-fit['b']:.4f} over {fit['points']} points; 95 % intervals: "
        f"{a_low:.4g} to {a_high:.4g}, exponent {-b_high:.4f} to {-b_low:.4f}"
    )


def write_sweep(sweep: Sweep, facts: dict[str, str]) -> str:
    """Write sweep.json, sweep.md and sweep.png; the Markdown. ValueError where no run is finished."""
    results = analyse(sweep)
    if not results["runs"]:
        raise ValueError(f"no run of the sweep {sweep.name!r} is finished and evaluated yet: nothing to write")
    text = markdown(results)
    told = text + "- " + ", ".join(f"{key} {value}" for key, value in facts.items()) + "\n"
    write_text(sweep.directory / "sweep.json", json.dumps(results | {"facts": facts}, indent=1) + "\n")
    write_text(sweep.directory / "sweep.md", told)
    with atomic_write(sweep.directory / "sweep.png") as file:
        draw(results).savefig(file, format="png", dpi=120)
    return text


def draw(results: dict[str, Any]) -> Any:
    """A matplotlib figure: BPB against FLOPs and parameters with the fits, the train-val gap, bandwidths, budgets."""
    from matplotlib.figure import Figure

    rows, minima = results["runs"], results["minima"]
    colors = {series: f"C{number}" for number, series in enumerate(results["fits"])}
    budgets = sorted({one["flops"] for one in minima})
    learned = [row for row in rows if row["sigma"]]
    panels = 3 + bool(learned) + len(budgets)
    across = min(panels, 4)
    down = -(-panels // across)
    figure = Figure(figsize=(5.2 * across, 4.4 * down), layout="constrained")
    axes = iter(figure.subplots(down, across, squeeze=False).flat)

    def scatter(axis: Any, chosen: list[dict[str, Any]], x: str, y: str, xlabel: str, ylabel: str) -> None:
        for series, color in colors.items():
            own = [row for row in chosen if row["series"] == series]
            axis.plot([row[x] for row in own], [row[y] for row in own], "o", color=color, markersize=4, label=series)
        axis.set(xscale="log", xlabel=xlabel, ylabel=ylabel)
        axis.grid(alpha=0.3, which="both")

    fitted = [one for one in minima if one.get("inside")] or rows
    for x, label in (("flops", "training FLOPs"), ("params", "parameters")):
        axis = next(axes)
        scatter(axis, rows, x, "val_bpb", label, "val bits per byte")
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter("{x:.2f}")
        axis.yaxis.set_minor_formatter("{x:.2f}")
        for series, fits in results["fits"].items():
            if fits[x]:
                own = [one[x] for one in fitted if one["series"] == series]
                ends = np.array([min(own), max(own)], dtype=float)
                law = fits[x]["a"] * ends ** -fits[x]["b"]
                axis.plot(ends, law, color=colors[series], label=f"exponent {-fits[x]['b']:.3f}")
        axis.legend()
    scatter(gap := next(axes), rows, "params", "gap", "parameters", "val - train, bits per byte")
    gap.axhline(0, color="gray", linewidth=0.8)
    if learned:
        axis = next(axes)
        deepest = max(row["depth"] for row in learned)
        for row in learned:
            color = f"{0.8 * (1 - row['depth'] / deepest):.2f}"  # the deeper, the darker
            axis.plot(range(1, len(row["sigma"]) + 1), row["sigma"], "-o", color=color, markersize=3)
        axis.set(xlabel="layer", ylabel="bandwidth, median of heads", title="the deeper the model, the darker")
        axis.set_yscale("log")  # a published GKA layer that averages all tokens lets it grow without end
        axis.set_xticks(range(1, deepest + 1))
    for budget in budgets:
        axis = next(axes)
        here = [row for row in rows if row["axes"]["flops"] == budget]
        scatter(axis, here, "params", "val_bpb", "parameters", "val bits per byte")
        sizes = np.geomspace(min(row["params"] for row in here), max(row["params"] for row in here), 50)
        for one in (one for one in minima if one["flops"] == budget and "params" in one):
            bpb = one["bpb"] + one["curvature"] * np.log(sizes / one["params"]) ** 2
            axis.plot(sizes, bpb, color=colors[one["series"]])
            axis.plot(one["params"], one["bpb"], "*", color=colors[one["series"]], markersize=12)
        axis.set_title(f"{budget:.3g} FLOPs")
    for axis in axes:
        axis.remove()
    return figure
