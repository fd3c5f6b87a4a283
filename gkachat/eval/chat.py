"""Benchmarks of models that were tuned on conversations.

scores, correct, truncated = evaluate_chat(model, tokenizer, ["arc-easy", "gsm8k"], limit=200)

ARC and MMLU: which of the letters A, B, C ... the model finds likeliest as the first token of its answer. GSM8K: the
number after #### in what it writes. HumanEval: whether what it writes passes the tests, in a sandbox. addition,
counting: the tasks that tuning makes up, those that it held back.
"""

import json
import math
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import torch

from gkachat.data.conversations import is_val, multiple_choice, render_prompt
from gkachat.data.tasks import answer_of, ask
from gkachat.eval.core import TOKENS
from gkachat.eval.report import Score
from gkachat.eval.sandbox import run_code
from gkachat.inference.engine import Engine, Request
from gkachat.inference.sampling import Sampling
from gkachat.model.gpt import GPT
from gkachat.tokenizer import Tokenizer

LETTERS = "ABCDEFGHIJ"
ANSWER_TOKENS = 512
NUMBER = re.compile(r"####[\s$]*([-+−]?)[\s$]*(\d[\d,]*(?:\.\d+)?|\.\d+)")
CODE_BLOCK = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE)


@dataclass(frozen=True)
class Question:
    """Answered by one of `choices` letters, of which number `gold` is right, or by a text that `is_right`."""

    text: str
    choices: int = 0
    gold: int = 0
    is_right: Callable[[str], bool] = lambda answer: False
    guess: float = 0.0
    """How often guessing is right."""


def _letters(question: str, choices: list[str], gold: int) -> Question:
    if not 2 <= len(choices) <= len(LETTERS) or gold not in range(len(choices)):
        raise ValueError(
            f"given {len(choices)} choices and answer {gold}, expected 2 to {len(LETTERS)} and one of them"
        )
    return Question(
        multiple_choice(_text(question), [*map(_text, choices)]), len(choices), gold, guess=1 / len(choices)
    )


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"given {type(value).__name__}, expected a text")
    return value


def _arc(row: dict[str, Any]) -> Question:
    """Its choices are labelled A to E or 1 to 4; we show letters."""
    return _letters(row["question"], row["choices"]["text"], row["choices"]["label"].index(row["answerKey"]))


def _mmlu(row: dict[str, Any]) -> Question:
    return _letters(row["question"], row["choices"], row["answer"])


def number_after_hashes(text: str) -> Decimal | None:
    """The number after the first #### that has one: commas, dollars and zeros at its end do not matter, signs do."""
    match = NUMBER.search(text)
    return Decimal(match[1].replace("−", "-") + match[2].replace(",", "")) if match else None


def _gsm8k(row: dict[str, Any]) -> Question:
    gold = number_after_hashes(_text(row["answer"]))
    if gold is None:
        raise ValueError("no number after #### in its answer")
    return Question(_text(row["question"]), is_right=lambda answer: number_after_hashes(answer) == gold)


def program(row: dict[str, Any], answer: str) -> str:
    """An answer to a HumanEval task, with its tests: what is in its first code block, or all of it.

    An answer without the function's head goes on where the task stops; one with it comes after the task, whose function
    has only a docstring and is replaced.
    """
    block = CODE_BLOCK.search(answer)
    code = block[1] if block else answer
    whole = re.search(rf"^def\s+{re.escape(row['entry_point'])}\b", code, re.MULTILINE)
    return f"{row['prompt']}{chr(10) if whole else ''}{code}\n\n{row['test']}\n\ncheck({row['entry_point']})\n"


def _humaneval(row: dict[str, Any]) -> Question:
    task = {name: _text(row[name]) for name in ("prompt", "test", "entry_point")}
    ask = f"Complete this Python function. Answer with all of it in a code block.\n\n```python\n{task['prompt']}```"
    return Question(ask, is_right=lambda answer: run_code(program(task, answer)).passed)


@dataclass(frozen=True)
class Task:
    """A dataset of the Hugging Face hub, and what is made of a row."""

    dataset: str
    subset: str
    question: Callable[[dict[str, Any]], Question]


def _made_up(name: str, held_out: float, n: int) -> list[Question]:
    """Of what tuning held back, fewer than `n` where there are no more. Guessing always gives the commonest answer."""
    rng, asked = random.Random(1337), {}
    for key, question, said in (ask(name, rng, {}) for _ in range(100_000)):
        if len(asked) < n and is_val(key, held_out):
            asked[key] = question, answer_of(said)
    if not asked:
        raise ValueError(f"{name}: tuning held nothing back (chat.val_fraction {held_out})")
    guess = Counter(gold for _, gold in asked.values()).most_common(1)[0][1] / len(asked)
    return [
        Question(text, is_right=lambda answer, gold=gold: answer_of(answer) == gold, guess=guess)
        for text, gold in asked.values()
    ]


MADE_UP, MADE_UP_QUESTIONS = ("addition", "counting"), 200
TASKS = {
    "arc-easy": Task("allenai/ai2_arc", "ARC-Easy", _arc),
    "arc-challenge": Task("allenai/ai2_arc", "ARC-Challenge", _arc),
    "mmlu": Task("cais/mmlu", "all", _mmlu),
    "gsm8k": Task("openai/gsm8k", "main", _gsm8k),
    "humaneval": Task("openai/openai_humaneval", "openai_humaneval", _humaneval),
}


def read_questions(name: str, data: Path | None = None, limit: int | None = None) -> list[Question]:
    """A task's test split, from the hub or from data/<name>.jsonl with the same columns; shuffled, then cut to `limit`.

    Raises ValueError naming the row that is not as it should be; OSError for a file that cannot be read.
    """
    task = TASKS[name]
    where = f"Hugging Face dataset {task.dataset!r} ({task.subset})" if data is None else str(data / f"{name}.jsonl")
    if data is None:
        import datasets

        try:
            rows = list(enumerate(datasets.load_dataset(task.dataset, task.subset, split="test"), 1))
        except Exception as error:  # the hub client raises a dozen unrelated types
            told = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(f"cannot read {where}: {told}; --data DIR reads DIR/{name}.jsonl instead") from error
    elif not (data / f"{name}.jsonl").is_file():
        raise FileNotFoundError(f"no file {where} with the rows of {name}")
    else:
        with open(data / f"{name}.jsonl", "rb") as file:
            rows = [(number, line) for number, line in enumerate(file, 1) if line.strip()]
    if not rows:
        raise ValueError(f"{where}: no rows")
    random.Random(1337).shuffle(rows)
    questions = []
    for number, row in rows[:limit]:
        try:
            questions.append(task.question(json.loads(row) if isinstance(row, bytes) else row))
        except KeyError as error:
            raise ValueError(f"{where}, row {number}: no column {error}") from None
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{where}, row {number}: {error}") from None
    return questions


def evaluate_chat(
    model: GPT,
    tokenizer: Tokenizer,
    tasks: Sequence[str],
    *,
    data: Path | None = None,
    limit: int | None = None,
    held_out: float | None = None,
    allow_code_execution: bool = False,
    rows: int = 16,
    on_task: Callable[[str, Score], None] = lambda name, score: None,
) -> tuple[dict[str, Score], dict[str, list[bool]], int]:
    """Scores; of each task which questions were answered right, in the order asked; prompts that lost their beginning.

    Args:
        tasks: names from TASKS and MADE_UP.
        held_out: share of the conversations that tuning held back, for tasks that are made up.
        data: see `read_questions`; so for `limit`.
        allow_code_execution: HumanEval needs it.
        rows: answers that are written at a time.
        on_task: told of each task that is finished.

    Raises what `read_questions` does, ValueError for a task that is unknown or not allowed, OSError without a sandbox.
    """
    if not tasks or (unknown := set(tasks) - {*TASKS, *MADE_UP}):
        given = ", ".join(sorted(unknown)) if tasks else "none"
        raise ValueError(f"tasks: given {given}, expected of {', '.join([*TASKS, *MADE_UP])}")
    if held_out is None and set(tasks) & set(MADE_UP):
        raise ValueError(
            f"{' and '.join(MADE_UP)}: of a run that scripts.chat_sft has tuned on made-up conversations only"
        )
    if "humaneval" in tasks:
        if not allow_code_execution:
            raise ValueError("humaneval runs code that the model writes: --allow-code-execution lets it, in a sandbox")
        run_code("")  # or say now that there is none
    if limit is not None and limit < 1:
        raise ValueError(f"limit: given {limit}, expected 1 or more")
    read = {
        name: _made_up(name, held_out, limit or MADE_UP_QUESTIONS)
        if name in MADE_UP
        else read_questions(name, data, limit)
        for name in tasks
    }
    scores: dict[str, Score] = {}
    correct: dict[str, list[bool]] = {}
    truncated = 0
    for name, questions in read.items():
        start = time.perf_counter()
        by_letter = questions[0].choices > 0
        room = model.config.sequence_len - (0 if by_letter else min(ANSWER_TOKENS, model.config.sequence_len // 2))
        prompts = [render_prompt(tokenizer, [{"role": "user", "content": question.text}]) for question in questions]
        truncated += sum(len(ids) > room for ids in prompts)
        prompts = [[ids[0], *ids[1:][-(room - 1) :]] for ids in prompts]
        if by_letter:
            chosen = choose(model, tokenizer, prompts, [question.choices for question in questions])
            correct[name] = [letter == question.gold for letter, question in zip(chosen, questions, strict=True)]
        else:
            answers = answer(model, tokenizer, prompts, rows)
            correct[name] = [q.is_right(text) for q, text in zip(questions, answers, strict=True)]
        n, accuracy = len(questions), sum(correct[name]) / len(questions)
        guess = sum(question.guess for question in questions) / n
        centered = (accuracy - guess) / (1 - guess)
        error = math.sqrt(accuracy * (1 - accuracy) / n)
        scores[name] = Score(accuracy, error, n, time.perf_counter() - start, centered)
        on_task(name, scores[name])
    return scores, correct, truncated


@torch.inference_mode()
def choose(model: GPT, tokenizer: Tokenizer, prompts: Sequence[list[int]], choices: Sequence[int]) -> list[int]:
    """For each prompt the likeliest of its first so many letters, as a number. Only the last position gets logits."""
    device = model.wte.weight.device
    letters = torch.tensor([tokenizer.encode(letter)[0] for letter in LETTERS], device=device)
    waiting = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    chosen = [0] * len(prompts)
    while waiting:
        longest = len(prompts[waiting[0]])
        n = max(1, TOKENS.get(device.type, TOKENS["cpu"]) // longest)
        batch, waiting = waiting[:n], waiting[n:]
        cache = model.make_cache(len(batch), longest, block=longest)
        padded = [[*prompts[i][:-1], *[0] * (longest - len(prompts[i]))] for i in batch]
        model.prefill(torch.tensor(padded, device=device), cache)
        for row, i in enumerate(batch):
            cache.lengths[row] = len(prompts[i]) - 1
        last = torch.tensor([[prompts[i][-1]] for i in batch], device=device)
        logits = model.decode(last, cache, slice(0, len(batch)))[:, letters].tolist()
        for i, row in zip(batch, logits, strict=True):
            chosen[i] = max(range(choices[i]), key=row.__getitem__)
    return chosen


def answer(model: GPT, tokenizer: Tokenizer, prompts: Sequence[list[int]], rows: int) -> list[str]:
    """What the model writes after each prompt, the likeliest token each time."""
    end = (tokenizer.special["<|assistant_end|>"],)
    settings = Sampling(max_tokens=ANSWER_TOKENS, temperature=0.0, stop_tokens=end)
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    said = [""] * len(prompts)
    requests = [Request(prompts[i][1:], settings) for i in order]  # the engine puts BOS in front
    for piece in Engine(model, tokenizer).run(requests, rows=rows):
        said[order[piece.request]] += piece.text
    return said
