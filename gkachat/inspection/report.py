"""Looking inside a run: what its attention weighs, over val documents or a text of one's own.

inspection = inspect_run(run_dir, text="def add(a, b):")
write_inspection(inspection, directory)      # inspection.md, .json, heads.png, maps.png, maps.html

Works on whatever a layer's `look` tells. Where it has a sigma there are sigma.png and distances.png besides.
"""

import html
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gkachat.attention.fused import visible
from gkachat.attention.linear import Look
from gkachat.checkpoint import checkpoint_steps, load_model, load_weights, step_dir, tokens_dir
from gkachat.data.shards import Split
from gkachat.eval.compare import by_layer, heat_map
from gkachat.files import atomic_write, write_text
from gkachat.inspection.page import PAGE
from gkachat.tokenizer import Tokenizer
from gkachat.train.metrics import read_metrics

FIGURES = {
    "effective": "effective number of attended tokens",
    "distance": "mean attended distance, tokens",
    "self": "share of the token itself",
    "nothing": "share of no token",
}
MOST_PAIRS = 160_000  # distances kept of each head
MOST_MAPS = 12  # by default


@dataclass(frozen=True)
class Inspection:
    run: str
    attention: str
    step: int
    source: str
    """What was read."""
    figures: dict[str, list[list[float]]]
    """Of each of FIGURES, a list a layer, a number a head: means over all positions."""
    visible: list[float]
    """Tokens that a position sees, a number a layer: what `effective` comes to where all weigh the same."""
    sigma: list[list[float]]
    """Of this checkpoint, a list a layer; empty where there is none."""
    distances: list[Tensor]
    """Squared distances to earlier tokens within the window, (H, pairs) a layer; empty where there are none."""
    history: tuple[list[str], dict[int, list[list[float]]]]
    """sigma_history's."""
    tokens: list[str]
    """Of the maps."""
    maps: dict[str, Tensor]
    """LAYER.HEAD: (T, S) weights among these tokens."""


@torch.no_grad()
def inspect_run(
    run_dir: Path,
    *,
    text: str | None = None,
    step: int | None = None,
    device: str | torch.device = "cpu",
    documents: int = 8,
    tokens: int = 48,
    heads: tuple[str, ...] = (),
) -> Inspection:
    """Run a model over a text, by default the first val documents, and look at every layer's weights.

    Args:
        documents: so many, of val.
        tokens: of the first text, that the maps show.
        heads: LAYER.HEAD, counted from 0, that maps are made of; by default up to MOST_MAPS, evenly spaced.

    Raises FileNotFoundError for no such run, ValueError for a text without two tokens or a head that does not exist.
    """
    if documents < 1 or tokens < 2:
        raise ValueError(f"given {documents} documents and maps of {tokens} tokens, expected 1 and 2 at least")
    model, tokenizer, meta = load_model(run_dir, device, step)
    config = model.config
    chosen = _chosen(heads, config.depth, config.n_head)
    texts, source = _texts(text, tokenizer, meta, documents, config.sequence_len)
    sums, maps = torch.zeros(len(FIGURES), 2, config.depth, config.n_head, dtype=torch.float64), {}
    seen, pairs = torch.zeros(config.depth), [[] for _ in model.blocks]
    random = torch.Generator().manual_seed(0)

    def watch(layer: int, look: Look, window: int | None) -> None:
        weights = look.weights[0].cpu()
        found, T = figures(weights), weights.size(-1)
        for at, name in enumerate(FIGURES):  # positions that weigh no token have no number of them
            sums[at, 0, layer] += found[name].nansum(dim=-1)
            sums[at, 1, layer] += found[name].isfinite().sum(dim=-1)
        seen[layer] += visible(T, window).sum()
        if look.distances is not None:
            earlier = look.distances[0].cpu()[:, visible(T, window, include_self=False)]
            few = max(1, MOST_PAIRS // len(texts))
            if earlier.size(1) > few:
                earlier = earlier[:, torch.randint(earlier.size(1), (few,), generator=random)]
            pairs[layer].append(earlier)
        for name, (at, head) in chosen.items():
            if at == layer and name not in maps:
                maps[name] = weights[head, :tokens, :tokens].clone()

    for layer, block in enumerate(model.blocks):

        def before(attention: Any, given: tuple, layer: int = layer) -> None:
            watch(layer, attention.look(*given[:3]), attention.window)

        block.attn.register_forward_pre_hook(before)
    for ids in texts:
        model(torch.tensor([ids], device=device))
    means = (sums[:, 0] / sums[:, 1].clamp(min=1)).tolist()
    sigma = [block.attn.sigma.tolist() for block in model.blocks if hasattr(block.attn, "sigma")]
    return Inspection(
        run=run_dir.resolve().name,
        attention=config.attention,
        step=meta["step"],
        source=source,
        figures=dict(zip(FIGURES, means, strict=True)),
        visible=(seen / sum(map(len, texts))).tolist(),
        sigma=sigma,
        distances=[torch.cat(layer, dim=1) for layer in pairs if layer],
        history=sigma_history(run_dir) if sigma else ([], {}),
        tokens=[tokenizer.decode_bytes([id]).decode(errors="backslashreplace") for id in texts[0][:tokens]],
        maps={name: maps[name] for name in chosen},
    )


def figures(weights: Tensor) -> dict[str, Tensor]:
    """FIGURES of a text's weights (H, T, S), each (H, T).

    The first two are of the weights divided by their sum, and NaN where that is 0: exp of the entropy in nats, and
    the mean of i - j.
    """
    total = weights.sum(dim=-1)
    shares = weights / total[..., None]
    at = torch.arange(weights.size(-1))
    return {
        "effective": torch.where(total > 0, -torch.xlogy(shares, shares).sum(dim=-1), math.nan).exp(),
        "distance": (shares * (at[:, None] - at)).sum(dim=-1),
        "self": weights.diagonal(dim1=-2, dim2=-1),
        "nothing": (1 - total).clamp(min=0),
    }


def _chosen(heads: tuple[str, ...], depth: int, n_head: int) -> dict[str, tuple[int, int]]:
    every = {f"{layer}.{head}": (layer, head) for layer in range(depth) for head in range(n_head)}
    if unknown := [head for head in heads if head not in every]:
        raise ValueError(
            f"heads: given {unknown[0]!r}, expected LAYER.HEAD with a layer from 0 to {depth - 1} and a head from 0 to "
            f"{n_head - 1}"
        )
    names = list(every)
    return {name: every[name] for name in heads or names[:: -(-len(names) // MOST_MAPS)]}


def _texts(
    text: str | None, tokenizer: Tokenizer, meta: dict[str, Any], documents: int, longest: int
) -> tuple[list[list[int]], str]:
    """What is read, each text with BOS and cut to the context, and what it is in words."""
    if text is not None:
        ids = tokenizer.encode(text)
        texts, source = [ids], f"a text of {len(ids):,} tokens"
    else:
        val = ((shard, at) for shard in Split(tokens_dir(meta), "val", tokenizer) for at in range(len(shard.length)))
        read = (shard.tokens[shard.start[at] :][: min(shard.length[at], longest)].tolist() for shard, at in val)
        texts = [ids for ids, _ in zip(read, range(documents), strict=False)]
        source = f"{len(texts)} val documents"
    texts = [[tokenizer.bos, *ids][:longest] for ids in texts if ids]
    if not texts:
        raise ValueError("the text is empty, expected one token at least")
    return texts, f"{source}, {sum(map(len, texts)):,} tokens read with BOS, {longest:,} of each at most"


def sigma_history(run_dir: Path) -> tuple[list[str], dict[int, list[list[float]]]]:
    """What a layer's numbers are, and at each step a list a layer; none where there is no sigma.

    Every head's, from metrics.jsonl, or where it has none from checkpoints. Runs of before logged three numbers.
    """
    records = read_metrics(run_dir) if (run_dir / "metrics.jsonl").exists() else []
    three = {record["step"]: record["sigma"] for record in records if "sigma" in record}
    by_head = {record["step"]: record["sigma_by_head"] for record in records if "sigma_by_head" in record}
    if not three:
        read = {step: by_layer(load_weights(step_dir(run_dir, step))) for step in checkpoint_steps(run_dir)}
        by_head = {step: sigma for step, sigma in read.items() if sigma}
    if by_head:
        return [f"head {head}" for head in range(len(next(iter(by_head.values()))[0]))], by_head
    return ["least", "median", "largest"], three


def markdown(inspection: Inspection) -> str:
    """The table: a row a head."""
    shown = {"layer.head": [], "visible": [], "effective": [], "distance": [], "self": []}
    if _is_told(inspection, "nothing"):
        shown["nothing"] = []
    if inspection.sigma:
        shown |= {"sigma": [], "median d²/2σ²": []}
    for layer, heads in enumerate(inspection.figures["effective"]):
        for head in range(len(heads)):
            row = {name: f"{values[layer][head]:.3f}" for name, values in inspection.figures.items()}
            row |= {"layer.head": f"{layer}.{head}", "visible": f"{inspection.visible[layer]:.1f}"}
            if inspection.sigma:
                sigma = inspection.sigma[layer][head]
                median = inspection.distances[layer][head].median().item() / (2 * sigma**2)
                row |= {"sigma": f"{sigma:.3f}", "median d²/2σ²": f"{median:.3f}"}
            for name, column in shown.items():
                column.append(row[name])
    lines = [" | ".join(shown), " | ".join("---:" for _ in shown), *map(" | ".join, zip(*shown.values(), strict=True))]
    table = "".join(f"| {line} |\n" for line in lines)
    return f"{inspection.run}: {inspection.attention}, step {inspection.step:,}; {inspection.source}\n\n{table}"


def _is_told(inspection: Inspection, figure: str) -> bool:
    """A share of no token is worth telling where there is one."""
    return figure != "nothing" or max(map(max, inspection.figures[figure])) > 1e-6


def write_inspection(inspection: Inspection, directory: Path) -> list[str]:
    """Write what there is to see; the names of the files."""
    tree = {key: value for key, value in vars(inspection).items() if key not in ("distances", "maps")}
    tree["maps"] = {name: weights.tolist() for name, weights in inspection.maps.items()}
    texts = {
        "inspection.md": markdown(inspection),
        "inspection.json": json.dumps(tree) + "\n",
        "maps.html": page(inspection),
    }
    pictures = {"heads.png": draw_heads, "maps.png": draw_maps}
    if inspection.sigma:
        pictures |= {"sigma.png": draw_sigma, "distances.png": draw_distances}
    for name, text in texts.items():
        write_text(directory / name, text)
    for name, draw in pictures.items():
        with atomic_write(directory / name) as file:
            draw(inspection).savefig(file, format="png", dpi=120)
    for name in {"sigma.png", "distances.png"} - pictures.keys():  # of another run that was looked at before
        (directory / name).unlink(missing_ok=True)
    return sorted({**texts, **pictures})


def page(inspection: Inspection) -> str:
    """The maps as one HTML page that asks nothing of any network."""
    title = f"{inspection.run}, step {inspection.step:,}: {inspection.attention}"
    rows = {
        name: [[round(weight, 4) for weight in row[: at + 1]] for at, row in enumerate(weights.tolist())]
        for name, weights in inspection.maps.items()
    }
    data = json.dumps({"tokens": inspection.tokens, "heads": rows}).replace("<", "\\u003c")  # no text ends the script
    return PAGE.replace("TITLE", html.escape(title)).replace("DATA", data)


def _figure(panels: int, width: float, height: float, columns: int = 4) -> tuple[Any, list[Any]]:
    """A figure with so many axes in a grid, each of that size in inches."""
    from matplotlib.figure import Figure

    columns = min(columns, panels)
    rows = -(-panels // columns)
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes[panels:]:
        axis.remove()
    return figure, axes[:panels]


def _titled(figure: Any, inspection: Inspection, what: str) -> Any:
    figure.suptitle(f"{inspection.run} ({inspection.attention}), step {inspection.step:,}: {what}", parse_math=False)
    return figure


def draw_heads(inspection: Inspection) -> Any:
    """FIGURES as heat maps, on scales that are the same for all runs on the same texts and windows.

    But for shares above 0.1: their scale goes to the largest.
    """
    shown = {name: values for name, values in inspection.figures.items() if _is_told(inspection, name)}
    depth, n_head = len(inspection.visible), len(inspection.figures["self"][0])
    figure, axes = _figure(len(shown), max(4.4, 1 + 0.35 * n_head), max(3.6, 1 + 0.3 * depth))
    limits = {"effective": (1, max(inspection.visible)), "distance": (0, max(inspection.visible))}
    for axis, (name, values) in zip(axes, shown.items(), strict=True):
        heat_map(figure, axis, values, FIGURES[name], *limits.get(name, (0, max(0.1, *map(max, values)))))
    return _titled(figure, inspection, "heads")


def draw_maps(inspection: Inspection) -> Any:
    """The weights of the chosen heads: a row what a token looks at, on one scale from 0 to 1."""
    from matplotlib.colors import PowerNorm

    n = len(inspection.tokens)
    figure, axes = _figure(len(inspection.maps), 1.2 + 0.085 * n, 0.9 + 0.085 * n, columns=3)
    labels = [_label(token) for token in inspection.tokens]
    for axis, (name, weights) in zip(axes, inspection.maps.items(), strict=True):
        weights = weights.masked_fill(~visible(n, None), math.nan).numpy()
        image = axis.imshow(weights, cmap="viridis", norm=PowerNorm(0.5, 0, 1))
        axis.set_title(f"layer {name.replace('.', ', head ')}")
        axis.set_xticks(range(n), labels, rotation=90, fontsize=5, family="monospace", parse_math=False)
        axis.set_yticks(range(n), labels, fontsize=5, family="monospace", parse_math=False)
        axis.tick_params(length=0, pad=1)
    figure.colorbar(image, ax=axes, shrink=0.5, label="weight (root scale)")
    return _titled(figure, inspection, "weight of each token (across) for each token (down)")


def _label(token: str) -> str:
    """A token on an axis: visible, short, in letters that every font has."""
    shown = token.replace("\n", "\\n").replace("\t", "\\t").replace(" ", "·")
    plain = "".join(c if c == "·" or (c.isascii() and c.isprintable()) else f"\\u{ord(c):x}" for c in shown)
    return plain if len(plain) <= 10 else plain[:9] + "…"


def draw_sigma(inspection: Inspection) -> Any:
    """Bandwidths over training: curves, a color a layer, and a heat map."""
    from matplotlib import colormaps

    labels, history = inspection.history
    steps, depth, few = list(history), len(inspection.sigma), -(-len(labels) * len(inspection.sigma) // 70)
    names = [f"{layer}, {label}" for layer in range(depth) for label in labels]
    rows = [[history[step][at // len(labels)][at % len(labels)] for step in steps] for at in range(len(names))]
    figure, (curves, chart) = _figure(2, 6.5, min(12, max(4.2, 0.8 + 0.16 * len(rows))))
    for at, values in enumerate(rows):
        layer, i = divmod(at, len(labels))
        color = colormaps["viridis"](0.9 * layer / max(1, depth - 1))
        curves.plot(steps, values, ("-", "--", ":", "-.")[i % 4], color=color, label=None if i else f"layer {layer}")
    curves.set(xlabel="step", ylabel="sigma", title=f"{labels[0]} to {labels[-1]} of each layer")
    curves.grid(alpha=0.3)
    curves.legend(fontsize=7, ncols=-(-depth // 10))
    image = chart.imshow(rows, aspect="auto", cmap="viridis", interpolation="nearest")
    every = -(-len(steps) // 8)
    chart.set_xticks(range(0, len(steps), every), steps[::every])
    chart.set_yticks(range(0, len(rows), few), names[::few], fontsize=7)
    chart.set(xlabel="step", title="sigma of each layer")
    figure.colorbar(image, ax=chart)
    return _titled(figure, inspection, "bandwidths over training")


def draw_distances(inspection: Inspection) -> Any:
    """How the squared distances of a layer's heads are spread; dashed where a pair weighs 1/e of a token's own."""
    figure, axes = _figure(len(inspection.sigma), 4.2, 3.0)
    for layer, (axis, distances, sigma) in enumerate(zip(axes, inspection.distances, inspection.sigma, strict=True)):
        marks = [math.log10(2 * value**2) for value in sigma]
        # Equal tokens are at distance 0 or near it: they go to the first bin.
        logs = distances.clamp(min=max(1e-9, distances.median().item() / 100)).log10()
        bins = torch.linspace(min(logs.min().item(), *marks) - 0.05, max(logs.max().item(), *marks) + 0.05, 81)
        for head, value in enumerate(sigma):
            color = f"C{head % 10}"
            counts = torch.histogram(logs[head].contiguous(), bins)[0] / distances.size(1)
            axis.stairs(counts.numpy(), (10**bins).numpy(), color=color, label=f"head {head}")
            axis.axvline(2 * value**2, color=color, linestyle="--", linewidth=1)
        axis.set(xscale="log", title=f"layer {layer}", xlabel="squared distance", ylabel="share of pairs")
        if len(sigma) <= 10:
            axis.legend(fontsize=7)
    return _titled(figure, inspection, "squared distances to earlier tokens; dashed: 2 sigma squared")
