"""Count parameters, training FLOPs and decode-cache bytes of both attentions, on the meta device.

python -m scripts.cost --depth 20
python -m scripts.cost --depth 20 --json
"""

import json
from typing import Annotated

import tyro

from gkachat.config import GPTConfig, load_config
from gkachat.cost import PUBLISHED_FLOPS_RATIO, PUBLISHED_PARAMS_RATIO, compare_accounts
from scripts.cli import run


def main(
    depth: int | None = None,
    config: str | None = None,
    sequence_len: int | None = None,
    vocab_size: int | None = None,
    window_pattern: str | None = None,
    as_json: Annotated[bool, tyro.conf.arg(name="json"), tyro.conf.FlagCreatePairsOff] = False,
) -> None:
    """Print the accounts.

    Args:
        depth: Layers; 20 unless a config says otherwise.
        config: A TOML file to take the shape from.
        sequence_len: Tokens a row.
        vocab_size: Tokens in the vocabulary.
        window_pattern: Letters S and L, one a layer.
        as_json: Print JSON instead of tables.
    """
    given = {"depth": depth, "sequence_len": sequence_len, "vocab_size": vocab_size, "window_pattern": window_pattern}
    overrides = [f"--model.{name}={value}" for name, value in given.items() if value is not None]
    shape: GPTConfig = load_config(config, overrides).model
    counted = compare_accounts(shape)
    if as_json:
        print(json.dumps(counted, indent=1))
        return
    print(
        f"depth {shape.depth}, {shape.n_embd} channels, {shape.n_head} heads of {shape.head_dim}, vocabulary "
        f"{shape.vocab_size:,}, {shape.sequence_len} tokens a row, windows {shape.window_pattern}\n"
    )
    _print_tables(counted)


def _print_tables(counted: dict) -> None:
    softmax, gka, ratio = counted["softmax"], counted["gka"], counted["ratio"]

    def line(name: str, a: int, b: int, note: str = "") -> None:
        print(f"{name:28} {a:16,} {b:16,} {f'{b / a:8.4f}' if a else '':>8}  {note}".rstrip())

    print(f"{'':28} {'softmax':>16} {'gka':>16} {'ratio':>8}")
    groups = list(dict.fromkeys([*softmax["params"], *gka["params"]]))
    for group in [g for g in groups if g != "total"]:
        line(group.replace("_", " "), softmax["params"].get(group, 0), gka["params"].get(group, 0))
    total = softmax["params"]["total"], gka["params"]["total"]
    line("parameters", *total, f"published at depth 20: {PUBLISHED_PARAMS_RATIO}")
    line("training FLOPs a token", softmax["flops_per_token"], gka["flops_per_token"])
    line("decode cache, bytes a token", softmax["cache_bytes_per_token"], gka["cache_bytes_per_token"])
    print("\ntotal training FLOPs, gka over softmax, by protocol")
    for protocol, value in ratio["total_flops"].items():
        note = f"  published at depth 20: {PUBLISHED_FLOPS_RATIO}" if protocol == "paper" else ""
        print(f"  {protocol:14} {value:.4f}{note}")


if __name__ == "__main__":
    run(lambda: tyro.cli(main, description=__doc__))
