"""Benchmarks of a run that was tuned on conversations: ARC, MMLU, GSM8K, HumanEval, made-up sums and letter counts.

python -m scripts.chat_eval d20_gka_chat --tasks arc-easy mmlu gsm8k --limit 200
python -m scripts.chat_eval d4_gka_chat --tasks addition counting
"""

from pathlib import Path
from typing import Annotated

import tyro

from gkachat.checkpoint import find_run, load_model
from gkachat.eval.chat import TASKS, evaluate_chat
from gkachat.eval.report import Score, write_report
from gkachat.inference.quantize import for_inference
from gkachat.machine import pick_device, pick_dtype
from scripts.cli import run


def main(
    run_name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")],
    tasks: tuple[str, ...] = tuple(name for name in TASKS if name != "humaneval"),
    limit: int | None = None,
    data: Path | None = None,
    allow_code_execution: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
    batch_size: int = 16,
    step: int | None = None,
    device: str = "auto",
) -> None:
    """Print how many questions the model answers right, and keep that among the run's evaluations.

    Args:
        run_name: A run's name, or the path of its directory.
        tasks: Of arc-easy, arc-challenge, mmlu, gsm8k, humaneval, addition, counting.
        limit: So many questions of each task, drawn from all of them; by default all (200 of those that are made up).
        data: A directory with TASK.jsonl files of the same columns, instead of the Hugging Face hub.
        allow_code_execution: Run what the model writes for humaneval, in a sandbox (Linux).
        batch_size: Answers that are written at a time.
        step: Which checkpoint; by default the last.
        device: A torch device, or auto.
    """
    run_dir = find_run(run_name)
    model, tokenizer, meta = load_model(run_dir, pick_device(device), step)
    for_inference(model, pick_dtype("auto", pick_device(device)))
    print(f"{run_dir.name}, step {meta['step']}")
    chat = meta["config"].get("chat", {})
    held_out = chat["val_fraction"] if chat.get("source") == "generated" else None

    def show(name: str, score: Score) -> None:
        spread = f"{score.accuracy:.4f} +- {score.standard_error:.4f}"
        guess = (score.accuracy - score.centered) / (1 - score.centered) if score.centered < 1 else None
        chance = "" if guess is None else f" (guessing: {guess:.4f})"
        print(f"  {name:14s} {spread}{chance}; {score.examples:,} in {score.seconds:.1f} s", flush=True)

    scores, correct, truncated = evaluate_chat(
        model, tokenizer, tasks, data=data, limit=limit, held_out=held_out, allow_code_execution=allow_code_execution,
        rows=batch_size, on_task=show,
    )  # fmt: skip
    mean = sum(score.centered for score in scores.values()) / len(scores)
    facts = {"limit": limit, "truncated": truncated, "mean_centered": mean, "correct": correct}
    print(f"  mean centered over {len(scores)} tasks: {mean:.4f}")
    if truncated:
        print(f"{truncated} prompts did not fit into {model.config.sequence_len} tokens and lost their beginning")
    print(write_report(run_dir, "chat", meta, scores, **facts).with_suffix(".md"))


if __name__ == "__main__":
    run(lambda: tyro.cli(main, description=__doc__))
