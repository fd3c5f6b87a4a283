"""Addition and letter counting, asked of models that were tuned on the made-up conversations of gkachat.data.tasks.

    scores = evaluate_chat(model, tokenizer, ["addition", "counting"], val_fraction=0.05)
    scores["addition"]["accuracy"], scores["addition"]["baseline"]

Both tasks work without a network. gkachat.eval.harness has ARC, MMLU, GSM8K, HumanEval and other benchmarks.
"""

import hashlib
import random
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from gkachat.data.conversations import is_val, render_prompt
from gkachat.data.tasks import MAX_QUESTIONS, SCORED_TASKS, answer_of, ask, kind_of
from gkachat.eval.results import task_score
from gkachat.inference.engine import Engine, Request
from gkachat.inference.sampling import Sampling
from gkachat.model.gpt import GPT
from gkachat.tokenizer import Tokenizer

MAX_ANSWER_TOKENS = 512
SEED = 1337


def held_out_questions(task: str, val_fraction: float, limit: int = MAX_QUESTIONS) -> dict[str, tuple[str, str]]:
    """Return up to `limit` {key: (question, answer)} that tuning kept out of training, always the same ones.

    `val_fraction` is the tuned run's chat.val_fraction. Raises ValueError when nothing was kept out.
    """
    rng, found = random.Random(SEED), {}
    for _ in range(100_000):
        key, text, reply = ask(task, rng, {})
        if is_val(key, val_fraction):
            found[key] = text, answer_of(reply)
            if len(found) == limit:
                break
    if not found:
        raise ValueError(f"{task}: tuning kept no question out of training (chat.val_fraction {val_fraction})")
    return found


def evaluate_chat(
    model: GPT,
    tokenizer: Tokenizer,
    tasks: Sequence[str] = SCORED_TASKS,
    *,
    val_fraction: float,
    limit: int = MAX_QUESTIONS,
    rows: int = 64,
) -> dict[str, dict[str, Any]]:
    """Ask held-out questions, with greedy decoding, and return {task: figures}.

    Args:
        tasks: names from SCORED_TASKS.
        val_fraction, limit: see `held_out_questions`.
        rows: answers generated at a time.

    Figures are those of `task_score` (the baseline always gives the most frequent answer), `correct` (a bool per
    question), `kinds` ({kind: correct and examples}; see `kind_of`) and `sha256` of the questions. Raises ValueError
    for an unknown task or a limit below 1.
    """
    if not tasks or not set(tasks) <= set(SCORED_TASKS):
        raise ValueError(f"tasks: given {', '.join(tasks) or 'none'}, expected some of {', '.join(SCORED_TASKS)}")
    if limit < 1:
        raise ValueError(f"limit: given {limit}, expected 1 or more")
    scores = {}
    for task in tasks:
        start, questions = time.perf_counter(), held_out_questions(task, val_fraction, limit)
        texts, answers = zip(*questions.values(), strict=True)
        replies = generate_replies(model, tokenizer, texts, rows)
        correct = [answer_of(reply) == answer for reply, answer in zip(replies, answers, strict=True)]
        n, commonest = len(questions), max(Counter(answers).values())
        by_kind = defaultdict(list)
        for key, right in zip(questions, correct, strict=True):
            by_kind[kind_of(key)].append(right)
        scores[task] = {
            **task_score(sum(correct) / n, n, time.perf_counter() - start, commonest / n),
            "correct": correct,
            "kinds": {kind: {"correct": sum(found), "examples": len(found)} for kind, found in sorted(by_kind.items())},
            "sha256": hashlib.sha256(repr(list(questions.values())).encode()).hexdigest(),
        }
    return scores


def generate_replies(model: GPT, tokenizer: Tokenizer, texts: Sequence[str], rows: int) -> list[str]:
    """Return the model's reply to each user message, the likeliest token each time."""
    stop = (tokenizer.special["<|assistant_end|>"],)
    sampling = Sampling(max_tokens=MAX_ANSWER_TOKENS, temperature=0.0, stop_tokens=stop)
    prompts = [render_prompt(tokenizer, [{"role": "user", "content": text}]) for text in texts]
    replies = [""] * len(texts)
    # The engine adds BOS itself.
    for output in Engine(model, tokenizer).run([Request(ids[1:], sampling) for ids in prompts], rows=rows):
        replies[output.request] += output.text
    return replies
