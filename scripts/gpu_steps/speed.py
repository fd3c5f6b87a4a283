"""Speed and memory at depth 20: attention kernels, training steps in turns, the largest step, and profiles."""

import gc
from contextlib import suppress

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from gkachat.benchmark import benchmark, measured_peaks, table
from gkachat.config import ATTENTIONS, GPTConfig
from gkachat.machine import device_name, peak_flops, peak_memory
from scripts.bench import attention as bench_attention
from scripts.bench import step as bench_step
from scripts.gpu_steps import Check, Save, Sizes

KERNELS_SHOWN = 25
WARM_MEMORY_SHARE = 0.2  # of the GPU's memory, for a step that is only compiled while others run
KERNEL_COLUMNS = {"kernel": "{kernel}", "calls": "{calls}", "ms": "{ms:.3f}", "share": "{share:.3f}"}


def config(sizes: Sizes, attention: str) -> GPTConfig:
    """Return the shape of the models that are timed."""
    return GPTConfig(
        depth=sizes.depth, attention=attention, n_embd=sizes.n_embd, vocab_size=sizes.vocab_size,
        sequence_len=sizes.tokens,
    )  # fmt: skip


def compiled_step(check: Check, attention: str, rows: int, save: Save) -> tuple:
    """Return bench_step's training step at depth 20, and its model.

    The backward is compiled before the forward runs, so that a step that warms holds its activations only for a moment.
    The option is part of the key of the caches on disk, so that all steps must set it.
    """
    device, dtype = check.start(save)
    torch._functorch.config.force_non_lazy_backward_lowering = True
    return bench_step.training_step(config(check.sizes, attention), rows, device, dtype, check.sizes.compile)


def warm(check: Check, attention: str, save: Save) -> None:
    """Take one step, which leaves its compiled kernels in the caches on disk for the steps that are timed."""
    step, _ = compiled_step(check, attention, check.sizes.rows, save)
    step()
    save(compiled=True)


def warm_memory(check: Check, _: str, save: Save) -> None:
    """Compile the step of `memory`. It then ends where its activations need more than its share of the GPU."""
    device, _ = check.start(save)
    if device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(WARM_MEMORY_SHARE, device)
    step, _ = compiled_step(check, "softmax", check.sizes.configured_rows, save)
    with suppress(torch.OutOfMemoryError):
        step()
    save(compiled=True)


def kernels(check: Check, _: str, save: Save) -> None:
    """Time attention operators and whole layers at the shapes of depth 20."""
    device, dtype = check.start(save)
    sizes, rows, blocks = check.sizes, [], []
    peaks = measured_peaks(device, dtype)
    save(flops_per_second=peaks[0], bytes_per_second=peaks[1])
    model = config(sizes, "gka")
    shape = (sizes.kernel_rows, sizes.tokens, model.n_head, model.head_dim)
    windows = {model.window(layer) for layer in range(model.depth)}
    for level in ("sublayer", "operator"):
        for window in sorted(windows, key=lambda window: window or sizes.tokens):
            compiled = sizes.compile and level == "sublayer"
            found = bench_attention.measure(level, shape, window, device, dtype, peaks, compiled, sizes.rounds)
            rows += found
            blocks.append(f"{level}, shape {shape}, window {window or 'full'}\n")
            blocks.append(table(found, bench_attention.COLUMNS))
            save(rows=rows, page="\n".join(blocks))
            if device.type == "cuda":
                torch.cuda.empty_cache()


def steps(check: Check, _: str, save: Save) -> None:
    """Time training steps of the three models in turns."""
    sizes, taken, models = check.sizes, {}, {}
    for attention in ATTENTIONS:
        taken[attention], models[attention] = compiled_step(check, attention, sizes.rows, save)
    device, dtype = check.start(save)
    timings = benchmark(taken, device, sizes.rounds)
    peak = peak_flops(device_name(device)) or measured_peaks(device, dtype)[0]
    rows = bench_step.step_rows(timings, models, sizes.rows * sizes.tokens, peak)
    save(rows=rows, mfu_of_flops_per_second=peak, page=table(rows, bench_step.COLUMNS))


def memory(check: Check, _: str, save: Save) -> None:
    """Measure the peak memory of softmax's step at its configured rows, optimizers included."""
    step, _ = compiled_step(check, "softmax", check.sizes.configured_rows, save)
    device, _ = check.start(save)
    for taken in range(1, 4):
        step()
        gib = peak_memory(device) / 2**30
        reserved = torch.cuda.max_memory_reserved(device) / 2**30 if device.type == "cuda" else None
        shown = f"peak {gib:.1f} GiB allocated, {reserved or gib:.1f} GiB reserved, after {taken} of 3 steps"
        save(peak_gib=gib, reserved_gib=reserved, page=f"{check.sizes.configured_rows} rows: {shown}\n")


def profiles(check: Check, _: str, save: Save) -> None:
    """Profile one step of softmax and one of gka: the kernels that take the most time."""
    found, blocks = {}, []
    for attention in ("softmax", "gka"):
        step, model = compiled_step(check, attention, check.sizes.rows, save)
        on_gpu = next(model.parameters()).is_cuda
        for _ in range(2):
            step()
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
        with profile(activities=activities) as profiler:
            step()
            if on_gpu:
                torch.cuda.synchronize()
        kind, total = (DeviceType.CUDA, "self_device_time_total") if on_gpu else (DeviceType.CPU, "self_cpu_time_total")
        events = [event for event in profiler.key_averages() if event.device_type == kind]
        events.sort(key=lambda event: -getattr(event, total))
        step_us = sum(getattr(event, total) for event in events)
        found[attention] = [
            {
                "kernel": event.key[:90].replace("|", "/"), "calls": event.count,
                "ms": round(getattr(event, total) / 1e3, 3), "share": round(getattr(event, total) / step_us, 4),
            }
            for event in events[:KERNELS_SHOWN]
        ]  # fmt: skip
        blocks += [f"{attention}, {step_us / 1e3:.1f} ms in {sum(event.count for event in events)} kernels\n"]
        blocks += [table(found[attention], KERNEL_COLUMNS)] if found[attention] else ["no kernel was recorded\n"]
        save(kernels=found, page="\n".join(blocks))
        del step, model, profiler, events
        gc.collect()
        if on_gpu:
            torch.cuda.empty_cache()
