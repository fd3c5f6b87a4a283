"""Run tasks of lm-evaluation-harness on a run (needs pip install -e '.[eval]').

python -m scripts.lm_eval d20_gka --tasks lambada_openai wikitext --limit 100
python -m scripts.lm_eval d20_gka_chat --tasks arc_easy arc_challenge mmlu gsm8k

A run that scripts.chat_sft tuned is asked through its chat template.
"""

import os
from pathlib import Path
from typing import Annotated

import tyro

from scripts.cli import run


def main(
    run_name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")],
    tasks: tuple[str, ...],
    limit: int | None = None,
    num_fewshot: int | None = None,
    include_path: Path | None = None,
    run_unsafe_code: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
    batch_size: int = 16,
    seed: int = 42,
    step: int | None = None,
    device: str = "auto",
) -> None:
    """Print the harness's metrics, and write them to the run's evals/.

    Args:
        run_name: Name or directory of a run.
        tasks: Names of tasks, groups or tags of the harness, or paths of YAML files.
        limit: Number of examples of each task; by default all.
        num_fewshot: Examples in a prompt; by default as many as the task says.
        include_path: Directory with more tasks.
        run_unsafe_code: Allow tasks that run the code the model writes (humaneval). It runs without a sandbox.
        batch_size: Texts generated at a time.
        seed: Seed of sampling, for tasks that sample.
        step: Step of the checkpoint; by default the last one.
        device: A torch device, or auto.
    """
    from gkachat.checkpoint import find_run, load_model
    from gkachat.eval.results import write_result
    from gkachat.inference.quantize import for_inference
    from gkachat.machine import how_to_install, pick_device, pick_dtype

    run_dir, chosen = find_run(run_name), pick_device(device)
    if run_unsafe_code:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"  # what the metric itself asks for
    try:
        from gkachat.eval.harness import HarnessModel, evaluate
    except ModuleNotFoundError as error:
        raise ValueError(f"no package {error.name}: {how_to_install('eval')}") from None
    model, tokenizer, meta = load_model(run_dir, chosen, step)
    for_inference(model, pick_dtype("auto", chosen))
    lm = HarnessModel(model, tokenizer, chat="chat" in meta["config"], batch_size=batch_size, seed=seed)
    options = {"limit": limit, "num_fewshot": num_fewshot}
    scores, metrics = evaluate(lm, tasks, include_path=include_path, run_unsafe_code=run_unsafe_code, **options)
    figures = {**options, "chat_template": lm.chat, "truncated": lm.truncated, "ignored": sorted(lm.ignored_options)}
    path = write_result(run_dir, "lm_eval", meta, chosen, scores, metrics=metrics, **figures)
    print(f"{run_dir.name}, step {meta['step']}{', with its chat template' if lm.chat else ''}")
    for task, values in metrics.items():
        print(f"  {task:24s} " + "  ".join(f"{name} {value:.4g}" for name, value in values.items()))
    if lm.truncated:
        print(f"{lm.truncated} texts were longer than {model.config.sequence_len} tokens and lost their beginning")
    if lm.ignored_options:
        print(f"generation options that were ignored: {', '.join(sorted(lm.ignored_options))}")
    print(path.with_suffix(".md"))


if __name__ == "__main__":
    run(main, __doc__)
