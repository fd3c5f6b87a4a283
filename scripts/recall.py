"""Train tiny models on synthetic texts, to see what each attention can find in its past.

python -m scripts.recall --out results/recall/recall
python -m scripts.recall --tasks recall --attentions softmax gka_conv --lengths 64 --pairs 4 8 --seeds 0 1

A run whose result is in the output already is not repeated, so that an interrupted sweep goes on.
"""

import itertools
import json
import statistics
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from scripts.cli import run

Task = Literal["induction", "recall", "copying", "needle"]


def main(
    tasks: Annotated[tuple[Task, ...], tyro.conf.arg(metavar="TASK ...")] = (
        "induction",
        "recall",
        "copying",
        "needle",
    ),
    attentions: tuple[str, ...] = (),
    lengths: tuple[int, ...] = (64, 128),
    pairs: tuple[int, ...] = (4, 8, 16),
    seeds: tuple[int, ...] = (0,),
    steps: int = 600,
    batch: int = 32,
    channels: int = 64,
    out: Path | None = None,
) -> None:
    """Print the accuracy of every attention on every task, as a table; write it, and a figure, if asked to.

    Args:
        tasks: Which tasks: a text said twice, keys and values, values among noise, a needle among distractors.
        attentions: Registered names; by default all of them.
        lengths: Tokens of a text.
        pairs: Pairs of keys and values in a text (values to copy; places that could be the needle).
        seeds: Seeds of weights and texts.
        steps: Training steps.
        batch: Texts of a step.
        channels: Width of the models, which have 2 layers and heads of 32 channels.
        out: Write .json, .md and .png under this path, and keep the results that are in the .json already.
    """
    import torch

    from gkachat.benchmark import publish, table
    from gkachat.config import ATTENTIONS
    from gkachat.eval.recall import check_shape
    from gkachat.files import write_text

    settings = {"steps": steps, "batch": batch, "channels": channels}
    names = attentions or tuple(ATTENTIONS)
    path = out and out.with_suffix(".json")
    rows = finished(path, settings)
    grid = [
        {"task": task, "attention": name, "length": length, "pairs": n, "seed": seed}
        for task, length, n, seed, name in itertools.product(tasks, lengths, pairs, seeds, names)
        if task != "induction" or n == pairs[0]  # it has no pairs
    ]
    for case in grid:
        check_shape(case["task"], case["length"], case["pairs"])
    missing = [case for case in grid if not any(case.items() <= row.items() for row in rows)]
    for number, case in enumerate(missing, 1):
        rows.append(case | train(**case, **settings))
        words = ", ".join(f"{key} {value}" for key, value in case.items())
        print(f"{number}/{len(missing)} {words}: {rows[-1]['accuracy']:.1%} in {rows[-1]['seconds']:.0f} s", flush=True)
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n")
    found = table(summary(rows), None)
    publish(
        "What an attention finds in its past", {"settings": settings, "rows": rows}, found, torch.device("cpu"), out
    )
    if out:
        draw(rows, out.with_suffix(".png"))


def finished(path: Path | None, settings: dict[str, int]) -> list[dict[str, Any]]:
    """Return the rows of an earlier sweep. Raises ValueError for one that had other settings."""
    if path is None or not path.exists():
        return []
    found = json.loads(path.read_text())
    if found["settings"] != settings:
        raise ValueError(f"{path}: its runs have {found['settings']}, these {settings}; give another --out")
    return found["rows"]


def train(
    task: str, attention: str, length: int, pairs: int, seed: int, *, steps: int, batch: int, channels: int
) -> dict[str, float]:
    """Return the accuracy on 512 new texts after training, and the seconds that it took.

    The model has no smear, which hands each token its predecessor, and attention reads the residual stream alone, so
    that attention is what is tested.
    """
    import torch

    from gkachat.config import Config, GPTConfig, OptimConfig, RunConfig, TrainConfig
    from gkachat.eval.recall import TASKS, VOCAB_SIZE
    from gkachat.model.gpt import GPT
    from gkachat.train.optim import make_optimizers
    from gkachat.train.schedule import resolve, set_hyperparameters

    began = time.perf_counter()
    tokens = batch * length
    model_config = GPTConfig(
        depth=2, attention=attention, vocab_size=VOCAB_SIZE, sequence_len=length, n_embd=channels, head_dim=32,
        window_pattern="L", value_embeddings=False, attention_x0=False, smear=False,
    )  # fmt: skip
    config = resolve(
        Config(
            run=RunConfig(seed=seed),
            model=model_config,
            train=TrainConfig(total_tokens=steps * tokens, total_batch_size=tokens, warmup_steps=steps // 20),
            optim=OptimConfig(lr_scale=1.0, width_scale=1.0, weight_decay=0.0),
        )
    )
    torch.manual_seed(seed)
    model, generator = GPT(model_config), torch.Generator().manual_seed(seed)
    optimizers = make_optimizers(model, config.optim)
    for step in range(steps):
        set_hyperparameters(optimizers, step, config)
        model(*TASKS[task](batch, length, pairs, generator)).backward()
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad(set_to_none=True)
    with torch.inference_mode():
        idx, targets = TASKS[task](512, length, pairs, torch.Generator().manual_seed(10**6 + seed))
        right = model(idx).argmax(dim=-1) == targets
    return {"accuracy": right[targets != -1].double().mean().item(), "seconds": time.perf_counter() - began}


def summary(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Return a table's rows: each task and shape, with the mean over seeds of every attention, and their range."""
    cells: dict[tuple, dict[str, list[float]]] = {}
    for row in sorted(rows, key=lambda row: (row["task"], row["length"], row["pairs"])):
        shape = row["task"], f"{row['length']}", "" if row["task"] == "induction" else f"{row['pairs']}"
        cells.setdefault(shape, {}).setdefault(row["attention"], []).append(100 * row["accuracy"])
    names = list(dict.fromkeys(row["attention"] for row in rows))

    def cell(found: list[float]) -> str:
        spread = f" ({min(found):.0f} to {max(found):.0f})" if len(found) > 1 else ""
        return f"{statistics.mean(found):.1f}{spread}" if found else "not run"

    return [
        {"task": shape[0], "tokens": shape[1], "pairs": shape[2]} | {name: cell(found.get(name, [])) for name in names}
        for shape, found in cells.items()
    ]


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw accuracy over pairs, a panel for each task: a color for each attention, a line for each length."""
    from matplotlib.figure import Figure

    from gkachat.plots import save_figure

    tasks = list(dict.fromkeys(row["task"] for row in rows))
    names, lengths = (list(dict.fromkeys(row[key] for row in rows)) for key in ("attention", "length"))
    figure = Figure(figsize=(4 * len(tasks), 3.8), layout="constrained")
    for axis, task in zip(figure.subplots(1, len(tasks), sharey=True, squeeze=False)[0], tasks, strict=True):
        x_axis = "length" if task == "induction" else "pairs"
        lines: dict[tuple, dict[int, list[float]]] = {}
        for row in (row for row in rows if row["task"] == task):
            line = row["attention"], None if x_axis == "length" else row["length"]
            lines.setdefault(line, {}).setdefault(row[x_axis], []).append(100 * row["accuracy"])
        for (name, length), points in lines.items():
            style = "-" if length is None else ("-", "--", ":", "-.")[lengths.index(length) % 4]
            xs = sorted(points)
            label = name if length is None else f"{name}, {length} tokens"
            axis.plot(
                xs, [statistics.mean(points[x]) for x in xs], f"o{style}", color=f"C{names.index(name)}", label=label
            )
        axis.set(title=task, xlabel="tokens" if x_axis == "length" else "pairs", ylim=(-3, 103))
        axis.set_xticks(sorted({x for points in lines.values() for x in points}))
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    figure.axes[0].set_ylabel("accuracy, %")
    save_figure(figure, path)


if __name__ == "__main__":
    run(main, __doc__)
