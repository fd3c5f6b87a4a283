"""CORE: 22 few-shot tasks, each centered so that guessing scores 0, and their mean (DCLM, arXiv 2406.11794).

    result = evaluate_core(model, tokenizer, "eval_bundle.zip")     # or a directory; nanochat's bundle
    result["arc_easy"]["accuracy"], result["mean_centered"], result["name"]

Few-shot prompts are long and what is scored is short, so the tokens that an example's choices begin with are read once,
for many examples at a time, into a decode cache; the choices go on from there, one after the other, and only their
logits are formed. Rounding aside this is what scoring each text by itself gives, and in float32 an example whose
decision hangs on rounding is scored again in just that way.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gkachat.eval.bundle import TASKS, Task, prompts, read_bundle
from gkachat.model.gpt import GPT
from gkachat.tokenizer import Tokenizer
from gkachat.train.distributed import World, sum_over_world

TOKENS = {
    "cpu": 2**12,
    "cuda": 2**16,
}  # a batch's, padding included: caches of 2^16 take 6.6 GB at depth 20 in bfloat16
SCORES = 2**26  # numbers that logits, or a layer's attention scores, of a step consist of
ROWS = 1024  # that are tokens at a time, to be sorted by length: some 100 MB of Python's integers
TOO_CLOSE = 1e-4  # nats; float32 rounding moves a mean loss or a logit by some 1e-5


def common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    """How many tokens they all begin with."""
    low, high = min(sequences), max(sequences)  # in this order all others lie between the two
    return next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(len(low), len(high)))


@dataclass
class Example:
    """A row's texts as tokens: text k is scored from token starts[k] on."""

    texts: list[tuple[int, ...]]
    starts: list[int]
    gold: int | None
    """None: language modelling."""
    cut: bool
    """Whether a text was longer than the model's context."""


def tokenized(task: Task, index: int, tokenizer: Tokenizer, limit: int) -> Example:
    """Texts longer than `limit` lose tokens at their beginning, BOS among them, each as many as it must."""
    texts = [(tokenizer.bos, *tokenizer.encode(text)) for text in prompts(task, index)]
    if task.kind == "schema":
        suffix = common_prefix([text[::-1] for text in texts])
        starts = [len(text) - suffix for text in texts]
    else:
        # In language modelling the prompt's own length, but where the tokenizer joins its end to what follows.
        starts = [common_prefix(texts)] * len(texts)
    if task.kind == "language_modeling":
        texts, starts = texts[1:], starts[1:]
    # The first token of all is predicted by nothing.
    starts = [max(1, start - max(0, len(text) - limit)) for text, start in zip(texts, starts, strict=True)]
    cut = max(map(len, texts)) > limit
    return Example([text[-limit:] for text in texts], starts, task.rows[index].get("gold"), cut)


@dataclass
class Group:
    """Texts that go on from the same tokens."""

    prefix: tuple[int, ...]
    tails: list[tuple[int, tuple[int, ...], int]]
    """Example, the text's tokens after the prefix, and from which of these on they are scored (1 or later)."""


def groups(number: int, example: Example) -> list[Group]:
    """One for all texts if their common beginning is longer than what follows, else (among them texts that were cut
    apart) one for each, which begins with all that is not scored. Equal texts count once, empty scores not at all."""
    texts = {text: start for text, start in zip(example.texts, example.starts, strict=True) if start < len(text)}
    if not texts:
        return []
    shared = min(common_prefix([*texts]), *(start - 1 for start in texts.values()), math.inf)
    if 2 * shared >= max(map(len, texts)):
        tails = sorted(((number, text[shared:], start - shared) for text, start in texts.items()), key=_tail_length)
        return [Group(next(iter(texts))[:shared], tails)]
    return [Group(text[: start - 1], [(number, text[start - 1 :], 1)]) for text, start in texts.items()]


def _tail_length(tail: tuple[int, tuple[int, ...], int]) -> int:
    return -len(tail[1])


def batches(found: list[Group], tokens: int) -> Iterator[list[Group]]:
    """Groups of like length, together at most `tokens` long with their padding, or one; the longest first."""
    batch: list[Group] = []
    longest = tail = 0
    for group in sorted(found, key=lambda group: -len(group.prefix)):
        tail = max(tail, len(group.tails[0][1]))
        if batch and (len(batch) + 1) * (longest + tail) > tokens:
            yield batch
            batch, tail = [], len(group.tails[0][1])
        longest = longest if batch else len(group.prefix)
        batch.append(group)
    if batch:
        yield batch


@dataclass(frozen=True)
class Scored:
    """A text's tokens from its start on."""

    mean_loss: float
    hits: bool
    """Whether each is the likeliest."""
    lead: float
    """How far `hits` is from being otherwise, in logits."""


def _summary(losses: list[float], hits: list[float], leads: list[float]) -> Scored:
    return Scored(sum(losses) / len(losses), all(hits), abs(min(leads)))


def _measured(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """(3, N): loss, whether the target is the likeliest, and its lead over the best other token."""
    own_N = logits_NV.gather(1, targets_N[:, None])[:, 0]
    highest = logits_NV.topk(2, dim=-1).values
    lead_N = own_N - torch.where(own_N == highest[:, 0], highest[:, 1], highest[:, 0])
    return torch.stack([logits_NV.logsumexp(dim=-1) - own_N, (logits_NV.argmax(dim=-1) == targets_N).float(), lead_N])


def score(model: GPT, batch: list[Group]) -> dict[tuple[int, tuple[int, ...]], Scored]:
    """Of each text, by its example and tokens."""
    device = model.wte.weight.device
    batch = sorted(batch, key=lambda group: -len(group.tails))
    prefix, tail = max(len(group.prefix) for group in batch), max(len(group.tails[0][1]) for group in batch)
    cache = model.make_cache(len(batch), prefix + tail, block=prefix + tail)  # so long a block: no layer's slots wrap
    if prefix:
        model.prefill(_padded([group.prefix for group in batch], prefix).to(device), cache)
    keys, measured = [], []
    for k in range(len(batch[0].tails)):
        going = [group for group in batch if len(group.tails) > k]  # the first so many
        for row, group in enumerate(going):
            cache.lengths[row] = len(group.prefix)
        longest = max(len(group.tails[k][1]) for group in going) - 1
        rows = max(1, SCORES // (longest * max(model.config.vocab_size, model.config.n_head * (prefix + tail))))
        for first in range(0, len(going), rows):
            part = going[first : first + rows]
            tails = _padded([group.tails[k][1] for group in part], longest + 1)
            scored = torch.zeros_like(tails, dtype=torch.bool)
            for row, group in enumerate(part):
                number, tokens, start = group.tails[k]
                scored[row, start : len(tokens)] = True
                keys.append(((number, group.prefix + tokens), len(tokens) - start))
            tails, scored = tails.to(device), scored.to(device)
            logits = model.decode(tails[:, :-1], cache, slice(first, first + len(part)), every=True)
            measured.append(_measured(logits[scored[:, 1:]], tails[scored]))
    numbers = iter(zip(*torch.cat(measured, dim=1).tolist(), strict=True))
    return {key: _summary(*zip(*(next(numbers) for _ in range(n)), strict=True)) for key, n in keys}


def _padded(sequences: Sequence[Sequence[int]], length: int) -> Tensor:
    return torch.tensor([[*sequence, *[0] * (length - len(sequence))] for sequence in sequences])


def score_alone(model: GPT, text: tuple[int, ...], start: int) -> Scored:
    """The plain way: the whole text by itself, all logits."""
    idx = torch.tensor([text], device=model.wte.weight.device)
    losses, hits, leads = _measured(model(idx)[0, start - 1 : -1], idx[0, start:]).tolist()
    return _summary(losses, hits, leads)


def decide(example: Example, scores: dict[tuple[int, ...], Scored]) -> tuple[bool, float]:
    """Whether the example is right, and how far, in nats or logits, from being judged otherwise."""
    if example.gold is None:
        only = scores[example.texts[0]]
        return only.hits, only.lead
    # A choice that the others go on from has no tokens of its own. Its mean is NaN, which Python's min, as in the
    # reference, takes where it comes first and never elsewhere.
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
    finished: Mapping[str, dict[str, Any]] | None = None,
    on_task: Callable[[str, dict[str, Any]], None] = lambda label, result: None,
    on_progress: Callable[[str, int, int], None] = lambda label, done, total: None,
) -> dict[str, Any]:
    """Few-shot accuracy on each task of a bundle.

    Args:
        bundle_dir: a directory, or a zip.
        max_per_task: rows a task is cut to, after they were shuffled.
        world: processes, each with the same model, that share the rows out.
        tokens: most that are read at a time, padding included; by default TOKENS. Memory follows it: the cache takes
            `scripts.cost`'s cache_bytes_per_token for each, activations some 20 n_embd numbers.
        finished: results of an earlier call that was interrupted, taken where rows and rules are the same.
        on_task: told of each task that is finished; on_progress: of the work done, in prompts with their shots.

    Returns a dict:
        <task>: accuracy, baseline (what guessing gets), centered, standard_error, correct (a bool a row, in the order
            of evaluation), examples, how many of them were cut to the context and how many rescored, seconds, sha256
            (of rows and rules).
        mean_centered: over all tasks; core: the same number, where all 22 ran, every row of theirs.
        name: what to call it; missing: which of the 22 were not there.

    Raises what `read_bundle` does.
    """
    tasks, done = read_bundle(bundle_dir, max_per_task), 0
    total = sum(len(task.rows) * (1 + task.shots) for task in tasks)
    tokens = tokens or TOKENS.get(model.wte.weight.device.type, TOKENS["cpu"])
    results, was_training = {}, model.training
    model.eval()
    try:
        for task in tasks:
            result = (finished or {}).get(task.label)
            if result is None or result["sha256"] != task.sha256:

                def progress(rows: int, task: Task = task, done: int = done) -> None:
                    on_progress(task.label, done + rows * (1 + task.shots), total)

                result = _evaluate(model, tokenizer, task, world, tokens, progress)
                on_task(task.label, result)
            results[task.label] = result
            done += len(task.rows) * (1 + task.shots)
    finally:
        model.train(was_training)
    mean = sum(result["centered"] for result in results.values()) / len(results)
    missing, whole = [label for label in TASKS if label not in results], all(len(t.rows) == t.n_rows for t in tasks)
    is_core = not missing and len(results) == len(TASKS)
    name = "CORE" if is_core else f"mean centered over {len(TASKS) - len(missing)} of {len(TASKS)} tasks"
    if len(results) + len(missing) > len(TASKS):
        name += f" and {len(results) + len(missing) - len(TASKS)} others"
    if not whole:
        name += f", at most {max_per_task} rows of each"
    core = {"core": mean} if is_core and whole else {}
    return {**results, "mean_centered": mean, **core, "name": name, "missing": missing}


def _evaluate(
    model: GPT, tokenizer: Tokenizer, task: Task, world: World, tokens: int, progress: Callable[[int], None]
) -> dict[str, Any]:
    start, device = time.monotonic(), model.wte.weight.device
    n = len(task.rows)
    found = torch.zeros(n + 2, dtype=torch.int64, device=device)  # right or not, cut, rescored: added up over processes
    mine = range(world.rank, n, world.size)
    for first in range(0, len(mine), ROWS):
        examples = {i: tokenized(task, i, tokenizer, model.config.sequence_len) for i in mine[first : first + ROWS]}
        scores: dict[int, dict[tuple[int, ...], Scored]] = {i: {} for i in examples}
        read = [group for i, example in examples.items() for group in groups(i, example)]
        texts, seen = sum(len(group.tails) for group in read), 0
        for batch in batches(read, tokens):
            for (i, text), scored in score(model, batch).items():
                scores[i][text] = scored
            seen += sum(len(group.tails) for group in batch)
            progress(min(n, world.size * round(first + len(examples) * seen / texts)))
        for i, example in examples.items():
            right, margin = decide(example, scores[i])
            if margin < TOO_CLOSE and model.compute_dtype == torch.float32:
                starts = dict(zip(example.texts, example.starts, strict=True))
                right, _ = decide(example, {text: score_alone(model, text, starts[text]) for text in scores[i]})
                found[n + 1] += 1
            found[i] += right
            found[n] += example.cut
    *correct, cut, rescored = sum_over_world(found, world).tolist()
    accuracy = sum(correct) / n
    return {
        "accuracy": accuracy,
        "baseline": task.baseline,
        "centered": (accuracy - task.baseline) / (1 - task.baseline),
        "standard_error": math.sqrt(accuracy * (1 - accuracy) / n),
        "correct": [bool(c) for c in correct],
        "examples": n,
        "cut": cut,
        "rescored": rescored,
        "seconds": time.monotonic() - start,
        "sha256": task.sha256,
    }
