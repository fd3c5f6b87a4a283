"""Count parameters, training FLOPs, decode-cache bytes and tokens a step of all attentions, on the meta device.

python -m scripts.cost --depth 20
python -m scripts.cost --depth 20 --json
python -m scripts.cost --config configs/d20.toml --plan 12 16 20 24
"""

import dataclasses
import itertools
import json
from typing import Annotated, Any

import tyro

from gkachat.config import ATTENTIONS, Config
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
    from gkachat.benchmark import show

    if plan:
        show(training_plan(config, overrides, plan))
        return
    from gkachat.model.stats import compare_stats

    loaded = load_config(config, overrides)
    shape = loaded.model
    counts = compare_stats(shape)
    if as_json:
        print(json.dumps(counts, indent=1))
        return
    print(
        f"depth {shape.depth}, {shape.n_embd} channels, {shape.n_head} heads of {shape.head_dim}, vocabulary "
        f"{shape.vocab_size:,}, {shape.sequence_len} tokens per row, windows {shape.window_pattern}\n"
    )
    show(f"{count_tables(counts)}\n\n{batch_table(loaded)}")


def batch_table(config: Config) -> str:
    """Return a Markdown table of the tokens a step of every attention, under each protocol.

    The batch follows from the token budget, which the protocol sets, unless the config gives it.
    """
    from gkachat.benchmark import table
    from gkachat.model.stats import PROTOCOLS
    from gkachat.train.schedule import resolve

    def tokens_per_step(attention: str, protocol: str) -> int:
        model = config.model.with_attention(attention)
        train = dataclasses.replace(config.train, protocol=protocol)
        return resolve(dataclasses.replace(config, model=model, train=train)).train.total_batch_size

    return table(
        [
            {"tokens a step": protocol, **{name: f"{tokens_per_step(name, protocol):,}" for name in ATTENTIONS}}
            for protocol in PROTOCOLS
        ]
    )


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
                "": f"d{depth} {attention}",
                "parameters": f"{stats.params['total'] / 1e6:,.0f} M",
                "tokens": f"{train.total_tokens / 1e9:.2f} B",
                "steps of tokens": f"{n_steps(one):,} of {train.total_batch_size:,}",
                "FLOPs": f"{flops:.2e}",
                "state GiB": f"{state_bytes(one.model) / 2**30:.1f}",
                "GiB per row at most": f"{row_bytes / 2**30:.2f}",
                "GPU hours": f"{flops / (ASSUMED_MFU * peak_flops('H100')) / 3600:,.1f}",
            }
        )
    return table(rows)


def count_tables(counts: dict[str, Any]) -> str:
    """Return two Markdown tables of `compare_stats`: counts, and total FLOPs under each protocol over softmax's."""
    from gkachat.benchmark import table
    from gkachat.model.stats import PROTOCOLS, PUBLISHED_FLOPS_RATIO, PUBLISHED_PARAMS_RATIO

    ratios = counts["ratios"]
    names = ["softmax", *ratios]
    groups = dict.fromkeys(group for name in names for group in counts[name]["params"])
    values = {group: [counts[name]["params"].get(group, 0) for name in names] for group in [*groups][1:]}
    values["parameters"] = [counts[name]["params"]["total"] for name in names]
    values |= {key: [counts[name][key] for name in names] for key in ("flops_per_token", "cache_bytes_per_token")}
    rows = []
    for what, (softmax, *others) in values.items():
        row = {"": what.replace("_", " "), "softmax": f"{softmax:,}"}
        row |= {name: f"{value:,}" for name, value in zip(ratios, others, strict=True)}
        over = [f"{value / softmax:.4f}" if softmax else "" for value in others]
        rows.append(row | {f"{name} over softmax": ratio for name, ratio in zip(ratios, over, strict=True)})
    totals = [
        {
            "total FLOPs over softmax": protocol,
            **{name: f"{ratios[name]['total_flops'][protocol]:.4f}" for name in ratios},
        }
        for protocol in PROTOCOLS
    ]
    published = f"{PUBLISHED_PARAMS_RATIO} of the parameters and {PUBLISHED_FLOPS_RATIO} of the total FLOPs"
    return f"{table(rows)}\n{table(totals)}\nPublished for gka at depth 20: {published}."


if __name__ == "__main__":
    run(main, __doc__)
