"""CORE: 22 few-shot tasks, each centered so that guessing scores 0, and their mean (DCLM, arXiv 2406.11794).

    result = evaluate_core(model, tokenizer, "eval_bundle.zip")     # or a directory; nanochat's bundle
    result["arc_easy"]["accuracy"], result["mean_centered"], result["name"]

The tokens that an example's choices share are read once (gkachat.eval.scoring). In float32, an example whose decision
depends on rounding is scored again, each of its texts alone.
"""

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gkachat.eval.bundle import TASKS, Task, make_prompts, read_bundle
from gkachat.eval.results import task_score
from gkachat.eval.scoring import Continuation, Group, TextScore, score_alone, score_texts
from gkachat.files import read_json, write_text
from gkachat.model.gpt import GPT
from gkachat.tokenizer import Tokenizer
from gkachat.train.distributed import World, all_reduce_sum, barrier

ROWS_PER_CHUNK = 512  # rows tokenized at a time and sorted by length: some 50 MB of Python integers
MIN_MARGIN = 1e-4  # nats or logits; float32 rounding moves a mean loss or a logit by some 1e-5


def common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    """Return the number of tokens that all sequences begin with."""
    low, high = min(sequences), max(sequences)  # all others lie between these two in lexicographic order
    return next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(len(low), len(high)))


@dataclass
class Example:
    """One row's texts as tokens. Text k is scored from token starts[k] on."""

    texts: list[tuple[int, ...]]
    starts: list[int]
    gold: int | None
    """Index of the right text; None for language modelling."""
    truncated: bool
    """Whether a text was longer than the model's context."""


def tokenize_example(task: Task, index: int, tokenizer: Tokenizer, max_tokens: int) -> Example:
    """Tokenize row `index` of a task. Texts longer than `max_tokens` lose tokens, BOS first, at their beginning."""
    texts = [(tokenizer.bos, *tokenizer.encode(text)) for text in make_prompts(task, index)]
    if task.kind == "schema":
        suffix = common_prefix([text[::-1] for text in texts])
        starts = [len(text) - suffix for text in texts]
    else:
        # In language modelling this is the prompt's length, or less where the tokenizer joins its end to what follows.
        starts = [common_prefix(texts)] * len(texts)
    if task.kind == "language_modeling":
        texts, starts = texts[1:], starts[1:]
    # No token predicts the first one.
    starts = [max(1, start - max(0, len(text) - max_tokens)) for text, start in zip(texts, starts, strict=True)]
    truncated = max(map(len, texts)) > max_tokens
    return Example([text[-max_tokens:] for text in texts], starts, task.rows[index].get("gold"), truncated)


def group_texts(number: int, example: Example) -> list[Group]:
    """Group an example's texts: one group if they share at least half of the longest, otherwise one group per text.

    Equal texts count once. Texts with nothing to score are left out.
    """
    starts = {text: start for text, start in zip(example.texts, example.starts, strict=True) if start < len(text)}
    if not starts:
        return []
    shared = min(common_prefix([*starts]), *(start - 1 for start in starts.values()), math.inf)
    if 2 * shared >= max(map(len, starts)):
        tails = [Continuation(number, text[shared:], start - shared) for text, start in starts.items()]
        return [Group(next(iter(starts))[:shared], tails)]
    return [Group.alone(number, text, start) for text, start in starts.items()]


def decide(example: Example, scores: dict[tuple[int, ...], TextScore]) -> tuple[bool, float]:
    """Return whether the model's answer is right, and the margin in nats or logits that decides it."""
    if example.gold is None:
        only = scores[example.texts[0]]
        return only.greedy, only.margin
    # A choice that all others continue has no tokens of its own. Its mean is NaN, which min() returns if it comes first
    # and never otherwise; the reference implementation does the same.
    means = [scores[text].mean_loss if text in scores else math.nan for text in example.texts]
    best = min(means)
    chosen = means.index(best)
    others = (m for text, m in zip(example.texts, means, strict=True) if text != example.texts[chosen] and m >= best)
    return chosen == example.gold, min(others, default=math.inf) - best


@torch.inference_mode()
def evaluate_core(
    model: GPT,
    tokenizer: Tokenizer,
    bundle_dir: str | Path,
    max_per_task: int | None = None,
    *,
    world: World = World(),  # noqa: B008 (frozen)
    tokens: int | None = None,
    partial: Path | None = None,
    partial_key: Any = None,
    on_task: Callable[[str, dict[str, Any]], None] = lambda label, result: None,
    on_progress: Callable[[str, int, int], None] = lambda label, done, total: None,
) -> dict[str, Any]:
    """Measure few-shot accuracy on each task of a bundle.

    Args:
        bundle_dir: a directory, or a zip.
        max_per_task: rows of a task that are scored, the first after they were shuffled. Few-shot examples come from
            all rows, so that each result is that of a full evaluation.
        world: processes, each with the same model, that share the rows.
        tokens: tokens in a batch, with padding; by default scoring.MAX_BATCH_TOKENS. Memory follows it: the cache
            takes `scripts.cost`'s cache_bytes_per_token for each, activations some 20 n_embd numbers.
        partial: file that keeps finished tasks. An interrupted evaluation continues from it if it has the same
            `partial_key` (any JSON value, which should identify the model); tasks whose rows or rules differ are
            evaluated again.
        on_task: called with each task's label and result.
        on_progress: called with the task's label and the prompts read so far and in all, few-shot examples counted.

    Returns a dict:
        <task>: the figures of `results.task_score`, correct (a bool per row, in the order of evaluation), sha256 of its
            rows and rules, and how many examples were truncated and how many rescored alone.
        mean_centered: mean over all tasks.
        core: the same number, if all 22 tasks ran on all their rows.
        name: the name of the mean, "CORE" only if it is the full one.
        missing: those of the 22 tasks that were not scored.
        unscored: "task: why it cannot be scored", for tasks that the bundle has a file of.

    Raises the errors of `read_bundle`.
    """
    tasks, unscored = read_bundle(bundle_dir, max_per_task)
    kept = read_json(partial, tasks=dict) if partial is not None and partial.exists() else {}
    finished = kept["tasks"] if kept.get("key") == partial_key and kept else {}
    barrier(world)  # every process has read the file before it is written
    total, done = sum(task.n_scored * (1 + task.shots) for task in tasks), 0
    results = {}
    for task in tasks:
        result = finished.get(task.label)
        if result is None or result["sha256"] != task.sha256:

            def on_rows(rows: int, task: Task = task, done: int = done) -> None:
                on_progress(task.label, done + rows * (1 + task.shots), total)

            result = finished[task.label] = _evaluate_task(model, tokenizer, task, world, tokens, on_rows)
            if partial is not None and world.is_rank0:
                write_text(partial, json.dumps({"key": partial_key, "tasks": finished}))
            on_task(task.label, result)
        results[task.label] = result
        done += task.n_scored * (1 + task.shots)
    return {**results, **_summary(tasks, results, max_per_task), "unscored": unscored}


def _summary(tasks: list[Task], results: dict[str, dict[str, Any]], max_per_task: int | None) -> dict[str, Any]:
    """Return the mean over tasks, its name, and the tasks that are missing."""
    mean = sum(result["centered"] for result in results.values()) / len(results)
    missing = [label for label in TASKS if label not in results]
    others = len(results) + len(missing) - len(TASKS)
    name = "CORE" if not missing and not others else f"mean centered over {len(TASKS) - len(missing)} of 22 tasks"
    if others:
        name += f" and {others} others"
    if any(task.n_scored < len(task.rows) for task in tasks):
        name += f", at most {max_per_task} rows of each"
    core = {"core": mean} if name == "CORE" else {}
    return {"mean_centered": mean, **core, "name": name, "missing": missing}


def _evaluate_task(
    model: GPT, tokenizer: Tokenizer, task: Task, world: World, tokens: int | None, on_rows: Callable[[int], None]
) -> dict[str, Any]:
    start, n = time.monotonic(), task.n_scored
    sums = torch.zeros(n + 2, dtype=torch.int64, device=model.wte.weight.device)  # right or not, truncated, rescored
    own_rows = range(world.rank, n, world.size)
    for first in range(0, len(own_rows), ROWS_PER_CHUNK):
        chunk = own_rows[first : first + ROWS_PER_CHUNK]
        examples = {i: tokenize_example(task, i, tokenizer, model.config.sequence_len) for i in chunk}
        scores: dict[int, dict[tuple[int, ...], TextScore]] = {i: {} for i in examples}
        groups = [group for i, example in examples.items() for group in group_texts(i, example)]
        for (i, text), text_score in score_texts(model, groups, tokens):
            scores[i][text] = text_score
        for i, example in examples.items():
            right, margin = decide(example, scores[i])
            if margin < MIN_MARGIN and model.compute_dtype == torch.float32:
                starts = dict(zip(example.texts, example.starts, strict=True))
                right, _ = decide(example, {text: score_alone(model, text, starts[text]) for text in scores[i]})
                sums[n + 1] += 1
            sums[i] += right
            sums[n] += example.truncated
        on_rows(min(n, world.size * (first + len(chunk))))
    *correct, truncated, rescored = all_reduce_sum(sums, world).tolist()
    return {
        **task_score(sum(correct) / n, n, time.monotonic() - start, task.baseline),
        "correct": [bool(c) for c in correct],
        "truncated": truncated,
        "rescored": rescored,
        "sha256": task.sha256,
    }
