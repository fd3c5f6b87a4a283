"""The report: a page of results/gpu/ made from the steps' JSON."""

from typing import Any

from gkachat.benchmark import table

Records = dict[str, dict[str, Any]]
"""What each step wrote, by its name."""

TITLES = {
    "kernels": "Attention kernels",
    "steps": "Training steps in turns",
    "memory": "Softmax's step at its configured rows",
    "decode": "Decoding",
    "prefill": "Scoring, as CORE does it",
    "profile": "Profiles of one step",
}


def _row(rows: list[dict[str, Any]], **wanted: Any) -> dict[str, Any]:
    """Return the first row with these values. Raises KeyError where there is none."""
    for row in rows:
        if all(row[key] == value for key, value in wanted.items()):
            return row
    raise KeyError(str(wanted))


def sublayer_speed(records: Records) -> float:
    """Return softmax's time over gka's for the attention layers of a SSSL model: three short windows and a full one."""
    rows = [row for row in records["kernels"]["rows"] if row["level"] == "sublayer"]
    total = {"softmax": 0.0, "gka": 0.0}
    for window in {row["window"] for row in rows} | {None}:
        for name in total:
            named = [row for row in rows if row["name"].startswith(f"{name} (")]
            total[name] += (1 if window is None else 3) * _row(named, window=window)["both_ms"]
    if len({row["window"] for row in rows}) < 2:
        raise KeyError("one window")
    return total["softmax"] / total["gka"]


def step_figure(records: Records, name: str, figure: str) -> float:
    return _row(records["steps"]["rows"], name=name)[figure]


def decode_speed(records: Records) -> float:
    """Return gka's speed over softmax's at the largest batch, compiled where that was measured."""
    rows = records["decode"]["rows"]
    largest = [row for row in rows if row["batch"] == max(row["batch"] for row in rows) and row["name"] == "gka"]
    return largest[-1]["speed_over_softmax"]


MARKS = (
    ("speed of GKA's layers over softmax's (SSSL)", sublayer_speed, 1.8),
    ("speed of GKA's step over softmax's", lambda records: step_figure(records, "gka", "speed_over_softmax"), 1.18),
    ("softmax's MFU", lambda records: step_figure(records, "softmax", "mfu"), 0.45),
    ("speed of GKA's decoding over softmax's, largest batch", decode_speed, 1.6),
)


def marks(records: Records) -> list[dict[str, str]]:
    """Return each mark with its figure and whether it was met, or "not measured"."""
    found = []
    for name, figure, least in MARKS:
        try:
            value = figure(records)
            shown = {"figure": f"{value:.3f}", "result": "met" if value >= least else "not met"}
        except (KeyError, IndexError, ValueError):
            shown = {"figure": "", "result": "not measured"}
        found.append({"mark": name, "at least": f"{least}", **shown})
    return found


def count_right(record: dict[str, Any]) -> str:
    """Return how many comparisons of a step were right, or ""."""
    comparisons = record.get("comparisons", [])
    return f"{sum(c['right'] for c in comparisons)} of {len(comparisons)}" if comparisons else ""


def summary_rows(records: Records) -> list[dict[str, str]]:
    """Return how each step ended."""
    return [
        {
            "step": name, "ended": record["status"], "seconds": f"{record.get('seconds', 0):.0f}",
            "right": count_right(record), "error": record.get("error", "").replace("|", "/")[:160],
        }
        for name, record in records.items()
    ]  # fmt: skip


def wrong_rows(records: Records) -> list[dict[str, str]]:
    """Return every comparison that was wrong."""
    return [
        {
            "comparison": comparison["name"],
            "error": comparison.get("raised") or f"{comparison['error']:.3g}",
            "tolerance": "" if "raised" in comparison else f"{comparison['tolerance']:.3g}",
        }
        for record in records.values()
        for comparison in record.get("comparisons", [])
        if not comparison["right"]
    ]


def page(records: Records, command: str, seconds: float) -> str:
    """Return the report as Markdown."""
    facts = next((record["facts"] for record in records.values() if "facts" in record), {})
    blocks = ["# GPU check", table(summary_rows(records))]
    compared = [record for record in records.values() if record.get("comparisons")]
    if compared:
        wrong = wrong_rows(records)
        total = sum(len(record["comparisons"]) for record in compared)
        blocks += ["## Comparisons", f"{total - len(wrong)} of {total} are within their tolerance."]
        blocks += ["These are not:", table(wrong)] if wrong else []
    for name, record in records.items():
        if "page" in record:
            blocks += [f"## {TITLES[name]}", record["page"].rstrip()]
    where = ", ".join(f"{key} {value}" for key, value in facts.items())
    blocks += ["## Marks", table(marks(records)), f"`{command}`, {seconds:.0f} s", where or "no step has run"]
    return "\n\n".join(block.strip() for block in blocks) + "\n"
