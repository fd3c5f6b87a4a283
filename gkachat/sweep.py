"""Sweeps: many runs that differ in a few options, with tables, fits and figures of their results.

    sweep = load_sweep("configs/sweep_depth.toml")   # scripts.sweep trains and evaluates sweep.runs
    write_sweep(sweep, facts={})                     # sweep.json, .md and .png of the runs that are finished

A sweep file:

    [sweep]
    name = "depth"
    base = "laptop.toml"            # a config, beside this file or relative to the repository's root
    flops = [1e13, 3e13]            # optional, iso-FLOP: each run trains until a budget is spent
    [sweep.grid]                    # one run for every combination, of any fields of a config
    "model.depth" = [2, 3, 4]
    "run.seed" = [42, 43]
    [sweep.set]                     # options of all runs; "none" unsets what the base sets
    "model.n_embd" = "none"
    [sweep.set.softmax]             # options of the runs with this attention
    "model.short_conv" = true
"""

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gkachat.benchmark import table
from gkachat.checkpoint import checkpoint_steps
from gkachat.checks import DIRECTORY_NAME, ConfigError, is_directory_name, require
from gkachat.config import ATTENTIONS, Config, home
from gkachat.config_file import from_dict, load_config, read_toml
from gkachat.eval.compare import read_run
from gkachat.eval.results import write_report
from gkachat.model.stats import model_stats
from gkachat.plots import label, log_axis
from gkachat.train.schedule import n_steps, resolve, whole_budget

SHORT = {"model.depth": "d", "run.seed": "s", "model.attention": "", "train.protocol": ""}  # in the name of a run
# Runs that differ only in these fields belong to one series, which is fitted. Any other field starts another series.
SIZES = {"model.depth", "model.n_embd", "flops", "train.total_tokens", "train.baseline_tokens", "run.seed"}
COLUMNS = {
    "seeds": "{seeds:d}", "parameters": "{params:,.0f}", "tokens": "{tokens:,.0f}", "FLOPs": "{flops:.3g}",
    "val BPB": "{val_bpb:.4f}", "±": "{val_bpb_spread:.4f}", "train BPB": "{train_bpb:.4f}", "gap": "{gap:+.4f}",
    "± gap": "{gap_spread:.4f}", "seconds": "{seconds:,.0f}",
}  # fmt: skip
AVERAGED = ("params", "tokens", "flops", "val_bpb", "train_bpb", "gap", "seconds")


@dataclass(frozen=True)
class SweepOptions:
    """The [sweep] table of a sweep file."""

    name: str = ""
    base: str = ""
    flops: tuple[float, ...] = ()
    grid: dict = field(default_factory=dict)
    set: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        require(
            self,
            name=(bool(self.name) and is_directory_name(self.name), DIRECTORY_NAME),
            flops=(all(0 < budget < math.inf for budget in self.flops), "numbers above 0"),
        )


@dataclass(frozen=True)
class SweepFile:
    """Content of a sweep file."""

    sweep: SweepOptions


@dataclass(frozen=True)
class Run:
    """One run of a sweep."""

    name: str
    axes: dict[str, Any]
    """Value of each field of the grid, and of "flops" if there are budgets."""
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
        """Name of the series that the run belongs to: its attention and the values of fields that are not sizes."""
        others = [axis for axis in self.axes if axis not in SIZES | {"model.attention"}]
        return ", ".join([self.config.model.attention, *(f"{_leaf(axis)} {self.axes[axis]}" for axis in others)])

    def is_trained(self) -> bool:
        """Return whether the run was trained to its end with exactly these options."""
        if checkpoint_steps(self.directory)[-1:] != [n_steps(self.config)]:
            return False
        try:
            return load_config(self.directory / "config.toml") == self.config
        except (FileNotFoundError, ConfigError):
            return False  # training reports what is wrong

    def result(self) -> dict[str, Any] | None:
        """Return the figures of the run, or None until it is trained and evaluated."""
        try:
            read = read_run(self.directory) if self.is_trained() else None
        except (FileNotFoundError, ValueError):
            return None
        return read and {
            "run": self.name, "series": self.series, "axes": self.axes, "seed": self.config.run.seed,
            "depth": self.config.model.depth, **read["figures"], "seconds": read["facts"]["seconds"],
            "sigma": [float(np.median(heads)) for heads in read["sigma"]],
            "val_sha256": read["results"]["bpb"]["val_sha256"],
        }  # fmt: skip


@dataclass(frozen=True)
class Sweep:
    """A sweep and its runs."""

    name: str
    runs: list[Run]

    @property
    def directory(self) -> Path:
        return home() / "sweeps" / self.name


def load_sweep(path: str | Path, overrides: Sequence[str] = ()) -> Sweep:
    """Return the runs of a sweep file. `--section.field value` overrides apply to all of them.

    Raises FileNotFoundError for a missing file, and ConfigError that names each problem and the runs that have it.
    """
    tree = read_toml(path)
    if "sweep" not in tree:
        raise ConfigError([f"{path}: no [sweep] table, expected one with name, base and grid"])
    options: SweepOptions = from_dict(SweepFile, tree).sweep
    places = (Path(path).parent, Path(__file__).parents[1])
    base = next((place / options.base for place in places if (place / options.base).is_file()), None)
    grid, fixed = _flat(options.grid), _flat(options.set)
    problems = []
    if base is None:
        where = " or ".join(map(str, places))
        problems.append(f"sweep.base: given {options.base!r}, expected a config file in {where}")
    for axis, values in grid.items():
        if not isinstance(values, list) or not values or any(value in values[:i] for i, value in enumerate(values)):
            problems.append(f"sweep.grid.{axis}: given {values!r}, expected a list of different values")
    decided = {"run.name": "every run has its own"}
    if options.flops:
        decided |= dict.fromkeys(("train.total_tokens", "train.protocol"), "sweep.flops decides")
    taken = dict.fromkeys(grid, "it is an axis of the grid") | decided
    flags = [word.partition("=")[0][2:].replace("-", "_") for word in overrides if word.startswith("--")]
    for where, keys, reasons in (("sweep.grid.", grid, decided), ("sweep.set.", fixed, taken), ("--", flags, taken)):
        problems += [f"{where}{key}: cannot be set: {reasons[key]}" for key in keys if key in reasons]
    if problems:
        raise ConfigError(problems)
    axes = {"flops": list(options.flops), **grid} if options.flops else grid
    combinations = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    runs = [_plan(options.name, base, axes, fixed, overrides) for axes in combinations]
    names = [run.name for run in runs]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ConfigError([f"two runs are named {name}: write their values differently" for name in twice])
    return Sweep(options.name, runs)


def _plan(name: str, base: Path, axes: dict[str, Any], fixed: dict[str, Any], overrides: Sequence[str]) -> Run:
    """Return the run with these values of the axes. Raises ConfigError that names the run."""
    name = "_".join([name, *(SHORT.get(axis, _leaf(axis)) + _word(value) for axis, value in axes.items())])
    fields = {axis: value for axis, value in axes.items() if axis != "flops"}
    try:
        tree = read_toml(base)
        _set(tree, fixed, fields)
        config = load_config(tree, overrides)
        if "run.seed" not in axes:  # resuming does not compare seeds, so the name tells them apart
            name += f"_s{config.run.seed}"
        config = dataclasses.replace(config, run=dataclasses.replace(config.run, name=name))
        if "flops" in axes:
            config = _spend(config, axes["flops"])
        return Run(name, axes, resolve(config))
    except ConfigError as error:
        raise ConfigError([f"{problem} (in {name})" for problem in error.problems]) from None


def _set(tree: dict[str, Any], fixed: dict[str, Any], axes: dict[str, Any]) -> None:
    """Set the options of one run in `tree`, the base config: those of all runs, of its attention, and its axes."""
    attention = axes.get("model.attention", tree.get("model", {}).get("attention", Config().model.attention))
    ours = {key: value for key, value in fixed.items() if key.partition(".")[0] not in ATTENTIONS}
    ours |= {key.partition(".")[2]: value for key, value in fixed.items() if key.partition(".")[0] == attention}
    for key, value in (ours | axes).items():
        *sections, name = key.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
            if not isinstance(node, dict):
                raise ConfigError([f"{key}: unknown field"])
        node[name] = value
        if value == "none":
            del node[name]


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested tables as one dict with dotted names. TOML nests names that are not quoted."""
    flat = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _leaf(axis: str) -> str:
    return axis.rpartition(".")[2]


def _word(value: Any) -> str:
    """Return a value as part of a directory name."""
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return "".join(c if c.isalnum() or c in ".-" else "-" for c in text.replace("e+0", "e").replace("e+", "e"))


def _spend(config: Config, budget: float) -> Config:
    """Return the config with as many training tokens as take `budget` FLOPs."""
    tokens = whole_budget(budget / model_stats(config.model).flops_per_token, "sweep.flops", budget)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, total_tokens=tokens))
    if tokens < (step := resolve(config).train.total_batch_size):
        raise ConfigError([f"sweep.flops: given {budget:g}, {tokens:,} tokens, expected a step of {step:,} or more"])
    return config


def fit_power_law(x: Sequence[float], y: Sequence[float]) -> dict[str, Any] | None:
    """Fit y = a x^-b by least squares of log y on log x, with 95 % confidence intervals of a and b.

    None for fewer than three different x, or if all lie within 20 %, where power laws cannot be told apart.
    """
    if len(set(x)) < 3 or max(x) < 1.2 * min(x):
        return None
    from scipy.stats import t

    (slope, log_a), covariance = np.polyfit(np.log(x), np.log(y), 1, cov=True)
    b_error, a_error = t.ppf(0.975, len(x) - 2) * np.sqrt(np.diag(covariance))
    return {
        "a": math.exp(log_a), "a_interval": [math.exp(log_a - a_error), math.exp(log_a + a_error)],
        "b": -slope, "b_interval": [-slope - b_error, -slope + b_error], "points": len(x),
    }  # fmt: skip


def fit_parabola(params: Sequence[float], bpb: Sequence[float]) -> dict[str, Any] | None:
    """Fit bpb as a parabola in log params and return its minimum.

    `inside` is whether the minimum lies between the smallest and the largest size. None for fewer than three different
    sizes, or for a parabola that opens downward.
    """
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
    """Return the rows of finished runs, their means over seeds, the minimum at each budget, and the fits."""
    found = {run.name: run.result() for run in sweep.runs}
    rows = [row for row in found.values() if row]
    means = []
    for same in _grouped(rows, _axes_without_seed):
        mean = {key: float(np.mean([row[key] for row in same])) for key in AVERAGED}
        for key in ("val_bpb", "gap"):
            mean[f"{key}_spread"] = float(np.std([r[key] for r in same], ddof=1)) if len(same) > 1 else None
        axes = _axes_without_seed(same[0])
        means.append({"series": same[0]["series"], "axes": axes, "seeds": len(same), **mean})
    minima = []
    for same in _grouped([row for row in rows if "flops" in row["axes"]], lambda r: [r["series"], r["axes"]["flops"]]):
        fitted = fit_parabola([row["params"] for row in same], [row["val_bpb"] for row in same])
        minima.append({"series": same[0]["series"], "flops": same[0]["axes"]["flops"], **(fitted or {})})
    # With budgets, the fits are over the best size of each budget.
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


def _axes_without_seed(row: dict[str, Any]) -> dict[str, Any]:
    return {axis: value for axis, value in row["axes"].items() if axis != "run.seed"}


def _grouped(rows: list[dict[str, Any]], key: Callable[[dict[str, Any]], Any]) -> list[list[dict[str, Any]]]:
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(json.dumps(key(row)), []).append(row)
    return list(groups.values())


def markdown(results: dict[str, Any]) -> str:
    """Return the tables of runs and means, and the minima and fits in words, as Markdown."""

    def shown(rows: list[dict[str, Any]], first: str) -> str:
        names = ["budget" if axis == "flops" else _leaf(axis) for axis in rows[0]["axes"]]
        axes = {name: f"{{values[{i}]}}" for i, name in enumerate(names)}
        of_means = dict.fromkeys(("seeds", "val_bpb_spread", "gap_spread"))  # a run has none of them
        rows = [{**of_means, **row, "values": [*map(_word, row["axes"].values())]} for row in rows]
        return table(rows, {first: f"{{{first}}}", **axes, **COLUMNS})

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
    """Write sweep.json, sweep.md and sweep.png, and return the Markdown. Raises ValueError if no run is finished."""
    results = analyse(sweep)
    if not results["runs"]:
        raise ValueError(f"no run of the sweep {sweep.name!r} is finished and evaluated yet: nothing to write")
    text = markdown(results)
    with_facts = text + "- " + ", ".join(f"{key} {value}" for key, value in facts.items()) + "\n"
    write_report(sweep.directory / "sweep", with_facts, results | {"facts": facts}, draw(results))
    return text


def draw(results: dict[str, Any]) -> Any:
    """Return a matplotlib figure: BPB against FLOPs and parameters with fits, the val gap, bandwidths, budgets."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    rows, minima = results["runs"], results["minima"]
    colors = {series: f"C{number}" for number, series in enumerate(results["fits"])}
    budgets = sorted({one["flops"] for one in minima})
    learned = [row for row in rows if row["sigma"]]
    panels = 3 + bool(learned) + len(budgets)
    across = min(panels, 4)
    down = -(-panels // across)
    figure = Figure(figsize=(5.2 * across, 4.4 * down), layout="constrained")
    axes = iter(figure.subplots(down, across, squeeze=False).flat)

    def ends(values: list[float]) -> tuple[float, float]:
        return min(values), max(values)

    def scatter(axis: Any, chosen: list[dict[str, Any]], x: str, y: str, xlabel: str, ylabel: str) -> None:
        for series, color in colors.items():
            own = [row for row in chosen if row["series"] == series]
            points = [row[x] for row in own], [row[y] for row in own]
            axis.plot(*points, "o", color=color, markersize=4, label=label(series))
        axis.set(xlabel=xlabel, ylabel=ylabel)
        log_axis(axis, "x", *ends([row[x] for row in chosen]))
        axis.grid(alpha=0.3, which="both")

    fitted = [one for one in minima if one.get("inside")] or rows
    for x, xlabel in (("flops", "training FLOPs"), ("params", "parameters")):
        axis = next(axes)
        scatter(axis, rows, x, "val_bpb", xlabel, "val bits per byte")
        log_axis(axis, "y", *ends([row["val_bpb"] for row in rows]))
        for series, fits in results["fits"].items():
            if fits[x]:
                between = np.array(ends([one[x] for one in fitted if one["series"] == series]), dtype=float)
                law = fits[x]["a"] * between ** -fits[x]["b"]
                axis.plot(between, law, color=colors[series], label=f"exponent {-fits[x]['b']:.3f}")
        axis.legend()
    scatter(gap := next(axes), rows, "params", "gap", "parameters", "val - train, bits per byte")
    gap.axhline(0, color="gray", linewidth=0.8)
    if learned:
        axis = next(axes)
        deepest = max(row["depth"] for row in learned)
        for row in learned:
            color = f"{0.8 * (1 - row['depth'] / deepest):.2f}"
            axis.plot(range(len(row["sigma"])), row["sigma"], "-o", color=color, markersize=3)
        axis.set(xlabel="layer", ylabel="bandwidth, median of heads", title="the deeper the model, the darker")
        # A log scale, because sigma grows without bound in published GKA layers that average all tokens.
        log_axis(axis, "y", *ends([sigma for row in learned for sigma in row["sigma"]]))
        axis.xaxis.set_major_locator(MaxNLocator(12, integer=True, min_n_ticks=1))
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
