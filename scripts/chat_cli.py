"""Talk to a run's checkpoint: one completion, or, without a prompt, a conversation that keeps its history.

python -m scripts.chat_cli d4_gka -p "def fibonacci("
"""

from typing import Annotated

import tyro

from gkachat.checkpoint import find_run, load_model
from gkachat.engine import Engine
from gkachat.machine import pick_device, pick_dtype
from scripts.cli import run


def main(
    run_name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")],
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
        run_name: A run's name, or the path of its directory.
        prompt: Text to go on from; without it, lines are read from the terminal and the text so far is the context.
        temperature: 0 takes the likeliest token each time.
        top_k: Sample among so many likeliest tokens only.
        top_p: Sample among the likeliest tokens that reach this probability only.
        max_tokens: Longest completion.
        seed: Of the sampling.
        step: Which checkpoint; by default the last.
        device: A torch device, or auto.
    """
    model, tokenizer, meta = load_model(find_run(run_name), pick_device(device), step)
    model.prepare(pick_dtype("auto", pick_device(device)))
    engine = Engine(model, tokenizer)

    def complete(context: list[int], seed: int) -> list[int]:
        """Print the completion as it comes and return its tokens."""
        tokens = []

        def remember():
            settings = {"max_tokens": max_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p}
            for token in engine.generate(context, seed=seed, **settings):
                tokens.append(token)
                yield token

        for text in engine.stream(remember()):
            print(text, end="", flush=True)
        print()
        return tokens

    if prompt is not None:
        print(prompt, end="", flush=True)
        complete(tokenizer.encode(prompt), seed)
        return
    print(f"{run_name}, step {meta['step']}, {meta['config']['model']['attention']}. It continues the text so far.")
    print("An empty line lets it go on, /clear forgets, /quit or Ctrl-D ends.")
    context: list[int] = []
    turn = 0
    while (line := _read_line()) is not None and line.strip() != "/quit":
        if line.strip() == "/clear":
            context = []
            continue
        context += tokenizer.encode(line)
        context += complete(context, seed + turn)
        turn += 1


def _read_line() -> str | None:
    try:
        return input("> ")
    except EOFError:
        print()
        return None


if __name__ == "__main__":
    run(lambda: tyro.cli(main, description=__doc__))
