"""The files of an inspection: a table, all numbers as JSON, figures and a web page.

write_inspection(inspect_run(run_dir), directory)
"""

import json
from pathlib import Path

from gkachat.benchmark import table
from gkachat.files import write_text
from gkachat.inspection.figures import distances_figure, maps_figure, sigma_figure, statistics_figure
from gkachat.inspection.page import page
from gkachat.inspection.statistics import Inspection
from gkachat.plots import save_figure

COLUMNS = {
    "layer.head": "{name}",
    "visible": "{visible:.1f}",
    "effective": "{effective:.3f}",
    "distance": "{distance:.3f}",
    "self": "{self:.3f}",
    "unassigned": "{unassigned:.3f}",
    "sigma": "{sigma:.3f}",
    "median d²/2σ²": "{median_exponent:.3f}",
}


def markdown(inspection: Inspection) -> str:
    """Return a heading and a Markdown table with a row for each head."""
    rows = []
    for layer, n_visible in enumerate(inspection.visible):
        for head in range(len(inspection.statistics["self"][layer])):
            row = {"name": f"{layer}.{head}", "visible": n_visible, "sigma": None, "median_exponent": None}
            row |= {name: values[layer][head] for name, values in inspection.statistics.items()}
            if inspection.sigma:
                row["sigma"] = inspection.sigma[layer][head]
                row["median_exponent"] = inspection.distances[layer][head].median().item() / (2 * row["sigma"] ** 2)
            rows.append(row)
    heading = f"{inspection.run}: {inspection.attention}, step {inspection.step:,}; {inspection.source}"
    return f"{heading}\n\n{table(rows, COLUMNS)}"


def write_inspection(inspection: Inspection, directory: Path) -> list[str]:
    """Write the table, the numbers, the figures and the page; return the names of the files."""
    tree = {key: value for key, value in vars(inspection).items() if key not in ("distances", "maps")}
    tree["maps"] = {name: weights.tolist() for name, weights in inspection.maps.items()}
    texts = {
        "statistics.md": markdown(inspection),
        "statistics.json": json.dumps(tree) + "\n",
        "maps.html": page(inspection),
    }
    figures = {"statistics.png": statistics_figure, "maps.png": maps_figure}
    sigma_figures = {"sigma.png": sigma_figure, "distances.png": distances_figure}
    if inspection.sigma:
        figures |= sigma_figures
    else:  # left by an earlier inspection
        for name in sigma_figures:
            (directory / name).unlink(missing_ok=True)
    for name, text in texts.items():
        write_text(directory / name, text)
    for name, draw in figures.items():
        save_figure(draw(inspection), directory / name)
    return sorted({**texts, **figures})
