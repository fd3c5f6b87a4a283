"""Evaluate a run: bits per byte on its corpus, or CORE, 22 few-shot tasks.

python -m scripts.base_eval d4_gka
python -m scripts.base_eval d4_gka --eval core
torchrun --standalone --nproc_per_node=8 -m scripts.base_eval d20_gka
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from scripts.cli import run

if TYPE_CHECKING:
    from gkachat.model.gpt import GPT
    from gkachat.tokenizer import Tokenizer
    from gkachat.train.distributed import World

TIMEOUT = 600.0  # as run.timeout; no watchdog runs here, and a collective fails after 31 minutes (init_process_group)


def main(
    run_name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")],
    eval: Literal["bpb", "core"] = "bpb",
    step: int | None = None,
    device: str = "auto",
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    bundle: Path | None = None,
    max_per_task: int | None = None,
    tokens: int | None = None,
) -> None:
    """Print a run's figures, and write them to its evals/.

    Args:
        run_name: Name or directory of a run. Under torchrun, all processes share the work.
        eval: bpb: bits per byte on all of val and a quarter as many training tokens. core: CORE; when interrupted, the
            same command continues after the last finished task.
        step: Step of the checkpoint; by default the last one.
        device: A torch device, or auto.
        dtype: Dtype of activations; auto: as in training.
        bundle: core: directory or zip of nanochat's bundle; by default it is downloaded and its SHA-256 checked.
        max_per_task: core: score at most this many rows of each task; by default all.
        tokens: core: tokens in a batch; device memory follows it.
    """
    from gkachat.checkpoint import find_run, load_model, open_checkpoint
    from gkachat.eval.results import announce_earlier
    from gkachat.inference.quantize import for_inference
    from gkachat.machine import pick_device, pick_dtype
    from gkachat.train.distributed import destroy_process_group, init_process_group

    run_dir, chosen = find_run(run_name), pick_device(device)
    if announce_earlier(run_dir, eval, open_checkpoint(run_dir, step)[1]):
        return
    world = init_process_group(chosen.type, TIMEOUT)
    try:
        model, tokenizer, meta = load_model(run_dir, chosen, step)
        for_inference(model, pick_dtype(dtype, chosen))
        if eval == "core":
            core(run_dir, model, tokenizer, meta, world, bundle, max_per_task, tokens)
        else:
            bpb(run_dir, model, tokenizer, meta, world)
    finally:
        destroy_process_group()


def title(run_dir: Path, meta: dict[str, Any]) -> str:
    """Return a run's name and step, which shows whether it was interrupted."""
    return f"{run_dir.name}, step {meta['step']:,} of {meta['n_steps']:,}"


def bpb(run_dir: Path, model: "GPT", tokenizer: "Tokenizer", meta: dict[str, Any], world: "World") -> None:
    from gkachat.checkpoint import tokens_dir
    from gkachat.eval.bpb import evaluate_corpus
    from gkachat.eval.results import write_result
    from gkachat.inference.quantize import compiled_on_gpu

    loader = meta["config"]["data"]["loader"]
    result = evaluate_corpus(compiled_on_gpu(model), tokenizer, tokens_dir(meta), loader, world)
    if not world.is_rank0:
        return
    write_result(run_dir, "bpb", meta, model.wte.weight.device, **result)
    print(f"{title(run_dir, meta)}: bits per byte over {result['val_tokens']:,} val tokens")
    print(f"  val      {result['val_bpb']:.4f}")
    print(f"  train    {result['train_bpb']:.4f}   (gap {result['val_bpb'] - result['train_bpb']:+.4f})")
    print(f"  unigram  {result['unigram_bpb']:.4f}   (val, for comparison)")


def core(
    run_dir: Path,
    model: "GPT",
    tokenizer: "Tokenizer",
    meta: dict[str, Any],
    world: "World",
    bundle: Path | None,
    max_per_task: int | None,
    tokens: int | None,
) -> None:
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from gkachat.eval.bundle import fetch_bundle
    from gkachat.eval.core import evaluate_core
    from gkachat.eval.results import DIRECTORY, write_result
    from gkachat.machine import commit
    from gkachat.train.distributed import barrier

    if bundle is None and world.is_rank0:
        fetch_bundle()
    barrier(world)
    bundle = bundle or fetch_bundle()
    cut = f"_{max_per_task}" if max_per_task else ""  # what an interrupted full evaluation left is not touched
    partial = run_dir / DIRECTORY / f".core{cut}_step_{meta['step']:06d}.partial.json"
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    with Progress(*columns, disable=not world.is_rank0) as progress:
        bar = progress.add_task("reading the bundle")

        def on_task(label: str, score: dict[str, Any]) -> None:
            figures = f"{score['accuracy']:.4f} +- {score['standard_error']:.4f}   centered {score['centered']:+.4f}"
            line = f"  {label:33} {figures}   {score['examples']:,} examples, {score['seconds']:.1f} s"
            if world.is_rank0:
                progress.console.print(line, highlight=False, soft_wrap=True)

        result = evaluate_core(
            model,
            tokenizer,
            bundle,
            max_per_task,
            world=world,
            tokens=tokens,
            partial=partial,
            partial_key=[meta["sha256"], commit(), str(model.compute_dtype)],
            on_task=on_task,
            on_progress=lambda label, done, n: progress.update(bar, description=label, completed=done, total=n),
        )
    if not world.is_rank0:
        return
    scores = {label: score for label, score in result.items() if isinstance(score, dict)}
    figures = {key: value for key, value in result.items() if key not in scores}
    figures |= {"dtype": str(model.compute_dtype), "processes": world.size, "bundle": str(bundle)}
    path = write_result(run_dir, "core", meta, model.wte.weight.device, scores, **figures)
    partial.unlink(missing_ok=True)
    print(f"{title(run_dir, meta)}: {result['name']}: {result['mean_centered']:.4f}")
    for line in result["unscored"]:
        print(f"  not scored: {line}")
    named = {line.partition(":")[0] for line in result["unscored"]}
    if absent := [label for label in result["missing"] if label not in named]:
        print(f"  not in the bundle: {', '.join(absent)}")
    if truncated := sum(score["truncated"] for score in scores.values()):
        print(f"  {truncated:,} examples longer than {model.config.sequence_len:,} tokens lost their beginning")
    print(f"  written to {path}")


if __name__ == "__main__":
    run(main, __doc__)
