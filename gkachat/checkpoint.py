"""Run directories and the checkpoints in them. Nothing is pickled.

runs/<name>/
    config.toml                        resolved
    tokenizer.json                     the run's own copy
    metrics.jsonl
    checkpoints/step_000300/
        model.safetensors              float32 weights
        optimizer.safetensors          what Muon and AdamW remember
        meta.json                      step, config, counts, hashes of all of the above

A checkpoint is written under a temporary name and renamed: a directory called step_* is complete.
"""

import dataclasses
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gkachat.config import Config, GPTConfig, home
from gkachat.config_file import build, to_toml
from gkachat.files import sha256, write_text
from gkachat.gpt import GPT
from gkachat.tokenizer import Tokenizer

MODEL, OPTIMIZER, META = "model.safetensors", "optimizer.safetensors", "meta.json"


def find_run(name: str | Path) -> Path:
    """A run directory from its path, or from its name under runs/. FileNotFoundError lists what there is."""
    runs = home() / "runs"
    for directory in (Path(name), runs / name):
        if (directory / "config.toml").exists():
            return directory
    known = sorted(path.parent.name for path in runs.glob("*/config.toml"))
    raise FileNotFoundError(f"no run {str(name)!r}; in {runs} there are: {', '.join(known) or 'none'}")


def start_run(run_dir: Path, config: Config, tokenizer: Tokenizer) -> None:
    """Write what a run needs besides its weights."""
    write_text(run_dir / "config.toml", to_toml(config))
    tokenizer.save(run_dir)


def checkpoint_steps(run_dir: Path) -> list[int]:
    """Steps that complete checkpoints exist for, ascending."""
    directories = (run_dir / "checkpoints").glob("step_*")
    return sorted(int(match[1]) for d in directories if (match := re.fullmatch(r"step_(\d+)", d.name)))


def save_checkpoint(
    run_dir: Path,
    step: int,
    model_tensors: dict[str, Tensor],
    optimizer_tensors: dict[str, Tensor],
    config: Config,
    meta: dict[str, Any],
) -> Path:
    """Write a checkpoint; on any failure the earlier ones stand and OSError says why."""
    from safetensors.torch import save_file

    directory = run_dir / "checkpoints" / f"step_{step:06d}"
    temporary = directory.with_name(f".{directory.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        for name, tensors in ((MODEL, model_tensors), (OPTIMIZER, optimizer_tensors)):
            save_file({key: t.detach().cpu().contiguous() for key, t in tensors.items()}, temporary / name)
        files = {name: sha256(temporary / name) for name in (MODEL, OPTIMIZER)}
        files["../../tokenizer.json"] = sha256(run_dir / "tokenizer.json")
        content = {"step": step, **meta, "config": dataclasses.asdict(config), "sha256": files}
        write_text(temporary / META, json.dumps(content, indent=1) + "\n")
        if directory.exists():
            shutil.rmtree(directory)
        os.replace(temporary, directory)
    except Exception as error:  # safetensors has its own type for a full disk
        raise OSError(f"cannot write checkpoint {directory}: {error}; earlier checkpoints are untouched") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return directory


def read_meta(run_dir: str | Path, step: int | None = None) -> tuple[Path, dict[str, Any]]:
    """Directory and meta of a checkpoint, by default the last. FileNotFoundError or ValueError where there is none."""
    run_dir = Path(run_dir)
    steps = checkpoint_steps(run_dir)
    if not steps or (step is not None and step not in steps):
        has = ", ".join(map(str, steps)) or "none"
        raise FileNotFoundError(
            f"{run_dir} has no checkpoint{'' if step is None else f' of step {step}'}; it has: {has}"
        )
    directory = run_dir / "checkpoints" / f"step_{steps[-1] if step is None else step:06d}"
    try:
        return directory, json.loads((directory / META).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{directory / META} cannot be read ({error}); delete {directory} to use an earlier one"
        ) from None


def load_tensors(directory: Path, name: str, meta: dict[str, Any]) -> dict[str, Tensor]:
    """Tensors of a checkpoint file after its hash was checked. Raises ValueError when it does not match."""
    from safetensors.torch import load_file

    path = directory / name
    if not path.exists() or sha256(path) != meta["sha256"][name]:
        raise ValueError(f"{path} does not match the hash in its meta.json; delete {directory} to use an earlier one")
    return load_file(path)


def load_tokenizer(run_dir: str | Path, meta: dict[str, Any]) -> Tokenizer:
    """The run's own tokenizer. Raises ValueError when it is not the one the checkpoint was trained with."""
    tokenizer = Tokenizer.load(run_dir)
    if tokenizer.sha256 != meta["sha256"]["../../tokenizer.json"]:
        raise ValueError(f"{Path(run_dir) / 'tokenizer.json'} is not the tokenizer this checkpoint was trained with")
    return tokenizer


def load_model(
    run_dir: str | Path, device: str | torch.device = "cpu", step: int | None = None
) -> tuple[GPT, Tokenizer, dict]:
    """The last checkpoint of a run (or that of `step`), ready to evaluate.

    Returns:
        model in eval mode and float32 on `device`; tokenizer; meta, what meta.json holds.

    Raises:
        FileNotFoundError: no such run or checkpoint.
        ValueError: a file that does not match its hash.
    """
    directory, meta = read_meta(run_dir, step)
    tokenizer = load_tokenizer(run_dir, meta)
    tensors = load_tensors(directory, MODEL, meta)
    config = build(GPTConfig, meta["config"]["model"])
    # What computed the operator in training may not run here, and is no part of the model.
    config = dataclasses.replace(config, gka=dataclasses.replace(config.gka, backend="auto"))
    with torch.device("meta"):  # no weights are drawn only to be overwritten
        model = GPT(config)
    model.load_state_dict(tensors, assign=True)
    model.prepare(model.compute_dtype)  # rotation tables are no weights: they are still on the meta device
    return model.to(device).eval(), tokenizer, meta
