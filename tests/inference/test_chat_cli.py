"""Chat in the terminal and by scripts: a run that was tuned on conversations, and one that was not."""

import contextlib
import fcntl
import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios

import pytest
import torch
from conftest import ROOT, call, untrained_run

from gkachat.config import ATTENTIONS
from gkachat.data.conversations import render_prompt
from gkachat.inference.chat import ChatSession
from gkachat.inference.sampling import Sampling
from gkachat.tokenizer import Tokenizer, train_tokenizer
from scripts import chat_cli
from scripts.cli import run

TURNS = [{"role": ("user", "assistant")[i % 2], "content": f"turn {i}"} for i in range(7)]
CONTEXT = 32  # tokens


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Home with two runs: `base`, and `chat`, which is the newest."""
    home = tmp_path_factory.mktemp("home")
    tokenizer = train_tokenizer(["import os\ndef f(x = 1):\n turn 0 1 2 3 4 5 6 é 漢\n" * 9], 300)
    torch.manual_seed(0)
    for name, tuned in (("base", False), ("chat", True)):
        untrained_run(home, name, tokenizer, tuned=tuned, sequence_len=CONTEXT)
    return home


@pytest.fixture
def chat(home, monkeypatch, capsys):
    """Function that runs the script on lines of stdin and returns what it prints."""
    monkeypatch.setenv("GKACHAT_HOME", str(home))

    def chat(run, *lines, **options):
        stdin = b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines)
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BufferedReader(io.BytesIO(stdin))))
        chat_cli.main(run, device="cpu", **{"max_tokens": 4} | options)
        return capsys.readouterr().out

    return chat


@pytest.fixture
def session(home, monkeypatch):
    monkeypatch.setenv("GKACHAT_HOME", str(home))
    return lambda run: ChatSession.from_run(run, device="cpu")


def test_a_base_run_continues_the_prompt_and_the_seed_decides_how(chat):
    a, b, c = (chat("base", prompt="def f(", max_tokens=12, seed=seed) for seed in (1, 1, 2))
    assert a == b != c
    assert a.startswith("def f(") and len(a) > len("def f(\n")


def test_a_base_run_continues_its_own_answer_from_the_very_same_tokens(chat):
    def answers(max_tokens, *lines):
        out = chat("base", *lines, as_json=True, temperature=0, max_tokens=max_tokens)
        return [json.loads(line)["answer"] for line in out.splitlines()]

    two, one = answers(4, "import", "", "/quit", "not read"), answers(8, "import")
    # A character that is cut between two answers shows as U+FFFD.
    assert len(two) == 2 and "".join(two).replace("\ufffd", "") == one[0].replace("\ufffd", "")


def test_commands_show_save_forget_and_load_the_conversation(chat, tmp_path):
    saved = tmp_path / "talk.json"
    out = chat(
        None, "/stats", "/system be kind", "turn 1", "/stats", f"/save {saved}", "/reset", f"/load {saved}", "/help"
    )
    assert "no answer yet" in out and "Ctrl-C stops an answer" in out
    assert re.search(
        r"run chat, tokens_read \d+, tokens_left_out 0, tokens_written \d, seconds [\d.]+, finished (max_tokens|stop)",
        out,
    )
    stored = json.loads(saved.read_text())
    assert stored["system"] == "be kind" and stored["histories"][0][0] == {"role": "user", "content": "turn 1"}
    again = tmp_path / "again.json"
    chat(None, f"/load {saved}", f"/save {again}", "/reset", f"/save {saved}")
    assert json.loads(again.read_text()) == stored
    assert json.loads(saved.read_text()) == {"system": "be kind", "histories": [[]]}


@pytest.mark.parametrize(
    ("content", "line", "message"),
    [
        ("", "/load /no/such/file", "/load /no/such/file: .*No such file"),
        ("[]", "/load {}", "cannot be read"),
        ('{"histories": []}', "/load {}", "has 0 conversations, expected 1"),
        ('{"histories": [3]}', "/load {}", "given 3, expected a list"),
        ('{"histories": [[{"role": "assistant", "content": ""}]]}', "/load {}", "role 'assistant', expected 'user'"),
        ('{"histories": [[{"role": "user", "content": ""}]]}', "/load {}", "role 'user', expected 'assistant'"),
        ("", "/system be kind", "not tuned on conversations"),
        ("", "/save", "/save: no file is named; give one, as in /save talk.json"),
    ],
)
def test_a_command_that_fails_is_listed_at_the_end_of_a_script(chat, capsys, tmp_path, content, line, message):
    (tmp_path / "talk.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        chat("base", line.format(tmp_path / "talk.json"), "turn", "/stats")
    assert "tokens_written" in capsys.readouterr().out


def test_scripts_get_json_and_may_give_whole_conversations(chat):
    messages = [{"role": "system", "content": "x"}, {"role": "user", "content": "Hello!"}]
    lines = ["What?", json.dumps({"messages": messages}), "/reset", "Again"]
    answers = [json.loads(line) for line in chat("chat", *lines, compare="base", as_json=True).splitlines()]
    assert [(answer["run"], answer["prompt"]) for answer in answers] == [
        (run, prompt) for prompt in ("What?", "Hello!", "Again") for run in ("chat", "base")
    ]
    assert all(0 < answer["tokens_written"] <= 4 and answer["finished"] for answer in answers)
    for bad, message in (
        ({"messages": []}, "expected a list"),
        ({"messages": TURNS[:2]}, "expected 'user'"),
        ({}, "given None"),
    ):
        with pytest.raises(ValueError, match=message):
            chat("chat", json.dumps(bad), as_json=True)


def test_a_line_that_cannot_be_answered_does_not_end_the_session(chat, capsys):
    half = {"messages": [{"role": "user", "content": "half \ud83d"}]}
    bad = [json.dumps(half), "{", '{"messages": ' + "[" * 100_000, b"\xff", "/load /no/such/file", b"\0N\0o"]
    with pytest.raises(ValueError, match=r"half of a surrogate pair, which is no text; \{: not JSON"):
        chat("chat", "What?", *bad, "And?", as_json=True)
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert ["error" in answer for answer in answers] == [False, *[True] * len(bad), False]
    assert "surrogate" in answers[1]["error"] and "not UTF-8" in answers[4]["error"] and "NUL" in answers[6]["error"]
    with pytest.raises(ValueError, match=r"^line 2: NUL characters, as in UTF-16 without .*\(iconv"):
        chat("base", b"\n\0N\0o")


def test_line_ends_and_byte_order_marks_do_not_change_answers(chat):
    def answers(data):
        out = chat("base", data, as_json=True, temperature=0, max_tokens=8)
        return [(answer["prompt"], answer["answer"]) for answer in map(json.loads, out.splitlines())]

    lines = 'import\n\n{"messages": [{"role": "user", "content": [{"type": "text", "text": "def"}]}]}\nüx\n'
    expected = answers(lines.encode())
    assert [prompt for prompt, _ in expected] == ["import", "", "def", "üx"]
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        assert answers(lines.replace("\n", "\r\n").encode(encoding)) == expected


def test_files_are_utf8_and_answers_are_printed_whatever_the_locale(home):
    """The tokenizer's file has letters beyond ASCII; the terminal here has none of them."""
    ascii_alone = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
    result = call("chat_cli", "base", "--max-tokens", "4", home=home, stdin="漢\n", **ascii_alone)
    assert result.returncode == 0, result.stderr
    shown = call("chat_cli", "base", "--max-tokens", "4", home=home, stdin="漢\n").stdout
    assert result.stdout.encode() == shown.encode("ascii", "backslashreplace")


def test_a_tilde_is_the_home_directory(home, chat, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "own").symlink_to(home)
    monkeypatch.setenv("GKACHAT_HOME", "~/own")
    assert json.loads(chat("chat", "What?", "/save ~/talk.json", "/load ~/talk.json", as_json=True))["answer"]
    assert chat("~/own/runs/chat", "What?") and (tmp_path / "talk.json").exists()


def test_compared_runs_are_named_in_front_of_their_answers(chat, tmp_path, monkeypatch):
    assert re.fullmatch(r"chat: .*\nbase: .*\n", chat("chat", prompt="turn", compare="base"), flags=re.DOTALL)
    monkeypatch.setenv("GKACHAT_HOME", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="no run with a checkpoint"):
        chat(None)


def test_the_first_answer_on_a_cpu_does_not_wait_for_torch_to_import_its_compiler(home, tmp_path):
    tokenizer = Tokenizer.load(home / "runs" / "chat")
    for attention in ATTENTIONS:  # head_dim 64 and two lengths of window, as larger models have
        shape = {"depth": 2, "n_embd": 64, "head_dim": 64, "window_pattern": "SL"}
        untrained_run(tmp_path, attention, tokenizer, attention=attention, **shape)
    code = f"""if True:
        import runpy, sys
        for run in {list(ATTENTIONS)}:
            sys.argv = ["chat_cli", run, "-p", "What is 2 + 3?", "--max-tokens", "2", "--device", "cpu"]
            try:
                runpy.run_module("scripts.chat_cli", run_name="__main__", alter_sys=True)
            except SystemExit as exit:
                assert not exit.code
        import torch
        from gkachat.eval.bpb import bpb_sums
        idx = torch.zeros(1, 4, dtype=torch.long)
        bpb_sums(torch.nn.Embedding(8, 8), [(idx, idx)], torch.ones(8))
        compiler = {{"torch._dynamo", "torch._inductor", "torch.nn.attention.flex_attention", "sympy", "triton"}}
        assert not compiler & sys.modules.keys(), compiler & sys.modules.keys()"""
    env = {**os.environ, "GKACHAT_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_the_oldest_turns_are_left_out_whole_and_the_system_message_stays(session):
    chat, system = session("chat"), [{"role": "system", "content": "x"}]
    assert len(chat.prompt_tokens(TURNS, 4)) <= CONTEXT - 4
    prompt = chat.prompt_tokens(system + TURNS, 4)
    rendered = [render_prompt(chat.engine.tokenizer, system + TURNS[first:]) for first in (2, 4, 6)]
    assert prompt in rendered
    assert len(chat.prompt_tokens(TURNS, 1000)) <= CONTEXT / 2  # an answer gets at most half of the context


@pytest.mark.parametrize(("run", "n_head"), [("chat", 2), ("base", 1)])
def test_the_end_of_a_message_that_is_too_long_stays(session, run, n_head):
    chat, message = session(run), {"role": "user", "content": "x = 1 " * 40}
    whole, cut = (chat.prompt_tokens([message], max_tokens) for max_tokens in (-1000, 4))
    assert cut == whole[:n_head] + whole[-(CONTEXT - 4 - n_head) :]


@pytest.mark.parametrize("run", ["chat", "base"])
def test_what_does_not_fit_the_context_is_said(chat, capsys, home, run):
    """The first message fits; the second is cut, and the answer says by how much."""
    lines = ["x", "x = 1 " * 40]
    short, cut = (json.loads(line) for line in chat(run, *lines, as_json=True).splitlines())
    assert short["tokens_left_out"] == 0 < cut["tokens_left_out"] and cut["tokens_read"] <= CONTEXT - 4
    chat_cli.main(run, prompt=lines[1], max_tokens=4, device="cpu")
    assert re.search(rf"\({run} left out \d+ older tokens: its context is 32", capsys.readouterr().err)


def test_a_terminal_is_shown_control_characters_and_does_not_obey_them(monkeypatch, capsys, session):
    """Escape sequences can hide text, or write to the clipboard. What goes to a file is the answer as it is."""
    answer = "a\x1b[2K\x9b1A\r\x07\tb\né"
    monkeypatch.setattr(ChatSession, "answer", lambda self, *_: iter([answer]))
    chat = session("chat")
    chat.stats = {"tokens_left_out": 0}
    for at_terminal, shown in ((True, "a\\x1b[2K\\x9b1A\\x0d\\x07\tb\né\n"), (False, answer + "\n")):
        monkeypatch.setattr("sys.stdout.isatty", lambda at_terminal=at_terminal: at_terminal)
        chat_cli.Chat([chat], Sampling(), as_json=False).ask("x")
        assert capsys.readouterr().out == shown


def test_an_answer_that_is_closed_early_stays_in_the_conversation(session):
    chat = session("chat")
    answer = chat.ask("turn", Sampling(max_tokens=9, temperature=0))
    text = next(answer)
    answer.close()
    assert chat.messages == [{"role": "user", "content": "turn"}, {"role": "assistant", "content": text}]
    assert chat.stats["finished"] == "interrupted" and chat.stats["tokens_written"] == 1


class InterruptedSession:
    """Session whose second answer Ctrl-C cuts short."""

    name, n_asked, stats = "x", 0, {}

    def ask(self, text, sampling):
        self.n_asked += 1
        yield f"answer {self.n_asked}"
        if self.n_asked == 2:
            raise KeyboardInterrupt
        yield "."


def test_ctrl_c_ends_the_answer_and_not_the_chat(capsys):
    chat = chat_cli.Chat([InterruptedSession()], Sampling(), as_json=False)
    for question in "abc":
        chat.ask(question)
    assert capsys.readouterr().out == "answer 1.\nanswer 2\nanswer 3.\n"


def test_answers_side_by_side_take_turns_and_ctrl_c_ends_both(capsys):
    closed = []

    def answer(name):
        try:
            yield from (f"{name}{i} " for i in range(2))
            raise KeyboardInterrupt
        finally:
            closed.append(name)

    chat_cli.print_side_by_side(["one", "two"], [answer("x"), answer("y")])
    assert re.search(r"x0 x1 .* y0 y1", capsys.readouterr().out) and closed == ["x", "y"]


def test_messages_begin_with_a_slash_and_commands_with_a_known_name(chat, tmp_path):
    typed = ["/usr/bin is a path", "/", "/helpful", " /help", "/system  be kind ", f"/save {tmp_path / 'a'}", "/stats "]
    out = chat("chat", *typed, as_json=True)
    prompts = [json.loads(line)["prompt"] for line in out.splitlines()]  # what is no answer goes to stderr
    assert prompts == typed[:4] and json.loads((tmp_path / "a").read_text())["system"] == "be kind"


def test_closed_stdin_is_an_empty_one(home, monkeypatch):
    monkeypatch.setattr("sys.stdin", None)
    monkeypatch.setenv("GKACHAT_HOME", str(home))
    monkeypatch.setattr("sys.argv", ["chat_cli", "chat", "--device=cpu"])
    with pytest.raises(SystemExit) as exit:
        run(chat_cli.main, chat_cli.__doc__)
    assert not exit.value.code


# At a terminal


class AtTerminal:
    """The script at a terminal that does no more than pass on bytes. stdout may go elsewhere."""

    def __init__(self, home, *options, stdout=None, term="xterm"):
        self.main, terminal = pty.openpty()
        env = {**os.environ, "GKACHAT_HOME": str(home), "OMP_NUM_THREADS": "1", "TERM": term, "HOME": str(home)}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "scripts.chat_cli", "--max-tokens=2", "--device=cpu", *options],
            cwd=ROOT, env=env, stdin=terminal, stdout=stdout or terminal, stderr=terminal,
            preexec_fn=self._take_terminal,
        )  # fmt: skip
        os.close(terminal)
        os.set_blocking(self.main, False)
        self.shown = b""

    @staticmethod
    def _take_terminal():
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # Ctrl-C then sends a signal
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # background jobs ignore it

    def read_until(self, text):
        while text not in self.shown:
            assert select.select([self.main], [], [], 60)[0], f"{text} did not come after {self.shown}"
            self.shown += os.read(self.main, 4096)
        self.shown = self.shown.partition(text)[2]

    def type(self, data):
        """Type, and read what is shown meanwhile: neither side waits for the other for ever."""
        while data:
            _, ready, _ = select.select([], [self.main], [], 1)
            data = data[os.write(self.main, data[:1024]) if ready else 0 :]
            while select.select([self.main], [], [], 0)[0]:
                self.shown += os.read(self.main, 4096)

    def end(self):
        """Read until the script ends, and return its exit code."""
        with contextlib.suppress(OSError):
            while select.select([self.main], [], [], 60)[0] and os.read(self.main, 4096):
                pass
        return self.process.wait(timeout=60)


def test_what_is_typed_at_a_terminal_is_edited_and_no_line_is_cut(home):
    """After the first message all is typed at once. What comes while the model answers waits for the next prompt."""
    terminal = AtTerminal(home)
    for line in (b"", b"ac\x1b[Db\r"):  # left
        terminal.type(line)
        terminal.read_until(b">\x08")  # a prompt
    typed = {
        b"\x1b[A": "abc",  # up
        b"one\x1b\rtwo\x0fthree": "one\ntwo\nthree",  # Alt-Enter, Ctrl-O
        b"\x1b[200~pasted\r\n/quit\n\tend\n\x1b[201~": "pasted\n/quit\n\tend\n",
        b"x" * 5000: "x" * 5000,
        b"\x1b[200~" + "é".encode() * 20_000 + b"\x1b[201~": "é" * 20_000,
        b"half \xff a character": None,  # no text
        b"/usr/bin": "/usr/bin",
    }
    for line in [*typed, b"/save", b"~/typed.json", b"/save ~", b"/quit"]:
        terminal.type(line + b"\r")
    assert terminal.end() == 0
    messages = json.loads((home / "typed.json").read_text())["histories"][0]
    expected = ["abc", *(text for text in typed.values() if text is not None)]
    assert [message["content"] for message in messages[::2]] == expected
    assert "+one\n+two\n+three\n" in (home / "chat_history").read_text()


def test_stdout_has_json_alone_whatever_is_typed(home, tmp_path):
    with (tmp_path / "out").open("wb") as out:
        terminal = AtTerminal(home, "--json", stdout=out)
        terminal.read_until(b"stops an answer.\r\n")
        asked = b'{"messages": [{"role": "user", "content": "Hi"}]}'
        for line in [b"/help", b"a\xff", b"What?", b"{", asked, b"/stats", b"/load /no/such"]:
            terminal.type(line + b"\r")
        terminal.type(b"\x04")
        assert terminal.end() == 0
    found = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
    assert [answer["prompt"] for answer in found] == ["", "What?", "{", "Hi", "/load /no/such"]
    assert ["error" in answer for answer in found] == [True, False, True, False, True]


def test_ctrl_c_at_a_terminal_does_not_end_the_program(home):
    terminal = AtTerminal(home, term="dumb")  # such a terminal cannot move its cursor
    terminal.read_until(b"stops an answer.\r\n> ")
    terminal.process.send_signal(signal.SIGINT)
    terminal.read_until(b"Ctrl-D ends.\r\n> ")
    terminal.type(b"\x03")
    terminal.read_until(b"Ctrl-D ends.\r\n> ")
    terminal.type(b"/load nothing\n")
    terminal.read_until(b"No such file")
    terminal.type(b"/quit\n")
    assert terminal.end() == 0
