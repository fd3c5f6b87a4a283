"""Measure a run: bits per byte over all of val and as many training tokens, or CORE, 22 few-shot tasks.

python -m scripts.base_eval d4_gka
python -m scripts.base_eval d4_gka --eval core
torchrun --nproc_per_node=8 -m scripts.base_eval d20_gka --eval core
"""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from gkachat.checkpoint import find_run, load_model, tokens_dir
from gkachat.data.loader import val_batches
from gkachat.data.shards import Split, read_manifest
from gkachat.eval.bpb import evaluate_bpb, unigram_bpb
from gkachat.eval.bundle import fetch_bundle
from gkachat.eval.compare import EVAL_FILE
from gkachat.eval.core import evaluate_core
from gkachat.eval.report import DIRECTORY, Score, write_report
from gkachat.files import read_json, write_text
from gkachat.inference.quantize import for_inference
from gkachat.machine import commit, pick_device, pick_dtype
from gkachat.model.gpt import GPT
from gkachat.tokenizer import Tokenizer
from gkachat.train import distributed
from scripts.cli import run

ROWS = 4  # that go through a device at a time; training's own number may be too many for this one
MORE = ("baseline", "cut", "rescored", "sha256", "correct")  # that a report on CORE holds of each task
TIMEOUT = 600.0  # seconds that processes wait for each other


def main(
    run_name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")],
    eval: Literal["bpb", "core"] = "bpb",
    step: int | None = None,
    device: str = "auto",
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    bundle: str | None = None,
    max_per_task: int | None = None,
    tokens: int | None = None,
) -> None:
    """Print a run's figures and keep them: in evals/, bits per byte in eval.json as well.

    Args:
        run_name: A run's name, or the path of its directory.
        eval: bpb, bits per byte; or core. An interrupted CORE goes on after the last finished task.
        step: Which checkpoint; by default the last.
        device: A torch device, or auto.
        dtype: What activations are computed in; auto: as in training.
        bundle: core: a directory or zip of nanochat's bundle; by default it is downloaded, and its SHA-256 checked.
        max_per_task: core: rows of each task; by default all.
        tokens: core: most that go through a device at a time; memory follows it.
    """
    run_dir, picked = find_run(run_name), pick_device(device)
    world = distributed.start(picked.type, TIMEOUT)
    if picked.type == "cuda" and world.size > 1:
        picked = torch.device("cuda", world.local_rank)
    try:
        model, tokenizer, meta = load_model(run_dir, picked, step)
        for_inference(model, pick_dtype(dtype, picked))
        if eval == "core":
            core(run_dir, model, tokenizer, meta, world, bundle, max_per_task, tokens)
        elif world.is_main:
            bpb(run_dir, model, tokenizer, meta)
    finally:
        distributed.stop()


def core(
    run_dir: Path,
    model: GPT,
    tokenizer: Tokenizer,
    meta: dict[str, Any],
    world: distributed.World,
    bundle: str | None,
    max_per_task: int | None,
    tokens: int | None,
) -> None:
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    if bundle is None and world.is_main:
        fetch_bundle()
    distributed.barrier(world)
    path = Path(bundle) if bundle is not None else fetch_bundle()
    partial = run_dir / DIRECTORY / f".core_step_{meta['step']:06d}.partial.json"
    made_by = [meta["sha256"], commit(), str(model.compute_dtype)]
    kept = read_json(partial, made_by=list, tasks=dict) if partial.exists() else {}
    finished = kept["tasks"] if kept.get("made_by") == made_by else {}
    distributed.barrier(world)  # all have read it before it is written again
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    with Progress(*columns, disable=not world.is_main) as progress:
        bar = progress.add_task("reading the bundle")

        def on_task(label: str, result: dict[str, Any]) -> None:
            finished[label] = result
            if world.is_main:
                write_text(partial, json.dumps({"made_by": made_by, "tasks": finished}))
                progress.console.print(line(label, result), highlight=False, soft_wrap=True)

        result = evaluate_core(
            model, tokenizer, path, max_per_task, world=world, tokens=tokens, finished=dict(finished), on_task=on_task,
            on_progress=lambda label, done, n: progress.update(bar, description=label, completed=done, total=n),
        )  # fmt: skip
    if not world.is_main:
        return
    tasks = {label: told for label, told in result.items() if isinstance(told, dict)}
    fields = ("accuracy", "standard_error", "examples", "seconds", "centered")
    path = write_report(
        run_dir,
        "core",
        meta,
        {label: Score(**{field: told[field] for field in fields}) for label, told in tasks.items()},
        name=result["name"],
        **{key: result[key] for key in ("core", "mean_centered", "missing") if key in result},
        dtype=str(model.compute_dtype),
        processes=world.size,
        bundle=str(path),
        **{key: {label: told[key] for label, told in tasks.items()} for key in MORE},
    )
    partial.unlink(missing_ok=True)
    print(f"{run_dir.name}, step {meta['step']}: {result['name']}: {result['mean_centered']:.4f}")
    if result["missing"]:
        print(f"  not in the bundle: {', '.join(result['missing'])}")
    if cut := sum(told["cut"] for told in tasks.values()):
        print(f"  {cut:,} examples longer than {model.config.sequence_len:,} tokens were cut at their beginning")
    print(f"  written to {path}")


def line(label: str, result: dict[str, Any]) -> str:
    figures = f"{result['accuracy']:.4f} +- {result['standard_error']:.4f}   centered {result['centered']:+.4f}"
    return f"  {label:33} {figures}   {result['examples']:,} examples, {result['seconds']:.1f} s"


def bpb(run_dir: Path, model: GPT, tokenizer: Tokenizer, meta: dict[str, Any]) -> None:
    corpus = tokens_dir(meta)
    splits = {name: Split(corpus, name, tokenizer) for name in ("train", "val")}
    n_val, token_bytes = sum(int(documents.length.sum()) for documents in splits["val"]), tokenizer.token_bytes()

    def measured(name: str, tokens: int | None) -> float:
        shape = {"sequence_len": model.config.sequence_len, "batch_rows": ROWS, "bos": tokenizer.bos}
        return evaluate_bpb(model, val_batches(splits[name], tokens=tokens, **shape), token_bytes)

    result = {
        "step": meta["step"],
        "val_bpb": measured("val", None),
        "train_bpb": measured("train", n_val),
        "unigram_bpb": unigram_bpb(splits["train"], splits["val"], token_bytes),
        "val_tokens": n_val,
        "val_sha256": [shard.text_sha256 for shard in read_manifest(corpus).shards if shard.split == "val"],
    }
    write_text(run_dir / EVAL_FILE, json.dumps(result, indent=1) + "\n")
    write_report(run_dir, "bpb", meta, {}, **result)
    print(f"{run_dir.name}, step {meta['step']}: bits per byte over {n_val:,} val tokens")
    print(f"  val      {result['val_bpb']:.4f}")
    print(f"  train    {result['train_bpb']:.4f}   (gap {result['val_bpb'] - result['train_bpb']:+.4f})")
    print(f"  unigram  {result['unigram_bpb']:.4f}   (val, for comparison)")


if __name__ == "__main__":
    run(lambda: tyro.cli(main, description=__doc__))
