"""Figures of an Inspection: head statistics, attention maps, bandwidths over training, squared distances.

Each function returns a matplotlib Figure.
"""

import math
from typing import Any

import numpy as np

from gkachat.attention.kernels.reference import visible
from gkachat.inspection.statistics import STATISTICS, Inspection
from gkachat.plots import LABEL_CHARS, heat_map, label

LINE_STYLES = ("-", "--", ":", "-.")
MAX_LABELS = 70  # rows that are labelled on one axis
MAX_TOKEN_CHARS = 10


def statistics_figure(inspection: Inspection) -> Any:
    """Draw one heat map for each statistic, layers down and heads across.

    Scales are equal for all runs on the same texts with the same windows, so that their figures can be compared.
    Weights above 0.1 stretch theirs.
    """
    depth, n_head = len(inspection.visible), len(inspection.statistics["self"][0])
    figure, axes = _grid(len(STATISTICS), max(4.4, 1 + 0.35 * n_head), max(3.6, 1 + 0.3 * depth))
    most_visible = max(inspection.visible)
    for axis, (name, values) in zip(axes, inspection.statistics.items(), strict=True):
        if name in ("effective", "distance"):
            limits = (1 if name == "effective" else 0, most_visible)
        else:
            limits = (0, max(0.1, *map(max, values)))
        heat_map(figure, axis, values, STATISTICS[name], *limits)
    return _titled(figure, inspection, "attention of each head")


def maps_figure(inspection: Inspection) -> Any:
    """Draw the weights of the mapped heads, a row for each query, all on one scale from 0 to 1."""
    from matplotlib.colors import PowerNorm

    n = len(inspection.tokens)
    width, height = (max(2.4, edge + 0.085 * n) for edge in (1.2, 0.9))  # 2.4: the title of a head, and the color scale
    figure, axes = _grid(len(inspection.maps), width, height, columns=3, layout="compressed")
    labels = [_token_label(token) for token in inspection.tokens]
    for axis, (name, weights) in zip(axes, inspection.maps.items(), strict=True):
        weights = weights.masked_fill(~visible(n, None), math.nan).numpy()
        image = axis.imshow(weights, cmap="viridis", norm=PowerNorm(0.5, 0, 1))
        axis.set_title(f"layer {name.replace('.', ', head ')}")
        axis.set_xticks(range(n), labels, rotation=90, fontsize=5, family="monospace", parse_math=False)
        axis.set_yticks(range(n), labels, fontsize=5, family="monospace", parse_math=False)
        axis.tick_params(length=0, pad=1)
    figure.colorbar(image, ax=axes, shrink=0.5, label="weight (square-root scale)")
    return _titled(figure, inspection, "weight of each key (across) for each query (down)")


def _token_label(token: str) -> str:
    """Return a short label with visible spaces, in characters that every font has."""
    spaced = token.replace("\n", "\\n").replace("\t", "\\t").replace(" ", "·")
    label = "".join(c if c == "·" or (c.isascii() and c.isprintable()) else f"\\u{ord(c):x}" for c in spaced)
    return label if len(label) <= MAX_TOKEN_CHARS else label[: MAX_TOKEN_CHARS - 1] + "…"


def sigma_figure(inspection: Inspection) -> Any:
    """Draw every head's bandwidth over training, as curves with one color for each layer and as a heat map."""
    from matplotlib import colormaps

    history = inspection.sigma_history
    steps, depth, n_head = list(history), len(inspection.sigma), len(inspection.sigma[0])
    heads = [(layer, head) for layer in range(depth) for head in range(n_head)]
    rows = [[history[step][layer][head] for step in steps] for layer, head in heads]
    figure, (curves, chart) = _grid(2, 6.5, min(12, max(4.2, 0.8 + 0.16 * len(heads))))
    for (layer, head), sigma in zip(heads, rows, strict=True):
        color = colormaps["viridis"](0.9 * layer / max(1, depth - 1))
        first = f"layer {layer}" if head == 0 else None
        curves.plot(steps, sigma, LINE_STYLES[head % len(LINE_STYLES)], color=color, label=first)
    curves.set(xlabel="step", ylabel="sigma", title="sigma of each head")
    curves.grid(alpha=0.3)
    curves.legend(fontsize=7, ncols=math.ceil(depth / 10))

    image = chart.imshow(rows, aspect="auto", cmap="viridis", interpolation="nearest")
    every_step, every_head = math.ceil(len(steps) / 8), math.ceil(len(heads) / MAX_LABELS)
    names = [f"{layer}.{head}" for layer, head in heads]
    chart.set_xticks(range(0, len(steps), every_step), steps[::every_step])
    chart.set_yticks(range(0, len(heads), every_head), names[::every_head], fontsize=7)
    chart.set(xlabel="step", ylabel="layer.head", title="sigma of each head")
    figure.colorbar(image, ax=chart)
    return _titled(figure, inspection, "bandwidths over training")


def distances_figure(inspection: Inspection) -> Any:
    """Draw histograms of each head's squared distances; a dashed line marks 2 sigma^2, where the kernel is 1/e."""
    figure, axes = _grid(len(inspection.sigma), 4.2, 3.0)
    for layer, (axis, distances, sigma) in enumerate(zip(axes, inspection.distances, inspection.sigma, strict=True)):
        marks = [2 * value**2 for value in sigma]
        # Equal tokens are at distance 0 or near it, which a log scale lacks: they go to the first bin.
        low = max(1e-9, min(distances.median().item() / 100, *marks))
        bins = np.geomspace(0.9 * low, 1.1 * max(distances.max().item(), *marks), 81)
        shares = np.full(distances.size(1), 1 / distances.size(1))
        for head, mark in enumerate(marks):
            style = {"color": f"C{head % 10}", "label": f"head {head}"}
            axis.hist(distances[head].clamp(min=low).numpy(), bins, weights=shares, histtype="step", **style)
            axis.axvline(mark, color=style["color"], linestyle="--", linewidth=1)
        axis.set(xscale="log", title=f"layer {layer}", xlabel="squared distance", ylabel="share of pairs")
        if len(sigma) <= 10:
            axis.legend(fontsize=7)
    return _titled(figure, inspection, "squared distances to earlier tokens; dashed: 2 sigma squared")


def _grid(
    panels: int, width: float, height: float, columns: int = 4, layout: str = "constrained"
) -> tuple[Any, list[Any]]:
    """Return a figure and its axes, `panels` of them in a grid, each width by height inches."""
    from matplotlib.figure import Figure

    columns = min(columns, panels)
    rows = math.ceil(panels / columns)
    figure = Figure(figsize=(width * columns, height * rows), layout=layout)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes[panels:]:
        axis.remove()
    return figure, axes[:panels]


def _titled(figure: Any, inspection: Inspection, subject: str) -> Any:
    title = f"{inspection.run} ({inspection.attention}), step {inspection.step:,}: {subject}"
    figure.suptitle(label(title, max(LABEL_CHARS, round(9 * figure.get_figwidth()))))  # nine characters an inch
    return figure
