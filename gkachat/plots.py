"""Parts of figures: heat maps, log axes with ticks that do not overlap, labels that fit, and pictures without cut text.

They need matplotlib, which is imported when a figure is drawn.
"""

import textwrap
from pathlib import Path
from typing import Any

from gkachat.files import atomic_write

LABEL_CHARS = 45  # across a panel of 5 inches, in the larger size of titles


def save_figure(figure: Any, path: Path) -> None:
    """Write a matplotlib figure as a PNG that is as large as its texts need, so that no title is cut off."""
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=120, bbox_inches="tight")


def label(text: str, width: int = LABEL_CHARS) -> str:
    """Return a text, such as a run's name, in lines of at most `width` characters. A $ in it is no formula."""
    return textwrap.fill(text, width).replace("$", r"\$")


def log_axis(axes: Any, letter: str, low: float, high: float) -> None:
    """Give the axis "x" or "y", which shows `low` to `high`, a log scale with few ticks, such as 1, 3 and 10 M."""
    from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullLocator

    getattr(axes, f"set_{letter}scale")("log")
    axis = getattr(axes, f"{letter}axis")
    subs = (1, 2, 5) if high < 100 * low else (1, 3) if high < 1000 * low else (1,)
    even = MaxNLocator(5 if letter == "x" else 8, steps=(1, 2, 5, 10))
    axis.set_major_locator(LogLocator(subs=subs, numticks=7) if high > 4 * low else even)
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(EngFormatter())


def heat_map(figure: Any, axis: Any, values: list[list[float]], title: str, *limits: float) -> None:
    """Draw one number per layer and head, with the numbers written out if there are at most 64.

    `limits`: lowest and highest value of the color scale; by default those of `values`.
    """
    from matplotlib.ticker import MaxNLocator

    low, high = limits or (None, None)
    image = axis.imshow(values, aspect="auto", cmap="viridis", vmin=low, vmax=high)
    axis.set(xlabel="head", ylabel="layer", title=label(title))
    for one in (axis.xaxis, axis.yaxis):
        one.set_major_locator(MaxNLocator(12, integer=True, min_n_ticks=1))
    if len(values) * len(values[0]) <= 64:
        middle = (image.norm.vmin + image.norm.vmax) / 2
        for layer, heads in enumerate(values):
            for head, value in enumerate(heads):
                color = "black" if value > middle else "white"
                axis.text(head, layer, f"{value:.2f}", ha="center", va="center", color=color)
    figure.colorbar(image, ax=axis)
