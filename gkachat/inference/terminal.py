"""Prompts at a terminal, with line editing, a history, and several lines or pasted text in one prompt.

with Terminal(sys.stdout, history=Path("chat_history")) as terminal:
    text = terminal.read()
"""

import contextlib
import sys
import termios
import tty
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from prompt_toolkit import PromptSession
from prompt_toolkit.application import create_app_session
from prompt_toolkit.enums import DEFAULT_BUFFER
from prompt_toolkit.filters import has_focus
from prompt_toolkit.history import FileHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import create_output

from gkachat.text import decode


class Terminal:
    """Prompts within `open_terminal`."""

    keys = "Alt-Enter or Ctrl-O begins another line. Pasted text is one message. Arrows bring back messages."
    """What a user should know."""

    def __init__(self, session: PromptSession[str]):
        self.session = session

    def read(self, prompt: str = "> ") -> str:
        """Return what is typed until Enter. Raises EOFError for Ctrl-D, KeyboardInterrupt, ValueError for no text."""
        try:
            text = self.session.prompt(prompt, prompt_continuation=" " * len(prompt))
        finally:
            self.mark_pasted_text()  # which the end of a prompt switches off
        return decode(text.encode("utf-8", "surrogateescape"))

    def mark_pasted_text(self) -> None:
        """Ask the terminal to put marks around pasted text, by which line ends in it are no Enter."""
        self.session.output.enable_bracketed_paste()
        self.session.output.flush()


@contextlib.contextmanager
def open_terminal(stream: TextIO, history: Path) -> Iterator[Terminal]:
    """Yield the terminal at stdin. Prompts and what is typed show on `stream`, stdout or stderr.

    Within the context, the terminal passes on each key and does not echo it. What is typed or pasted while an answer
    is printed then waits for the next prompt. A terminal that collects lines would cut them at 4,095 bytes.
    """
    output, modes = create_output(stream), termios.tcgetattr(sys.stdin)
    output.enable_cpr = False  # the cursor's position serves menus, and some terminals do not tell it
    # Given to PromptSession itself, the output would draw on terminals that cannot move their cursor (TERM=dumb).
    with create_app_session(output=output):
        keys = _key_bindings()
        terminal = Terminal(PromptSession(history=_History(history), key_bindings=keys, multiline=True))
        tty.setcbreak(sys.stdin)
        try:
            terminal.mark_pasted_text()
            yield terminal
        finally:
            output.disable_bracketed_paste()
            output.flush()
            termios.tcsetattr(sys.stdin, termios.TCSADRAIN, modes)


class _History(FileHistory):
    """History in a file, and only in memory where that cannot be written."""

    def store_string(self, string: str) -> None:
        with contextlib.suppress(OSError):
            super().store_string(string)


def _key_bindings() -> KeyBindings:
    keys, in_text = KeyBindings(), has_focus(DEFAULT_BUFFER)

    @keys.add("enter", filter=in_text)
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter", filter=in_text)
    @keys.add("c-o", filter=in_text)
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys
