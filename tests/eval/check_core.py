"""Compare decisions and speed of gkachat.eval.core with those of the plain scorer. Takes an hour on two cores.

python tests/eval/check_core.py BUNDLE TOKENIZER [--attention gka] [--dtype bfloat16] [--vocab-size 32768] [--out OUT]

BUNDLE is a directory. The model has random weights, none of them zero, so that no decision is certain beforehand.
"""

import argparse
import shlex
import sys
import time
from pathlib import Path

import core_reference as reference
import torch

from gkachat.benchmark import facts, table
from gkachat.config import ATTENTIONS
from gkachat.eval.core import evaluate_core
from gkachat.eval.results import write_report
from gkachat.tokenizer import Tokenizer

TOLERANCE = {"float32": 0.0, "bfloat16": 0.1}  # margins, in nats or logits, below which decisions may differ
COLUMNS = {
    "": "{model}",
    "task": "{task}",
    "rows": "{rows}",
    "right": "{right}",
    "other decisions": "{differ}",
    "largest margin of these": "{largest:.3f}",
    "rescored": "{rescored}",
    "plain, rows/s": "{plain:.2f}",
    "rows/s": "{fast:.2f}",
    "speed over plain": "{ratio:.2f}",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("tokenizer", type=Path, help="a tokenizer's directory")
    parser.add_argument("--attention", nargs="+", default=[*ATTENTIONS], choices=[*ATTENTIONS])
    parser.add_argument("--dtype", nargs="+", default=["float32"], choices=[*TOLERANCE])
    parser.add_argument("--vocab-size", type=int, help="of the model; by default the tokenizer's")
    parser.add_argument("--max-per-task", type=int)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", help="write OUT.json and OUT.md")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    tokenizer, rows = Tokenizer.load(options.tokenizer), []
    shape = {"depth": 4, "n_embd": 256, "head_dim": 128, "sequence_len": 2048}
    shape["vocab_size"] = options.vocab_size or tokenizer.vocab_size
    for attention, dtype in ((attention, dtype) for attention in options.attention for dtype in options.dtype):
        model = reference.random_model(dtype=getattr(torch, dtype), attention=attention, **shape)
        fast = evaluate_core(model, tokenizer, options.bundle, options.max_per_task)
        start = time.perf_counter()
        for task, plain in reference.evaluate(model, tokenizer, options.bundle, options.max_per_task):
            seconds, found = time.perf_counter() - start, fast[task]
            margins = [m for (right, m), other in zip(plain, found["correct"], strict=True) if right != other]
            if margins and max(margins) > TOLERANCE[dtype]:
                raise AssertionError(f"{attention}, {dtype}, {task}: decisions differ at margins of {margins}")
            rows.append(
                {
                    "model": f"{attention}, {dtype}",
                    "task": task,
                    "rows": len(plain),
                    "right": sum(found["correct"]),
                    "differ": len(margins),
                    "largest": max(margins, default=None),
                    "rescored": found["rescored"],
                    "plain": len(plain) / seconds,
                    "fast": len(plain) / found["seconds"],
                    "ratio": seconds / found["seconds"],
                }
            )
            print(rows[-1], flush=True)
            start = time.perf_counter()
    command, where = f"python {shlex.join(sys.argv)}", facts(torch.device("cpu"))
    text = f"{table(rows, COLUMNS)}\n`{command}`\n\n{', '.join(f'{key} {value}' for key, value in where.items())}\n"
    print(text)
    if options.out:
        result = {"command": command, "facts": where, "shape": shape, "rows": rows}
        write_report(Path(options.out), f"# CORE against the plain scorer\n\n{text}", result)


if __name__ == "__main__":
    main()
