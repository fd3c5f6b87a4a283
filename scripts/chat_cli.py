"""Chat with a trained run in the terminal. A run that was tuned on conversations answers; any other continues the text.

python -m scripts.chat_cli d4_gka_chat
python -m scripts.chat_cli d4_softmax_chat --compare d4_gka_chat
python -m scripts.chat_cli d4_gka -p "def fibonacci("
python -m scripts.chat_cli d4_gka_chat --json < messages.txt

Without a terminal, each line of stdin is a message. With --json, each answer is a line with a JSON object. A line of
stdin may then be {"messages": [...]}, which is answered by itself, apart from the conversation. A line that cannot be
answered gives an object with `error`, and exit code 1 at the end.
"""

import dataclasses
import itertools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated

import tyro

from gkachat.config import home
from gkachat.data.conversations import Messages, check_history, check_messages
from gkachat.files import read_json, write_text
from gkachat.text import check_text, decode, expand, lines, list_some, parse_json
from scripts.cli import run

if TYPE_CHECKING:
    from gkachat.inference.chat import ChatSession
    from gkachat.inference.sampling import Sampling


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
    sessions = [ChatSession.from_run(name, step=step, device=device, int8=int8) for name in names]
    chat = Chat(sessions, sampling, as_json)
    if system:
        chat.set_system(system)
    if prompt is None:
        chat.loop(at_terminal=sys.stdin.isatty())
        return
    prompt = prompt.replace("\r\n", "\n").removesuffix("\r")  # of a file with such line ends
    if not sessions[0].is_tuned and not as_json and not compare:
        print(prompt, end="")  # the answer continues it
    chat.ask(prompt)


class Chat:
    """Sends each message to one or two sessions, and prints their answers."""

    def __init__(self, sessions: "list[ChatSession]", sampling: "Sampling", as_json: bool):
        self.sessions, self.sampling, self.as_json = sessions, sampling, as_json

    def loop(self, at_terminal: bool) -> None:
        """Answer lines and run commands until the input ends.

        Without a terminal, an error ends the loop too. With `as_json`, a line that has one is answered by an object
        with `error`, and ValueError that lists them is raised at the end.
        """
        stdin, errors, number = None if at_terminal else iter(lines(sys.stdin.buffer)), [], 0
        if at_terminal:
            for session in self.sessions:
                does = "answers" if session.is_tuned else "continues the text so far"
                print(f"{session.name}, step {session.step}, {session.engine.model.config.attention}: {does}.")
            self.help("")
        while True:
            line, number = "", number + 1
            try:
                line = input("> ") if at_terminal else next_line(stdin)
                if self.as_json and line.lstrip().startswith("{"):
                    self.answer(check_messages(parse_json(line).get("messages")))
                elif line.startswith("/"):
                    name, _, argument = line.strip().partition(" ")
                    command, _ = COMMANDS.get(name, COMMANDS["/help"])
                    command(self, argument)
                else:
                    self.ask(line)
            except EOFError:  # the end of the input, or /quit
                if errors:
                    raise ValueError(list_some(errors)) from None
                return
            except KeyboardInterrupt:  # at the prompt; _print_answers handles Ctrl-C during an answer
                if not at_terminal:
                    raise
                print("\n/quit or Ctrl-D ends.")
            except (OSError, ValueError) as error:
                message = f"{line.strip()[:80] or f'line {number}'}: {error}"
                if at_terminal:
                    print(message)
                elif self.as_json:
                    errors.append(message)
                    print(json.dumps({"prompt": line, "error": str(error)}, ensure_ascii=False), flush=True)
                else:
                    raise ValueError(message) from None

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
        write_text(expand(argument), json.dumps({"system": self.sessions[0].system, "histories": histories}) + "\n")

    def load(self, argument: str) -> None:
        stored = read_json(expand(argument), histories=list)
        histories = [check_history(history) for history in stored["histories"]]
        if len(histories) != len(self.sessions):
            raise ValueError(f"the file has {len(histories)} conversations, expected {len(self.sessions)}")
        for session, history in zip(self.sessions, histories, strict=True):
            session.messages, session.system = history, str(stored.get("system", ""))

    def stats(self, argument: str) -> None:
        for session in self.sessions:
            print(", ".join(f"{key} {value}" for key, value in session.stats.items()) or "no answer yet")

    def help(self, argument: str) -> None:
        for _, text in COMMANDS.values():
            print(text)
        print("An empty line continues the text of a run that was not tuned. Ctrl-C stops an answer.")

    def quit(self, argument: str) -> None:
        raise EOFError

    def _print_answers(self, prompt: str, answers: Sequence[Iterator[str]]) -> None:
        """Print streamed answers: side by side in a terminal, otherwise one after the other. Ctrl-C ends them."""
        if len(answers) > 1 and sys.stdout.isatty() and not self.as_json:
            print_side_by_side([session.name for session in self.sessions], answers)
            return
        for session, answer in zip(self.sessions, answers, strict=True):
            text, interrupted = "", False
            if len(answers) > 1 and not self.as_json:
                print(f"{session.name}: ", end="")
            try:
                for part in answer:
                    text += part
                    if not self.as_json:
                        print(part, end="", flush=True)
            except KeyboardInterrupt:
                answer.close()
                interrupted = True
            if self.as_json:
                print(json.dumps({"prompt": prompt, "answer": text} | session.stats, ensure_ascii=False), flush=True)
            else:
                print()
            if interrupted:
                return


COMMANDS: dict[str, tuple[Callable[[Chat, str], None], str]] = {
    "/reset": (Chat.reset, "/reset         forget the conversation"),
    "/system": (Chat.set_system, "/system TEXT   set the system message of a tuned run; without TEXT, remove it"),
    "/save": (Chat.save, "/save FILE     write the conversation to a file"),
    "/load": (Chat.load, "/load FILE     continue a saved conversation"),
    "/stats": (Chat.stats, "/stats         show figures of the last answer"),
    "/help": (Chat.help, "/help          show this list"),
    "/quit": (Chat.quit, "/quit          end, like Ctrl-D"),
}


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
                    text.append(part)
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
