"""The scripts as users call them, with right and with wrong input; and what the README says."""

import json
import os
import re
import select
import shlex
import signal
import subprocess
import sys

import pytest
from conftest import ROOT, TINY, call

from gkachat.data.conversations import prompt
from scripts.chat_cli import Conversation, Speaker
from scripts.cli import RUN_FLAGS, parse_config

README = (ROOT / "README.md").read_text()
SCRIPTS = sorted(p.stem for p in (ROOT / "scripts").glob("*.py") if p.stem not in ("__init__", "cli"))
# A model and a horizon that train in seconds on the laptop corpus.
SMALL = ["--model.depth=1", "--model.n_embd=64", "--train.baseline_tokens=8192", "--train.eval_tokens=512"]
SPEEDRUN = [*SMALL, "--chat.conversations=300"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_says_what_a_script_does(script, tmp_path):
    result = call(script, "--help", home=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "usage:" in result.stdout and f"python -m scripts.{script}" in result.stdout
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("script", SCRIPTS)
def test_importing_a_script_does_nothing(script):
    code = f"import sys; sys.argv = ['x', '--nonsense']; import scripts.{script} as s; assert callable(s.main)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("script", "args", "named"),
    [
        ("base_train", ["configs/none.toml"], "no config file configs/none.toml"),
        ("base_train", ["configs/laptop.toml", "--model.depht=3"], "did you mean model.depth?"),
        ("base_train", ["configs/laptop.toml", "--model.depth=x", "--run.seed=y"], "run.seed: given 'y', expected int"),
        ("base_train", ["configs/laptop.toml"], "no tokenizer at"),
        ("base_train", ["configs/laptop.toml", "--resume", "--overwrite"], "expected one of them"),
        ("data_prep", ["configs/laptop.toml"], "scripts.tok_train"),
        ("tok_train", ["configs/laptop.toml", "--data.source=files", "--data.files=/no/*.txt"], "nothing matches"),
        ("tok_eval", ["configs/laptop.toml"], "scripts.tok_train"),
        ("base_eval", ["d9"], "no run 'd9'"),
        ("chat_cli", ["d9", "-p", "x"], "no run 'd9'"),
        ("chat_sft", ["d9"], "no run 'd9'"),
        ("chat_sft", [], "given no run"),
        ("chat_sft", ["d9", "--resume", "--overwrite"], "expected one of them"),
        ("compare", ["d9", "d8"], "no run 'd9'"),
        ("export_hf", ["d9", "out"], "no run 'd9'"),
        ("inspect", ["d9"], "no run 'd9'"),
        (
            "vision_train",
            ["configs/vision_digits.toml", "--model.patch_size=3"],
            "given 8, expected a multiple of patch",
        ),
        ("vision_train", ["configs/vision_digits.toml", "--data.source=mnist"], "expected 'digits' or 'huggingface'"),
        ("vision_train", ["configs/laptop.toml"], "tokenizer: unknown field"),
        ("vision_report", ["d9"], "no run 'd9'"),
        ("sweep", [], "given no sweep file"),
        ("sweep", ["configs/laptop.toml"], "sweep: expected a table with name, base and grid"),
        ("sweep", ["configs/sweep_depth.toml", "--model.depth=3"], "--model.depth: cannot be set: it is an axis"),
        ("estimate", [], "given no config"),
        ("estimate", ["configs/laptop.toml", "configs/none.toml"], "no config file configs/none.toml"),
    ],
)
def test_wrong_input_gets_one_line_and_a_failing_exit(script, args, named, tmp_path):
    result = call(script, *args, home=tmp_path)
    assert result.returncode == 1
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert named in result.stderr


def test_a_value_that_spells_a_flag_is_a_value():
    config, flags = parse_config(["configs/laptop.toml", "--run.name", "resume", "--overwrite"], "", RUN_FLAGS)
    assert config.run.name == "resume" and flags == {"overwrite"}


@pytest.fixture(scope="module")
def trained(corpus_home, tmp_path_factory):
    home = tmp_path_factory.mktemp("trained")
    for name in ("tokenizer", "tokens"):
        (home / name).symlink_to(corpus_home / name)
    result = call("base_train", "configs/laptop.toml", *TINY, "--model.attention=gka", home=home)
    assert result.returncode == 0, result.stderr
    return home


def test_training_again_under_the_same_name_is_refused(trained):
    result = call("base_train", "configs/laptop.toml", *TINY, "--model.attention=gka", home=trained)
    assert result.returncode == 1 and "exists" in result.stderr and result.stderr.count("\n") == 1


def test_chat_completes_a_prompt_and_the_seed_decides(trained):
    args = ["d2_gka", "-p", "def f(", "--max-tokens", 12, "--seed"]
    a, b, c = (call("chat_cli", *args, seed, home=trained).stdout for seed in (1, 1, 2))
    assert a == b != c
    assert a.startswith("def f(") and len(a) > len("def f(\n")


def test_chat_keeps_its_history(trained):
    def answers(n, stdin):
        words = ["d2_gka", "--json", "--temperature=0", "--max-tokens", n]
        result = call("chat_cli", *words, home=trained, stdin=stdin)
        return [json.loads(line)["answer"] for line in result.stdout.splitlines()]

    two, one = answers(4, "import\n\n/quit\n"), answers(8, "import")
    # Two turns of four tokens write what one of eight does; a character that was cut between them shows as none.
    assert len(two) == 2 and "".join(two).replace("\ufffd", "") == one[0].replace("\ufffd", "")


def test_chat_takes_the_newest_run_and_keeps_turns_that_fit(trained, tmp_path):
    saved = tmp_path / "talk.json"
    lines = [
        "import",
        "/stats",
        f"/save {saved}",
        "/reset",
        f"/load {saved}",
        "/help",
        "x = 1 " * 40,
        "/stats",
        "/quit",
    ]
    talk = call("chat_cli", "--max-tokens=4", home=trained, stdin="\n".join(lines) + "\n")
    assert talk.returncode == 0, talk.stderr
    assert "finished max_tokens" in talk.stdout and "Ctrl-C stops an answer" in talk.stdout
    assert json.loads(saved.read_text())["histories"][0][0] == {"role": "user", "content": "import"}
    assert "tokens_read 28," in talk.stdout  # of a turn that is too long, BOS and its end: 32 less 4 to come
    nothing = call("chat_cli", home=tmp_path)
    assert nothing.returncode == 1 and "no run with a checkpoint" in nothing.stderr


def test_what_chat_cannot_do_is_one_line_and_a_failing_exit(trained, tmp_path):
    (tmp_path / "talk.json").write_text('{"histories": [[{"role": "assistant", "content": "I begin"}]]}')
    for line, told in (
        ("/load /no/such/file", "No such file"),
        (f"/load {tmp_path / 'talk.json'}", "given role 'assistant', expected 'user'"),
        ("/system be kind", "not tuned on conversations"),
    ):
        result = call("chat_cli", "d2_gka", home=trained, stdin=line + "\n")
        assert result.returncode == 1 and told in result.stderr and result.stderr.count("\n") == 1, result.stderr


@pytest.fixture(scope="module")
def tuned(trained):
    result = call("chat_sft", "d2_gka", "--chat.conversations=200", "--chat.epochs=0.2", home=trained)
    assert result.returncode == 0, result.stderr
    assert "truncated" in result.stdout  # the context is 32 tokens
    return trained


def test_tuning_refuses_what_is_there_and_goes_on_when_asked(tuned):
    options = ["d2_gka", "--chat.conversations=200", "--chat.epochs=0.2"]
    again = call("chat_sft", *options, home=tuned)
    assert again.returncode == 1 and "run 'd2_gka_chat' exists" in again.stderr
    resumed = call("chat_sft", *options, "--resume", home=tuned)
    assert resumed.returncode == 0, resumed.stderr
    other = call("chat_sft", "d2_gka", "--chat.conversations=300", "--resume", home=tuned)
    assert other.returncode == 1 and "conversations: given 300, the run has 200" in other.stderr


def test_chat_answers_scripts_in_json(tuned):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello!"}]
    lines = ["What is 3 + 4?", json.dumps({"messages": messages}), "/reset", "Again"]
    result = call(
        "chat_cli", "d2_gka_chat", "--compare", "d2_gka", "--json", "--max-tokens=5", home=tuned, stdin="\n".join(lines)
    )
    assert result.returncode == 0, result.stderr
    said = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(s["run"], s["prompt"]) for s in said] == [
        (run, prompt) for prompt in ("What is 3 + 4?", "Hello!", "Again") for run in ("d2_gka_chat", "d2_gka")
    ]
    assert all(s["tokens_written"] <= 5 and s["finished"] for s in said)
    bad = call("chat_cli", "d2_gka_chat", "--json", home=tuned, stdin='{"messages": []}')
    assert bad.returncode == 1 and "expected a list of messages" in bad.stderr and bad.stderr.count("\n") == 1


def test_chat_leaves_out_the_oldest_turns_whole(tuned, monkeypatch):
    monkeypatch.setenv("GKACHAT_HOME", str(tuned))
    speaker = Speaker("d2_gka_chat", None, "cpu", int8=False)
    turns = [{"role": ("user", "assistant")[i % 2], "content": f"turn {i}"} for i in range(7)]
    system = [{"role": "system", "content": "keep"}]
    shown = speaker.tokenizer.decode(speaker.ids(system + turns, room=4))
    assert len(speaker.ids(turns, room=4)) <= 28
    first = int(re.search(r"keep\n\nturn (\d)", shown)[1])
    assert first % 2 == 0 and 0 < first <= 6
    assert shown == speaker.tokenizer.decode(prompt(speaker.tokenizer, system + turns[first:]))
    long = speaker.ids([{"role": "user", "content": "x = 1 " * 40}], room=4)
    assert len(long) == 28 and long[:2] == prompt(speaker.tokenizer, turns[:1])[:2]


class Interrupted:
    """A speaker whose second answer Ctrl-C cuts short."""

    run_dir, said, stats = ROOT, 0, {}

    def answer(self, messages, **settings):
        self.said += 1
        yield f"answer {self.said}"
        if self.said == 2:
            raise KeyboardInterrupt
        yield "."


def test_ctrl_c_ends_the_answer_and_keeps_what_was_said(capsys):
    conversation = Conversation([Interrupted()], as_json=False, seed=0, max_tokens=5)
    for question in "abc":
        conversation.say(question)
    assert [m["content"] for m in conversation.histories[0]] == ["a", "answer 1.", "b", "answer 2", "c", "answer 3."]
    assert capsys.readouterr().out == "answer 1.\nanswer 2\nanswer 3.\n"


def test_ctrl_c_at_a_terminal_does_not_end_the_program(tuned):
    """A terminal of its own, as over ssh."""
    import pty

    main, terminal = pty.openpty()
    env = {**os.environ, "GKACHAT_HOME": str(tuned), "OMP_NUM_THREADS": "1", "TERM": "dumb"}
    words = [sys.executable, "-m", "scripts.chat_cli", "d2_gka_chat"]
    process = subprocess.Popen(
        words, cwd=ROOT, env=env, stdin=terminal, stdout=terminal, stderr=terminal,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # who runs tests in the background ignores it
    )  # fmt: skip
    os.close(terminal)

    def read_until(text):
        seen = b""
        while text not in seen:
            assert select.select([main], [], [], 60)[0], f"{text} did not come after {seen}"
            seen += os.read(main, 4096)

    def press_ctrl_c():
        """Until something is printed: Python's prompt does not see a signal between its last check and its wait."""
        for _ in range(60):
            process.send_signal(signal.SIGINT)
            if select.select([main], [], [], 1)[0]:
                return

    read_until(b"/quit\r\n> ")
    press_ctrl_c()
    read_until(b"Ctrl-D ends.\r\n> ")
    os.write(main, b"/stats\n")
    read_until(b"nothing said yet")
    os.write(main, b"/quit\n")
    assert process.wait(timeout=60) == 0


def bash_lines():
    """Every command in the bash blocks of the README and of two pages that one machine can follow."""
    pages = [README, *((ROOT / "docs" / name).read_text() for name in ("inference.md", "evaluation.md"))]
    blocks = [block for page in pages for block in re.findall(r"```bash\n(.*?)```", page, flags=re.DOTALL)]
    lines = [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]
    return [line for line in lines if line]


def bash(*words, home):
    return subprocess.run(
        ["bash", *words],
        cwd=ROOT,
        env={**os.environ, "GKACHAT_HOME": str(home), "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )


@pytest.fixture(scope="module")
def speedrun(tmp_path_factory):
    home = tmp_path_factory.mktemp("speedrun")
    return home, bash("speedrun.sh", *SPEEDRUN, home=home)


def test_the_speedrun_trains_compares_and_says_how_to_talk(speedrun):
    home, result = speedrun
    assert result.returncode == 0, result.stderr
    assert "| parameters |" in result.stdout and "unigram" in result.stdout
    assert result.stdout.count("  addition  ") == result.stdout.count("  counting  ") == 3
    commands = [line.strip() for line in result.stdout.splitlines() if "scripts.chat_cli" in line]
    assert len(commands) == 4
    for command in commands:
        spoken = bash("-c", f"{command} -p 'What is 12 + 34?' --max-tokens 3", home=home)
        assert spoken.returncode == 0 and spoken.stdout
    assert (home / "comparisons" / "d4_softmax-d4_gka-d4_gka_plus" / "comparison.png").exists()


def test_a_second_speedrun_keeps_what_is_finished(speedrun):
    home, _ = speedrun
    weights = sorted((home / "runs").glob("*/checkpoints/*/model.safetensors"))
    before = [p.stat().st_mtime_ns for p in weights]
    again = bash("speedrun.sh", *SPEEDRUN, home=home)
    assert again.returncode == 0, again.stderr
    assert "set-up" not in again.stdout and "was there" in again.stdout
    assert [p.stat().st_mtime_ns for p in weights] == before


def test_a_step_that_fails_stops_the_speedrun_with_its_name(tmp_path):
    (tmp_path / "tokenizer").write_text("in the way")
    result = bash("speedrun.sh", *SPEEDRUN, home=tmp_path)
    assert result.returncode != 0
    assert result.stderr.splitlines()[-1].startswith("speedrun: train the tokenizer failed")
    assert "== tokenize" not in result.stdout


def test_the_readmes_commands_run(speedrun, tmp_path):
    home, _ = speedrun
    notes = tmp_path / "notes"
    notes.mkdir()
    for i in range(300):
        (notes / f"{i}.txt").write_text(f"Note {i}. " + " ".join(str(i * k) for k in range(400)))
    ran = 0
    for words in bash_lines():
        if words[:3] != ["python", "-m", words[2] if len(words) > 2 else ""] or "-m" not in words:
            assert words[:2] in (["bash", "speedrun.sh"], ["bash", "tests/run.sh"], ["source", ".venv/bin/activate"])
            continue
        script, args = words[2].removeprefix("scripts."), words[3:]
        args = [arg.replace("notes/**", f"{notes}/**") for arg in args]
        if script == "base_train":
            args += SMALL
        if script.startswith("bench"):
            args += ["--tokens", 64, "--rounds", 1]
        result = call(script, *args, home=home)
        assert result.returncode == 0, (words, result.stderr)
        ran += 1
    assert ran >= 8


def test_the_readmes_first_screen_has_the_two_commands():
    first = README.splitlines()[:25]
    assert any(line.startswith("bash speedrun.sh") for line in first)
    assert any(line.startswith("bash tests/run.sh") for line in first)


def test_the_test_script_runs_pytest(tmp_path):
    result = bash("tests/run.sh", "--version", home=tmp_path)
    assert result.returncode == 0 and "pytest" in result.stdout + result.stderr
