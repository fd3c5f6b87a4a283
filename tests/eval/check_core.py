"""Compare decisions and speed of gkachat.eval.core with those of the plain scorer. Takes an hour on two cores.

python tests/eval/check_core.py BUNDLE TOKENIZER [--attention gka] [--dtype bfloat16] [--vocab-size 32768] [--out OUT]

BUNDLE is a directory. The model has random weights, none of them zero, so that no decision is certain beforehand.
"""

import argparse
import json
import random
import shlex
import sys
import time
from pathlib import Path

import core_reference as reference
import torch

from gkachat.benchmark import facts, table
from gkachat.config import ATTENTIONS, GPTConfig
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
}


def random_model(config: GPTConfig, dtype: torch.dtype) -> GPT:
    torch.manual_seed(0)
    model = GPT(config, dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape)
    return model


def check(bundle: Path, model: GPT, tokenizer: Tokenizer, max_per_task: int | None, tolerance: float) -> list[dict]:
    """Return a row of figures per task. Raises AssertionError for a decision that differs beyond the tolerance."""
    results, found = evaluate_core(model, tokenizer, bundle, max_per_task), []
    for label, (rows, shots, kind, delimiter, _) in reference.read_bundle(bundle).items():
        random.Random(1337).shuffle(rows)
        rows, fast, start = rows[:max_per_task], results[label], time.perf_counter()
        plain = [reference.decide(model, tokenizer, rows, i, shots, kind, delimiter) for i in range(len(rows))]
        seconds = time.perf_counter() - start
        margins = [m for (right, m), other in zip(plain, fast["correct"], strict=True) if right != other]
        assert all(m <= tolerance for m in margins), f"{label}: decisions differ at margins of {margins}"
        found.append(
            {
                "name": label,
                "rows": len(rows),
                "shots": shots,
                "right": sum(fast["correct"]),
                "differ": len(margins),
                "largest": max(margins, default=None),
                "rescored": fast["rescored"],
                "plain": len(rows) / seconds,
                "fast": len(rows) / fast["seconds"],
                "ratio": seconds / fast["seconds"],
            }
        )
        print(found[-1], flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("tokenizer", type=Path, help="a tokenizer's directory")
    parser.add_argument("--attention", nargs="+", default=[*ATTENTIONS], choices=[*ATTENTIONS])
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
    tokenizer, results, text = Tokenizer.load(options.tokenizer), {}, ""
    for attention in options.attention:
        for dtype in options.dtype:
            config = GPTConfig(
                depth=options.depth,
                attention=attention,
                vocab_size=options.vocab_size or tokenizer.vocab_size,
                n_embd=options.n_embd,
                sequence_len=options.sequence_len,
            )
            model = random_model(config, getattr(torch, dtype))
            rows = check(options.bundle, model, tokenizer, options.max_per_task, TOLERANCE[dtype])
            results[f"{attention}, {dtype}"] = rows
            text += (
                f"{attention}, {dtype}, depth {config.depth}, {config.n_embd} channels, vocabulary "
                f"{config.vocab_size:,}, context {config.sequence_len:,}; decisions differ at margins of "
                f"{TOLERANCE[dtype]} at most:\n\n{table(rows, COLUMNS)}\n"
            )
    command, where = f"python {shlex.join(sys.argv)}", facts(torch.device("cpu"))
    text += f"`{command}`\n\n{', '.join(f'{key} {value}' for key, value in where.items())}\n"
    print(text)
    if options.out:
        result = {"command": command, "facts": where, "results": results}
        write_text(Path(options.out).with_suffix(".json"), json.dumps(result, indent=1) + "\n")
        write_text(Path(options.out).with_suffix(".md"), f"# CORE against the plain scorer\n\n{text}")


if __name__ == "__main__":
    main()
