"""Check what a speedrun needs before anything is spent: its options, GPUs, batch, compiler and disk. Writes nothing.

python -m scripts.preflight configs/laptop.toml
python -m scripts.preflight configs/d20.toml --train.protocol paper --chat.source huggingface
"""

import dataclasses
import sys

from gkachat.checks import ConfigError
from gkachat.config import ATTENTIONS, Config, TuningConfig, home
from scripts.cli import parse_config, run

COLUMNS = {
    "": "{run.name}", "tokens": "{train.total_tokens:,}", "tokens a step": "{train.total_batch_size:,}",
    "rows a GPU": "{rows:,}",
}  # fmt: skip
BYTES_PER_CHAR = 0.5  # of a shard, at most: two bytes a token, four or more characters a token
OTHER_BYTES = 4 * 2**30  # conversations, CORE's bundle, compiled kernels, Hugging Face's cache (it streams), results


def disk_need(configs: list[Config]) -> dict[str, float]:
    """Return the bytes that the shards and the checkpoints of all runs, tuned ones included, take at most."""
    from gkachat.model.stats import model_stats, state_bytes
    from gkachat.train.schedule import n_steps

    checkpoints = []
    for config in configs:
        run, steps = config.run, n_steps(config)
        one = state_bytes(config.model) - 4 * model_stats(config.model).params["total"]  # without gradients
        kept = run.keep_last + (steps // run.keep_every if run.keep_every else 0)
        checkpoints.append((one, one * (kept + run.keep_last)))  # the run and its tuned one
    in_writing = max(one for one, _ in checkpoints)
    return {
        "shards": BYTES_PER_CHAR * (configs[0].data.max_chars or 0),
        "checkpoints": sum(kept for _, kept in checkpoints) + in_writing,
        "everything else": OTHER_BYTES,
    }


def check_disk(configs: list[Config]) -> str:
    """Return a line about the disk space that the speedrun needs. Raises OSError if there is less."""
    from gkachat.files import free_disk

    names = [f"{config.run.name}{suffix}" for config in configs for suffix in ("", "_chat")]
    directories = {
        "shards": [home() / "tokens" / configs[0].data_name],
        "checkpoints": [home() / "runs" / name for name in names],
    }
    need, there, left = {}, 0.0, 0.0
    for what, size in disk_need(configs).items():  # shards that are there make no room for checkpoints
        files = [path for directory in directories.get(what, []) for path in directory.rglob("*") if path.is_file()]
        need[what], found = size / 2**30, sum(path.stat().st_size for path in files) / 2**30
        there, left = there + found, left + max(0, need[what] - found)
    free, existing = free_disk(home())
    parts = ", ".join(f"{size:,.1f} for {what}" for what, size in need.items())
    line = (
        f"about {sum(need.values()):,.1f} GiB ({parts}), of which {there:,.1f} are there; "
        f"{free / 2**30:,.1f} GiB are free at {existing}"
    )
    if left > free / 2**30:
        raise OSError(f"disk: {line}: free some, set GKACHAT_HOME, or lower data.max_chars or run.keep_last")
    return line


def main() -> None:
    config, _ = parse_config(sys.argv[1:], __doc__, cls=TuningConfig)
    import torch

    from gkachat.benchmark import show, table
    from gkachat.machine import check_compiler, check_installed, count_gpus, device_name
    from gkachat.train.schedule import resolve

    gpus, prefix = count_gpus(), f"{config.run.name}_" if config.run.name else f"d{config.model.depth}_"
    if gpus and config.run.compile is not False:
        check_compiler()
    for wanted, package, extra in ((config.run.wandb, "wandb", "wandb"), (config.run.fp8, "torchao", "fp8")):
        if wanted:
            check_installed(package, extra)
    configs = []
    for attention in ATTENTIONS:
        try:
            model = dataclasses.replace(config.model, attention=attention)
            named = dataclasses.replace(config.run, name=prefix + attention)
            configs.append(resolve(dataclasses.replace(config, model=model, run=named), max(1, gpus)))
        except ConfigError as error:
            raise ConfigError([f"{attention}: {error}"]) from None
    rows = [
        vars(one) | {"rows": -(-one.train.total_batch_size // one.model.sequence_len // max(1, gpus))}
        for one in configs
    ]
    print(f"GPUs: {gpus} x {device_name(torch.device('cuda', 0))}" if gpus else "GPUs: none")
    print(f"disk: {check_disk(configs)}\n")
    show(table(rows, COLUMNS))


if __name__ == "__main__":
    run(main)
