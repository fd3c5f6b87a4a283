"""The pages keep up with the code: links, files, names and imports exist, and every command line parses."""

import argparse
import ast
import dataclasses
import functools
import importlib
import inspect
import os
import pydoc
import re
import shlex
import subprocess
import sys
import typing

import pytest
from conftest import ROOT, TINY, untrained_run

import gkachat.checkpoint
import gkachat.sweep
import gkachat.train.setup  # before `parse` patches what it imports
import scripts.cli
from gkachat import config_file
from gkachat.checks import ConfigError
from gkachat.config import Config, TuningConfig
from gkachat.config_file import load_config, parse_args, to_toml
from gkachat.inference.engine import Engine
from gkachat.tokenizer import train_tokenizer
from gkachat.vision_config import VisionConfig

README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md")), ROOT / "configs" / "README.md"]
RESULTS = sorted((ROOT / "results").rglob("*.md"))  # their commands belong to the commits that they name
PROGRAMS = sorted([*(ROOT / "scripts").glob("*.py"), *(ROOT / "configs").glob("*.toml")])
TOP = {path.name for path in ROOT.iterdir()}
MADE_BY_THE_READER = {"cauchy.py"}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)


def name(page):
    return str(page.relative_to(ROOT))


def blocks(text, language):
    return [block for found, block in FENCE.findall(text) if found == language]


def inline_code(text):
    return re.findall(r"`([^`\n]+)`", FENCE.sub("", text))


# Links, files and names


def anchors(text):
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", text), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page, text):
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", text)):
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        if "://" in target:
            continue
        if not file.exists():
            yield f"{target}: no such file"
        elif anchor and anchor not in anchors(text if file == page else file.read_text()):
            yield f"{target}: no such heading"


def missing_files(page, text):
    """Yield the paths in backticks that exist neither in the root nor beside the page, the package or the tests."""
    places = (ROOT, page.parent, ROOT / "gkachat", ROOT / "tests" / "reliability")
    for path in set(inline_code(text)) - MADE_BY_THE_READER:
        is_path = re.fullmatch(r"[\w*-][\w./*-]*(/|\.(py|sh|md|toml|json|png))", path)
        of_the_repo = path.split("/")[0] in TOP or path.endswith((".py", ".sh"))
        if is_path and of_the_repo and not any(any(place.glob(path.rstrip("/"))) for place in places):
            yield f"{path}: no such file"


@functools.cache
def config_fields():
    def fields(cls, prefix=""):
        for field, kind in typing.get_type_hints(cls).items():
            yield prefix + field
            if dataclasses.is_dataclass(kind):
                yield from fields(kind, f"{prefix}{field}.")

    return {field for cls in (Config, TuningConfig, VisionConfig) for field in fields(cls)}


def wrong_names(text):
    """Yield the names in backticks of config fields and of package members that do not exist."""
    sections = "|".join(sorted(field for field in config_fields() if "." not in field))
    for code in inline_code(text):
        if re.fullmatch(rf"({sections})\.[a-z_.]+", code):
            of_today = code in config_fields() or code.endswith((".safetensors", ".json", ".toml", ".py"))
            if not of_today and not code.startswith("model.plus."):  # docs/experiments_gka_plus.md has their commit
                yield f"{code}: no such field"
        match = re.match(r"(?:gkachat|scripts)(\.\w+)+", code)
        if match and pydoc.locate(match[0]) is None:
            yield f"{match[0]}: no such name"


def missing_definitions(text):
    """Yield what is written as "`file.py`: `Class.method`" and is not defined in that file."""
    for path, definition in re.findall(r"`([\w/]+\.py)`: `([\w.]+)`", text):
        source = (ROOT / path).read_text()
        if not all(re.search(rf"^ *(def|class) {part}\b", source, re.MULTILINE) for part in definition.split(".")):
            yield f"{path}: {definition} is not defined there"


def wrong_imports(text):
    for block in blocks(text, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module)
                yield from (f"{node.module}.{a.name}: no such name" for a in node.names if not hasattr(module, a.name))


@pytest.mark.parametrize("page", [*PAGES, *RESULTS], ids=name)
def test_links_and_files_of_a_page_exist(page):
    text = page.read_text()
    problems = [*broken_links(page, text), *missing_files(page, text)]
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_names_on_a_page_exist(page, cauchy):
    text = page.read_text()
    problems = [*wrong_names(text), *missing_definitions(text), *wrong_imports(text)]
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize(
    "written",
    [
        "[a](docs/none.md)",
        "[a](docs/data.md#none)",
        "[a](#none)",
        "`gkachat/none.py`",
        "`results/none*.md`",
        "`train.protocl`",
        "`gkachat.model.gpt.GTP`",
        "`scripts.speak`",
    ],
)
def test_a_wrong_link_file_or_name_is_found(written):
    text = (
        f"{README.read_text()}\n{written} [b](docs/data.md#sources) `scripts/cli.py` `run.seed` `gkachat.model.gpt.GPT`"
    )
    found = [*broken_links(README, text), *missing_files(README, text), *wrong_names(text)]
    assert len(found) == 1 and found[0].split(":")[0] in written


# Commands


class Parsed(BaseException):
    """Raised in place of the work that a command line asks for."""


def stop_after(function):
    def stopped(*args, **kwargs):
        function(*args, **kwargs)
        raise Parsed

    return stopped


def parse(script, args, run_dir):
    """Run a script's `main` until it has read its command line. The error is the script's own."""
    module = importlib.import_module(f"scripts.{script}")
    if inspect.signature(module.main).parameters:
        parse_args(functools.wraps(module.main)(lambda *args, **kwargs: None), args)
        return
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Parsed):
        patch.chdir(ROOT)
        patch.setattr(sys, "argv", [script, *args])
        for place in (module, scripts.cli, config_file, gkachat.sweep):
            patch.setattr(place, "load_config", stop_after(load_config), raising=False)
        for place in (module, gkachat.checkpoint):  # scripts.chat_sft starts from the config of a run
            patch.setattr(place, "find_run", lambda name: run_dir, raising=False)
        patch.setattr(module, "parse_benchmark", stop_after(lambda parser: parser.parse_args()), raising=False)
        if hasattr(module, "argparse"):
            patch.setattr(argparse.ArgumentParser, "parse_args", stop_after(argparse.ArgumentParser.parse_args))
        module.main()


def commands(text):
    """Yield the words of each command in fenced blocks and in backticks, without pipes, redirections and comments."""
    fenced = [*blocks(text, "bash"), *blocks(text, "text")]
    lines = [line for block in fenced for line in block.replace("\\\n", " ").splitlines()]
    lines += [line for line in inline_code(text) if line.startswith(("python -m ", "torchrun ", "bash "))]
    for line in lines:
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words = list(lexer)
        end = next((i for i, word in enumerate(words) if word and set(word) <= set("<>|&;")), len(words))
        yield tuple(words[:end])


def usage_lines(text):
    """Return the commands in the docstring of a script or the comments of a config, as a bash block."""
    lines = re.findall(r"^[# ]*((?:python -m|torchrun|bash) .*)$", text.replace("\\\n", " "), flags=re.MULTILINE)
    return "\n".join(["```bash", *(line for line in lines if "$" not in line), "```"])


def unknown_options(words):
    try:
        load_config(None, words, TuningConfig)
    except ConfigError as error:
        return [problem for problem in error.problems if "nrecognized" in problem or "unknown" in problem]
    return []


@functools.cache
def problem_of_command(words, run_dir):
    """Return why a command does not run, or "". Programs that are not of this repo are not looked at."""
    script = next((i for i, word in enumerate(words) if word.startswith("scripts.")), None)
    if script is not None:
        try:
            parse(words[script].removeprefix("scripts."), list(words[script + 1 :]), run_dir)
        except (SystemExit, ImportError, ValueError, OSError) as error:
            return repr(error)
        configs = [word for word in words if re.fullmatch(r"configs/\S+\.toml", word)]
        return "".join(f"{config}: no such file" for config in configs if not (ROOT / config).exists())
    if words[:1] == ("bash",):
        if not (ROOT / words[1]).is_file():
            return f"{words[1]}: no such file"
        own = [word for word in words[2:] if re.fullmatch(r"--[\w-]+", word)]
        source = (ROOT / words[1]).read_text()
        unknown = [option for option in own if not re.search(rf"{option}[\s|)]", source)]
        return "; ".join(unknown + unknown_options([word for word in words[2:] if word not in own]))
    return ""


def wrong_commands(text, run_dir):
    for words in commands(text):
        if problem := problem_of_command(words, run_dir):
            yield f"{shlex.join(words)}: {problem}"
    for option in inline_code(text):
        if re.match(r"--(?!section)\w+\.\w", option):
            yield from (f"{option}: {problem}" for problem in unknown_options(shlex.split(option)))


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run directory as far as reading a command line needs it."""
    directory = tmp_path_factory.mktemp("run")
    (directory / "config.toml").write_text(to_toml(Config()))
    return directory


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_on_a_page_parse(page, run_dir, cauchy):
    problems = list(wrong_commands(page.read_text(), run_dir))
    assert not problems, "\n".join(problems)


def test_usage_lines_of_scripts_and_configs_parse(run_dir):
    problems = [wrong for path in PROGRAMS for wrong in wrong_commands(usage_lines(path.read_text()), run_dir)]
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize(
    "command",
    [
        "python -m scripts.base_train configs/laptop.toml --model.dpeth 3",
        "python -m scripts.base_train configs/laptop.toml --model.attention linear",
        "torchrun --nnodes=2 \\\n    -m scripts.base_train configs/none.toml --resume > log &",
        "python -m scripts.data_prep configs/laptop.toml --overwrite",
        "python -m scripts.chat_cli d4_gka --temprature 0.7  # warm",
        "python -m scripts.base_eval d4_gka --eval cor",
        "python -m scripts.verify_run",
        "python -m scripts.bench_step --deep 4",
        "python -m scripts.sweep configs/sweep_depth.toml --model.head 3",
        "python -m scripts.estimate configs/laptop.toml --train.none 3",
        "python -m scripts.chat_sft d4_gka --chat.epoch 2",
        "python -m scripts.speak d4_gka",
        "bash speedrun.sh --fast",
        "bash speedrun.sh --run.sed 43",
        "bash walk.sh",
    ],
)
def test_a_wrong_command_is_found(command, run_dir):
    text = f"```bash\n{command}\npython -m scripts.base_train configs/laptop.toml --model.attention gka\n```\n"
    assert len(list(wrong_commands(text, run_dir))) == 1


def test_a_wrong_option_is_found(run_dir):
    text = "`--train.protocl paper` and `--section.field value`, `--run.fp8 true`\n"
    assert [problem.split(":")[0] for problem in wrong_commands(text, run_dir)] == ["--train.protocl paper"]


# The front door


def test_readme_begins_with_the_two_commands():
    lines = blocks(README.read_text(), "bash")[0].splitlines()
    assert [line.split("#")[0].strip() for line in lines] == ["bash speedrun.sh", "bash tests/run.sh"]


def test_readme_is_short_and_links_every_page():
    text = README.read_text()
    assert len(text.splitlines()) <= 120
    assert [page for page in map(name, PAGES[1:]) if f"({page})" not in text] == []


def test_commands_page_lists_every_script():
    page = (ROOT / "docs" / "commands.md").read_text()
    names = {path.stem for path in (ROOT / "scripts").glob("*.py")} - {"__init__", "cli"}
    assert names == set(re.findall(r"`scripts\.(\w+)`", page))


def test_readme_python_block_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("GKACHAT_HOME", str(tmp_path))
    tokenizer = train_tokenizer(["def add(a, b):\n    return a + b\n" * 8], 300)
    untrained_run(tmp_path, "d4_gka", tokenizer, attention="gka")
    [block] = blocks(README.read_text(), "python")
    exec(block, {})
    assert capsys.readouterr().out


# The attention that docs/attention.md adds. tests/attention/test_conformance.py holds it to what every attention must.


def test_an_added_attention_takes_at_most_30_lines_outside_the_package(cauchy):
    assert len(cauchy.read_text().splitlines()) <= 30
    assert not any("cauchy" in path.read_text().lower() for path in (ROOT / "gkachat").rglob("*.py"))


def test_an_added_attention_trains_by_its_own_file_and_generates(cauchy, tiny_home):
    command = [cauchy, "scripts.base_train", "configs/laptop.toml", *TINY, "--model.attention", "cauchy"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    trained = subprocess.run([sys.executable, *command], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert trained.returncode == 0, trained.stderr
    assert "layers 0, 1: reference (the layer defines its own scores)" in trained.stdout
    model, tokenizer, _ = gkachat.checkpoint.load_model(tiny_home / "runs" / "d2_cauchy")
    engine, prompt = Engine(model, tokenizer), tokenizer.encode("import os")
    tokens = list(engine.generate(prompt, max_tokens=5, seed=1))
    assert len(tokens) == 5 and engine.samples(prompt, 2, max_tokens=5, seed=1)[0] == tokens
