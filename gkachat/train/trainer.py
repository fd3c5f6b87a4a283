"""The training loop: `Trainer.fit` is the loop, `train_step` one step. scripts/base_train.py shows how to call it.

On Ctrl-C, SIGTERM or SIGUSR1 a run finishes its step, saves and stops. A resumed run continues from the newest sound
checkpoint as if nothing had happened: batches are a function of the step, the optimizers' state is in the checkpoint,
and no other object carries state between steps.
"""

import dataclasses
import gc
import math
import os
import shutil
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gkachat import checkpoint
from gkachat.machine import device_name, peak_flops, peak_memory, several, widest_float
from gkachat.model.gpt import Transformer
from gkachat.model.stats import ModelStats
from gkachat.tokenizer import Tokenizer
from gkachat.train import schedule
from gkachat.train.distributed import Watchdog, World, all_reduce_sum, barrier, broadcast_from_rank0
from gkachat.train.metrics import Metrics, Timers, format_duration
from gkachat.train.optim import load_named_state, named_state
from gkachat.train.setup import Run, largest_device_batch

MIN_EVAL_ROWS = 16  # on a GPU
LOW_MULTIPLIER = 0.9  # of the learning rate; a schedule that stays below it is reported
CURE = "lower the learning rates or set train.clip_norm, and start anew (--overwrite, or another --run.name)"
SAME_SIGNAL_SECONDS = 1.0  # a terminal, a launcher and a scheduler may each deliver the same signal


class Task(Protocol):
    """The data that a model is trained and evaluated on: language.LanguageTask or vision.ImageTask."""

    tokenizer: Tokenizer | None
    """Saved with the run, where the data are text."""
    stats: ModelStats
    """Parameters and FLOPs of the model, for the log."""
    metrics: tuple[str, ...]
    """Names of what `evaluate` returns."""

    def batch(self, step: int) -> tuple[tuple[Tensor, Tensor], int]:
        """Return this rank's inputs and targets of a step, and the number of targets (not -1) over all ranks."""

    def evaluate(
        self, step: int, model: Transformer, rows: int, proceed: Callable[[], bool]
    ) -> dict[str, tuple[float, float]]:
        """Return a (sum, weight) for each metric over this rank's share of the data, `rows` at a time.

        The metric is the sum over all ranks divided by the weight over all ranks. `proceed` is called between batches,
        as a heartbeat; when it returns False, the evaluation is cut short.
        """

    def describe(self) -> str:
        """Return a line about the data, for the start of the log."""


class Trainer:
    """Trains a model on a task."""

    def __init__(
        self,
        config: Any,
        model: Transformer,
        optimizers: list[torch.optim.Optimizer],
        task: Task,
        device: torch.device,
        world: World,
        ema_decay: float = 0.0,
    ):
        """
        Args:
            config: a resolved Config or VisionConfig.
            optimizers: made from the model by optim.make_optimizers.
            ema_decay: above 0, evaluate and save a moving average of the weights instead of the latest ones.
        """
        self.config, self.model, self.optimizers, self.task = config, model, optimizers, task
        self.device, self.world, self.ema_decay = device, world, ema_decay
        self.n_steps = schedule.n_steps(config)
        self.eval_model = deepcopy(model) if ema_decay else model
        rows = -(-config.train.total_batch_size // config.model.sequence_len // world.size)
        self.device_batch_size = config.train.device_batch_size
        if self.device_batch_size == "auto":
            self.device_batch_size = largest_device_batch(model, optimizers, rows, device, world)
        self.forward: nn.Module = model
        if world.size > 1:  # averages gradients over ranks while the backward still runs
            self.forward = DistributedDataParallel(model, gradient_as_bucket_view=True)
        compile = device.type == "cuda" if config.run.compile is None else config.run.compile
        self.eval_forward, self.eval_rows = self.eval_model, self.device_batch_size
        if compile:
            self.forward = torch.compile(self.forward, dynamic=False)
        # What this process has not done yet. Its first time compiles, and lasts long, on a GPU also without `compile`.
        self.to_compile = {"step", "evaluation"} if compile or device.type == "cuda" else set()
        if device.type == "cuda":  # without gradients, this many rows fit where a step fits, and keep a GPU busy
            self.eval_rows = max(MIN_EVAL_ROWS, self.device_batch_size)
            self.eval_forward = torch.compile(self.eval_model, dynamic=False) if compile else self.eval_model

        self.step, self.seconds, self.skipped, self.skipped_in_a_row = 0, 0.0, 0, 0
        self.extended_at: list[int] = []  # steps at which the run was resumed with a larger token budget
        self.stop_requested, self.interrupted = 0.0, False  # time of the first signal; whether all ranks stop
        self.pending: deque[tuple[int, Tensor, torch.cuda.Event | None]] = deque()  # steps that are not checked yet
        self.timers, self.watchdog = Timers(), Watchdog(config.run.timeout, world)
        self.saver: checkpoint.Saver | None = None  # of the run that `fit` trains

    def fit(self, run: Run) -> None:
        """Train to the last step, or until a signal. Either way the last step ends up in a checkpoint."""
        self.run, self.report, train = run, run.report, self.config.train
        evaluated = self.start_or_resume()
        self.report_start()
        with run.lock, stop_on_signal(self), self.watchdog.watching(), without_garbage_collection():
            if self.is_due(train.eval_every) and not evaluated:
                self.evaluate()
            try:
                while self.step < self.n_steps and not self.interrupted:
                    self.watchdog.heartbeat(f"step {self.step}", compiles="step" in self.to_compile)
                    start = time.perf_counter()
                    self.train_step()
                    to_log = self.step == self.n_steps or self.step % self.config.run.log_every == 0
                    self.check_steps(wait=to_log)
                    self.to_compile.discard("step")
                    self.seconds += time.perf_counter() - start
                    if to_log:
                        self.log_step()
                    to_evaluate = self.is_due(train.eval_every)
                    if to_evaluate or self.is_due(self.config.run.checkpoint_every):
                        self.save_checkpoint()
                    if to_evaluate:
                        self.evaluate()
            except (FloatingPointError, OSError, ValueError) as error:  # bad numbers or data: the weights may be good
                self.save_checkpoint()
                self.saver.wait()
                if isinstance(error, FloatingPointError):
                    raise FloatingPointError(f"{error}; {self.advise_resume()}") from None
                raise
            self.save_checkpoint()
            try:
                self.saver.finish()
            except FloatingPointError as error:
                raise FloatingPointError(f"{error}; {CURE}; {self.advise_resume()}") from None
            barrier(self.world)
        self.report_end()
        # DistributedDataParallel must not be the last to hold the process group: it would wait for its threads with the
        # interpreter locked, and these may wait for the interpreter.
        self.forward = self.model

    def train_step(self) -> None:
        """Take one step: batch, forward, backward, guard against non-finite numbers, optimizers.

        Nothing here makes the host wait for a GPU. `check_steps` tells later how the step went.
        """
        config, device, world = self.config, self.device, self.world
        with self.timers("data"):
            batch, n_targets = self.task.batch(self.step)
        total_loss = torch.zeros((), device=device)
        microbatches = list(zip(*(t.split(self.device_batch_size) for t in batch), strict=True))
        for index, (inputs, targets) in enumerate(microbatches):
            # Weights make the sum a mean over all targets, however rows are split. Gradients are averaged over ranks.
            weight = int((targets >= 0).sum()) * world.size / n_targets
            with self.timers("data"):
                inputs, targets = (t.to(device, non_blocking=t.is_pinned()) for t in (inputs, targets))
            last = index == len(microbatches) - 1
            with nullcontext() if last or world.size == 1 else self.forward.no_sync():
                with self.timers("forward"):
                    loss = self.forward(inputs, targets) * weight
                    total_loss += loss.detach()
                with self.timers("backward"):
                    loss.backward()

        with self.timers("optimizer"):
            gradients = [p.grad for optimizer in self.optimizers for p in optimizer.model_parameters()]
            grad_norm = torch.nn.utils.get_total_norm(gradients)
            stop = torch.full_like(total_loss, float(self.stop_requested > 0))  # new_tensor would wait for the GPU
            loss, stop = all_reduce_sum(torch.stack((total_loss / world.size, stop)), world)
            ok = (torch.isfinite(loss) & torch.isfinite(grad_norm)).float()
            if config.train.clip_norm is not None:
                torch._foreach_mul_(gradients, (config.train.clip_norm / grad_norm).clamp(max=1.0).nan_to_num())
            schedule.set_hyperparameters(self.optimizers, self.step, config)
            for optimizer in self.optimizers:
                optimizer.found_inf = 1 - ok  # torch's convention: with 1 the step changes nothing
                optimizer.step()
            self.model.zero_grad(set_to_none=True)
            if self.ema_decay:
                averaged, trained = ([p.data for p in model.parameters()] for model in (self.eval_model, self.model))
                torch._foreach_lerp_(averaged, trained, 1 - self.ema_decay)

        numbers, event = torch.stack((loss, stop, grad_norm, ok)), None
        if device.type == "cuda":
            numbers = torch.empty(4, pin_memory=True).copy_(numbers, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self.pending.append((self.step, numbers, event))
        self.step += 1

    def check_steps(self, wait: bool = False) -> None:
        """Count skipped steps, and stop when some rank was asked to. The last step is checked only with `wait`.

        A GPU may still work on the last step, which is queued as a whole: a wait for the step before it, on a host that
        is that far ahead, leaves the GPU busy. What is found is equal on all ranks, so that they stop at the same step.
        Raises FloatingPointError after `train.max_skipped` skipped steps in a row.
        """
        running = 0 if wait or self.device.type != "cuda" else 1
        while len(self.pending) > running:
            step, numbers, event = self.pending.popleft()
            if event is not None and not event.query():
                event.synchronize()
            self.loss, stop, self.grad_norm, ok = numbers.tolist()
            self.interrupted |= stop > 0
            if ok:
                self.skipped_in_a_row = 0
                if self.saver is not None:
                    self.saver.proven = step
                continue
            self.skipped += 1
            self.skipped_in_a_row += 1
            self.report(f"step {step:6d} | loss {self.loss}, gradient norm {self.grad_norm}: step skipped")
            if self.skipped_in_a_row >= self.config.train.max_skipped:
                raise FloatingPointError(
                    f"loss or gradient not finite in {self.skipped_in_a_row} steps in a row, up to step {step} "
                    f"(loss {self.loss}); {CURE}"
                )

    def advise_resume(self) -> str:
        """Return what --resume does after numbers that were not finite."""
        steps = checkpoint.checkpoint_steps(self.run.directory)
        if not steps:
            return "there is no checkpoint"
        sound = [step for step in steps if step <= self.saver.proven]
        text = f"--resume goes on from step {steps[-1]}"
        if sound[-1:] != steps[-1:]:
            after = f"those after step {sound[-1]}, from which training went on" if sound else "the newest"
            text += f"; if that fails again, delete {after}, in {self.run.directory / checkpoint.CHECKPOINTS}"
        return text

    def is_due(self, every: int) -> bool:
        """Return whether this step is the first, the last or one that `every` divides. 0 divides none."""
        return self.step in (0, self.n_steps) or (every > 0 and self.step % every == 0)

    def evaluate(self) -> None:
        """Measure the metrics of the task over all ranks and log them.

        A failure is reported and training goes on, except at step 0, where there is nothing to lose.
        """

        def proceed() -> bool:
            self.watchdog.heartbeat(f"the evaluation at step {self.step}", compiles="evaluation" in self.to_compile)
            return not self.stop_requested

        names, found, failed = self.task.metrics, {}, False
        proceed()
        with self.timers("evaluation"):
            try:
                found = self.task.evaluate(self.step, self.eval_forward, self.eval_rows, proceed)
            except Exception as error:
                if self.step == 0:
                    raise
                failed = True
                print(f"evaluation at step {self.step} failed: {error!r}; training goes on", file=sys.stderr)
            sums = [found.get(name, (0.0, 0.0)) for name in names]
            sums = torch.tensor([(failed, self.stop_requested > 0), *sums], dtype=torch.float64)
            sums = sums.to(self.device, widest_float(self.device))
            (failed, stopped), *sums = all_reduce_sum(sums, self.world).tolist()
        self.to_compile.discard("evaluation")
        if stopped:
            self.interrupted = True
        elif failed:
            if self.world.is_rank0:
                self.metrics.write("evaluation_failed", self.step)
        else:
            values = {name: total / weight for name, (total, weight) in zip(names, sums, strict=True)}
            if all(map(math.isfinite, values.values())):
                self.saver.proven = self.step
            if self.world.is_rank0:
                self.metrics.write("eval", self.step, tokens=self.tokens, seconds=self.seconds, **values)
            shown = (f"{name.replace('_', ' ')} {value:.4f}" for name, value in values.items())
            self.report(f"step {self.step:6d} | {' | '.join(shown)}")

    def start_or_resume(self) -> bool:
        """Load the newest sound checkpoint, or make a new run directory. Return whether its step is evaluated."""
        run, config, tokenizer, rank0 = self.run, self.config, self.task.tokenizer, self.world.is_rank0
        step = -1
        if rank0:
            step = checkpoint.newest_sound(run.directory, self.report) if run.resume else -1
            if step < 0:
                if run.resume:
                    damaged = any(run.directory.glob(f"{checkpoint.CHECKPOINTS}/damaged_*"))
                    none = "no sound checkpoint: it starts anew" if damaged else "no checkpoint yet: it starts"
                    self.report(f"run {run.directory.name!r} has {none}")
                else:
                    shutil.rmtree(run.directory, ignore_errors=True)  # an old run, with --overwrite
                checkpoint.start_run(run.directory, config, tokenizer)
        step = broadcast_from_rank0(step, self.world, self.device)
        self.saver = checkpoint.Saver(run.directory, config, tokenizer, self.report, self.world.rank, self.world.size)
        if step >= 0:
            self.load_checkpoint(step)
        self.logged = self.step, self.seconds
        evaluated = False
        if rank0:
            self.metrics = Metrics(
                run.directory, wandb_project=config.run.wandb, config=dataclasses.asdict(config), last_step=step
            )
            evaluated = self.step in self.metrics.evaluated
        return bool(broadcast_from_rank0(int(evaluated), self.world, self.device))

    def load_checkpoint(self, step: int) -> None:
        """Load weights, optimizer state and counts. Raises ValueError for another tokenizer."""
        run_dir, tokenizer = self.run.directory, self.task.tokenizer
        directory, meta = checkpoint.open_checkpoint(run_dir, step)
        if tokenizer and checkpoint.load_tokenizer(run_dir, meta).sha256 != tokenizer.sha256:
            raise ValueError(f"cannot resume {run_dir.name!r}: the tokenizer has been trained anew since")
        weights = checkpoint.load_weights(directory)
        state = checkpoint.load_optimizer(directory, meta["world_size"])
        self.eval_model.load_state_dict(weights)
        if self.ema_decay:
            tensors = dict(state)
            weights, state = {name: tensors.pop(f"{name}/trained") for name in weights}, tensors.items()
            self.model.load_state_dict(weights)
        load_named_state(self.optimizers, self.model, state)
        self.step, self.seconds, self.skipped = meta["step"], meta["seconds"], meta["skipped"]
        self.timers.seconds.update(meta["phases"])
        self.saver.step, self.extended_at = self.step, meta.get("extended_at", [])
        before = meta.get("n_steps", self.n_steps)
        if before < self.n_steps:
            self.extended_at = [*self.extended_at, self.step]
            if self.world.is_rank0:
                checkpoint.write_config(run_dir, self.config)
            lr = schedule.lr_multiplier(self.step, self.config)
            self.report(
                f"run {run_dir.name!r} is trained longer, {self.n_steps} steps instead of {before}: from step "
                f"{self.step}, learning rates (now x{lr:.3f}), momentum and weight decay follow the new schedule"
            )
        elif self.step >= self.n_steps:
            self.report(f"run {run_dir.name!r} is finished at step {self.step}; a larger token budget trains it longer")
        else:
            self.report(f"run {run_dir.name!r} resumes at step {self.step} of {self.n_steps}")

    def save_checkpoint(self) -> None:
        """Start to write a checkpoint of this step, unless it exists."""
        self.watchdog.heartbeat(f"the checkpoint at step {self.step}")
        with self.timers("checkpoint"):
            if self.world.is_rank0:
                self.metrics.flush_to_disk()
            state = named_state(self.optimizers, self.model)
            if self.ema_decay and self.world.is_rank0:
                state |= {f"{name}/trained": tensor for name, tensor in self.model.state_dict().items()}
            meta = {
                "tokens": self.tokens,
                "seconds": self.seconds,
                "skipped": self.skipped,
                "phases": dict(self.timers.seconds),
                "peak_memory_bytes": peak_memory(self.device),
                "device": device_name(self.device),
                "dtype": str(self.model.compute_dtype).removeprefix("torch."),
                "n_steps": self.n_steps,
                "extended_at": self.extended_at,
            }
            self.saver.save(self.step, self.eval_model.state_dict(), state, meta)
        gc.collect()

    @property
    def tokens(self) -> int:
        """Tokens trained on so far."""
        return self.step * self.config.train.total_batch_size

    def log_step(self) -> None:
        """Write and print loss, gradient norm, learning rate and speed since the last logged step."""
        if not self.world.is_rank0:
            return
        step, seconds = self.logged
        rate = (self.step - step) * self.config.train.total_batch_size / (self.seconds - seconds)
        self.logged = self.step, self.seconds
        lr = schedule.lr_multiplier(self.step - 1, self.config)
        values = {
            "loss": self.loss, "grad_norm": self.grad_norm, "skipped": self.skipped, "lr": lr,
            "tokens_per_second": rate, **self.model.statistics(),
        }  # fmt: skip
        shown = [
            f"step {self.step:6d}/{self.n_steps}", f"loss {self.loss:.4f}", f"norm {self.grad_norm:.3g}",
            f"lr x{lr:.3f}", f"{rate:,.0f} tok/s",
        ]  # fmt: skip
        peak = peak_flops(device_name(self.device))
        if peak is not None:
            values["mfu"] = rate * self.task.stats.flops_per_token / (peak * self.world.size)
            shown.append(f"mfu {100 * values['mfu']:.1f} %")
        left = self.seconds / self.step * (self.n_steps - self.step)
        shown += [f"{100 * self.step / self.n_steps:.0f} %", f"{format_duration(left)} left"]
        self.metrics.write("train", self.step, tokens=self.tokens, seconds=self.seconds, **values)
        self.report(" | ".join(shown))

    def report_start(self) -> None:
        """Print device, model, length of training, data and kernels."""
        model, train, stats = self.config.model, self.config.train, self.task.stats
        groups = ", ".join(f"{name} {n:,}" for name, n in stats.params.items() if name != "total")
        flops = stats.flops_per_token * train.total_tokens
        device, dtype = device_name(self.device), str(self.model.compute_dtype).removeprefix("torch.")
        self.report(f"run {self.run.directory} on {several(self.world.size, device)}, {dtype}")
        self.report(f"{model.attention}, depth {model.depth}: {stats.params['total']:,} parameters ({groups})")
        self.report(f"{self.n_steps:,} steps of {train.total_batch_size:,} tokens; {flops:.3g} FLOPs")
        highest = schedule.highest_multiplier(self.config)
        if highest < LOW_MULTIPLIER:
            self.report(
                f"learning rates rise to x{highest:.3f} of those in optim at most: of {self.n_steps:,} steps, "
                f"train.warmup_steps is {train.warmup_steps:,} and train.warmdown_fraction {train.warmdown_fraction}"
            )
        self.report(self.task.describe())
        for line in self.model.kernel_lines():
            self.report(line)

    def report_end(self) -> None:
        """Close the log and print how the wall clock was spent."""
        if self.world.is_rank0:
            self.metrics.close()
        seconds = self.timers.seconds
        total = sum(seconds.values()) or 1.0
        shares = ", ".join(f"{name} {100 * s / total:.1f} %" for name, s in seconds.items())
        if self.interrupted:
            self.report(f"interrupted at step {self.step}; give --resume to go on")
        self.report(f"wall clock: {shares}; in training steps {format_duration(self.seconds)}")


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Switch off Python's cyclic collector, which pauses at arbitrary moments. A step leaves no cycles behind.

    Objects that exist by now are frozen, so that collecting by hand need not look at them.
    """
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


@contextmanager
def stop_on_signal(trainer: Trainer) -> Iterator[None]:
    """Make Ctrl-C, SIGTERM and SIGUSR1 stop the trainer after its step, and a second signal end the process at once."""

    def request_stop(number: int, frame: object) -> None:
        now = time.monotonic()
        if not trainer.stop_requested:
            trainer.stop_requested = now
            trainer.report("stopping after this step; once more to stop at once")
        elif now - trainer.stop_requested > SAME_SIGNAL_SECONDS:
            os._exit(128 + number)

    before = {s: signal.signal(s, request_stop) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
