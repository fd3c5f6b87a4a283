"""The scripts with right and with wrong input, the speedrun, and the commands of the README."""

import dataclasses
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys

import pytest
from conftest import ROOT, TINY, run_script

from gkachat.config import ATTENTIONS, TuningConfig
from gkachat.config_file import load_config, to_toml
from scripts.cli import RUN_FLAGS, parse_config, run

README = (ROOT / "README.md").read_text()
SCRIPTS = sorted(p.stem for p in (ROOT / "scripts").glob("*.py") if p.stem not in ("__init__", "cli"))
SLOW = {
    "torch",
    "triton",
    "datasets",
    "wandb",
    "matplotlib",
    "scipy",
    "tiktoken",
    "tokenizers",
    "transformers",
    "pyarrow",
}
# A part of the laptop corpus, and a model and a token budget that train on it in seconds. Answers end with the context.
DATA = ["--data.max_chars=600000", "--data.val_fraction=0.1", "--tokenizer.vocab_size=512"]
SHAPE = ["--model.depth=1", "--model.n_embd=64", "--model.sequence_len=64"]
SMALL = [*DATA, *SHAPE, "--train.baseline_tokens=8192", "--train.eval_tokens=512"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_shows_usage_and_an_example(script, tmp_path):
    result = run_script(script, "--help", home=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith(f"usage: python -m scripts.{script} ") and result.stdout.count("usage:") == 1
    commands = [line for line in result.stdout.splitlines() if re.search(rf" -m scripts\.{script}\b", line)][1:]
    assert all(line.count(" -m scripts.") == 1 and line.split()[0] in ("python", "torchrun") for line in commands)
    assert commands and ("[RUN]" in result.stdout.splitlines()[0]) == (script == "chat_cli")
    assert "(default: )" not in " ".join(result.stdout.replace("│", "").split())
    assert not any(tmp_path.iterdir())


def test_help_shows_every_field_with_its_value_in_the_file(tmp_path):
    shown = run_script("base_train", "configs/laptop.toml", "--help", home=tmp_path).stdout
    shown = " ".join(shown.replace("│", "").split())
    width = "Width in channels. None: 64 * depth, rounded up to whole heads of 128 (of head_dim, if that is set)."
    assert f"--model.n_embd {{none}}|INT {width} (default: 192)" in shown
    assert "--resume Continue the run" in shown and "--optim.muon_cautious {true,false}" in shown


def test_help_and_wrong_options_import_nothing_slow():
    """In one process, so that the scripts share what they import."""
    code = f"""if True:
        import runpy, sys
        slow = {SLOW}
        for script in {SCRIPTS}:
            for word in ("--help", "--nonsense"):
                sys.argv = [script, word]
                try:
                    runpy.run_module("scripts." + script, run_name="__main__", alter_sys=True)
                except SystemExit as exit:
                    assert bool(exit.code) == (word == "--nonsense"), (script, word)
                assert not slow & sys.modules.keys(), (script, word, slow & sys.modules.keys())"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(("package", "ended"), [("tyro", (-signal.SIGINT, "")), ("torch", (130, "interrupted\n"))])
def test_ctrl_c_while_a_script_imports_leaves_no_traceback(package, ended, tmp_path):
    """The script imports tyro itself, and torch once it has read its options."""
    (tmp_path / f"{package}.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    process = subprocess.Popen(
        [sys.executable, "-m", "scripts.base_eval", "none"],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(tmp_path)}, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # background jobs ignore SIGINT
    )  # fmt: skip
    _, error = process.communicate()
    assert (process.returncode, error) == ended


def test_importing_scripts_does_nothing():
    imports = "; ".join(f"import scripts.{script}; assert callable(scripts.{script}.main)" for script in SCRIPTS)
    words = [sys.executable, "-c", f"import sys; sys.argv = ['x', '--nonsense']; {imports}"]
    result = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("base_train configs/none.toml", "no config file configs/none.toml; there are: configs/d20.toml, "),
        ("base_train configs/vision_digits.toml", "a config of image models, which scripts.vision_train reads"),
        ("data_prep configs/sweep_depth.toml", "configs/sweep_depth.toml: a sweep file, which scripts.sweep reads"),
        ("base_train configs/laptop.toml --resum", "Unrecognized options: --resum (did you mean --resume?)"),
        (
            "base_train configs/laptop.toml --train.baseline_tokens=none --train.tokens_per_param=1e300",
            "train.tokens_per_param: given 1e+300, expected above 0",
        ),
        (
            f"chat_cli d9 --seed {10**20}",
            "Error parsing --seed: given a number of more than 64 bits",
        ),
        ("base_train configs/laptop.toml --model.depht=3", "configs/laptop.toml: Unrecognized options: --model.depht"),
        ("base_train --model.depht=3", "did you mean --model.depth?"),
        ("base_train configs/laptop.toml --model.depth=x", "Error parsing --model.depth: given 'x', expected a whole"),
        ("base_train configs/laptop.toml --model.attention=fair", "given 'fair', expected 'softmax' or 'gka' or"),
        ("base_train configs/laptop.toml", "no tokenizer at"),
        ("base_train configs/laptop.toml --resume --overwrite", "expected one of them"),
        (
            "base_train configs/laptop.toml --run.name=-x",
            "run.name: given '-x', expected a directory name, not a path, ",
        ),
        ("data_prep configs/laptop.toml", "scripts.tok_train"),
        ("tok_train configs/laptop.toml --data.source=files --data.files=/no/*.txt", "nothing matches"),
        ("tok_eval configs/laptop.toml", "scripts.tok_train"),
        ("cost --dept 3", "Unrecognized options: --dept, 3 (did you mean --depth?)"),
        ("cost --depth x", "Error parsing --depth"),
        ("cost --depth 0", "model.depth: given 0, expected 1 to 1000"),
        ("base_eval d9", "no run 'd9'"),
        ("chat_cli d9 -p x", "no run 'd9'"),
        ("chat_sft d9", "no run 'd9'"),
        ("chat_sft", "given no run"),
        ("chat_sft d9 --resume --overwrite", "expected one of them"),
        ("compare d9 d8", "no run 'd9'"),
        ("export_hf d9 out", "no run 'd9'"),
        ("attention_maps d9", "no run 'd9'"),
        ("vision_train configs/vision_digits.toml --model.patch_size=3", "given 8, expected a multiple of patch"),
        ("vision_train configs/vision_digits.toml --data.source=mnist", "Expected one of ('digits', 'huggingface')"),
        ("vision_train configs/laptop.toml", "a config of language models, which scripts.base_train reads"),
        (
            "vision_train configs/vision_digits.toml --train.epochs=1e300",
            "train.epochs: given 1e+300, expected above 0",
        ),
        ("vision_report d9", "no run 'd9'"),
        ("sweep", "given no sweep file"),
        ("sweep configs/laptop.toml", "no [sweep] table, expected one with name, base and grid"),
        ("sweep configs/sweep_depth.toml --model.depth=3", "--model.depth: cannot be set: it is an axis"),
        ("estimate configs/none.toml", "no config file configs/none.toml"),
    ],
)
def test_wrong_input_gets_one_line_and_a_failing_exit(words, named, tmp_path):
    result = run_script(*words.split(), home=tmp_path)
    assert result.returncode == 1
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert named in result.stderr


def test_closed_standard_streams_are_as_dev_null(monkeypatch):
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)  # as Python has it
    with pytest.raises(SystemExit) as exit:
        run(lambda: len(sys.stdin.read()) + sys.stdout.isatty() + sys.stderr.isatty())
    assert exit.value.code == 0


def test_a_full_disk_and_lack_of_memory_are_one_line(capfd):
    def allocate():
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB.\nIf reserved ...")

    full = open("/dev/full", "w")  # noqa: SIM115 (as stdout of the test)
    for main, message in (
        (
            allocate,
            "error: out of memory (CUDA out of memory. Tried to allocate 2.00 GiB.): give a smaller",
        ),
        (
            lambda: full.write("x") and full.flush(),
            "error: [Errno 28] No space left on device: the disk that",
        ),
    ):
        with pytest.raises(SystemExit) as exit:
            run(main)
        error = capfd.readouterr().err
        assert exit.value.code == 1 and error.startswith(message) and error.count("\n") == 1


def test_a_value_that_spells_a_flag_is_a_value():
    config, flags = parse_config(["configs/laptop.toml", "--run.name", "resume", "--overwrite"], "", RUN_FLAGS)
    assert config.run.name == "resume" and flags == {"overwrite"}


@pytest.fixture(scope="module")
def trained(corpus_home, tmp_path_factory):
    home = tmp_path_factory.mktemp("trained")
    for name in ("tokenizer", "tokens"):
        (home / name).symlink_to(corpus_home / name)
    result = run_script("base_train", "configs/laptop.toml", *TINY, "--model.attention=gka", home=home)
    assert result.returncode == 0, result.stderr
    return home


def test_training_again_under_the_same_name_is_refused(trained):
    result = run_script("base_train", "configs/laptop.toml", *TINY, "--model.attention=gka", home=trained)
    assert result.returncode == 1 and "exists" in result.stderr and result.stderr.count("\n") == 1


def test_tuning_refuses_an_image_model(tmp_path):
    (tmp_path / "runs" / "digits").mkdir(parents=True)
    shutil.copy(ROOT / "configs" / "vision_digits.toml", tmp_path / "runs" / "digits" / "config.toml")
    result = run_script("chat_sft", "digits", home=tmp_path)
    assert result.returncode == 1 and result.stderr.endswith("given an image model, expected a language model\n")


def test_tuning_refuses_a_run_that_exists_and_continues_it_when_asked(trained):
    options = ["d2_gka", "--chat.conversations=200", "--chat.epochs=0.2"]
    first = run_script("chat_sft", *options, home=trained)
    assert first.returncode == 0, first.stderr
    assert "truncated" in first.stdout  # the context is 32 tokens
    again = run_script("chat_sft", *options, home=trained)
    assert again.returncode == 1 and "run 'd2_gka_chat' exists" in again.stderr
    resumed = run_script("chat_sft", *options, "--resume", home=trained)
    assert resumed.returncode == 0 and "run 'd2_gka_chat' is finished at step " in resumed.stdout, resumed.stderr
    other = run_script("chat_sft", "d2_gka", "--chat.conversations=300", "--resume", home=trained)
    assert other.returncode == 1 and "conversations: given 300, the run has 200" in other.stderr


@pytest.fixture(scope="module")
def kinds(trained):
    """A home with a run of each kind, and an export."""
    home, short = trained, ["--chat.conversations=100", "--train.total_tokens=512"]
    assert run_script("chat_sft", "d2_gka", *short, "--run.name=tuned_generated", home=home).returncode == 0
    for source, files in (("files", ("talks.jsonl",)), ("huggingface", ())):  # as if they had been tuned on these
        run_dir = shutil.copytree(home / "runs" / "tuned_generated", home / "runs" / f"tuned_{source}")
        config = load_config(run_dir / "config.toml", cls=TuningConfig)
        config = dataclasses.replace(config, chat=dataclasses.replace(config.chat, source=source, files=files))
        (run_dir / "config.toml").write_text(to_toml(config))
        for path in run_dir.rglob("meta.json"):
            path.write_text(json.dumps(json.loads(path.read_text()) | {"config": dataclasses.asdict(config)}))
    options = ["configs/vision_digits.toml", "--run.name=digits", "--train.epochs=0.1", "--model.depth=1"]
    assert run_script("vision_train", *options, "--model.n_embd=16", "--model.head_dim=16", home=home).returncode == 0
    result = run_script("export_hf", "d2_gka", home / "exported", home=home)
    assert result.returncode == 0, result.stderr
    return home


TUNED = ["tuned_generated", "tuned_files", "tuned_huggingface"]
IMAGE = "given an image model"


@pytest.mark.parametrize(
    ("words", "taken", "refused"),
    [
        ("verify_run {}", ["d2_gka", *TUNED, "digits"], {}),
        ("base_eval {}", ["d2_gka", *TUNED], {"digits": IMAGE}),
        ("chat_cli {} -p hi --max-tokens 2", ["d2_gka", *TUNED], {"digits": IMAGE}),
        ("chat_cli d2_gka --compare {} -p hi --max-tokens 2", ["d2_gka", *TUNED], {"digits": IMAGE}),
        ("chat_eval {} --limit 1", TUNED, {"digits": IMAGE, "d2_gka": "given a run that was not tuned"}),
        (
            "chat_sft {} --run.name=again --overwrite --chat.conversations=100 --train.total_tokens=512",
            ["d2_gka", "tuned_files"],
            {"digits": IMAGE},
        ),
        ("export_hf {} {home}/out --overwrite", ["d2_gka", *TUNED], {"digits": IMAGE}),
        ("attention_maps {} --documents 1 --tokens 4", ["tuned_files"], {"digits": IMAGE}),
        ("lm_eval {} --tasks none", [], {"digits": IMAGE}),
        ("compare d2_gka {}", ["d2_gka"], {"digits": f"{IMAGE}, expected language models"}),
        (
            "vision_report {}",
            ["digits"],
            {"d2_gka": "given a language model, which scripts.compare", "tuned_files": "given a tuned language model"},
        ),
        (
            "base_train configs/laptop.toml --resume --run.name={}",
            [],
            {"tuned_files": "another kind (tuned language model)", "digits": "another kind (image model)"},
        ),
    ],
    ids=lambda value: value.split()[0] if isinstance(value, str) else "",
)
def test_a_script_takes_every_kind_of_run_or_names_what_it_is(words, taken, refused, kinds, monkeypatch):
    monkeypatch.setattr("gkachat.eval.chat.MAX_ANSWER_TOKENS", 2)
    if "run.name" not in words:
        step = kinds / "runs/d2_gka/checkpoints/step_000008"
        refused = refused | {
            str(kinds / "exported"): "given a model for transformers, expected a run",
            str(step): f"given a checkpoint, expected its run, {kinds}/runs/d2_gka, and --step",
        }
    for name in [*taken, *refused]:
        options = TINY if words.startswith("base_train") else []
        result = run_script(*words.format(name, home=kinds).split(), *options, home=kinds)
        if name in taken:
            assert result.returncode == 0, (name, result.stdout, result.stderr)
        else:
            assert result.returncode == 1 and refused[name] in result.stderr, (name, result.stderr)
            assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1


def test_options_that_cannot_apply_to_tuning_are_refused_and_not_in_the_help(trained):
    shown = run_script("chat_sft", "--help", home=trained).stdout
    assert "--chat.epochs" in shown and "--train.total_tokens" in shown
    for option in (
        "model.depth",
        "model.gka.rope",
        "data.max-chars",
        "tokenizer.vocab_size",
        "train.protocol",
        "chat.base",
    ):
        assert f"--{option.replace('-', '_')} " not in shown
        for words in ([f"--{option}", "3"], [f"--{option}=3"]):
            result = run_script("chat_sft", "d2_gka", *words, "--run.name=blocked", home=trained)
            assert result.returncode == 1 and result.stderr.count("\n") == 1
            assert result.stderr.startswith(f"error: --{option.replace('-', '_')}: cannot be set: ")
    assert not (trained / "runs" / "blocked").exists()


def bash(*words, home):
    environment = {"GKACHAT_HOME": str(home), "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    words = ["env", *(f"{name}={value}" for name, value in environment.items()), "bash", *words]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=900)


@pytest.fixture(scope="module")
def speedrun(tmp_path_factory):
    home = tmp_path_factory.mktemp("speedrun")
    return home, bash("speedrun.sh", *SMALL, "--chat.conversations=300", home=home)


def test_the_speedrun_trains_compares_and_says_how_to_talk(speedrun):
    home, result = speedrun
    assert result.returncode == 0, result.stderr
    assert "| parameters |" in result.stdout and "unigram" in result.stdout
    assert len(re.findall(r"^d1_\w+ \|   addition\b", result.stdout, flags=re.M)) == len(ATTENTIONS)
    commands = [line.strip() for line in result.stdout.splitlines() if "scripts.chat_cli" in line]
    assert len(commands) == len(ATTENTIONS) + 1
    for command in commands:
        words = shlex.split(command.partition("scripts.chat_cli")[2])
        spoken = run_script("chat_cli", *words, "-p", "What is 12 + 34?", "--max-tokens", 3, home=home)
        assert spoken.returncode == 0 and spoken.stdout
    assert (home / "comparisons" / "d1_softmax-d1_gka-d1_gka_conv" / "comparison.png").exists()


def test_the_steps_of_a_second_speedrun_keep_what_is_finished(speedrun):
    home, _ = speedrun
    weights = sorted((home / "runs").glob("*/checkpoints/*/model.safetensors"))
    before = [p.stat().st_mtime_ns for p in weights]
    config, named = "configs/laptop.toml", ["--model.attention", "gka", "--run.name", "d1_gka"]
    for step in (
        ["tok_train", config, *DATA],
        ["data_prep", config, *DATA],
        ["base_train", config, "--resume", *named, *SMALL],
        ["chat_sft", "d1_gka", "--resume", "--chat.conversations", 300],
    ):
        result = run_script(*step, home=home)
        assert result.returncode == 0, result.stderr
    assert weights and [p.stat().st_mtime_ns for p in weights] == before


def bash_lines():
    """Return the commands in bash blocks of the README and of four pages, but those of depth 20, which take GPUs."""
    names = ("inference.md", "evaluation.md", "data.md", "kernels.md")
    pages = [README, *((ROOT / "docs" / name).read_text() for name in names)]
    blocks = [block for page in pages for block in re.findall(r"```bash\n(.*?)```", page, flags=re.DOTALL)]
    lines = [shlex.split(line, comments=True) for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line and not any("d20" in word for word in line)]


def test_the_commands_of_the_readme_run(speedrun, tmp_path):
    home, _ = speedrun
    notes = tmp_path / "notes"
    notes.mkdir()
    for i in range(300):
        (notes / f"{i}.txt").write_text(f"Note {i}. " + " ".join(str(i * k) for k in range(400)))
    ran = 0
    for words in bash_lines():
        if words[:2] != ["python", "-m"]:
            assert words[:2] in (["bash", "speedrun.sh"], ["bash", "tests/run.sh"], ["source", ".venv/bin/activate"])
            continue
        script, args = words[2].removeprefix("scripts."), words[3:]
        # The speedrun above has models of depth 1.
        args = [arg.replace("notes/**", f"{notes}/**").replace("d4_", "d1_") for arg in args]
        if script in ("tok_train", "data_prep", "base_train"):
            args += SMALL if script == "base_train" else DATA
        if script.startswith("bench"):
            args += ["--tokens", 64, "--rounds", 1]
        result = run_script(script, *args, home=home)
        assert result.returncode == 0, (words, result.stderr)
        ran += 1
    assert ran >= 8


def test_the_first_screen_of_the_readme_has_the_two_commands():
    first = README.splitlines()[:25]
    assert any(line.startswith("bash speedrun.sh") for line in first)
    assert any(line.startswith("bash tests/run.sh") for line in first)


def test_the_test_script_runs_pytest(tmp_path):
    result = bash("tests/run.sh", "--version", home=tmp_path)
    assert result.returncode == 0 and "pytest" in result.stdout + result.stderr
