"""Run directories and the checkpoints in them. Nothing is pickled.

runs/<name>/
    config.toml                        resolved
    tokenizer.json                     the run's own copy
    metrics.jsonl
    checkpoints/step_000300/
        model.safetensors              float32 weights: all that it takes to share the model
        optimizer_0-of-2.safetensors   what Muon and AdamW remember, a part for each process
        meta.json                      step, config, counts, the code's version, hashes of all of the above

A checkpoint is written under a temporary name, flushed to disk and renamed: a directory called step_* is complete.
"""

import dataclasses
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gkachat.config import Config, ConfigError, DataConfig, GPTConfig, TokenizerConfig, home
from gkachat.config_file import from_dict, to_toml
from gkachat.files import flush, read_json, sha256, write_text
from gkachat.machine import commit
from gkachat.model.gpt import GPT
from gkachat.tokenizer import Tokenizer

MODEL, META, CHECKPOINTS = "model.safetensors", "meta.json", "checkpoints"
FIELDS = {"step": int, "config": dict, "sha256": dict, "tokenizer_sha256": str, "world_size": int}


def find_run(name: str | Path) -> Path:
    """A run directory from its path, or from its name under runs/. FileNotFoundError lists what there is."""
    runs = home() / "runs"
    for directory in (Path(name), runs / name):
        if (directory / "config.toml").exists():
            return directory
    known = sorted(path.parent.name for path in runs.glob("*/config.toml"))
    raise FileNotFoundError(f"no run {str(name)!r}; in {runs} there are: {', '.join(known) or 'none'}")


def start_run(run_dir: Path, config: Config, tokenizer: Tokenizer | None) -> None:
    """Write what a run needs besides its weights; the tokenizer only where there is text."""
    (run_dir / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
    if tokenizer is not None:
        tokenizer.save(run_dir)
    write_text(run_dir / "config.toml", to_toml(config))  # last: from now on it is a run


def step_dir(run_dir: str | Path, step: int) -> Path:
    return Path(run_dir) / CHECKPOINTS / f"step_{step:06d}"


def checkpoint_steps(run_dir: str | Path) -> list[int]:
    """Steps that complete checkpoints exist for, ascending."""
    directories = (Path(run_dir) / CHECKPOINTS).glob("step_*")
    return sorted(int(match[1]) for d in directories if (match := re.fullmatch(r"step_(\d+)", d.name)))


class Saver:
    """Writes a run's checkpoints off the training thread, one at a time, and removes those no longer wanted.

    Every process writes its part; the main one waits for all of them, in a directory that all must see.
    """

    def __init__(
        self,
        run_dir: Path,
        config: Config,
        tokenizer: Tokenizer | None,
        report: Callable[[str], None],
        rank: int = 0,
        world_size: int = 1,
    ):
        self.run_dir, self.config, self.tokenizer, self.report = run_dir, config, tokenizer, report
        self.rank, self.world_size = rank, world_size
        self.version = commit()  # of the code that runs, whatever is edited meanwhile
        self.thread: threading.Thread | None = None
        self.error: OSError | None = None
        self.step = -1  # of the last one that was begun
        self.copies: dict[str, Tensor] = {}
        if rank == 0:  # what a killed process was writing or removing
            for leftover in (run_dir / CHECKPOINTS).glob(".*.tmp"):
                shutil.rmtree(leftover, ignore_errors=True)

    def save(self, step: int, model: dict[str, Tensor], optimizer: dict[str, Tensor], meta: dict[str, Any]) -> None:
        """Copy the tensors and begin to write them. Waits for the checkpoint before to be written.

        A failure is reported, leaves earlier checkpoints alone, and is raised by `finish` unless a later one succeeds.
        """
        if step == self.step and self.error is None:
            return
        self.wait()
        self.step, self.error = step, None
        model, optimizer = self._copied(model if self.rank == 0 else {}), self._copied(optimizer)
        self.thread = threading.Thread(target=self._write, args=(step, model, optimizer, meta))
        self.thread.start()

    def _copied(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """In main memory, the same each time: fresh memory takes several times as long to fill."""
        for name, t in tensors.items():
            if name not in self.copies:
                self.copies[name] = torch.empty_like(t, device="cpu", pin_memory=t.is_cuda)
            self.copies[name].copy_(t.detach())
        return {name: self.copies[name] for name in tensors}

    def wait(self) -> None:
        """Until nothing is being written."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None

    def finish(self) -> None:
        """Wait, and raise OSError if the last checkpoint could not be written."""
        self.wait()
        if self.error is not None:
            raise self.error

    def _write(self, step: int, model: dict[str, Tensor], optimizer: dict[str, Tensor], meta: dict[str, Any]) -> None:
        directory = step_dir(self.run_dir, step)
        temporary = directory.with_name(f".{directory.name}.tmp")
        part = _part(self.rank, self.world_size)
        try:
            temporary.mkdir(exist_ok=True)
            digests = {part: _write_tensors(temporary / part, optimizer)}
            if self.rank:
                write_text(temporary / f"{part}.sha256", digests[part])
                return
            digests[MODEL] = _write_tensors(temporary / MODEL, model)
            for rank in range(1, self.world_size):
                digests[_part(rank, self.world_size)] = self._others(temporary, rank)
            content = {
                "step": step,
                "world_size": self.world_size,
                "version": self.version,
                "torch": torch.__version__,
                **meta,
                "config": dataclasses.asdict(self.config),
                "tokenizer_sha256": self.tokenizer.sha256 if self.tokenizer else "",
                "sha256": digests,
            }
            write_text(temporary / META, json.dumps(content, indent=1) + "\n")
            if directory.exists():  # damaged, or the run would have gone on from there
                remove(directory)
            os.replace(temporary, directory)
            flush(directory.parent)
            self.report(f"step {step:6d} | saved {directory}")
            self._rotate()
        except Exception as error:  # safetensors has its own type for a full disk
            shutil.rmtree(temporary, ignore_errors=True)
            self.error = OSError(f"cannot write checkpoint {directory}: {error}; earlier checkpoints are untouched")
            self.report(f"step {step:6d} | {self.error}")

    def _others(self, temporary: Path, rank: int) -> str:
        """The hash of another process's part, once that is written."""
        told = temporary / f"{_part(rank, self.world_size)}.sha256"
        since, patience = time.monotonic(), min(60.0, self.config.run.timeout)
        while not told.exists():
            if time.monotonic() - since > patience:
                raise TimeoutError(f"no {told.name} after {patience:.0f} s; do all processes see the same directory?")
            time.sleep(0.02)
        digest = told.read_text()
        told.unlink()
        return digest

    def _rotate(self) -> None:
        run = self.config.run
        for step in checkpoint_steps(self.run_dir)[: -run.keep_last]:
            if step != self.step and not (run.keep_every and step % run.keep_every == 0):
                remove(step_dir(self.run_dir, step))


def _part(rank: int, size: int) -> str:
    return f"optimizer_{rank}-of-{size}.safetensors"


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> str:
    """Write them to disk; the file's hash."""
    from safetensors.torch import save_file

    save_file({name: t.contiguous() for name, t in tensors.items()}, path)
    flush(path)
    return sha256(path)


def remove(directory: Path) -> None:
    """Delete a checkpoint so that at no moment a part of it has its name."""
    gone = directory.with_name(f".{directory.name}.gone.tmp")
    os.replace(directory, gone)
    shutil.rmtree(gone, ignore_errors=True)


def verify(directory: Path, *names: str) -> dict[str, Any]:
    """What a checkpoint's meta.json holds, after its files (or only those named) were compared with their hashes.

    Raises ValueError that says what is wrong with it.
    """
    meta = read_json(directory / META, **FIELDS)
    size = meta["world_size"]
    expected = {MODEL, *(_part(rank, size) for rank in range(min(size, 2**16)))}
    if meta["sha256"].keys() != expected:
        raise ValueError(f"{directory / META}: expected hashes of {', '.join(sorted(expected))}")
    for name in names or expected:
        path = directory / name
        if not path.is_file() or sha256(path) != meta["sha256"][name]:
            raise ValueError(f"{path} does not match the hash in its meta.json")
    return meta


def newest_sound(run_dir: Path, report: Callable[[str], None]) -> int:
    """Step of the newest checkpoint that verifies, or -1; says which were passed over, and sets these aside."""
    for step in reversed(checkpoint_steps(run_dir)):
        directory = step_dir(run_dir, step)
        try:
            verify(directory)
            return step
        except ValueError as error:
            aside = directory.with_name(f"damaged_{directory.name}")
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(directory, aside)
            report(f"passed over {directory.name}, which is now {aside.name}: {error}")
    return -1


def open_checkpoint(run_dir: str | Path, step: int | None = None, *names: str) -> tuple[Path, dict[str, Any]]:
    """Directory and meta of a checkpoint, by default the last; with `names`, after these files were verified.

    Raises FileNotFoundError where there is none, ValueError where it is damaged.
    """
    steps = checkpoint_steps(run_dir)
    if not steps or (step is not None and step not in steps):
        has = ", ".join(map(str, steps)) or "none"
        raise FileNotFoundError(
            f"{run_dir} has no checkpoint{'' if step is None else f' of step {step}'}; it has: {has}"
        )
    directory = step_dir(run_dir, steps[-1] if step is None else step)
    try:
        return directory, verify(directory, *names) if names else read_json(directory / META, **FIELDS)
    except ValueError as error:
        raise ValueError(f"{error}; delete {directory} to use an earlier one") from None


def load_weights(directory: Path) -> dict[str, Tensor]:
    """Raises ValueError for a file that is not what it should be, or numbers that are not finite."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(directory / MODEL)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{directory / MODEL} cannot be read ({error})") from None
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32 or not torch.isfinite(tensor).all():
            raise ValueError(f"{directory / MODEL}: {name} is {tensor.dtype}, expected finite float32")
    return tensors


def load_optimizer(directory: Path, world_size: int) -> Iterator[tuple[str, Tensor]]:
    """What was remembered, tensor by tensor, put together from the parts of a world of that size."""
    from safetensors import SafetensorError, safe_open

    try:
        with ExitStack() as stack:
            files = [directory / _part(rank, world_size) for rank in range(world_size)]
            parts = [stack.enter_context(safe_open(file, "pt")) for file in files]
            for name in dict.fromkeys(name for part in parts for name in part.keys()):  # noqa: SIM118 (no mapping)
                found = [part.get_tensor(name) for part in parts if name in part.keys()]  # noqa: SIM118
                yield name, found[0] if len(found) == 1 else torch.cat(found)  # rows were shared out in order
    except (SafetensorError, OSError) as error:
        raise ValueError(f"what the optimizers remember in {directory} cannot be read ({error})") from None


def load_tokenizer(run_dir: str | Path, meta: dict[str, Any]) -> Tokenizer:
    """The run's own tokenizer. Raises ValueError when it is not the one the checkpoint was trained with."""
    if not meta["tokenizer_sha256"]:
        raise ValueError(f"{run_dir}: given an image model, which has no tokenizer, expected a language model")
    tokenizer = Tokenizer.load(run_dir)
    if tokenizer.sha256 != meta["tokenizer_sha256"]:
        raise ValueError(f"{Path(run_dir) / 'tokenizer.json'} is not the tokenizer this checkpoint was trained with")
    return tokenizer


def model_config(meta: dict[str, Any], Config: type = GPTConfig) -> Any:
    """The shape in a checkpoint's meta. Raises ValueError where there is none."""
    try:
        config = from_dict(Config, meta["config"].get("model"))
    except ConfigError as error:
        raise ValueError(f"{META}: config.model: {error}") from None
    # What computed the operator in training may not run here, and is no part of the model.
    return dataclasses.replace(config, gka=dataclasses.replace(config.gka, backend="auto"))


def tokens_dir(meta: dict[str, Any]) -> Path:
    """Where the corpus is that a checkpoint was trained on."""
    stored = meta["config"]
    sections = {
        "data": from_dict(DataConfig, stored["data"]),
        "tokenizer": from_dict(TokenizerConfig, stored["tokenizer"]),
    }
    return home() / "tokens" / Config(**sections).data_name


def load_model(
    run_dir: str | Path, device: str | torch.device = "cpu", step: int | None = None
) -> tuple[GPT, Tokenizer, dict]:
    """The last checkpoint of a run (or that of `step`), ready to evaluate.

    Returns:
        model in eval mode and float32 on `device`; tokenizer; meta, what meta.json holds.

    Raises:
        FileNotFoundError: no such run or checkpoint.
        ValueError: a file that does not match its hash, or holds something else than a model of that shape.
    """
    directory, meta = open_checkpoint(run_dir, step, MODEL)
    tokenizer = load_tokenizer(run_dir, meta)
    return built(directory, meta, device), tokenizer, meta


def built(
    directory: Path, meta: dict[str, Any], device: str | torch.device, Config: type = GPTConfig, Model: type = GPT
) -> Any:
    """The model of a checkpoint, as `load_model` gives it; with Config and Model, one of another kind."""
    tensors, config = load_weights(directory), model_config(meta, Config)
    if config.depth > len(tensors):  # nobody waits for a million layers to be built before they are missed
        raise ValueError(f"{directory}: given {len(tensors)} tensors, expected those of {config.depth} layers")
    try:
        with torch.device("meta"):  # no weights are drawn only to be overwritten
            model = Model(config)
        model.load_state_dict(tensors, assign=True)
    except (RuntimeError, OverflowError) as error:
        raise ValueError(f"{directory / MODEL} is not of the shape in its meta.json: {error}") from None
    model.prepare(model.compute_dtype)  # rotation tables are no weights: they are still on the meta device
    return model.to(device).eval()
