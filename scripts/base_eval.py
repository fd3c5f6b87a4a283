"""Bits per byte of a run: all of the val split, as many training tokens, and the unigram model on the same val text.

python -m scripts.base_eval d4_gka
"""

import json
from typing import Annotated

import tyro

from gkachat.checkpoint import find_run, load_model
from gkachat.config import Config, DataConfig, TokenizerConfig, home
from gkachat.config_file import build
from gkachat.data.loader import val_batches
from gkachat.data.shards import Split, read_manifest
from gkachat.eval.bpb import evaluate_bpb, unigram_bpb
from gkachat.eval.compare import EVAL_FILE
from gkachat.files import write_text
from gkachat.machine import pick_device, pick_dtype
from scripts.cli import run

ROWS = 4  # that go through a device at a time; training's own number may be too many for this one


def main(
    run_name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")],
    step: int | None = None,
    device: str = "auto",
) -> None:
    """Print a run's bits per byte and keep them in its eval.json.

    Args:
        run_name: A run's name, or the path of its directory.
        step: Which checkpoint; by default the last.
        device: A torch device, or auto.
    """
    run_dir = find_run(run_name)
    model, tokenizer, meta = load_model(run_dir, pick_device(device), step)
    model.prepare(pick_dtype("auto", pick_device(device)))
    stored = meta["config"]
    sections = {"data": build(DataConfig, stored["data"]), "tokenizer": build(TokenizerConfig, stored["tokenizer"])}
    tokens_dir = home() / "tokens" / Config(**sections).data_name
    splits = {name: Split(tokens_dir, name, tokenizer) for name in ("train", "val")}
    n_val, token_bytes = sum(int(documents.length.sum()) for documents in splits["val"]), tokenizer.token_bytes()

    def bpb(name: str, tokens: int | None) -> float:
        shape = {"sequence_len": model.config.sequence_len, "batch_rows": ROWS, "bos": tokenizer.bos}
        return evaluate_bpb(model, val_batches(splits[name], tokens=tokens, **shape), token_bytes)

    result = {
        "step": meta["step"],
        "val_bpb": bpb("val", None),
        "train_bpb": bpb("train", n_val),
        "unigram_bpb": unigram_bpb(splits["train"], splits["val"], token_bytes),
        "val_tokens": n_val,
        "val_sha256": [shard.text_sha256 for shard in read_manifest(tokens_dir).shards if shard.split == "val"],
    }
    write_text(run_dir / EVAL_FILE, json.dumps(result, indent=1) + "\n")
    print(f"{run_dir.name}, step {meta['step']}: bits per byte over {n_val:,} val tokens")
    print(f"  val      {result['val_bpb']:.4f}")
    print(f"  train    {result['train_bpb']:.4f}   (gap {result['val_bpb'] - result['train_bpb']:+.4f})")
    print(f"  unigram  {result['unigram_bpb']:.4f}   (val, for comparison)")


if __name__ == "__main__":
    run(lambda: tyro.cli(main, description=__doc__))
