"""Options: from TOML and the command line to a checked Config, and back."""

import dataclasses
import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gkachat.config import (
    Config,
    ConfigError,
    DataConfig,
    GKAConfig,
    GPTConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
    home,
)
from gkachat.config_file import build, load_config, to_toml
from gkachat.sweep import load_sweep
from gkachat.vision_config import VisionConfig

FILES = sorted((Path(__file__).resolve().parents[1] / "configs").glob("*.toml"))
SHIPPED = [path for path in FILES if not path.stem.startswith("sweep_")]
PROPERTY = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]))


def problems_of(*args):
    """The problems that loading reports, one line each."""
    with pytest.raises(ConfigError) as caught:
        load_config(*args)
    assert str(caught.value) == "; ".join(caught.value.problems)
    return caught.value.problems


def given_on_the_command_line(*words):
    return problems_of(None, words)


@pytest.fixture
def toml(tmp_path):
    def write(text):
        path = tmp_path / "config.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def test_there_are_shipped_configs():
    assert {"d20_softmax.toml", "d20_gka.toml", "laptop.toml"} <= {path.name for path in SHIPPED}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_config_loads_and_round_trips(path, toml):
    cls = VisionConfig if path.stem.startswith("vision_") else Config
    config = load_config(path, cls=cls)
    assert load_config(toml(to_toml(config)), cls=cls) == config


@pytest.mark.parametrize("path", [path for path in FILES if path not in SHIPPED], ids=lambda path: path.stem)
def test_a_shipped_sweep_plans_attentions_at_widths_that_follow_depth(path):
    shapes = [run.config.model for run in load_sweep(path).runs]
    assert {shape.attention for shape in shapes} >= {"softmax", "gka"}
    assert len({shape.depth for shape in shapes}) >= 3
    assert all(shape.n_embd == 64 * shape.depth for shape in shapes)


def test_the_laptop_config_says_what_its_file_says():
    config = load_config(SHIPPED[[path.stem for path in SHIPPED].index("laptop")])
    assert config.data.source == "python-source"
    assert (config.model.depth, config.model.n_embd, config.model.n_head) == (4, 192, 3)
    assert config.train.baseline_tokens == 1_024_000
    assert config.optim.weight_decay == 0.1
    assert config.run_name == "d4_softmax"
    assert config.data_name == "python-source-v4096"


def test_the_two_d20_configs_differ_in_attention_alone():
    softmax, gka = (load_config(p) for stem in ("d20_softmax", "d20_gka") for p in SHIPPED if p.stem == stem)
    assert (softmax.model.attention, gka.model.attention) == ("softmax", "gka")
    assert dataclasses.replace(gka, model=softmax.model) == softmax
    assert dataclasses.replace(gka.model, attention="softmax") == softmax.model


def test_without_a_file_everything_is_default():
    assert load_config() == Config()


def test_a_missing_file_is_named():
    with pytest.raises(FileNotFoundError, match=r"no config file nowhere\.toml"):
        load_config("nowhere.toml")


@pytest.mark.parametrize("content", [b"[model\ndepth = 3", b"depth = ", b'[run]\nname = "\xff\xfe"'])
def test_a_file_that_is_not_toml_is_named(tmp_path, content):
    path = tmp_path / "broken.toml"
    path.write_bytes(content)
    [problem] = problems_of(path)
    assert problem.startswith(f"{path}: not valid TOML: ")


@PROPERTY
@given(name=ANY_TEXT, files=st.lists(ANY_TEXT, min_size=1), column=ANY_TEXT)
def test_any_text_round_trips_through_toml(tmp_path_factory, name, files, column):
    config = Config(
        run=RunConfig(wandb=name), data=DataConfig(source="files", name="n", files=tuple(files), text_column=column)
    )
    path = tmp_path_factory.mktemp("toml") / "config.toml"
    path.write_text(to_toml(config), encoding="utf-8")
    assert load_config(path) == config


@PROPERTY
@given(lr=st.floats(min_value=0, allow_nan=False), scale=st.none() | st.floats(min_value=0, allow_nan=False))
def test_any_number_round_trips_through_toml(tmp_path_factory, lr, scale):
    config = Config(optim=OptimConfig(matrix_lr=lr, lr_scale=scale))
    path = tmp_path_factory.mktemp("toml") / "config.toml"
    path.write_text(to_toml(config))
    assert load_config(path) == config


def test_nested_tables_and_booleans_round_trip(toml):
    config = Config(
        run=RunConfig(compile=False), model=GPTConfig(attention="gka", gka=GKAConfig(rope=True, include_self=False))
    )
    text = to_toml(config)
    assert "[model.gka]\nrope = true\ninclude_self = false" in text
    assert load_config(toml(text)) == config


def test_fields_that_are_none_are_left_out_of_toml():
    assert "total_tokens" not in to_toml(Config())
    assert "total_tokens = 7" in to_toml(Config(train=TrainConfig(total_tokens=7)))


def test_a_dataclass_is_built_from_a_dict():
    assert build(GPTConfig, dataclasses.asdict(GPTConfig(depth=3))) == GPTConfig(depth=3)
    with pytest.raises(ConfigError, match="dept: unknown field"):
        build(GPTConfig, {"dept": 3})


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--model.depth", "6"], ("model", "depth", 6)),
        (["--model.depth=6"], ("model", "depth", 6)),
        (["--model.depth=5", "--model.depth=6"], ("model", "depth", 6)),
        (["--model.sequence-len", "64"], ("model", "sequence_len", 64)),
        (["--train.final-lr-fraction=0.5"], ("train", "final_lr_fraction", 0.5)),
        (["--train.tokens_per_param", "3"], ("train", "tokens_per_param", 3.0)),
        (["--data.site_packages", "true"], ("data", "site_packages", True)),
        (["--data.site_packages=False"], ("data", "site_packages", False)),
        (["--run.compile", "true"], ("run", "compile", True)),
        (["--run.compile", "none"], ("run", "compile", None)),
        (["--train.total_tokens", "None"], ("train", "total_tokens", None)),
        (["--train.total_tokens", "12"], ("train", "total_tokens", 12)),
        (["--data.max_chars", "1_000"], ("data", "max_chars", 1000)),
        (["--data.subset", "none"], ("data", "subset", "none")),
        (["--run.name", "007"], ("run", "name", "007")),
        (["--run.name="], ("run", "name", "")),
        (["--data.revision=a=b"], ("data", "revision", "a=b")),
        (["--data.files", "a.txt", "b c.txt"], ("data", "files", ("a.txt", "b c.txt"))),
        (["--data.files=a.txt", "b.txt", "--model.depth", "2"], ("data", "files", ("a.txt", "b.txt"))),
        (["--model.attention", "gka"], ("model", "attention", "gka")),
        (["--model.gka.rope", "true"], ("model", "gka", GKAConfig(rope=True))),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_an_override_sets_its_field(words, expected):
    section, name, value = expected
    found = getattr(getattr(load_config(None, words), section), name)
    assert found == value
    assert type(found) is type(value)


def test_overrides_win_over_the_file_and_leave_the_rest(toml):
    path = toml("[model]\ndepth = 3\nsequence_len = 64\n[run]\nseed = 1\n")
    config = load_config(path, ["--model.depth", "5"])
    assert (config.model.depth, config.model.sequence_len, config.run.seed) == (5, 64, 1)


@pytest.mark.parametrize("words", [["--model.depth"], ["--model.depth", "1", "2"], ["--run.name", "a", "b"]])
def test_a_single_value_is_asked_for(words):
    [problem] = given_on_the_command_line(*words)
    assert problem == f"{words[0][2:]}: given {len(words) - 1} values, expected one"


@pytest.mark.parametrize("word", ["depth", "--", "--depth", "--model", "--model.gka", "--model.depth.x", "--a.b.c.d"])
def test_a_word_that_names_no_field_is_named(word):
    [problem] = given_on_the_command_line(word, "3")[:1]
    assert problem.startswith(f"{word}: unknown option, expected --section.field value")


def test_an_unknown_field_is_named_with_a_suggestion(toml):
    assert problems_of(toml("[model]\ndept = 3")) == ["model.dept: unknown field (did you mean model.depth?)"]
    assert given_on_the_command_line("--model.dept", "3") == [
        "--model.dept: unknown option, expected --section.field value (did you mean model.depth?)"
    ]


def test_an_unknown_section_is_named(toml):
    assert problems_of(toml("[modle]\ndepth = 3")) == ["modle: unknown field"]


def test_nothing_is_suggested_where_nothing_is_close(toml):
    assert problems_of(toml("[model]\nqqqqqqqq = 3")) == ["model.qqqqqqqq: unknown field"]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('[model]\ndepth = "four"', "model.depth: given 'four', expected int"),
        ("[model]\ndepth = 4.0", "model.depth: given 4.0, expected int"),
        ("[model]\ndepth = true", "model.depth: given True, expected int"),
        ("[model]\nn_embd = true", "model.n_embd: given True, expected int or nothing"),
        ("[run]\nname = 3", "run.name: given 3, expected str"),
        ("[run]\ncompile = 1", "run.compile: given 1, expected bool or nothing"),
        ("[optim]\nmatrix_lr = false", "optim.matrix_lr: given False, expected float"),
        ("[data]\nfiles = 'a.txt'", "data.files: given 'a.txt', expected a list of strings"),
        ("[data]\nfiles = [1]", "data.files: given [1], expected a list of strings"),
        ("model = 3", "model: given 3, expected a table"),
        ("[model]\ngka = true", "model.gka: given True, expected a table"),
        ("[model]\nattention = 'linear'", "model.attention: given 'linear', expected 'softmax' or 'gka' or 'gka_plus'"),
        (
            "[model.gka]\nbackend = 3",
            "model.gka.backend: given 3, expected 'auto' or 'sdpa' or 'triton' or 'reference'",
        ),
    ],
)
def test_an_ill_typed_value_is_named(toml, text, problem):
    assert problems_of(toml(text)) == [problem]


def test_an_ill_typed_override_is_named():
    assert given_on_the_command_line("--model.depth", "3.5") == ["model.depth: given '3.5', expected int"]
    assert given_on_the_command_line("--data.site_packages=yes") == ["data.site_packages: given 'yes', expected bool"]
    assert given_on_the_command_line("--optim.lr_scale=big") == [
        "optim.lr_scale: given 'big', expected float or nothing"
    ]


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("model = 3", "--model.depth=4"),
        ("tokenizer = 3", "--tokenizer.vocab_size=600"),
        ("model.gka = 3", "--model.gka.rope=true"),
    ],
)
def test_a_section_that_is_no_table_is_named_under_an_override_too(toml, text, word):
    assert problems_of(toml(text), [word]) == [f"{text.split()[0]}: given 3, expected a table"]


def test_all_problems_of_all_sections_are_reported_at_once(toml):
    path = toml(
        "[run]\nseed = -1\nlog_every = 0\n[model]\ndept = 3\n[model.gka]\nrope = 1\n[train]\nwarmup_steps = 1.5\n"
    )
    problems = problems_of(path, ["--optim.matrix_lr=-1", "--tokenizer.vocab_size", "5", "--nothing", "x"])
    assert {re.split(":", problem)[0] for problem in problems} == {
        "--nothing",
        "run.seed",
        "run.log_every",
        "model.dept",
        "model.gka.rope",
        "train.warmup_steps",
        "optim.matrix_lr",
        "tokenizer.vocab_size",
    }
    assert len(problems) == 8


@pytest.mark.parametrize(
    ("field", "values"),
    {
        "model.depth": [0, -1],
        "model.head_dim": [0, 1, 3, -2],
        "model.sequence_len": [1, 0],
        "model.window_pattern": ["", "SLX", "sl", "S L"],
        "model.vocab_size": [1, 0],
        "model.n_embd": [0, 8, -64, 100, 1000],
        "tokenizer.vocab_size": [511, 65_537, 0],
        "tokenizer.train_chars": [0],
        "tokenizer.doc_chars": [0],
        "data.val_fraction": [0, 1, -0.5, 2],
        "data.min_chars": [0],
        "data.max_chars": [0],
        "data.shard_chars": [1023],
        "data.name": ["a/b", "a\\b"],
        "run.name": ["a/b", "a\\b", ".", ".."],
        "run.seed": [-1],
        "run.log_every": [0],
        "run.checkpoint_every": [-1],
        "train.total_tokens": [0],
        "train.total_batch_size": [0],
        "train.baseline_tokens": [-5],
        "train.device_batch_size": [0],
        "train.eval_tokens": [0],
        "train.tokens_per_param": [0, "nan"],
        "train.warmup_steps": [-1],
        "train.eval_every": [-1],
        "train.warmdown_fraction": [-0.1, 1.1],
        "train.final_lr_fraction": [-0.1, 1.1],
        "optim.matrix_lr": [-1, "nan"],
        "optim.weight_decay": [-1],
    }.items(),
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_value_that_cannot_be_is_named(field, values):
    for value in values:
        problems = given_on_the_command_line(f"--{field}={value}")
        assert any(problem.startswith(f"{field}: given ") for problem in problems), (value, problems)


def test_the_bounds_of_the_vocabulary_are_allowed():
    for size in (512, 65_536):
        assert load_config(None, ["--tokenizer.vocab_size", str(size)]).tokenizer.vocab_size == size


def test_files_are_asked_for_when_they_are_the_source():
    assert given_on_the_command_line("--data.source", "files") == [
        "data.files: given (), expected paths when source is files"
    ]


@pytest.mark.parametrize(
    ("depth", "n_embd", "head_dim", "n_head"), [(20, 1280, 128, 10), (4, 256, 128, 2), (3, 192, 64, 3), (1, 64, 64, 1)]
)
def test_width_and_heads_follow_from_depth(depth, n_embd, head_dim, n_head):
    shape = GPTConfig(depth=depth)
    assert (shape.n_embd, shape.head_dim, shape.n_head) == (n_embd, head_dim, n_head)


def test_width_and_heads_by_hand_are_kept():
    shape = GPTConfig(depth=4, n_embd=96, head_dim=24)
    assert (shape.n_embd, shape.head_dim, shape.n_head) == (96, 24, 4)
    assert GPTConfig(depth=4, n_embd=384).head_dim == 128


@pytest.mark.parametrize("shape", [{"n_embd": 200}, {"n_embd": 128, "head_dim": 48}, {"depth": 3, "head_dim": 128}])
def test_channels_that_do_not_divide_into_heads_are_refused(shape):
    with pytest.raises(ConfigError, match=r"^n_embd: given \d+, expected 16 or more and a multiple of head_dim \d+$"):
        GPTConfig(**shape)


@pytest.mark.parametrize(
    ("sequence_len", "short"), [(2048, 512), (2052, 640), (1024, 256), (1000, 256), (512, 128), (256, 128), (129, 128)]
)
def test_a_short_window_is_a_quarter_of_the_sequence_rounded_up_to_128(sequence_len, short):
    assert GPTConfig(depth=4, sequence_len=sequence_len, window_pattern="S").window(0) == short


@pytest.mark.parametrize("sequence_len", [2, 64, 127, 128])
def test_a_window_as_long_as_the_sequence_is_none(sequence_len):
    shape = GPTConfig(depth=4, sequence_len=sequence_len, window_pattern="S")
    assert [shape.window(layer) for layer in range(4)] == [None] * 4


@pytest.mark.parametrize(
    ("pattern", "letters"), [("SSSL", "SSSLSSL"), ("S", "SSSSSSL"), ("L", "LLLLLLL"), ("SL", "SLSLSLL")]
)
def test_the_pattern_repeats_and_the_last_layer_is_always_long(pattern, letters):
    shape = GPTConfig(depth=7, sequence_len=2048, window_pattern=pattern)
    assert [shape.window(layer) for layer in range(7)] == [{"S": 512, "L": None}[letter] for letter in letters]


def test_the_models_vocabulary_follows_the_tokenizers(toml):
    path = toml("[tokenizer]\nvocab_size = 1000\n")
    assert load_config(path).model.vocab_size == 1000
    assert load_config(path, ["--tokenizer.vocab_size", "2000"]).model.vocab_size == 2000
    assert load_config(path, ["--model.vocab_size", "1024"]).model.vocab_size == 1024


def test_a_model_vocabulary_smaller_than_the_tokenizers_is_refused():
    assert given_on_the_command_line("--model.vocab_size=999", "--tokenizer.vocab_size=1000") == [
        "model.vocab_size: given 999, expected at least tokenizer.vocab_size 1000"
    ]


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({}, "python-source"),
        ({"site_packages": True}, "python-source-site"),
        ({"source": "files", "files": ("a.txt",)}, "files"),
        ({"source": "huggingface", "dataset": "org/set 1", "subset": "en"}, "org-set-1-en"),
        ({"name": "mine"}, "mine"),
    ],
)
def test_a_corpus_is_named_after_its_source(options, name):
    assert DataConfig(**options).name == name


def test_a_run_is_named_after_its_model():
    assert load_config(None, ["--model.attention=gka", "--model.depth=2"]).run_name == "d2_gka"
    assert load_config(None, ["--run.name=mine"]).run_name == "mine"


def test_home_is_taken_from_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("GKACHAT_HOME", str(tmp_path))
    assert home() == tmp_path
    monkeypatch.delenv("GKACHAT_HOME")
    assert home() == Path.home() / ".cache" / "gkachat"


def test_an_unknown_field_does_not_hide_what_is_wrong_with_the_others(tmp_path):
    path = tmp_path / "a.toml"
    path.write_text("[model]\ndept = 3\nvocab_size = 1\nhead_dim = 7\n")
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert [problem.split(":")[0] for problem in caught.value.problems] == [
        "model.dept",
        "model.vocab_size",
        "model.n_embd",
        "model.head_dim",
    ]


def test_an_ill_typed_field_is_named_once():
    with pytest.raises(ConfigError) as caught:
        load_config(None, ["--tokenizer.vocab_size=abc", "--data.source=files", "--data.val_fraction=x"])
    assert [problem.split(":")[0] for problem in caught.value.problems] == [
        "tokenizer.vocab_size",
        "data.val_fraction",
        "data.files",
    ]


def test_a_value_after_an_equals_sign_may_start_with_dashes():
    assert load_config(None, ["--run.name=--x"]).run.name == "--x"


@pytest.mark.parametrize("digits", [400, 5000])
def test_an_absurd_number_is_a_problem_like_any_other(tmp_path, digits):
    path = tmp_path / "a.toml"
    path.write_text(f"[optim]\nmatrix_lr = {'9' * digits}\n")
    with pytest.raises(ConfigError, match=r"matrix_lr|not valid TOML"):
        load_config(path)
