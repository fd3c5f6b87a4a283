"""The scripts as users call them, with right and with wrong input; and what the README says."""

import json
import os
import re
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT, TINY, call

from scripts.base_train import FLAGS
from scripts.cli import config_from_args

README = (ROOT / "README.md").read_text()
SCRIPTS = sorted(p.stem for p in (ROOT / "scripts").glob("*.py") if p.stem not in ("__init__", "cli"))
# A model and a horizon that train in seconds on the laptop corpus.
SMALL = ["--model.depth=1", "--model.n_embd=64", "--train.baseline_tokens=8192", "--train.eval_tokens=512"]


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
        ("compare", ["d9", "d8"], "no run 'd9'"),
    ],
)
def test_wrong_input_gets_one_line_and_a_failing_exit(script, args, named, tmp_path):
    result = call(script, *args, home=tmp_path)
    assert result.returncode == 1
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert named in result.stderr


def test_a_value_that_spells_a_flag_is_a_value():
    config, flags = config_from_args(["configs/laptop.toml", "--run.name", "resume", "--overwrite"], "", FLAGS)
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
    conversation = call(
        "chat_cli", "d2_gka", "--temperature=0", "--max-tokens=4", home=trained, stdin="import\n\n/quit\n"
    )
    assert conversation.returncode == 0, conversation.stderr
    longer = call("chat_cli", "d2_gka", "--temperature=0", "--max-tokens=8", "-p", "import", home=trained).stdout
    turns = conversation.stdout.split("> ")
    # Two turns of four tokens write what one of eight does.
    assert "import" + turns[1].removesuffix("\n") + turns[2].removesuffix("\n") == longer.removesuffix("\n")


def test_chat_takes_the_newest_run_and_keeps_turns_that_fit(trained, tmp_path):
    lines = ["import", "/stats", f"/save {tmp_path / 'talk.json'}", "/reset", f"/load {tmp_path / 'talk.json'}"]
    lines += ["/load /no/such/file", "/help", "x = 1 " * 40, "/stats", "/quit"]
    talk = call("chat_cli", "--max-tokens=4", home=trained, stdin="\n".join(lines) + "\n")
    assert talk.returncode == 0, talk.stderr
    assert talk.stdout.startswith("d2_gka, step 8, gka.")
    assert "ended by" in talk.stdout and "/load /no/such/file: [Errno 2]" in talk.stdout
    assert json.loads((tmp_path / "talk.json").read_text())[0] == "import"
    assert "27 tokens read" in talk.stdout  # of a turn that is too long, its end: 32 less BOS and 4 to come
    nothing = call("chat_cli", home=tmp_path)
    assert nothing.returncode == 1 and "no run with a checkpoint" in nothing.stderr


def test_weights_and_biases_works_offline(tiny_home):
    options = [*TINY, "--run.wandb=tests", "--model.attention=gka"]
    result = call("base_train", "configs/laptop.toml", *options, home=tiny_home, WANDB_MODE="offline")
    assert result.returncode == 0, result.stderr
    assert list((tiny_home / "runs" / "d2_gka" / "wandb").glob("offline-run-*/*.wandb"))


def bash_lines():
    """Every command in the README's bash blocks."""
    blocks = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
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
    return home, bash("speedrun.sh", *SMALL, home=home)


def test_the_speedrun_trains_compares_and_says_how_to_talk(speedrun):
    home, result = speedrun
    assert result.returncode == 0, result.stderr
    assert "| parameters |" in result.stdout and "unigram" in result.stdout
    commands = [line.strip() for line in result.stdout.splitlines() if "scripts.chat_cli" in line]
    assert len(commands) == 2
    for command in commands:
        spoken = bash("-c", f"{command} -p 'import ' --max-tokens 3", home=home)
        assert spoken.returncode == 0 and spoken.stdout.startswith("import ")
    assert (home / "comparisons" / "d4_softmax-d4_gka" / "comparison.png").exists()


def test_a_second_speedrun_keeps_what_is_finished(speedrun):
    home, _ = speedrun
    weights = sorted((home / "runs").glob("*/checkpoints/*/model.safetensors"))
    before = [p.stat().st_mtime_ns for p in weights]
    again = bash("speedrun.sh", *SMALL, home=home)
    assert again.returncode == 0, again.stderr
    assert "set-up" not in again.stdout and "was there" in again.stdout
    assert [p.stat().st_mtime_ns for p in weights] == before


def test_a_step_that_fails_stops_the_speedrun_with_its_name(tmp_path):
    (tmp_path / "tokenizer").write_text("in the way")
    result = bash("speedrun.sh", *SMALL, home=tmp_path)
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
