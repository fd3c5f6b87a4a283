"""Tasks of lm-evaluation-harness on a run's checkpoint (pip install 'gkachat[eval]').

python -m scripts.lm_eval d4_gka --tasks lambada_openai wikitext --limit 100
"""

from pathlib import Path
from typing import Annotated

import tyro

from gkachat.checkpoint import find_run, load_model
from gkachat.eval.report import write_report
from gkachat.inference.quantize import for_inference
from gkachat.machine import pick_device, pick_dtype
from scripts.cli import run


def main(
    run_name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")],
    tasks: tuple[str, ...],
    limit: int | None = None,
    num_fewshot: int | None = None,
    include_path: Path | None = None,
    batch_size: int = 16,
    seed: int = 42,
    step: int | None = None,
    device: str = "auto",
) -> None:
    """Print what the harness finds, and keep it among the run's evaluations.

    Args:
        run_name: A run's name, or the path of its directory.
        tasks: Names of tasks, groups or tags of the harness, or paths of YAML files.
        limit: So many examples of each task; by default all.
        num_fewshot: Examples in a prompt; by default as many as the task says.
        include_path: A directory with tasks of your own.
        batch_size: Texts that are generated, or read as a whole, at a time.
        seed: Of sampling, in tasks that sample.
        step: Which checkpoint; by default the last.
        device: A torch device, or auto.
    """
    run_dir = find_run(run_name)
    try:
        from gkachat.eval.lm_eval import HarnessModel, evaluate
    except ModuleNotFoundError as error:
        raise ValueError(f"no package {error.name}; pip install 'gkachat[eval]'") from None
    model, tokenizer, meta = load_model(run_dir, pick_device(device), step)
    for_inference(model, pick_dtype("auto", pick_device(device)))
    lm = HarnessModel(model, tokenizer, batch_size, seed)
    options = {"limit": limit, "num_fewshot": num_fewshot}
    scores, metrics = evaluate(lm, tasks, include_path=include_path, **options)
    facts = {**options, "truncated": lm.truncated, "ignored_options": sorted(lm.ignored)}
    path = write_report(run_dir, "lm_eval", meta, scores, metrics=metrics, **facts)
    print(f"{run_dir.name}, step {meta['step']}")
    for task, found in metrics.items():
        print(f"  {task:24s} " + "  ".join(f"{name} {value:.4g}" for name, value in found.items()))
    if lm.truncated:
        print(f"{lm.truncated} texts were longer than {model.config.sequence_len} tokens and lost their beginning")
    if lm.ignored:
        print(f"options of generation that were ignored: {', '.join(sorted(lm.ignored))}")
    print(path.with_suffix(".md"))


if __name__ == "__main__":
    run(lambda: tyro.cli(main, description=__doc__))
