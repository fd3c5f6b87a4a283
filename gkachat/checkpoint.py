"""Run directories and the checkpoints in them. Nothing is pickled.

    model, tokenizer, meta = load_model("runs/d4_gka")

runs/<name>/
    config.toml                        resolved
    tokenizer.json                     the run's own copy
    metrics.jsonl
    checkpoints/step_000300/
        model.safetensors              float32 weights: the only file needed to share the model
        optimizer_0-of-2.safetensors   optimizer state, one part for each rank
        meta.json                      format, step, config, counts, the code's version, hashes of the other files

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
from typing import Any, TypeVar

import torch
from torch import Tensor

from gkachat.checks import ConfigError
from gkachat.config import Config, DataConfig, GPTConfig, TokenizerConfig, TuningConfig, home
from gkachat.config_file import from_dict, kind_of, load_config, read_toml, to_toml
from gkachat.files import flush, read_json, sha256, write_text
from gkachat.machine import commit
from gkachat.model.gpt import GPT, Transformer
from gkachat.model.vit import ViT
from gkachat.text import expand, list_near
from gkachat.tokenizer import FILE_NAME, Tokenizer
from gkachat.vision_config import VisionConfig, ViTConfig

MODEL, META, CHECKPOINTS = "model.safetensors", "meta.json", "checkpoints"
FORMAT = 6  # of configs and checkpoints; to be raised when older runs can no longer be read
META_FIELDS = {"format": int, "step": int, "config": dict, "sha256": dict, "tokenizer_sha256": str, "world_size": int}

CONFIGS = {"language model": Config, "tuned language model": TuningConfig, "image model": VisionConfig}

Model = TypeVar("Model", bound=Transformer)


def find_run(name: str | Path) -> Path:
    """Return a run directory from its path, or from its name under runs/.

    Raises FileNotFoundError that lists the runs there are, or those with a similar name where they are many.
    """
    runs = home() / "runs"
    for directory in (expand(name), runs / name):
        if (directory / "config.toml").exists():
            return directory
        if (directory / META).exists() and directory.parent.name == CHECKPOINTS:
            raise ValueError(
                f"{directory}: given a checkpoint, expected its run, {directory.parent.parent}, and --step"
            )
        if (directory / "config.json").exists():
            raise ValueError(f"{directory}: given a model for transformers, expected a run, as the one it was made of")
    known = sorted(path.parent.name for path in runs.glob("*/config.toml"))
    raise FileNotFoundError(f"no run {str(name)!r}; in {runs} there are: {list_near(Path(name).name, known)}")


def load_run_config(run_dir: str | Path) -> Config | TuningConfig | VisionConfig:
    """Return the config of a run of any kind. Raises FileNotFoundError, or ConfigError where it is not valid."""
    tree = read_toml(Path(run_dir) / "config.toml")
    return load_config(tree, cls=CONFIGS[kind_of(tree)])


def start_run(run_dir: Path, config: Config | VisionConfig, tokenizer: Tokenizer | None) -> None:
    """Write what a run needs besides its weights. Image models have no tokenizer."""
    (run_dir / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
    if tokenizer is not None:
        tokenizer.save(run_dir)
    write_config(run_dir, config)  # last: find_run sees the run from now on


def write_config(run_dir: Path, config: Config | VisionConfig) -> None:
    """Write the config of a run, which a run that is trained longer changes."""
    write_text(run_dir / "config.toml", to_toml(config))


def step_dir(run_dir: str | Path, step: int) -> Path:
    """Return the directory of a step's checkpoint."""
    return Path(run_dir) / CHECKPOINTS / f"step_{step:06d}"


def checkpoint_steps(run_dir: str | Path) -> list[int]:
    """Return the steps that have a complete checkpoint, ascending."""
    directories = (Path(run_dir) / CHECKPOINTS).glob("step_*")
    return sorted(int(match[1]) for d in directories if (match := re.fullmatch(r"step_(\d+)", d.name)))


class Saver:
    """Writes a run's checkpoints in a thread, one at a time, and removes those that are no longer wanted.

    Every rank writes its optimizer state. Rank 0 writes the rest and waits for the others, in a directory that all of
    them must see.
    """

    def __init__(
        self,
        run_dir: Path,
        config: Config | VisionConfig,
        tokenizer: Tokenizer | None,
        report: Callable[[str], None],
        rank: int = 0,
        world_size: int = 1,
    ):
        self.run_dir, self.config, self.tokenizer, self.report = run_dir, config, tokenizer, report
        self.rank, self.world_size = rank, world_size
        self.version = commit()  # now: the working tree may be edited while the run trains
        self.thread: threading.Thread | None = None
        self.error: OSError | FloatingPointError | None = None
        self.step = -1  # the last step whose checkpoint was begun
        self.proven = -1  # the last step whose weights are known to give finite numbers
        self.copies: dict[str, Tensor] = {}
        if rank == 0:  # remove what a killed process left behind
            for leftover in (run_dir / CHECKPOINTS).glob(".*.tmp"):
                shutil.rmtree(leftover, ignore_errors=True)

    def save(self, step: int, model: dict[str, Tensor], optimizer: dict[str, Tensor], meta: dict[str, Any]) -> None:
        """Copy the tensors and start to write them, once the previous checkpoint is written.

        A failure is reported and leaves earlier checkpoints alone. `finish` raises it, unless a later save succeeds.
        Weights that are not finite are not written.
        """
        if step == self.step and self.error is None:
            return
        self.wait()
        self.step, self.error = step, None
        model, optimizer = self._copy(model if self.rank == 0 else {}), self._copy(optimizer)
        self.thread = threading.Thread(target=self._write, args=(step, model, optimizer, meta))
        self.thread.start()

    def _copy(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Copy tensors to main memory that is allocated once: fresh memory takes several times as long to fill."""
        for name, t in tensors.items():
            if name not in self.copies:
                self.copies[name] = torch.empty_like(t, device="cpu", pin_memory=t.is_cuda)
            self.copies[name].copy_(t.detach())
        return {name: self.copies[name] for name in tensors}

    def wait(self) -> None:
        """Wait until nothing is being written."""
        if self.thread is not None:
            self.thread.join()

    def finish(self) -> None:
        """Wait, and raise OSError or FloatingPointError if the last checkpoint could not be written."""
        self.wait()
        if self.error is not None:
            raise self.error
        if self.rank == 0:
            self._rotate()

    def _write(self, step: int, model: dict[str, Tensor], optimizer: dict[str, Tensor], meta: dict[str, Any]) -> None:
        directory = step_dir(self.run_dir, step)
        temporary = directory.with_name(f".{directory.name}.tmp")
        part = _part(self.rank, self.world_size)
        if wrong := [name for name, tensor in model.items() if not _is_finite(tensor)]:
            self.error = FloatingPointError(
                f"the weights of step {step} are not finite ({wrong[0]}): they are not saved"
            )
            self.report(f"step {step:6d} | {self.error}")
            return
        try:
            temporary.mkdir(exist_ok=True)
            digests = {part: _write_tensors(temporary / part, optimizer)}
            if self.rank:
                write_text(temporary / f"{part}.sha256", digests[part])
                return
            digests[MODEL] = _write_tensors(temporary / MODEL, model)
            for rank in range(1, self.world_size):
                digests[_part(rank, self.world_size)] = self._await_digest(temporary, rank)
            content = {
                "format": FORMAT,
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
            if directory.exists():  # it was damaged: an intact one would have been resumed from
                remove(directory)
            os.replace(temporary, directory)
            flush(directory.parent)
            self.report(f"step {step:6d} | saved {directory}")
            self._rotate()
        except Exception as error:  # safetensors raises its own type for a full disk
            shutil.rmtree(temporary, ignore_errors=True)
            self.error = OSError(f"cannot write checkpoint {directory}: {error}; earlier checkpoints are untouched")
            self.report(f"step {step:6d} | {self.error}")

    def _await_digest(self, temporary: Path, rank: int) -> str:
        """Return the hash of another rank's part, once that is written."""
        path = temporary / f"{_part(rank, self.world_size)}.sha256"
        since, patience = time.monotonic(), min(60.0, self.config.run.timeout)
        while not path.exists():
            if time.monotonic() - since > patience:
                raise TimeoutError(f"no {path.name} after {patience:.0f} s; do all processes see the same directory?")
            time.sleep(0.02)
        digest = path.read_text("utf-8")
        path.unlink()
        return digest

    def _rotate(self) -> None:
        """Remove checkpoints that are no longer wanted. The newest whose weights are proven, at least, is left."""
        run, steps = self.config.run, checkpoint_steps(self.run_dir)
        sound = [step for step in steps if step <= self.proven]
        if not sound:
            return
        for step in steps[: -run.keep_last]:
            if step not in (self.step, sound[-1]) and not (run.keep_every and step % run.keep_every == 0):
                remove(step_dir(self.run_dir, step))


def _part(rank: int, size: int) -> str:
    return f"optimizer_{rank}-of-{size}.safetensors"


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> str:
    """Write tensors to disk and return the file's hash."""
    from safetensors.torch import save_file

    save_file({name: t.contiguous() for name, t in tensors.items()}, path)
    path.chmod(path.parent.stat().st_mode & 0o666)  # safetensors lets only the owner read it; this follows the umask
    flush(path)
    return sha256(path)


def remove(directory: Path) -> None:
    """Delete a checkpoint. Its name is gone before the first of its files is."""
    gone = directory.with_name(f".{directory.name}.gone.tmp")
    os.replace(directory, gone)
    shutil.rmtree(gone, ignore_errors=True)


def check_format(run_dir: str | Path) -> None:
    """Raise ValueError if a run was written in another format. The message names the version that wrote it."""
    for step in checkpoint_steps(run_dir)[-1:]:
        directory = step_dir(run_dir, step)
        try:
            meta = read_json(directory / META)
        except ValueError:  # damaged, which `verify` reports
            return
        if meta.get("format") != FORMAT and "version" in meta:
            version, found = str(meta["version"])[:40], str(meta.get("format", 1))[:9]
            raise ValueError(
                f"{directory} was written by version {version} in format {found}, expected format {FORMAT}: "
                "use that version, or train the run again"
            )


def verify(directory: Path, *names: str) -> dict[str, Any]:
    """Return a checkpoint's meta after comparing its files, or only those named, with their hashes.

    Raises ValueError that says what is wrong with it.
    """
    meta = read_json(directory / META, **META_FIELDS)
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
    """Return the step of the newest checkpoint that verifies, or -1.

    Damaged ones, and those whose weights are not finite, are reported and renamed.
    """
    for step in reversed(checkpoint_steps(run_dir)):
        directory = step_dir(run_dir, step)
        try:
            verify(directory)
            load_weights(directory)
            return step
        except ValueError as error:
            aside = directory.with_name(f"damaged_{directory.name}")
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(directory, aside)
            report(f"passed over {directory.name}, which is now {aside.name}: {error}")
    return -1


def open_checkpoint(run_dir: str | Path, step: int | None = None, *names: str) -> tuple[Path, dict[str, Any]]:
    """Return directory and meta of a checkpoint, by default the last one. The files in `names` are verified first.

    Raises FileNotFoundError where there is none, ValueError where it is damaged or of another format.
    """
    check_format(run_dir)
    steps = checkpoint_steps(run_dir)
    if not steps or (step is not None and step not in steps):
        has = ", ".join(map(str, steps)) or "none"
        raise FileNotFoundError(
            f"{run_dir} has no checkpoint{'' if step is None else f' of step {step}'}; it has: {has}"
        )
    directory = step_dir(run_dir, steps[-1] if step is None else step)
    try:
        return directory, verify(directory, *names) if names else read_json(directory / META, **META_FIELDS)
    except ValueError as error:
        raise ValueError(f"{error}; delete {directory} to use an earlier one") from None


def load_weights(directory: Path) -> dict[str, Tensor]:
    """Return a checkpoint's weights. Raises ValueError for a file that is not finite float32 tensors."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(directory / MODEL)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{directory / MODEL} cannot be read ({error})") from None
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32 or not _is_finite(tensor):
            found = f"is {tensor.dtype}" if tensor.dtype != torch.float32 else "has numbers that are not finite"
            raise ValueError(f"{directory / MODEL}: {name} {found}, expected finite float32")
    return tensors


def _is_finite(tensor: Tensor) -> bool:
    """Return whether all numbers are finite. Unlike torch.isfinite(tensor).all(), it makes no tensors of this size."""
    return tensor.numel() == 0 or bool(torch.stack(torch.aminmax(tensor)).isfinite().all())


def load_optimizer(directory: Path, world_size: int) -> Iterator[tuple[str, Tensor]]:
    """Yield the optimizer state tensor by tensor, joined from the parts that `world_size` ranks wrote."""
    from safetensors import SafetensorError, safe_open

    try:
        with ExitStack() as stack:
            files = [directory / _part(rank, world_size) for rank in range(world_size)]
            parts = [stack.enter_context(safe_open(file, "pt")) for file in files]
            for name in dict.fromkeys(name for part in parts for name in part.keys()):  # noqa: SIM118 (no mapping)
                found = [part.get_tensor(name) for part in parts if name in part.keys()]  # noqa: SIM118
                yield name, found[0] if len(found) == 1 else torch.cat(found)  # ranks have rows in order
    except (SafetensorError, OSError) as error:
        raise ValueError(f"the optimizer state in {directory} cannot be read ({error})") from None


def load_tokenizer(run_dir: str | Path, meta: dict[str, Any]) -> Tokenizer:
    """Return the run's own tokenizer. Raises ValueError when the checkpoint was trained with another one, or none."""
    if not meta["tokenizer_sha256"]:
        raise ValueError(f"{run_dir}: given an image model, which has no tokenizer, expected a language model")
    try:
        tokenizer = Tokenizer.load(run_dir)
    except FileNotFoundError:
        own, first = Path(run_dir) / FILE_NAME, home() / "tokenizer" / tokens_dir(meta).name / FILE_NAME
        raise FileNotFoundError(f"{own} is missing: copy {first} there, if it was not trained anew since") from None
    if tokenizer.sha256 != meta["tokenizer_sha256"]:
        raise ValueError(f"{Path(run_dir) / 'tokenizer.json'} is not the tokenizer this checkpoint was trained with")
    return tokenizer


def model_config(meta: dict[str, Any], cls: type = GPTConfig) -> Any:
    """Return a checkpoint's model config, a GPTConfig or ViTConfig. Raises ValueError where it is not valid."""
    try:
        config = from_dict(cls, meta["config"].get("model"))
    except ConfigError as error:
        raise ValueError(f"{META}: config.model: {error}") from None
    # The kernel used in training may not run here, and is no part of the model.
    return dataclasses.replace(config, gka=dataclasses.replace(config.gka, backend="auto"))


def tokens_dir(meta: dict[str, Any]) -> Path:
    """Return the directory of the corpus that a checkpoint was trained on."""
    stored = meta["config"]
    config = Config(
        data=from_dict(DataConfig, stored["data"]), tokenizer=from_dict(TokenizerConfig, stored["tokenizer"])
    )
    return home() / "tokens" / config.data_name


def load_model(
    run_dir: str | Path, device: str | torch.device = "cpu", step: int | None = None
) -> tuple[GPT, Tokenizer, dict]:
    """Load the last checkpoint of a language model's run, or that of `step`.

    Returns:
        the model in eval mode, float32 and on `device`; its tokenizer; the content of meta.json.

    Raises:
        FileNotFoundError: no such run or checkpoint.
        ValueError: a file does not match its hash, or does not hold a model of the stored shape.
    """
    directory, meta = open_checkpoint(run_dir, step, MODEL)
    tokenizer = load_tokenizer(run_dir, meta)
    return _load(GPT, model_config(meta), directory, device), tokenizer, meta


def load_vision_model(
    run_dir: str | Path, device: str | torch.device = "cpu", step: int | None = None
) -> tuple[ViT, dict]:
    """Load model and meta of an image model's run, as `load_model` does.

    The weights are the averaged ones if the run averaged them.
    """
    directory, meta = open_checkpoint(run_dir, step, MODEL)
    return _load(ViT, model_config(meta, ViTConfig), directory, device), meta


def _load(cls: type[Model], config: Any, directory: Path, device: str | torch.device) -> Model:
    try:
        tensors = load_weights(directory)
    except ValueError as error:
        raise ValueError(f"{error}; delete {directory} to use an earlier one") from None
    if config.depth > len(tensors):  # building a million layers, only to miss their tensors, takes forever
        raise ValueError(f"{directory}: given {len(tensors)} tensors, expected those of {config.depth} layers")
    try:
        with torch.device("meta"):  # initial weights are not drawn
            model = cls(config)
        model.load_state_dict(tensors, assign=True)
    except (RuntimeError, OverflowError) as error:
        raise ValueError(f"{directory / MODEL} is not of the shape in its meta.json: {error}") from None
    model.prepare(model.compute_dtype)  # rotation tables are not in the file: they are still on the meta device
    return model.to(device).eval()
