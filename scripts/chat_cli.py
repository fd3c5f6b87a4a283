"""Talk to a run's checkpoint: one completion, or, without a prompt, a conversation that keeps its history.

python -m scripts.chat_cli d4_gka -p "def fibonacci("
"""

import json
import time
from pathlib import Path
from typing import Annotated

import tyro

from gkachat.checkpoint import CHECKPOINTS, find_run, load_model
from gkachat.config import home
from gkachat.engine import Engine, Request, Sampling
from gkachat.machine import pick_device, pick_dtype
from scripts.cli import run

HELP = "An empty line lets it go on; Ctrl-C stops an answer; /reset forgets, /stats, /save FILE, /load FILE, /quit."


def main(
    run_name: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")] = None,
    prompt: Annotated[str | None, tyro.conf.arg(aliases=["-p"])] = None,
    temperature: float = 0.8,
    top_k: int | None = 50,
    top_p: float | None = None,
    max_tokens: int = 200,
    seed: int = 42,
    step: int | None = None,
    device: str = "auto",
) -> None:
    """Stream what the model writes after a prompt.

    Args:
        run_name: A run's name, or the path of its directory; by default the run with the newest checkpoint.
        prompt: Text to go on from; without it, lines are read from the terminal and the text so far is the context.
        temperature: 0 takes the likeliest token each time.
        top_k: Sample among so many likeliest tokens only.
        top_p: Sample among the likeliest tokens that reach this probability only.
        max_tokens: Longest completion.
        seed: Of the sampling.
        step: Which checkpoint; by default the last.
        device: A torch device, or auto.
    """
    run_dir = find_run(newest_run() if run_name is None else run_name)
    model, tokenizer, meta = load_model(run_dir, pick_device(device), step)
    model.prepare(pick_dtype("auto", pick_device(device)))
    engine, limit = Engine(model, tokenizer), model.config.sequence_len

    def answer(turns: list[list[int]], seed: int) -> tuple[list[int], str]:
        """Print what follows, as it comes; its tokens, and how long it took."""
        most = limit - 1 - min(max_tokens, limit // 2)
        while len(turns) > 1 and sum(map(len, turns)) > most:
            del turns[0]
        tokens = [token for turn in turns for token in turn][-most:]  # of a single turn that is too long, its end
        settings = Sampling(max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
        said, start, why = [], time.perf_counter(), "Ctrl-C"
        try:
            for piece in engine.run([Request(tokens, settings)], rows=1):
                print(piece.text, end="", flush=True)
                said += [] if piece.token is None else [piece.token]
                why = piece.finished
        except KeyboardInterrupt:
            pass
        print()
        seconds = time.perf_counter() - start
        return said, f"{len(tokens)} tokens read, {len(said)} written in {seconds:.2f} s, ended by {why}"

    if prompt is not None:
        print(prompt, end="", flush=True)
        answer([tokenizer.encode(prompt)], seed)
        return
    print(f"{run_dir.name}, step {meta['step']}, {model.config.attention}. It continues the text so far.\n{HELP}")
    turns: list[list[int]] = []
    stats, turn = "nothing said yet", 0
    while (line := _read_line()) is not None and line.strip() != "/quit":
        command, _, argument = line.strip().partition(" ")
        try:
            if command == "/reset":
                turns = []
            elif command == "/stats":
                print(stats)
            elif command == "/save":
                Path(argument).write_text(json.dumps([tokenizer.decode(turn) for turn in turns]))
            elif command == "/load":
                turns = [tokenizer.encode(turn) for turn in json.loads(Path(argument).read_text())]
            elif command.startswith("/"):
                print(HELP)
            else:
                turns.append(tokenizer.encode(line))
                said, stats = answer(turns, seed + turn)
                turns.append(said)
                turn += 1
        except (OSError, ValueError, TypeError) as error:
            print(f"{command} {argument}: {error}")


def newest_run() -> str:
    """FileNotFoundError where there is none."""
    found = list((home() / "runs").glob(f"*/{CHECKPOINTS}/step_*"))
    if not found:
        raise FileNotFoundError(f"no run with a checkpoint in {home() / 'runs'}; train one, or name one")
    return max(found, key=lambda path: path.stat().st_mtime).parents[1].name


def _read_line() -> str | None:
    try:
        return input("> ")
    except (EOFError, KeyboardInterrupt):
        print()
        return None


if __name__ == "__main__":
    run(lambda: tyro.cli(main, description=__doc__))
