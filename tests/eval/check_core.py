"""All decisions of gkachat.eval.core against the plain scorer's, and both their speeds. Takes an hour on two cores.

python tests/eval/check_core.py BUNDLE TOKENIZER [--attention gka] [--dtype bfloat16] [--vocab-size 32768] [--out OUT]

The model is of random weights, all of them moved, so that no decision is a foregone conclusion; as such a model never
finds a continuation, half of lambada's are asked once more with the model's own.
"""

import argparse
import json
import random
import shlex
import shutil
import sys
import tempfile
import time
from pathlib import Path

import core_reference as reference
import torch
import yaml

from gkachat.benchmark import facts, table
from gkachat.config import GPTConfig
from gkachat.eval.core import evaluate_core
from gkachat.files import write_text
from gkachat.model.gpt import GPT
from gkachat.tokenizer import Tokenizer

TOLERANCE = {"float32": 0.0, "bfloat16": 0.1}  # margins, in nats or logits, below which decisions may differ
COLUMNS = {
    "": "{name}",
    "rows": "{rows}",
    "shots": "{shots}",
    "right": "{right}",
    "other decisions": "{differ}",
    "largest margin of these": "{largest:.3f}",
    "rescored": "{rescored}",
    "plain, rows/s": "{plain:.2f}",
    "rows/s": "{fast:.2f}",
    "speed over plain": "{ratio:.2f}",
    "of CPU time": "{cpu_ratio:.2f}",
}


def moved_model(config: GPTConfig, dtype: torch.dtype) -> GPT:
    """Fresh weights, among them zeros, with noise on all of them."""
    torch.manual_seed(0)
    model, generator = GPT(config, dtype).eval(), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


@torch.no_grad()
def own_answer(model: GPT, tokenizer: Tokenizer, text: str, n: int) -> str:
    """The model's own n tokens after a text, or as many fewer as are read back as the tokens they are."""
    context = [tokenizer.bos, *tokenizer.encode(text)]
    tokens = list(context)
    for _ in range(n):
        tokens.append(int(model(torch.tensor([tokens]))[0, -1, : tokenizer.vocab_size].argmax()))
    for end in range(len(tokens), len(context), -1):
        answer = tokenizer.decode(tokens[len(context) : end])
        if answer.strip() and tokenizer.encode(text + answer) == tokens[1:end]:
            return answer
    return ""


def with_own_answers(bundle: Path, target: Path, model: GPT, tokenizer: Tokenizer, n: int) -> Path:
    """The bundle and one task more, made of the last one of language modelling without shots."""
    shutil.copytree(bundle, target)
    tree = yaml.safe_load((target / "core.yaml").read_text())
    task = next(t for t in tree["icl_tasks"] if t["icl_task_type"] == "language_modeling" and t["num_fewshot"] == [0])
    rows = [json.loads(line) for line in (bundle / "eval_data" / task["dataset_uri"]).read_text().splitlines()][:n]
    for row in rows:
        row["continuation"] = " " + row["continuation"]
    for row in rows[::2]:
        row["context"] = row["context"].strip()
        row["continuation"] = own_answer(model, tokenizer, row["context"], 3) or row["continuation"]
    (target / "eval_data" / "own.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tree["icl_tasks"].append({**task, "label": "own_answers", "dataset_uri": "own.jsonl", "continuation_delimiter": ""})
    (target / "core.yaml").write_text(yaml.safe_dump(tree))
    with open(target / "eval_meta_data.csv", "a") as file:
        file.write("own_answers,,,0,,0,,\n")
    return target


def check(bundle: Path, model: GPT, tokenizer: Tokenizer, max_per_task: int | None, tolerance: float) -> list[dict]:
    """A row of figures a task, the ten-shot ones together, and all together. Both scorers take turns."""
    found, clock = [], (time.perf_counter, time.process_time)
    for label, (rows, shots, kind, delimiter, _) in reference.read_bundle(bundle).items():
        random.Random(1337).shuffle(rows)
        rows = rows[:max_per_task]
        before = [now() for now in clock]
        plain = [reference.decide(model, tokenizer, rows, i, shots, kind, delimiter) for i in range(len(rows))]
        between = [now() for now in clock]
        fast = evaluate_core(model, tokenizer, only(bundle, label), max_per_task)[label]
        after = [now() for now in clock]
        margins = [m for (right, m), other in zip(plain, fast["correct"], strict=True) if right != other]
        assert all(m <= tolerance for m in margins), f"{label}: decisions differ at margins of {margins}"
        found.append(
            {
                "name": label, "rows": len(rows), "shots": shots, "right": sum(fast["correct"]),
                "differ": len(margins), "largest": max(margins, default=None), "rescored": fast["rescored"],
                "plain_s": [b - a for a, b in zip(before, between, strict=True)],
                "fast_s": [b - a for a, b in zip(between, after, strict=True)],
            }
        )  # fmt: skip
        print(found[-1], flush=True)
    few = [row for row in found if row["shots"] == 10]
    for name, part in (("ten-shot tasks", few), ("all", found[:])) if few else ():
        total = {key: sum(row[key] for row in part) for key in ("rows", "right", "differ", "rescored")}
        seconds = {
            k: [sum(column) for column in zip(*(row[k] for row in part), strict=True)] for k in ("plain_s", "fast_s")
        }
        worst = max((row["largest"] for row in part if row["largest"] is not None), default=None)
        found.append({"name": name, "shots": "", **total, **seconds, "largest": worst})
    for row in found:
        row["plain"], row["fast"] = row["rows"] / row["plain_s"][0], row["rows"] / row["fast_s"][0]
        row["ratio"], row["cpu_ratio"] = (p / f for p, f in zip(row["plain_s"], row["fast_s"], strict=True))
    return found


def only(bundle: Path, label: str) -> Path:
    """The bundle with one task of its list."""
    target = bundle.with_name(f"{bundle.name}_{label}")
    if not target.exists():
        target.mkdir()
        for name in ("eval_data", "eval_meta_data.csv"):
            shutil.copytree(bundle / name, target / name) if name == "eval_data" else shutil.copy(bundle / name, target)
        tasks = yaml.safe_load((bundle / "core.yaml").read_text())["icl_tasks"]
        (target / "core.yaml").write_text(yaml.safe_dump({"icl_tasks": [t for t in tasks if t["label"] == label]}))
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("tokenizer", type=Path, help="a tokenizer's directory")
    parser.add_argument("--attention", nargs="+", default=["softmax", "gka"])
    parser.add_argument("--dtype", nargs="+", default=["float32"], choices=[*TOLERANCE])
    parser.add_argument("--vocab-size", type=int, help="of the model; by default the tokenizer's")
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--n-embd", type=int, default=256)
    parser.add_argument("--sequence-len", type=int, default=2048)
    parser.add_argument("--max-per-task", type=int)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", help="write OUT.json and OUT.md")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    tokenizer, results, text = Tokenizer.load(options.tokenizer), {}, "# CORE against the plain scorer\n"
    for attention in options.attention:
        for dtype in options.dtype:
            config = GPTConfig(
                depth=options.depth, attention=attention, vocab_size=options.vocab_size or tokenizer.vocab_size,
                n_embd=options.n_embd, sequence_len=options.sequence_len,
            )  # fmt: skip
            model = moved_model(config, getattr(torch, dtype))
            with tempfile.TemporaryDirectory() as home:
                own = with_own_answers(options.bundle, Path(home) / "bundle", model, tokenizer, 100)
                rows = check(own, model, tokenizer, options.max_per_task, TOLERANCE[dtype])
            results[f"{attention}, {dtype}"] = rows
            text += (
                f"\n{attention}, {dtype}, depth {config.depth}, {config.n_embd} channels, vocabulary "
                f"{config.vocab_size:,}, context {config.sequence_len:,}; decisions differ at margins of "
                f"{TOLERANCE[dtype]} at most:\n\n{table(rows, COLUMNS)}"
            )
    where = facts(torch.device("cpu"))
    print(text)
    if options.out:
        command = f"python {shlex.join(sys.argv)}"
        told = {"command": command, "facts": where, "results": results}
        write_text(Path(options.out).with_suffix(".json"), json.dumps(told, indent=1) + "\n")
        where = ", ".join(f"{key} {value}" for key, value in where.items())
        write_text(Path(options.out).with_suffix(".md"), f"{text}\n`{command}`\n\n{where}\n")


if __name__ == "__main__":
    main()
