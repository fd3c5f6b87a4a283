"""Kill a run again and again at random moments, and check that nothing is lost.

python tests/reliability/soak.py --kills 30 --steps 3000 --out results/soak.json
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from conftest import ROOT, TINY, run_script
from test_resume import differing_bytes, logged

from gkachat.checkpoint import Saver, checkpoint_steps, start_run, step_dir
from gkachat.config_file import load_config
from gkachat.machine import commit, processor
from gkachat.model.gpt import GPT
from gkachat.tokenizer import Tokenizer
from gkachat.train.metrics import read_metrics
from gkachat.train.optim import make_optimizers, named_state
from gkachat.train.schedule import resolve


def soak(home: Path, *, kills: int, steps: int, longest: float, seed: int, attention: str = "gka") -> dict:
    """Train once undisturbed and once killed. `home` holds the TINY corpus; a life lasts up to `longest` seconds."""
    rng, moments, passed_over, started_anew, recovery = random.Random(seed), [], 0, 0, []
    options = [
        "configs/laptop.toml", *TINY, f"--model.attention={attention}", f"--train.total_tokens={256 * steps}",
        "--run.checkpoint_every=3", "--train.eval_every=10", "--run.log_every=1",
    ]  # fmt: skip

    def start(name):
        command = [sys.executable, "-u", "-m", "scripts.base_train", *options, f"--run.name={name}", "--resume"]
        env = os.environ | {"GKACHAT_HOME": str(home), "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)

    assert start("whole").communicate()[0] and checkpoint_steps(home / "runs" / "whole")[-1] == steps
    killed = home / "runs" / "killed"
    for _ in range(kills):
        had_one, started = bool(checkpoint_steps(killed)), time.monotonic()
        process = start("killed")
        first = process.stdout.readline()
        recovery.append(time.monotonic() - started)
        started_anew += had_one and "it starts" in first
        time.sleep(rng.uniform(0, longest))
        process.send_signal(signal.SIGKILL)
        rest = first + process.communicate()[0]
        passed_over += rest.count("passed over")
        moments.append(rest.splitlines()[-1][:60])
        assert "100 %" not in rest, "the run ended before it could be killed: give it more steps"
    last = start("killed")
    passed_over += last.communicate()[0].count("passed over")
    records = [(r["kind"], r["step"]) for r in read_metrics(killed)]
    return {
        "kills": kills,
        "survived": kills if last.returncode == 0 and not started_anew and not passed_over else 0,
        "attention": attention,
        "steps": steps,
        "checkpoints_passed_over": passed_over,
        "bytes_that_differ": differing_bytes(home / "runs" / "whole", killed),
        "records_twice_or_missing": len(records)
        - len(set(records))
        + sum(r["step"] == steps for r in logged(killed))
        - 2,
        "records_differ": logged(home / "runs" / "whole") != logged(killed),
        "verify_run": run_script("verify_run", "killed", home=home).stdout.strip().splitlines()[-1].split(": ")[-1],
        "seconds_until_it_goes_on": sorted(recovery)[len(recovery) // 2],
        "last_words": moments,
    }


def saving(home: Path, depth: int) -> dict:
    """Time how long a save blocks training, and how long it takes, for a softmax model of that depth."""
    torch.manual_seed(0)
    config = load_config("configs/d20.toml", [f"--model.depth={depth}", "--model.sequence_len=256"])
    config = resolve(config)
    model = GPT(config.model)
    optimizers = make_optimizers(model, config.optim)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    for optimizer in optimizers:
        optimizer.step()
    [tokenizer_dir] = (home / "tokenizer").iterdir()
    tokenizer, run_dir, held, whole = Tokenizer.load(tokenizer_dir), home / "runs" / f"saving{depth}", [], []
    start_run(run_dir, config, tokenizer)
    saver = Saver(run_dir, config, tokenizer, lambda line: None)
    for step in range(1, 6):
        start = time.perf_counter()
        saver.save(step, model.state_dict(), named_state(optimizers, model), {})
        held.append(time.perf_counter() - start)
        saver.finish()
        whole.append(time.perf_counter() - start)
    size = sum(path.stat().st_size for path in step_dir(run_dir, 5).iterdir())
    return {"depth": depth, "bytes": size, "held_seconds": sorted(held)[2], "whole_seconds": sorted(whole)[2]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--longest", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    results, saved = [], []
    for attention in ("softmax", "gka"):
        with tempfile.TemporaryDirectory() as name:
            home = Path(name)
            for script in ("tok_train", "data_prep"):
                assert run_script(script, "configs/laptop.toml", *TINY, home=home).returncode == 0
            saved = saved or [saving(home, depth) for depth in (4, 8)]
            results.append(
                soak(
                    home, kills=args.kills, steps=args.steps, longest=args.longest, seed=args.seed, attention=attention
                )
            )
    facts = {"commit": commit(), "machine": processor(), "date": time.strftime("%Y-%m-%d"), "command": sys.argv}
    args.out.write_text(json.dumps(facts | {"soaks": results, "saving": saved}, indent=1) + "\n")
    print(json.dumps([{k: v for k, v in r.items() if k != "last_words"} for r in results + saved], indent=1))


if __name__ == "__main__":
    main()
