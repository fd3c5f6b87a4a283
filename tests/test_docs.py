"""What the pages say is there: links, files, commands and their options, imports; and the attention one adds works."""

import ast
import functools
import importlib
import importlib.util
import os
import re
import shlex
import subprocess
import sys

import pytest
import torch
import tyro
from conftest import ROOT, TINY

import gkachat.checkpoint
from gkachat.attention.layers import ATTENTION, register
from gkachat.config import ATTENTIONS, Config, ConfigError, GPTConfig, TuningConfig
from gkachat.config_file import load_config, to_toml
from gkachat.inference.engine import Engine
from gkachat.model.gpt import GPT
from gkachat.model.stats import model_stats
from gkachat.train.optim import make_optimizers
from gkachat.train.schedule import resolve
from scripts.cli import config_from_args

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "configs" / "README.md"]
EACH_PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)
MADE = {"cauchy.py"}  # by the reader, of a page's block
TOP = {path.name for path in ROOT.iterdir()}


def blocks(text, language):
    return [block for kind, block in FENCE.findall(text) if kind == language]


def inline(text):
    """What stands between single backticks."""
    return re.findall(r"`([^`\n]+)`", FENCE.sub("", text))


def anchors(text):
    """Of a page's headings, as GitHub makes them."""
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
    """Paths in backticks, and those that begin a line in a tree, which is a block of no language.

    They stand in the root, beside the page, in the package, or, on the reliability page, in its tests' directory; what
    a run writes is somewhere else.
    """
    places = (ROOT, page.parent, ROOT / "gkachat", ROOT / "tests" / "reliability")
    paths = [path for path in inline(text) if re.fullmatch(r"[\w*-][\w./*-]*(/|\.(py|sh|md|toml|json|png))", path)]
    paths = [path for path in paths if path.split("/")[0] in TOP or path.endswith((".py", ".sh"))]
    for block in blocks(text, ""):
        paths += [path for path in re.findall(r"^([\w./-]+)", block, flags=re.MULTILINE) if path.split("/")[0] in TOP]
    for path in paths:
        if path not in MADE and not any(any(place.glob(path.rstrip("/"))) for place in places):
            yield f"{path}: no such file"


def commands(text):
    """The words of each command, in bash blocks and in backticks, up to where a shell's own signs begin."""
    lines = [line for block in blocks(text, "bash") for line in block.replace("\\\n", " ").splitlines()]
    lines += [line for line in inline(text) if line.startswith(("python -m ", "torchrun ", "bash "))]
    for line in lines:
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words = list(lexer)
        end = next((i for i, word in enumerate(words) if word and set(word) <= set("<>|&;")), len(words))
        yield words[:end]


class Read(BaseException):
    """A command line was understood; what it asks for is not done."""


def stop(*args, **kwargs):
    raise Read


def read_command_line(script, args, run_dir):
    """Run a script's own main up to where its command line was read. An error for what it does not know."""
    module = importlib.import_module(f"scripts.{script}")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Read):
        patch.chdir(ROOT)
        patch.setattr(sys, "argv", [script, *args])
        if hasattr(module, "tyro"):
            tyro.cli(functools.wraps(module.main)(stop), args=args)
        if hasattr(module, "config_from_args"):
            patch.setattr(module, "config_from_args", lambda *given: stop(config_from_args(*given)))
        if hasattr(module, "parse_benchmark"):
            patch.setattr(module, "parse_benchmark", lambda parser: stop(parser.parse_args()))
        for name in ("Jobs", "estimate"):  # what scripts.sweep and scripts.estimate do next
            patch.setattr(module, name, stop, raising=False)
        patch.setattr(gkachat.checkpoint, "find_run", lambda name: run_dir)  # whose config scripts.chat_sft starts from
        patch.setattr(gkachat.checkpoint, "open_checkpoint", stop)
        module.main()


def unknown_fields(words):
    """Of `--section.field value`, what no config has."""
    try:
        load_config(None, words, TuningConfig)
    except ConfigError as error:
        return [problem for problem in error.problems if "unknown option" in problem]
    return []


def wrong_commands(text, run_dir):
    """Commands that name a script or a config there is not, or an option that is not known there."""
    for words in commands(text):
        script = next((i for i, word in enumerate(words) if word.startswith("scripts.")), None)
        if script is not None:
            try:
                read_command_line(words[script].removeprefix("scripts."), words[script + 1 :], run_dir)
            except (SystemExit, ImportError, ValueError, OSError) as error:
                yield f"{shlex.join(words)}: {error!r}"
        elif words[:1] == ["bash"]:
            source = (ROOT / words[1]).read_text() if (ROOT / words[1]).is_file() else ""
            own = [word for word in words[2:] if re.fullmatch(r"--[\w-]+", word)]
            unknown = [option for option in own if not re.search(rf"{option}[\s|)]", source)]
            unknown += unknown_fields([word for word in words[2:] if word not in own])
            if not source or unknown:
                yield f"{shlex.join(words)}: {unknown or 'no such file'}"
    for option in inline(text):
        if re.match(r"--(?!section)\w+\.\w", option):
            yield from unknown_fields(shlex.split(option))


def wrong_imports(text):
    for block in blocks(text, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module)
                yield from (f"{node.module}.{a.name}: no such name" for a in node.names if not hasattr(module, a.name))


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """As far as reading a command line goes."""
    directory = tmp_path_factory.mktemp("run")
    (directory / "config.toml").write_text(to_toml(Config()))
    return directory


@EACH_PAGE
def test_links_and_files_are_there(page):
    text = page.read_text()
    assert [*broken_links(page, text), *missing_files(page, text)] == []


@EACH_PAGE
def test_commands_and_imports_are_understood(page, run_dir, cauchy):
    text = page.read_text()
    assert [*wrong_commands(text, run_dir), *wrong_imports(text)] == []


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
def test_a_wrong_command_on_a_page_is_found(command, run_dir):
    text = PAGES[0].read_text()
    wrong = list(wrong_commands(text.replace("```bash\n", f"```bash\n{command}\n", 1), run_dir))
    assert len(wrong) == 1 and wrong[0].startswith(command.split()[0])


@pytest.mark.parametrize(
    "said",
    [
        "[a](docs/none.md)",
        "[a](docs/data.md#none)",
        "[a](#none)",
        "`gkachat/none.py`",
        "`results/none*.md`",
        "`none.sh`",
    ],
)
def test_a_wrong_link_or_path_on_a_page_is_found(said):
    text = f"{PAGES[0].read_text()}\n{said} [b](docs/data.md#sources) `scripts/cli.py` `docs/`\n"
    found = [*broken_links(PAGES[0], text), *missing_files(PAGES[0], text)]
    assert len(found) == 1 and found[0].split(":")[0] in said


def test_a_wrong_option_or_import_in_the_text_is_found(run_dir):
    text = "`--train.protocl paper` and `--section.field value`, `--run.fp8 true`\n"
    assert [problem.split(":")[0] for problem in wrong_commands(text, run_dir)] == ["--train.protocl"]
    text = "```python\nfrom gkachat.model.gpt import GTP, GPT\n```\n"
    assert list(wrong_imports(text)) == ["gkachat.model.gpt.GTP: no such name"]


# The attention that docs/attention.md adds.

SHAPE = {"depth": 2, "attention": "cauchy", "vocab_size": 64, "sequence_len": 160, "n_embd": 32, "head_dim": 16}


@pytest.fixture(scope="module")
def cauchy(tmp_path_factory):
    """The page's file, imported."""
    [code] = blocks((ROOT / "docs" / "attention.md").read_text(), "python")
    path = tmp_path_factory.mktemp("own") / "cauchy.py"
    path.write_text(code)
    spec = importlib.util.spec_from_file_location("cauchy", path)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    yield path
    del ATTENTION["cauchy"]
    ATTENTIONS.remove("cauchy")


@pytest.fixture(scope="module")
def drawn(cauchy):
    """A model with a window of 128 in its first layer, whose attention does something, and a text."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SHAPE)).eval()
    assert [block.attn.window for block in model.blocks] == [128, None]
    for name, p in model.named_parameters():
        if name.endswith(("c_proj.weight", "lm_head.weight", "log_sigma")):
            torch.nn.init.normal_(p, std=0.2)
    return model, torch.randint(64, (2, 160))


def test_an_added_attention_takes_less_than_60_lines_outside_the_package(cauchy):
    assert len(cauchy.read_text().splitlines()) < 60 and ATTENTION["cauchy"].__module__ == "cauchy"
    assert not any("cauchy" in path.read_text().lower() for path in (ROOT / "gkachat").rglob("*.py"))


def test_an_added_attention_is_counted(cauchy):
    own, gka = (model_stats(GPTConfig(**SHAPE | {"attention": name})) for name in ("cauchy", "gka"))
    assert own == gka and own.params["log_sigma"] == 4
    with pytest.raises(ValueError, match="attention 'gka': there is one already"):
        register("gka", ATTENTION["cauchy"])


def test_an_added_attention_learns(cauchy):
    config = resolve(Config(model=GPTConfig(**SHAPE)))
    torch.manual_seed(0)
    model = GPT(config.model)
    optimizers, idx = make_optimizers(model, config.optim), torch.randint(64, (4, 9)).repeat(1, 5)
    before, losses = [p.clone() for p in model.blocks[0].attn.parameters()], []
    for _ in range(20):
        loss = model(idx[:, :-1], idx[:, 1:])
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert not any(map(torch.equal, before, model.blocks[0].attn.parameters()))


@torch.inference_mode()
def test_an_added_attention_decodes_to_the_logits_of_the_whole_text(drawn):
    model, idx = drawn
    expected, T = model(idx), idx.size(1)
    cache, at, got = model.make_cache(2, T, block=32), 0, []
    while at < T:
        size = (32, 1, 7)[len(got) % 3]
        got.append(model.decode(idx[:, at : at + size], cache, slice(0, 2), every=True))
        at += size
    torch.testing.assert_close(torch.cat(got, dim=1), expected, rtol=1e-5, atol=1e-5)  # float32, sums in another order
    # A prompt read at once, then one token at a time; and rows that share a prefix.
    cache = model.make_cache(2, T, block=T)
    model.prefill(idx[:, :140], cache)
    prefix = model.make_cache(1, 20, block=20)
    model.decode(idx[:1, :20], prefix, slice(0, 1))
    rows = model.make_cache(2, T - 20, block=32, prefix=prefix)
    first = model.decode(idx[:1, 20:50].expand(2, -1), rows, slice(0, 2), every=True)
    torch.testing.assert_close(first, expected[:1, 20:50].expand(2, -1, -1), rtol=1e-5, atol=1e-5)
    for t in range(140, T):
        got = model.decode(idx[:, t : t + 1], cache, slice(0, 2))
        torch.testing.assert_close(got, expected[:, t], rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_an_added_attention_does_not_see_the_future_nor_beyond_its_window(drawn):
    attn, x = drawn[0].blocks[0].attn, torch.randn(1, 160, 32)
    changed = x.clone()
    changed[:, 10] += 1
    a, b = (attn(x, None, None) for x in (x, changed))
    differs = (a != b).any(dim=-1)[0]
    assert not differs[:10].any() and differs[10:138].all() and not differs[138:].any()


def test_an_added_attention_trains_by_the_script_and_speaks(cauchy, tiny_home):
    words = [cauchy, "scripts.base_train", "configs/laptop.toml", *TINY, "--model.attention", "cauchy"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    trained = subprocess.run([sys.executable, *words], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert trained.returncode == 0, trained.stderr
    assert "cauchy, depth 2" in trained.stdout and "layers 0, 1: torch (as it is written down)" in trained.stdout
    model, tokenizer, _ = gkachat.checkpoint.load_model(tiny_home / "runs" / "d2_cauchy")
    engine = Engine(model, tokenizer)
    one = list(engine.generate(tokenizer.encode("import os"), max_tokens=5, seed=1))
    assert len(one) == 5 and engine.samples(tokenizer.encode("import os"), 2, max_tokens=5, seed=1)[0] == one


def test_names_of_attentions_are_those_there_are():
    assert list(ATTENTION) == ATTENTIONS
