"""CORE written plainly, one text at a time with all logits: the reference of gkachat.eval.core."""

import csv
import json
import random
from pathlib import Path

import torch
import torch.nn.functional as F
import yaml

from gkachat.config import GPTConfig
from gkachat.model.gpt import GPT


def random_model(dtype=torch.float32, **shape):
    """Return a small model of random weights, none of them zero."""
    torch.manual_seed(0)
    small = {"depth": 2, "n_embd": 32, "head_dim": 16, "vocab_size": 512, "sequence_len": 1024}
    model = GPT(GPTConfig(**small | shape), dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def read_bundle(directory):
    """Return {label: (rows, shots, kind, delimiter, baseline in percent)}."""
    directory = Path(directory)
    with open(directory / "eval_meta_data.csv") as file:
        baselines = {row["Eval Task"]: float(row["Random baseline"]) for row in csv.DictReader(file)}
    tasks = {}
    for task in yaml.safe_load((directory / "core.yaml").read_text())["icl_tasks"]:
        lines = (directory / "eval_data" / task["dataset_uri"]).read_text().splitlines()
        tasks[task["label"]] = (
            [json.loads(line) for line in lines if line.strip()],
            task["num_fewshot"][0],
            task["icl_task_type"],
            task.get("continuation_delimiter", " "),
            baselines[task["label"]],
        )
    return tasks


def prompts(rows, index, shots, kind, delimiter):
    """Return the texts that are compared, and the index of the right one."""
    others = [i for i in range(len(rows)) if i != index]
    examples = [rows[i] for i in random.Random(1234 + index).sample(others, shots)] if shots else []
    row, head = rows[index], ""
    if kind == "multiple_choice":
        for example in examples:
            head += example["query"] + delimiter + example["choices"][example["gold"]] + "\n\n"
        return [head + row["query"] + delimiter + choice for choice in row["choices"]], row["gold"]
    if kind == "schema":
        for example in examples:
            head += example["context_options"][example["gold"]] + delimiter + example["continuation"] + "\n\n"
        return [head + option + delimiter + row["continuation"] for option in row["context_options"]], row["gold"]
    for example in examples:
        head += example["context"].strip() + delimiter + example["continuation"] + "\n\n"
    whole = head + row["context"].strip() + delimiter
    return [whole.strip(), whole + row["continuation"]], None


def common(sequences):
    """Return the length of the common prefix."""
    n = 0
    while all(len(s) > n and s[n] == sequences[0][n] for s in sequences):
        n += 1
    return n


@torch.no_grad()
def losses_and_predictions(model, tokens):
    """Return, for every position but the last, the next token's loss, the likeliest token, logits, the next token."""
    logits = model(torch.tensor([tokens], device=model.wte.weight.device))[0, :-1]
    targets = torch.tensor(tokens[1:], device=logits.device)
    losses = F.cross_entropy(logits, targets, reduction="none")
    return losses, logits.argmax(dim=-1), logits, targets


def decide(model, tokenizer, rows, index, shots, kind, delimiter):
    """Return (right or not, margin of the decision in nats of mean loss or in logits)."""
    texts, gold = prompts(rows, index, shots, kind, delimiter)
    sequences = [[tokenizer.bos, *tokenizer.encode(text)] for text in texts]
    if kind == "language_modeling":
        assert sequences[0] == sequences[1][: len(sequences[0])], "the prompt is a prefix of the text"
        starts, sequences = [len(sequences[0])], sequences[1:]
    elif kind == "multiple_choice":
        starts = [common(sequences)] * len(sequences)
    else:
        suffix = common([s[::-1] for s in sequences])
        starts = [len(s) - suffix for s in sequences]
    limit = model.config.sequence_len
    starts = [start - max(0, len(s) - limit) for s, start in zip(sequences, starts, strict=True)]
    sequences = [s[-limit:] for s in sequences]
    means = []
    for tokens, start in zip(sequences, starts, strict=True):
        losses, predictions, logits, targets = losses_and_predictions(model, tokens)
        if kind == "language_modeling":
            mine = logits.gather(1, targets[:, None])[start - 1 :, 0]
            lead = mine - logits.scatter(1, targets[:, None], -torch.inf)[start - 1 :].amax(dim=-1)
            return bool((predictions == targets)[start - 1 :].all()), abs(lead.min().item())
        means.append(losses[start - 1 :].mean().item())
    best = min(means)
    others = [m for m in means if m != best]
    return means.index(best) == gold, min(others, default=best) - best


def evaluate(model, tokenizer, bundle_dir, max_per_task=None):
    """Yield (label, [(right or not, margin) for each row])."""
    for label, (rows, *task, _) in read_bundle(bundle_dir).items():
        random.Random(1337).shuffle(rows)
        yield label, [decide(model, tokenizer, rows, i, *task) for i in range(len(rows))[:max_per_task]]


@torch.no_grad()
def greedy_continuation(model, tokenizer, text, n):
    """Return the model's own next n tokens as text, or fewer: as many as encode to these tokens again."""
    context = [tokenizer.bos, *tokenizer.encode(text)]
    tokens = list(context)
    for _ in range(n):
        tokens.append(int(model(torch.tensor([tokens]))[0, -1, : tokenizer.vocab_size].argmax()))
    for end in range(len(tokens), len(context), -1):
        answer = tokenizer.decode(tokens[len(context) : end])
        if answer.strip() and tokenizer.encode(text + answer) == tokens[1:end]:
            return answer
    return ""
