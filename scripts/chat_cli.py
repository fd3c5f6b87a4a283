"""Talk to a run's checkpoint. A run that was tuned on conversations answers; any other continues the text so far.

python -m scripts.chat_cli d4_gka_chat
python -m scripts.chat_cli d4_softmax_chat --compare d4_gka_chat
python -m scripts.chat_cli d4_gka -p "def fibonacci("
echo "What is 34 + 57?" | python -m scripts.chat_cli d4_gka_chat --json

Without a terminal every line of stdin is the next thing said. With --json an answer is a JSON object a line, and a line
may be one too: {"messages": [...]} is answered by itself, whatever was said before.
"""

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import tyro

from gkachat.checkpoint import CHECKPOINTS, find_run, load_model
from gkachat.config import home
from gkachat.data.conversations import Messages, check, prompt
from gkachat.files import write_text
from gkachat.inference.engine import Engine, Piece, Request
from gkachat.inference.quantize import for_inference
from gkachat.inference.sampling import Sampling
from gkachat.machine import pick_device, pick_dtype
from scripts.cli import run

HELP = """An empty line lets a run that was not tuned go on; Ctrl-C stops an answer.
/reset forgets what was said    /system TEXT  what to keep in mind (a tuned run; without TEXT: nothing)
/save FILE, /load FILE          /stats  of the last answer    /help    /quit"""


class Speaker:
    """A model, and what it is given to answer."""

    def __init__(self, run_name: str, step: int | None, device: str, int8: bool):
        where = pick_device(device)
        self.run_dir = find_run(run_name)
        model, self.tokenizer, self.meta = load_model(self.run_dir, where, step)
        self.model = for_inference(model, pick_dtype("auto", where), int8)
        self.engine, self.limit = Engine(self.model, self.tokenizer), model.config.sequence_len
        self.is_tuned = "chat" in self.meta["config"]
        self.stats: dict[str, Any] = {}
        self.said: dict[str, list[int]] = {}  # ids of its answers: one that was cut within a character has no such text

    def ids(self, messages: Messages, room: int) -> list[int]:
        """What was said, cut to leave `room` tokens (half of the context at most): by whole turns, the oldest first."""
        most, messages = self.limit - min(room, self.limit // 2), list(messages)
        system = messages[:1] if messages[0]["role"] == "system" else []
        while len(ids := self._rendered(messages)) > most and len(messages) > len(system) + 1:
            del messages[len(system) : len(system) + 2]
        kept = 2 if self.is_tuned else 1  # BOS, and that the user speaks; of a turn that is too long, its end
        return ids if len(ids) <= most else ids[:kept] + ids[len(ids) - most + kept :]

    def _rendered(self, messages: Messages) -> list[int]:
        if self.is_tuned:
            return prompt(self.tokenizer, messages)
        texts = [m["content"] for m in messages if m["role"] != "system"]
        return [
            self.tokenizer.bos,
            *(id for text in texts for id in self.said.get(text) or self.tokenizer.encode(text)),
        ]

    def answer(self, messages: Messages, **settings: Any) -> Iterator[str]:
        """What follows, as it comes; `stats` then tells how it went, also of an answer that was cut short."""
        ids, start, said, text, piece = self.ids(messages, settings["max_tokens"]), time.perf_counter(), [], "", None
        stops = tuple(self.tokenizer.special.values()) if self.is_tuned else ()
        try:
            for piece in self.engine.run([Request(ids[1:], Sampling(stop_tokens=stops, **settings))], rows=1):
                said += [] if piece.token is None else [piece.token]
                text += piece.text
                yield piece.text
        finally:
            self.said[text] = said
            self.stats = {
                "run": self.run_dir.name, "tokens_read": len(ids), "tokens_written": len(said),
                "seconds": round(time.perf_counter() - start, 3), "finished": _why(piece),
            }  # fmt: skip


def _why(piece: Piece | None) -> str:
    return (piece and piece.finished) or "interrupted"


class Conversation:
    """What was said to one or two speakers, each of which remembers its own answers."""

    def __init__(self, speakers: Sequence[Speaker], as_json: bool, seed: int, **settings: Any):
        self.speakers, self.as_json, self.seed, self.settings = speakers, as_json, seed, settings
        self.system, self.turns = "", 0
        self.histories: list[list[dict[str, str]]] = [[] for _ in speakers]

    def say(self, text: str) -> None:
        """Print the answers to it, and keep both."""
        before = [{"role": "system", "content": self.system}] if self.system else []
        for history in self.histories:
            history.append({"role": "user", "content": text})
        answers = self._answers([[*before, *history] for history in self.histories])
        for history, answer in zip(self.histories, answers, strict=True):
            history.append({"role": "assistant", "content": answer})
        self.turns += 1

    def answer_alone(self, messages: Messages) -> None:
        self._answers([messages] * len(self.speakers))

    def _answers(self, asked: Sequence[Messages]) -> list[str]:
        settings = self.settings | {"seed": self.seed + self.turns}
        streams = [s.answer(messages, **settings) for s, messages in zip(self.speakers, asked, strict=True)]
        answers = [""] * len(streams)
        with _shown([s.run_dir.name for s in self.speakers], answers, self.as_json) as show:
            try:
                going = list(enumerate(streams))
                while going:  # in turns where they stand side by side
                    for number, stream in list(going if show.together else going[:1]):
                        if (text := next(stream, None)) is None:
                            going.remove((number, stream))
                        else:
                            answers[number] += text
                            show(number, text)
            except KeyboardInterrupt:
                for stream in streams:
                    stream.close()
        if self.as_json:
            for speaker, messages, answer in zip(self.speakers, asked, answers, strict=True):
                said = {"prompt": messages[-1]["content"], "answer": answer}
                print(json.dumps(said | speaker.stats, ensure_ascii=False), flush=True)
        return answers

    def command(self, line: str) -> None:
        """Raises ValueError or OSError for one that cannot be done."""
        name, _, argument = line.partition(" ")
        if name == "/reset":
            self.histories = [[] for _ in self.speakers]
        elif name == "/system":
            if not self.speakers[0].is_tuned:
                raise ValueError("this run was not tuned on conversations: it only continues text")
            self.system = argument
        elif name == "/stats":
            for speaker in self.speakers:
                print(", ".join(f"{key} {value}" for key, value in speaker.stats.items()) or "nothing said yet")
        elif name == "/save":
            write_text(Path(argument), json.dumps({"system": self.system, "histories": self.histories}) + "\n")
        elif name == "/load":
            stored = json.loads(Path(argument).read_text())
            histories = stored["histories"] if isinstance(stored, dict) else None
            if not isinstance(histories, list) or len(histories) != len(self.speakers):
                raise ValueError(f"expected what /save wrote of {len(self.speakers)} speakers")
            self.system, self.histories = str(stored.get("system", "")), [h and list(check(h)) for h in histories]
        else:
            print(HELP)


@contextmanager
def _shown(names: Sequence[str], answers: list[str], as_json: bool) -> Iterator[Any]:
    """A function that shows the next words of a speaker: side by side on a terminal, else one after the other."""
    together = len(names) > 1 and not as_json and sys.stdout.isatty()
    if together:
        from rich.live import Live
        from rich.table import Table
        from rich.text import Text

        def table() -> Table:
            side_by_side = Table(*names, expand=True)
            side_by_side.add_row(*map(Text, answers))
            return side_by_side

        with Live(table(), refresh_per_second=10, vertical_overflow="visible") as live:

            def show(number: int, text: str) -> None:
                live.update(table())

            show.together = True
            yield show
        return
    spoken: list[int] = []

    def show(number: int, text: str) -> None:
        if as_json:
            return
        if len(names) > 1 and number not in spoken:
            print(f"{chr(10) if spoken else ''}{names[number]}: ", end="")
            spoken.append(number)
        print(text, end="", flush=True)

    show.together = False
    yield show
    if not as_json:
        print()


def main(
    run_name: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")] = None,
    prompt: Annotated[str | None, tyro.conf.arg(aliases=["-p"])] = None,
    compare: str | None = None,
    json: bool = False,
    system: str = "",
    temperature: float = 0.8,
    top_k: int | None = 50,
    top_p: float | None = None,
    max_tokens: int = 200,
    seed: int = 42,
    step: int | None = None,
    device: str = "auto",
    int8: bool = False,
) -> None:
    """Stream what the model answers.

    Args:
        run_name: A run's name, or the path of its directory; by default the run with the newest checkpoint.
        prompt: Say this, and end; otherwise lines are read from the terminal, or from stdin.
        compare: Another run, which is asked the same.
        json: Answer in JSON, an object a line.
        system: What a tuned run should keep in mind.
        temperature: 0 takes the likeliest token each time.
        top_k: Sample among so many likeliest tokens only.
        top_p: Sample among the likeliest tokens that together reach this probability.
        max_tokens: Tokens to generate at most.
        seed: Decides the samples.
        step: Which checkpoint; by default the last.
        device: A torch device, or auto.
        int8: Keep matrices as bytes: less memory, on a GPU less time.
    """
    names = [run_name or newest_run(), *([compare] if compare else [])]
    speakers = [Speaker(name, step, device, int8) for name in names]
    settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "max_tokens": max_tokens}
    conversation = Conversation(speakers, json, seed, **settings)
    if system:
        conversation.command(f"/system {system}")
    if prompt is not None:
        if not speakers[0].is_tuned and not json and not compare:
            print(prompt, end="")  # the text that goes on
        conversation.say(prompt)
        return
    at_terminal = sys.stdin.isatty()
    if at_terminal:
        for s in speakers:
            kind = "answers" if s.is_tuned else "continues the text so far"
            print(f"{s.run_dir.name}, step {s.meta['step']}, {s.model.config.attention}: {kind}.")
        print(HELP)
    for line in _lines("> " if at_terminal else ""):
        try:
            if json and line.lstrip().startswith("{"):
                conversation.answer_alone(_messages_in(line))
            elif line.startswith("/"):
                if line.strip() == "/quit":
                    return
                conversation.command(line.strip())
            else:
                conversation.say(line)
        except KeyboardInterrupt:  # an instant before or after the answer
            continue
        except (OSError, ValueError, TypeError, KeyError) as error:
            if not at_terminal:
                raise ValueError(f"{line.strip():.80}: {error}") from None
            print(f"{line.strip():.80}: {error}")


def newest_run() -> str:
    """FileNotFoundError where there is none."""
    runs = (path.parent for path in (home() / "runs").glob("*/tokenizer.json"))  # those of language models
    found = [step for run in runs for step in run.glob(f"{CHECKPOINTS}/step_*")]
    if not found:
        raise FileNotFoundError(f"no run with a checkpoint in {home() / 'runs'}; train one, or name one")
    return max(found, key=lambda path: path.stat().st_mtime).parents[1].name


def _messages_in(line: str) -> Messages:
    row = json.loads(line)
    messages = check(row.get("messages"))
    if messages[-1]["role"] != "user":
        raise ValueError(f"the last message: given role {messages[-1]['role']!r}, expected 'user'")
    return messages


def _lines(before: str) -> Iterator[str]:
    """Until the input ends. Ctrl-C at a terminal only begins the line anew."""
    while True:
        try:
            yield input(before)
        except EOFError:
            return
        except KeyboardInterrupt:
            if not before:
                raise
            print("\n/quit or Ctrl-D ends.")


if __name__ == "__main__":
    run(lambda: tyro.cli(main, description=__doc__))
