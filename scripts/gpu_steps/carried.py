"""The carried folder: corpus, tokenizer, and small models trained on a CPU, with their curves, tokens and scores.

carried/
    commit.txt                     of the code that wrote the folder
    tokenizer/, tokens/
    runs/gka/                      metrics.jsonl, tokenizer.json and the last checkpoint, without optimizer state
    runs/gka/reference.json        prompts, the tokens that follow, texts and their scores, in float32
"""

import dataclasses
import json
import os
import shutil
from contextlib import nullcontext
from pathlib import Path

import torch

from gkachat.checkpoint import CHECKPOINTS, Saver, checkpoint_steps, load_model
from gkachat.config import ATTENTIONS, Config, DataConfig, GPTConfig, RunConfig, TokenizerConfig, TrainConfig
from gkachat.config_file import load_config
from gkachat.data.shards import Split, write_shards
from gkachat.data.sources import Corpus
from gkachat.eval.bpb import bpb_sums
from gkachat.eval.scoring import score_alone
from gkachat.files import write_text
from gkachat.inference.engine import Engine, Request
from gkachat.inference.sampling import Sampling
from gkachat.machine import commit
from gkachat.model.gpt import GPT
from gkachat.tokenizer import Tokenizer, train_tokenizer
from gkachat.train.distributed import World
from gkachat.train.language import LanguageTask
from gkachat.train.optim import make_optimizers, named_state
from gkachat.train.schedule import resolve
from gkachat.train.setup import Run, build_model
from gkachat.train.trainer import Trainer
from scripts.gpu_steps import Sizes

LAPTOP = Path(__file__).parents[2] / "configs" / "laptop.toml"  # its learning rates suit so few tokens
CHECKPOINT_EVERY = 2  # steps; a killed run loses one of them at most


def config(sizes: Sizes, attention: str, device: str, dtype: str, compile: bool) -> Config:
    """Return the resolved config of a carried model's training."""
    batch = sizes.batch_rows * sizes.carried_tokens
    return resolve(
        Config(
            run=RunConfig(
                name=attention, device=device, dtype=dtype, compile=compile, log_every=1,
                checkpoint_every=CHECKPOINT_EVERY,
            ),
            data=DataConfig(max_chars=sizes.carried_chars, val_fraction=0.05),
            tokenizer=TokenizerConfig(vocab_size=sizes.carried_vocab),
            model=GPTConfig(
                depth=sizes.carried_depth, attention=attention, vocab_size=sizes.carried_vocab,
                sequence_len=sizes.carried_tokens, n_embd=sizes.carried_embd,
            ),
            train=TrainConfig(
                baseline_tokens=sizes.steps * batch, total_batch_size=batch, device_batch_size=sizes.batch_rows,
                warmup_steps=5, eval_every=0, eval_tokens=8 * batch,
            ),
            optim=load_config(LAPTOP).optim,
        )
    )  # fmt: skip


class KilledTask(LanguageTask):
    """A language task that sends its process a signal when a step begins."""

    def kill_at(self, step: int, signal: int) -> None:
        self.step, self.signal = step, signal

    def batch(self, step: int) -> tuple:
        if step == self.step:
            os.kill(os.getpid(), self.signal)
        return super().batch(step)


def train(config: Config, device: torch.device, carried: Path, run_dir: Path, kill: tuple[int, int] = (-1, 0)) -> None:
    """Train, or resume, a run on the carried corpus. `kill` is a step, and the signal that the process gets there.

    Weights start as the CPU draws them, whatever the device. They are the run's checkpoint of step 0, which it resumes
    from, as starting a new run writes TOML, and the writer may not be installed.
    """
    world, tokenizer = World(), Tokenizer.load(carried / "tokenizer")
    splits = [Split(carried / "tokens", split, tokenizer) for split in ("train", "val")]
    task = KilledTask(config, tokenizer, *splits, bpb_sums=bpb_sums, device=device, world=world)
    task.kill_at(*kill)
    model = build_model(GPT, config, torch.device("cpu")).to(device)
    optimizers = make_optimizers(model, config.optim, world)
    if not checkpoint_steps(run_dir):
        (run_dir / CHECKPOINTS).mkdir(parents=True)
        tokenizer.save(run_dir)
        saver = Saver(run_dir, config, tokenizer, print)
        meta = {"tokens": 0, "seconds": 0.0, "skipped": 0, "phases": {}}
        saver.save(0, model.state_dict(), named_state(optimizers, model), meta)
        saver.finish()
    trainer = Trainer(config, model, optimizers, task, device, world)
    trainer.fit(Run(run_dir, resume=True, report=print, lock=nullcontext()))


def greedy(engine: Engine, prompts: list[list[int]], new_tokens: int, rows: int) -> list[list[int]]:
    """Return the likeliest continuation of each prompt."""
    continuations: list[list[int]] = [[] for _ in prompts]
    sampling = Sampling(max_tokens=new_tokens, temperature=0)
    for output in engine.run([Request(prompt, sampling) for prompt in prompts], rows=rows):
        if output.token is not None:
            continuations[output.request].append(output.token)
    return continuations


@torch.inference_mode()
def margins(model: GPT, bos: int, prompt: list[int], continuation: list[int]) -> list[float]:
    """Return by how much the likeliest token leads at each token of a continuation, from one pass without a cache."""
    idx = torch.tensor([[bos, *prompt, *continuation]])
    highest = model(idx)[0, len(prompt) : -1].topk(2, dim=-1).values
    return (highest[:, 0] - highest[:, 1]).tolist()


def reference(sizes: Sizes, model: GPT, tokenizer: Tokenizer, split: Split) -> dict:
    """Return prompts and texts from val, with the tokens and scores that the model gives them here."""
    tokens = next(iter(split)).tokens.astype(int).tolist()
    T, engine = sizes.carried_tokens, Engine(model, tokenizer)
    # Lengths from 1 on, up to the longest that leaves room for the new tokens.
    longest = T - sizes.new_tokens - 1
    lengths = [1 + i * (longest - 1) // max(1, sizes.prompts - 1) for i in range(sizes.prompts)]
    prompts = [tokens[37 * i : 37 * i + length] for i, length in enumerate(lengths)]
    continuations = greedy(engine, prompts, sizes.new_tokens, rows=sizes.prompts)
    leads = [margins(model, tokenizer.bos, *pair) for pair in zip(prompts, continuations, strict=True)]
    texts = [(tokenizer.bos, *tokens[61 * i : 61 * i + (i + 2) * (T - 1) // 18]) for i in range(16)]
    starts = [len(text) // 2 for text in texts]
    with torch.inference_mode():
        losses = [score_alone(model, *pair).mean_loss for pair in zip(texts, starts, strict=True)]
    return {
        "prompts": prompts, "continuations": continuations, "margins": leads,
        "texts": texts, "starts": starts, "losses": losses,
    }  # fmt: skip


def prepare(sizes: Sizes, directory: Path) -> None:
    """Write the carried folder, on a CPU."""
    shutil.rmtree(directory, ignore_errors=True)
    cpu = torch.device("cpu")
    options = config(sizes, "softmax", "cpu", "float32", compile=False)
    texts = [text for split, text in Corpus(options.data) if split == "train"]
    tokenizer = train_tokenizer(iter(texts), sizes.carried_vocab)
    tokenizer.save(directory / "tokenizer")
    source = dataclasses.asdict(options.data) | {"files": []}
    for shard, _ in write_shards(
        Corpus(options.data), tokenizer, directory / "tokens", source=source, shard_chars=options.data.shard_chars
    ):
        print(f"{shard.name}: {shard.tokens:,} tokens", flush=True)
    for attention in ATTENTIONS:
        run_dir = directory / "runs" / attention
        train(config(sizes, attention, "cpu", "float32", compile=False), cpu, directory, run_dir)
        for step in checkpoint_steps(run_dir)[:-1]:
            shutil.rmtree(run_dir / CHECKPOINTS / f"step_{step:06d}")
        for path in run_dir.rglob("optimizer_*"):
            path.unlink()
        model, tokenizer, _ = load_model(run_dir)
        found = reference(sizes, model, tokenizer, Split(directory / "tokens", "val", tokenizer))
        write_text(run_dir / "reference.json", json.dumps(found) + "\n")
    write_text(directory / "commit.txt", commit() + "\n")
    size = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    print(f"{directory}: {size / 2**20:.1f} MiB")
