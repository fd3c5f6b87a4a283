"""Hostile files for every reader: a clear error, or a result, and nothing else.

python tests/reliability/fuzz.py --tries 3000 --out results/fuzz.json
"""

import argparse
import copy
import hashlib
import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from conftest import TINY, run_script

from gkachat.checkpoint import META, checkpoint_steps, load_model, load_optimizer, step_dir
from gkachat.config_file import load_config
from gkachat.data.shards import MANIFEST, Split
from gkachat.machine import commit
from gkachat.tokenizer import FILE_NAME, Tokenizer
from gkachat.train.metrics import read_metrics

CLEAR = (ValueError, FileNotFoundError)  # ConfigError is a ValueError
HOSTILE = [
    None, True, -1, 0, 1, 7, 2**31, 2**63, -(2**70), 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf"), "", "x",
    "../../etc/passwd", "\x00", "\ud800", "a" * 10_000, [], [[]], {}, {"": None}, ["x"] * 1000,
]  # fmt: skip


def mutate_bytes(rng: random.Random, data: bytes) -> bytes:
    data, n = bytearray(data), max(1, len(data))
    for _ in range(rng.choice([1, 1, 2, 8])):
        at = rng.randrange(n)
        match rng.randrange(7):
            case 0:
                data[at : at + 1] = bytes([rng.randrange(256)])
            case 1:
                del data[at : at + rng.choice([1, 4, 64, n])]
            case 2:
                data[at:at] = rng.randbytes(rng.choice([1, 4, 64]))
            case 3:
                data[at:at] = data[at : at + 50]
            case 4:
                data[:8] = rng.choice([0, 1, 2**20, 2**40, 2**63, 2**64 - 1]).to_bytes(8, "little")
            case 5:
                data[at : at + 8] = rng.choice([b"-1", b"null", b"1e999", b"[" * 5000, b"NaN", b'"', b"\xff\xfe"])
            case 6:
                data[:] = rng.choice([b"", b"{}", b"[]", b"\x00" * 100, b"[" * 100_000, data * 2])
    return bytes(data)


def mutate_tree(rng: random.Random, tree: object) -> object:
    """Another value, one less, or one more, somewhere in a JSON tree."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.choice([1, 1, 2, 4])):
        node, parents = tree, []
        while isinstance(node, dict | list) and node and (not parents or rng.random() < 0.8):
            key = rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))
            parents.append((node, key))
            node = node[key]
        if not parents:
            continue
        parent, key = parents[-1]
        match rng.randrange(4):
            case 0:
                del parent[key]
            case 1 if isinstance(parent, dict):
                parent[rng.choice(["unknown", "", "step"])] = rng.choice(HOSTILE)
            case 2 if isinstance(node, int | float) and not isinstance(node, bool):
                parent[key] = rng.choice([node + 1, -node, node * 1000, node * 10**6, node // 3])
            case _:
                parent[key] = rng.choice(HOSTILE)
    return tree


class Target:
    """A directory with a file to be spoilt, and what reads it."""

    def __init__(self, path: Path, read, fix=lambda path: None):
        self.path, self.read, self.fix, self.good = path, read, fix, path.read_bytes()

    def attack(self, rng: random.Random) -> str:
        if self.path.suffix == ".json" and rng.random() < 0.7:
            data = json.dumps(mutate_tree(rng, json.loads(self.good))).encode()
        else:
            data = mutate_bytes(rng, self.good)
        self.path.write_bytes(data)
        try:
            self.fix(self.path)
            self.read()
            return "read"
        except CLEAR as error:
            assert str(error).strip(), "an error without a word"
            return "refused"
        finally:
            self.path.write_bytes(self.good)
            self.fix(self.path)


def rehash(path: Path) -> None:
    """A hostile file whose hash in meta.json is right."""
    meta = path.parent / META
    tree = json.loads(meta.read_text())
    tree["sha256"][path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    meta.write_text(json.dumps(tree))


def targets(home: Path) -> dict[str, Target]:
    """`home` holds the TINY corpus and a run d2_gka."""
    run_dir, [tokens_dir] = home / "runs" / "d2_gka", [p for p in (home / "tokens").iterdir() if p.is_dir()]
    [tokenizer_dir] = (home / "tokenizer").iterdir()
    tokenizer, checkpoint = Tokenizer.load(tokenizer_dir), step_dir(run_dir, checkpoint_steps(run_dir)[-1])
    optimizer = checkpoint / "optimizer_0-of-1.safetensors"

    def read_split():
        return [documents.tokens.sum() for documents in Split(tokens_dir, "train", tokenizer)]

    return {
        "config.toml": Target(run_dir / "config.toml", lambda: load_config(run_dir / "config.toml")),
        "tokenizer.json": Target(tokenizer_dir / FILE_NAME, lambda: Tokenizer.load(tokenizer_dir)),
        "manifest.json": Target(tokens_dir / MANIFEST, read_split),
        "shard bin": Target(tokens_dir / "train_00000.bin", read_split),
        "shard idx": Target(tokens_dir / "train_00000.idx", read_split),
        "metrics.jsonl": Target(run_dir / "metrics.jsonl", lambda: read_metrics(run_dir)),
        "meta.json": Target(checkpoint / META, lambda: load_model(run_dir)),
        "model, hash wrong": Target(checkpoint / "model.safetensors", lambda: load_model(run_dir)),
        "model, hash right": Target(checkpoint / "model.safetensors", lambda: load_model(run_dir), rehash),
        "optimizer": Target(optimizer, lambda: dict(load_optimizer(checkpoint, 1))),
    }


def fuzz(home: Path, tries: int, seed: int) -> dict[str, dict[str, int]]:
    """How many of each reader's files were refused and how many read; anything else is raised, with the file kept."""
    found = {}
    for name, target in targets(home).items():
        outcomes, slowest = Counter(), 0.0
        for number in range(tries):
            start = time.perf_counter()
            outcomes[target.attack(random.Random(f"{seed} {name} {number}"))] += 1
            slowest = max(slowest, time.perf_counter() - start)
        found[name] = dict(outcomes) | {"slowest_seconds": round(slowest, 2)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tries", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    home = Path(tempfile.mkdtemp())
    for script in ("tok_train", "data_prep", "base_train"):
        options = ["--model.attention=gka"] if script == "base_train" else []
        assert run_script(script, "configs/laptop.toml", *TINY, *options, home=home).returncode == 0
    found = fuzz(home, args.tries, args.seed)
    facts = {"commit": commit(), "date": time.strftime("%Y-%m-%d"), "tries": args.tries, "seed": args.seed}
    args.out.write_text(json.dumps(facts | {"outcomes": found}, indent=1) + "\n")
    print(json.dumps(found, indent=1))
    shutil.rmtree(home)


if __name__ == "__main__":
    main()
