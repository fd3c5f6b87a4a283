"""Count parameters, training FLOPs and decode-cache bytes of all attentions, on the meta device.

python -m scripts.cost --depth 20
python -m scripts.cost --depth 20 --json
python -m scripts.cost --config configs/d20.toml --plan 12 16 20 24
"""

import itertools
import json
from typing import Annotated

import tyro

from gkachat.config_file import load_config
from scripts.cli import run

ASSUMED_MFU = 0.4  # for the GPU hours of a plan; not measured


def main(
    depth: int | None = None,
    config: str | None = None,
    sequence_len: int | None = None,
    vocab_size: int | None = None,
    window_pattern: str | None = None,
    as_json: Annotated[bool, tyro.conf.arg(name="json"), tyro.conf.FlagCreatePairsOff] = False,
    plan: tuple[int, ...] = (),
) -> None:
    """Print the counts of every attention at one shape, and their ratios to softmax.

    Args:
        depth: Layers; 20 unless the config says otherwise.
        config: A TOML file to take the shape from.
        sequence_len: Tokens per row.
        vocab_size: Tokens in the vocabulary.
        window_pattern: Letters S and L, one per layer.
        as_json: Print JSON instead of tables.
        plan: Depths. Print a Markdown table of what training takes at each: tokens, FLOPs, memory, hours.
    """
    given = {"depth": depth, "sequence_len": sequence_len, "vocab_size": vocab_size, "window_pattern": window_pattern}
    overrides = [f"--model.{name}={value}" for name, value in given.items() if value is not None]
    if plan:
        print(training_plan(config, overrides, plan))
        return
    from gkachat.model.stats import compare_stats  # torch takes seconds, which --help need not wait for

    shape = load_config(config, overrides).model
    counts = compare_stats(shape)
    if as_json:
        print(json.dumps(counts, indent=1))
        return
    print(
        f"depth {shape.depth}, {shape.n_embd} channels, {shape.n_head} heads of {shape.head_dim}, vocabulary "
        f"{shape.vocab_size:,}, {shape.sequence_len} tokens per row, windows {shape.window_pattern}\n"
    )
    _print_tables(counts)


def training_plan(config: str | None, overrides: list[str], depths: tuple[int, ...]) -> str:
    """Return a Markdown table of what training takes, for softmax and gka at each depth."""
    from gkachat.benchmark import table
    from gkachat.machine import peak_flops
    from gkachat.model.stats import activation_bytes, model_stats, state_bytes
    from gkachat.train.schedule import n_steps, resolve

    rows = []
    for depth, attention in itertools.product(depths, ("softmax", "gka")):
        one = resolve(load_config(config, [*overrides, f"--model.depth={depth}", f"--model.attention={attention}"]))
        stats, train = model_stats(one.model), one.train
        flops = stats.flops_per_token * train.total_tokens
        row_bytes = activation_bytes(one.model, 2) - activation_bytes(one.model, 1)
        rows.append(
            {
                "run": f"d{depth} {attention}",
                "parameters": f"{stats.params['total'] / 1e6:,.0f} M",
                "tokens": f"{train.total_tokens / 1e9:.2f} B",
                "steps of tokens": f"{n_steps(one):,} of {train.total_batch_size:,}",
                "FLOPs": f"{flops:.2e}",
                "state GiB": f"{state_bytes(one.model) / 2**30:.1f}",
                "GiB per row at most": f"{row_bytes / 2**30:.2f}",
                "GPU hours": f"{flops / (ASSUMED_MFU * peak_flops('H100')) / 3600:,.1f}",
            }
        )
    return table(rows, {"" if header == "run" else header: f"{{{header}}}" for header in rows[0]})


def _print_tables(counts: dict) -> None:
    from gkachat.model.stats import PROTOCOLS, PUBLISHED_FLOPS_RATIO, PUBLISHED_PARAMS_RATIO

    ratios = counts["ratios"]
    names = ["softmax", *ratios]

    def line(name: str, values: list[int], note: str = "") -> None:
        over = [f"{value / values[0]:10.4f}" if values[0] else " " * 10 for value in values[1:]]
        print("".join([f"{name:28}", *(f"{value:16,}" for value in values), *over, f"  {note}"]).rstrip())

    print("".join([f"{'':28}", *(f"{name:>16}" for name in names), *(f"{name:>10}" for name in ratios)]))
    groups = dict.fromkeys(group for name in names for group in counts[name]["params"])
    for group in [group for group in groups if group != "total"]:
        line(group.replace("_", " "), [counts[name]["params"].get(group, 0) for name in names])
    published = f"published at depth 20, gka: {PUBLISHED_PARAMS_RATIO}"
    line("parameters", [counts[name]["params"]["total"] for name in names], published)
    line("training FLOPs per token", [counts[name]["flops_per_token"] for name in names])
    line("decode-cache bytes per token", [counts[name]["cache_bytes_per_token"] for name in names])
    print("\nthe last columns, and the rows below, are ratios to softmax\n")
    print("".join([f"{'total training FLOPs under':28}", *(f"{name:>10}" for name in ratios)]))
    for protocol in PROTOCOLS:
        note = f"  published at depth 20, gka: {PUBLISHED_FLOPS_RATIO}" if protocol == "paper" else ""
        print(f"{protocol:28}" + "".join(f"{ratio['total_flops'][protocol]:10.4f}" for ratio in ratios.values()) + note)


if __name__ == "__main__":
    run(main, __doc__)
