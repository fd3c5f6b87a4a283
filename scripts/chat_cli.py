"""Chat with a trained run in the terminal. A run that was tuned on conversations answers; any other continues the text.

python -m scripts.chat_cli d4_gka_chat
python -m scripts.chat_cli d4_softmax_chat --compare d4_gka_chat
python -m scripts.chat_cli d4_gka -p "def fibonacci("
python -m scripts.chat_cli d4_gka_chat --json < messages.txt

Without a terminal, each line of stdin is a message, and an error at the end lists those that could not be answered.
With --json, stdout has one line with a JSON object for each answer, or with `error` for a message that cannot be
answered, and all else goes to stderr. A message may then be {"messages": [...]}, which is answered apart from the
conversation.
"""

import contextlib
import dataclasses
import itertools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from gkachat.config import home
from gkachat.data.conversations import Messages, check_history, check_messages
from gkachat.files import read_json, write_text
from gkachat.text import check_text, decode, expand, lines, list_some, parse_json, visible
from scripts.cli import run

if TYPE_CHECKING:
    from gkachat.inference.chat import ChatSession
    from gkachat.inference.sampling import Sampling
    from gkachat.inference.terminal import Terminal


def main(
    run_name: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="[RUN]")] = None,
    prompt: Annotated[str | None, tyro.conf.arg(aliases=["-p"])] = None,
    compare: str | None = None,
    as_json: Annotated[bool, tyro.conf.arg(name="json"), tyro.conf.FlagCreatePairsOff] = False,
    system: str = "",
    temperature: float = 0.8,
    top_k: int | None = 50,
    top_p: float | None = None,
    max_tokens: int = 200,
    seed: int = 42,
    step: int | None = None,
    device: str = "auto",
    int8: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
) -> None:
    """Stream the model's answers.

    Args:
        run_name: Name of a run, or path of its directory; by default the run with the newest checkpoint.
        prompt: Answer this message and exit. By default, messages are read from the terminal or from stdin.
        compare: Another run, which gets the same messages.
        as_json: Print each answer as a line with a JSON object.
        system: System message of a tuned run.
        temperature: Sampling temperature; 0 always takes the likeliest token.
        top_k: Sample among this many likeliest tokens.
        top_p: Sample among the likeliest tokens that together reach this probability.
        max_tokens: Tokens of an answer, at most.
        seed: Seed of the samples.
        step: Step of the checkpoint; by default the last.
        device: Torch device, or auto.
        int8: Store matrices in int8, which takes less memory.
    """
    from gkachat.inference.chat import ChatSession
    from gkachat.inference.sampling import Sampling

    names = [run_name or newest_run(), *([compare] if compare else [])]
    sampling = Sampling(max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    opened = contextlib.nullcontext()
    if prompt is None and sys.stdin.isatty():
        from gkachat.inference.terminal import open_terminal

        stream = sys.stdout if sys.stdout.isatty() and not as_json else sys.stderr
        opened = open_terminal(stream, history=home() / "chat_history")
    with opened as terminal:
        sessions = [ChatSession.from_run(name, step=step, device=device, int8=int8) for name in names]
        chat = Chat(sessions, sampling, as_json, terminal)
        if system:
            chat.set_system(system)
        if prompt is None:
            chat.loop()
            return
        prompt = prompt.replace("\r\n", "\n").removesuffix("\r")  # of a file with such line ends
        if not sessions[0].is_tuned and not as_json and not compare:
            print(prompt, end="")  # the answer continues it
        chat.ask(prompt)


class Chat:
    """Sends each message to one or two sessions, and prints their answers."""

    def __init__(
        self, sessions: "list[ChatSession]", sampling: "Sampling", as_json: bool, terminal: "Terminal | None" = None
    ):
        self.sessions, self.sampling, self.as_json, self.terminal = sessions, sampling, as_json, terminal

    def loop(self) -> None:
        """Answer messages and run commands until the input ends.

        An error fails its message alone. With `as_json`, an object with `error` answers it. Without a terminal,
        ValueError that lists them is raised at the end.
        """
        stdin, errors = None if self.terminal else iter(lines(sys.stdin.buffer)), []
        if self.terminal:
            for session in self.sessions:
                does = "answers" if session.is_tuned else "continues the text so far"
                self.say(f"{session.name}, step {session.step}, {session.engine.model.config.attention}: {does}.")
            self.help("")
        for number in itertools.count(1):
            message = ""
            try:
                message = self.terminal.read() if self.terminal else next_line(stdin)
                self.respond(message)
            except EOFError:  # the end of the input, or /quit
                break
            except KeyboardInterrupt:  # at the prompt; _print_answers handles Ctrl-C during an answer
                if not self.terminal:
                    raise
                self.say("/quit or Ctrl-D ends.")
            except BrokenPipeError:  # nobody reads the answers any more
                raise
            except (OSError, ValueError) as error:
                errors.append(f"{message.strip()[:80] or f'line {number}'}: {error}")
                if self.as_json:
                    print_json({"prompt": message, "error": str(error)})
                elif self.terminal:
                    self.say(errors[-1])
        if errors and not self.terminal:
            raise ValueError(list_some(errors))

    def respond(self, message: str) -> None:
        """Run a command, where the message begins with the name of one, and otherwise answer it."""
        name, _, argument = message.partition(" ")
        if self.as_json and message.lstrip().startswith("{"):
            self.answer(check_messages(parse_json(message).get("messages")))
        elif name.rstrip() in COMMANDS:
            command, _ = COMMANDS[name.rstrip()]
            command(self, argument.strip())
        else:
            self.ask(message)

    def say(self, text: str) -> None:
        """Print what is no answer: on stderr where stdout has JSON."""
        print(text, file=sys.stderr if self.as_json else sys.stdout, flush=True)

    def ask(self, text: str) -> None:
        """Print the answers to a message, and add both to the conversations."""
        check_text(text)
        sampling = self.sampling
        self.sampling = dataclasses.replace(sampling, seed=sampling.seed + 1)  # each turn has a seed of its own
        self._print_answers(text, [session.ask(text, sampling) for session in self.sessions])

    def answer(self, messages: Messages) -> None:
        """Print the answers to messages that are not part of the conversations."""
        for message in messages:
            check_text(message["content"])
        if messages[-1]["role"] != "user":
            raise ValueError(f"the last message: given role {messages[-1]['role']!r}, expected 'user'")
        answers = [session.answer(messages, self.sampling) for session in self.sessions]
        self._print_answers(messages[-1]["content"], answers)

    def reset(self, argument: str) -> None:
        for session in self.sessions:
            session.messages = []

    def set_system(self, argument: str) -> None:
        if not self.sessions[0].is_tuned:
            raise ValueError("this run was not tuned on conversations: it only continues text")
        for session in self.sessions:
            session.system = check_text(argument)

    def save(self, argument: str) -> None:
        histories = [session.messages for session in self.sessions]
        file = self.file(argument, "/save")
        write_text(file, json.dumps({"system": self.sessions[0].system, "histories": histories}) + "\n")
        self.say(f"saved {file}")

    def load(self, argument: str) -> None:
        stored = read_json(self.file(argument, "/load"), histories=list)
        histories = [check_history(history) for history in stored["histories"]]
        if len(histories) != len(self.sessions):
            raise ValueError(f"the file has {len(histories)} conversations, expected {len(self.sessions)}")
        for session, history in zip(self.sessions, histories, strict=True):
            session.messages, session.system = history, str(stored.get("system", ""))

    def file(self, argument: str, command: str) -> Path:
        """Return the file that follows a command, or that is typed at its prompt. Raises ValueError without one."""
        if not argument and self.terminal:
            argument = self.terminal.read("file: ").strip()
        if not argument:
            raise ValueError(f"no file is named; give one, as in {command} talk.json")
        return expand(argument)

    def stats(self, argument: str) -> None:
        for session in self.sessions:
            self.say(", ".join(f"{key} {value}" for key, value in session.stats.items()) or "no answer yet")

    def help(self, argument: str) -> None:
        for _, text in COMMANDS.values():
            self.say(text)
        if self.terminal:
            self.say(self.terminal.keys)
        self.say("An empty line continues the text of a run that was not tuned. Ctrl-C stops an answer.")

    def quit(self, argument: str) -> None:
        raise EOFError

    def _print_answers(self, prompt: str, answers: Sequence[Iterator[str]]) -> None:
        """Print streamed answers: side by side in a terminal, otherwise one after the other. Ctrl-C ends them."""
        if len(answers) > 1 and sys.stdout.isatty() and not self.as_json:
            print_side_by_side([session.name for session in self.sessions], answers)
            for session in self.sessions:
                say_what_is_left_out(session)
            return
        for session, answer in zip(self.sessions, answers, strict=True):
            text, interrupted = "", False
            if len(answers) > 1 and not self.as_json:
                print(f"{session.name}: ", end="")
            try:
                for part in answer:
                    text += part
                    if not self.as_json:
                        print(visible(part) if sys.stdout.isatty() else part, end="", flush=True)
            except KeyboardInterrupt:
                answer.close()
                interrupted = True
            if self.as_json:
                print_json({"prompt": prompt, "answer": text} | session.stats)
            else:
                print()
                say_what_is_left_out(session)
            if interrupted:
                return


COMMANDS: dict[str, tuple[Callable[[Chat, str], None], str]] = {
    "/reset": (Chat.reset, "/reset         forget the conversation"),
    "/system": (Chat.set_system, "/system TEXT   set the system message of a tuned run; without TEXT, remove it"),
    "/save": (Chat.save, "/save FILE     write the conversation to a file; without FILE, ask for one"),
    "/load": (Chat.load, "/load FILE     continue a saved conversation; without FILE, ask for one"),
    "/stats": (Chat.stats, "/stats         show figures of the last answer"),
    "/help": (Chat.help, "/help          show this list"),
    "/quit": (Chat.quit, "/quit          end, like Ctrl-D"),
}


def print_json(value: dict[str, Any]) -> None:
    """Print a line with a JSON object."""
    print(json.dumps(value, ensure_ascii=False), flush=True)


def say_what_is_left_out(session: "ChatSession") -> None:
    """Print on stderr how much of the conversation did not fit the context for the last answer, if some did not."""
    if left_out := session.stats.get("tokens_left_out"):
        context = session.engine.model.config.sequence_len
        print(f"({session.name} left out {left_out} older tokens: its context is {context} tokens)", file=sys.stderr)


def next_line(stdin: Iterator[bytes]) -> str:
    """Return the next line of stdin without its end. Raises EOFError after the last, ValueError where it is no text."""
    if (line := next(stdin, None)) is None:
        raise EOFError
    return decode(line).removesuffix("\n").removesuffix("\r")


def print_side_by_side(names: Sequence[str], answers: Sequence[Iterator[str]]) -> None:
    """Stream answers in the columns of a table, one token of each at a time. Ctrl-C ends all of them."""
    from rich.live import Live
    from rich.table import Table
    from rich.text import Text

    texts = [Text() for _ in answers]
    table = Table(*names, expand=True)
    table.add_row(*texts)
    with Live(table, refresh_per_second=10, vertical_overflow="visible"):
        try:
            for parts in itertools.zip_longest(*answers, fillvalue=""):
                for text, part in zip(texts, parts, strict=True):
                    text.append(visible(part))
        except KeyboardInterrupt:
            for answer in answers:
                answer.close()


def newest_run() -> str:
    """Return the name of the run with the newest checkpoint. Raises FileNotFoundError if there is none."""
    from gkachat.checkpoint import CHECKPOINTS

    runs = (path.parent for path in (home() / "runs").glob("*/tokenizer.json"))  # only language models have one
    checkpoints = [step for run in runs for step in run.glob(f"{CHECKPOINTS}/step_*")]
    if not checkpoints:
        raise FileNotFoundError(f"no run with a checkpoint in {home() / 'runs'}; train one, or name one")
    return max(checkpoints, key=lambda path: path.stat().st_mtime).parents[1].name


if __name__ == "__main__":
    run(main, __doc__)
