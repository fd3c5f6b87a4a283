"""Ask a tuned run the additions and letter counts that tuning held back. Needs no network.

python -m scripts.chat_eval d4_gka_chat
python -m scripts.chat_eval d4_gka_chat --tasks addition --limit 50

An answer counts when it says "The answer is ...", which only tuning with chat.source generated teaches. scripts.lm_eval
runs benchmarks such as ARC, MMLU and GSM8K.
"""

from typing import Annotated

import tyro

from gkachat.data.tasks import MAX_QUESTIONS, SCORED_TASKS
from scripts.cli import run


def main(
    run_name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")],
    tasks: tuple[str, ...] = SCORED_TASKS,
    limit: int = MAX_QUESTIONS,
    batch_size: int = 64,
    step: int | None = None,
    device: str = "auto",
) -> None:
    """Print the share of right answers, and write it to the run's evals/.

    Args:
        run_name: Name or directory of a run that scripts.chat_sft made.
        tasks: addition, counting, or both.
        limit: Largest number of questions of each task.
        batch_size: Number of answers generated at a time.
        step: Step of the checkpoint; by default the last one.
        device: A torch device, or auto.
    """
    from gkachat.checkpoint import find_run, load_model, open_checkpoint
    from gkachat.eval.chat import evaluate_chat
    from gkachat.eval.results import announce_earlier, write_result
    from gkachat.inference.quantize import for_inference
    from gkachat.machine import pick_device, pick_dtype

    run_dir, chosen = find_run(run_name), pick_device(device)
    if announce_earlier(run_dir, "chat", open_checkpoint(run_dir, step)[1]):
        return
    model, tokenizer, meta = load_model(run_dir, chosen, step)
    chat = meta["config"].get("chat")
    if chat is None:
        raise ValueError(f"{run_dir.name}: given a run that was not tuned, expected one that scripts.chat_sft made")
    for_inference(model, pick_dtype("auto", chosen))
    scores = evaluate_chat(model, tokenizer, tasks, val_fraction=chat["val_fraction"], limit=limit, rows=batch_size)
    print(f"{run_dir.name}, step {meta['step']}")
    if chat["source"] != "generated":
        print(f"  it was tuned on {chat['source']}, not on generated conversations, which teach the form of an answer")
    for task, score in scores.items():
        accuracy = f"{score['accuracy']:.4f} +- {score['standard_error']:.4f} (guessing: {score['baseline']:.4f})"
        print(f"  {task:14s} {accuracy}; {score['examples']:,} questions in {score['seconds']:.1f} s")
        for kind, found in score["kinds"].items():
            if kind:
                print(f"    {kind:12s} {found['correct']} of {found['examples']} right")
    print(write_result(run_dir, "chat", meta, chosen, scores, limit=limit).with_suffix(".md"))


if __name__ == "__main__":
    run(main, __doc__)
