"""Figures are legible: no text is cut off or covers another, also with few tokens, many layers and long names."""

import itertools
import struct

import pytest
import torch

from gkachat import sweep
from gkachat.eval import compare
from gkachat.inspection.figures import distances_figure, maps_figure, sigma_figure, statistics_figure
from gkachat.inspection.statistics import STATISTICS, Inspection
from gkachat.plots import save_figure

LONG = "a_run_with_$one$_name_" + 5 * "of_many_words_"


def check_legible(figure, tmp_path):
    """Save a figure. Raises AssertionError if its picture lacks a part of it, or if labels or titles overlap."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    save_figure(figure, tmp_path / "figure.png")
    width, height = struct.unpack(">II", (tmp_path / "figure.png").read_bytes()[16:24])
    renderer = FigureCanvasAgg(figure).get_renderer()
    needed = figure.get_tightbbox(renderer)  # in inches
    assert width + 1 > 120 * needed.width and height + 1 > 120 * needed.height
    titles = [axes.title for axes in figure.axes] + ([figure._suptitle] if figure._suptitle else [])
    for texts in [titles, *(visible_labels(axis) for axes in figure.axes for axis in (axes.xaxis, axes.yaxis))]:
        boxes = [text.get_window_extent(renderer) for text in texts if text.get_text() and text.get_visible()]
        for a, b in itertools.combinations(boxes, 2):
            assert not a.overlaps(b), [text.get_text() for text in texts]


def visible_labels(axis):
    low, high = sorted(axis.get_view_interval())
    return [tick.label1 for tick in axis.get_major_ticks() + axis.get_minor_ticks() if low <= tick.get_loc() <= high]


@pytest.mark.parametrize(
    ("run", "tokens", "depth", "n_head", "maps"),
    [("d2_gka", 2, 1, 1, 1), ("d2_gka", 3, 2, 2, 4), (LONG, 5, 8, 2, 4)],
    ids=["least", "few", "long"],
)
def test_an_inspection_of_any_size_is_legible(run, tokens, depth, n_head, maps, tmp_path):
    numbers, weights = [[0.5 + head for head in range(n_head)] for _ in range(depth)], torch.eye(tokens)
    names = list(itertools.islice((f"{i}.{j}" for i in range(depth) for j in range(n_head)), maps))
    inspection = Inspection(
        run, "gka", 12_000, "", dict.fromkeys(STATISTICS, numbers), [float(tokens)] * depth, numbers,
        [torch.rand(n_head, 9) + 0.1] * depth, {step: numbers for step in range(1000, 12_001, 1000)},
        ["<|bos|>", *["·long·word"] * (tokens - 1)], dict.fromkeys(names, weights),
    )  # fmt: skip
    for draw in (statistics_figure, maps_figure, sigma_figure, distances_figure):
        check_legible(draw(inspection), tmp_path)


@pytest.mark.parametrize(("depths", "ratio"), [((1,), 1), ((2, 3, 4), 8), ((2, 24), 2000)])
def test_a_sweep_of_any_size_is_legible_and_counts_layers_from_0(depths, ratio, tmp_path):
    rows = [
        {
            "series": series, "axes": {"flops": 3e12}, "depth": depth, "flops": 3e12, "gap": 0.1,
            "params": 4e5 * ratio ** (depth / max(depths)), "val_bpb": 1.5 + 1 / depth,
            "sigma": [4.0 + layer / 10 for layer in range(depth)],
        }
        for depth in depths for series in ("softmax", LONG)
    ]  # fmt: skip
    minima = [{"series": series, "flops": 3e12} for series in ("softmax", LONG)]
    fits = {series: {"flops": None, "params": {"a": 2, "b": 0.05}} for series in ("softmax", LONG)}
    figure = sweep.draw({"runs": rows, "minima": minima, "fits": fits})
    check_legible(figure, tmp_path)
    layers = next(axes for axes in figure.axes if axes.get_xlabel() == "layer")
    assert [*layers.lines[-1].get_xdata()] == [*range(max(depths))]
    assert all(position == int(position) for position in layers.get_xticks())


def test_a_comparison_of_runs_with_long_names_is_legible(tmp_path):
    curve = [{"tokens": n, "flops": 1e9 * n, "val_bpb": 1.2, "train_bpb": 1.1} for n in (0, 5_000_000)]
    names = [f"{LONG}{i}" for i in range(3)]
    sigma = dict.fromkeys(names, [[1.0] * 10] * 20)
    check_legible(compare.draw({"curves": dict.fromkeys(names, curve), "sigma": sigma}), tmp_path)
