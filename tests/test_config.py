"""Options: from TOML and the command line to a checked Config, and back."""

import dataclasses
import math
import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gkachat.checks import ConfigError
from gkachat.config import (
    ATTENTIONS,
    Config,
    DataConfig,
    GKAConfig,
    GPTConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
    TuningConfig,
    home,
)
from gkachat.config_file import from_dict, load_config, parse_args, read_toml, to_toml
from gkachat.data.sources import Corpus
from gkachat.inference.sampling import Sampling
from gkachat.sweep import load_sweep
from gkachat.vision_config import VisionConfig, ViTConfig

FILES = sorted((Path(__file__).resolve().parents[1] / "configs").glob("*.toml"))
SHIPPED = {path.stem: path for path in FILES if not path.stem.startswith("sweep_")}
PROPERTY = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]))


def problems_of(*args):
    """Return the problems that loading reports, one line each."""
    with pytest.raises(ConfigError) as caught:
        load_config(*args)
    assert str(caught.value) == "; ".join(caught.value.problems) and "\n" not in str(caught.value)
    return caught.value.problems


def fields_of(problems):
    return [problem.partition(":")[0] for problem in problems]


@pytest.fixture
def toml(tmp_path):
    def write(text):
        path = tmp_path / "config.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_config_loads_and_round_trips(name, toml):
    cls = VisionConfig if name.startswith("vision_") else Config
    config = load_config(SHIPPED[name], cls=cls)
    assert load_config(toml(to_toml(config)), cls=cls) == config


@pytest.mark.parametrize("path", [path for path in FILES if path.stem not in SHIPPED], ids=lambda path: path.stem)
def test_a_shipped_sweep_plans_attentions_at_widths_that_follow_depth(path):
    shapes = [run.config.model for run in load_sweep(path).runs]
    assert {shape.attention for shape in shapes} >= {"softmax", "gka"}
    assert len({shape.depth for shape in shapes}) >= 3
    assert all(shape.n_embd == 64 * shape.depth for shape in shapes)


def test_the_laptop_config_is_what_its_file_says():
    config = load_config(SHIPPED["laptop"])
    assert (config.model.depth, config.model.n_embd, config.model.n_head) == (4, 192, 3)
    assert (config.train.baseline_tokens, config.optim.weight_decay) == (1_024_000, 0.1)
    assert (config.run_name, config.data_name) == ("d4_softmax", "python-source-v4096")


def test_a_missing_file_and_one_that_is_not_toml_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config file nowhere\.toml"):
        load_config("nowhere.toml")
    for content in (b"[model\ndepth = 3", b"depth = ", b'[run]\nname = "\xff\xfe"', b"depth = " + b"9" * 5000):
        (path := tmp_path / "broken.toml").write_bytes(content)
        [problem] = problems_of(path)
        assert problem.startswith(f"{path}: not valid TOML: ")


@PROPERTY
@given(
    name=ANY_TEXT,
    files=st.lists(ANY_TEXT, min_size=1),
    lr=st.floats(min_value=0, allow_nan=False, allow_infinity=False),
)
def test_any_value_round_trips_through_toml(tmp_path_factory, name, files, lr):
    config = Config(
        run=RunConfig(wandb=name, compile=False),
        data=DataConfig(source="files", name="n", files=tuple(files)),
        model=GPTConfig(attention="gka", gka=GKAConfig(rope=True, include_self=False)),
        optim=OptimConfig(matrix_lr=lr),
    )
    path = tmp_path_factory.mktemp("toml") / "config.toml"
    path.write_text(to_toml(config), encoding="utf-8")
    assert load_config(path) == config


def test_without_a_file_everything_is_default_and_none_is_left_out_of_toml():
    assert load_config() == Config()
    assert "total_tokens" not in to_toml(Config())
    assert "total_tokens = 7" in to_toml(Config(train=TrainConfig(total_tokens=7)))


def test_a_dataclass_is_built_from_a_dict():
    assert from_dict(GPTConfig, dataclasses.asdict(GPTConfig(depth=3))) == GPTConfig(depth=3)
    with pytest.raises(ConfigError, match=r"dept: unknown field \(did you mean depth\?\)"):
        from_dict(GPTConfig, {"dept": 3})


@pytest.mark.parametrize(
    ("words", "section", "name", "expected"),
    [
        ("--model.depth 6", "model", "depth", 6),
        ("--model.depth=5 --model.depth=6", "model", "depth", 6),
        ("--model.sequence-len 64", "model", "sequence_len", 64),
        ("--train.final-lr-fraction=0.5", "train", "final_lr_fraction", 0.5),
        ("--train.tokens_per_param 3", "train", "tokens_per_param", 3.0),
        ("--train.device_batch_size auto", "train", "device_batch_size", "auto"),
        ("--data.site_packages true", "data", "site_packages", True),
        ("--run.compile false", "run", "compile", False),
        ("--run.compile none", "run", "compile", None),
        ("--train.total_tokens 12", "train", "total_tokens", 12),
        ("--data.max_chars 1_000", "data", "max_chars", 1000),
        ("--data.subset none", "data", "subset", "none"),
        ("--run.name 007", "run", "name", "007"),
        ("--run.name=", "run", "name", ""),
        ("--data.split=--x", "data", "split", "--x"),
        ("--data.revision=a=b", "data", "revision", "a=b"),
        ("--data.files a.txt b.txt --model.depth 2", "data", "files", ("a.txt", "b.txt")),
        ("--model.gka.rope true", "model", "gka", GKAConfig(rope=True)),
    ],
)
def test_an_override_sets_its_field(words, section, name, expected):
    found = getattr(getattr(load_config(None, words.split()), section), name)
    assert (found, type(found)) == (expected, type(expected))


def test_overrides_win_over_the_file_and_leave_the_rest(toml):
    path = toml("[model]\ndepth = 3\nsequence_len = 64\n[run]\nseed = 1\n[train]\ntotal_tokens = 3\n")
    config = load_config(path, ["--model.depth", "5", "--train.total_tokens", "none"])
    assert (config.model.depth, config.model.sequence_len, config.run.seed) == (5, 64, 1)
    assert config.model.n_embd == 384 and config.train.total_tokens is None


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ("--model.dept 3", "Unrecognized options: --model.dept, 3 (did you mean --model.depth?)"),
        ("depth 3", "Unrecognized options: depth, 3"),
        ("--model 3", "Unrecognized options: --model, 3"),
        ("--run.name a b", "Unrecognized options: b"),
        ("--model.depth", "Missing value for argument '--model.depth'"),
        ("--model.depth 3.5", "Error parsing --model.depth: given '3.5', expected a whole number"),
        *(
            (
                f"--{option} {digits}",
                f"Error parsing --{option}: given a number of more than 64 bits, expected one below",
            )
            for digits in (2**63, "9" * 5000)
            for option in ("run.seed", "model.depth", "train.total_tokens", "train.device_batch_size")
        ),
        (f"--run.seed {'x' * 5000}", "Error parsing --run.seed: given 'xxxx"),
        ("--data.site_packages=yes", "invalid choice 'yes' for argument '--data.site_packages'. Expected one of"),
        ("--optim.lr_scale=big", "Error parsing --optim.lr_scale: given 'big', expected {none}|FLOAT"),
        ("--train.protocol fair", "invalid choice 'fair' for argument '--train.protocol'. Expected one of"),
    ],
)
def test_an_option_that_cannot_be_read_is_named_in_one_line(words, problem):
    [found] = problems_of(None, words.split())
    assert found.startswith(problem) and len(found) < 400


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[model]\ndept = 3", "model.dept: unknown field (did you mean model.depth?)"),
        ("[model]\nqqqqqqqq = 3", "model.qqqqqqqq: unknown field"),
        ("[modle]\ndepth = 3", "modle: unknown field (did you mean model?)"),
        ('[model]\ndepth = "four"', "model.depth: given 'four', expected int"),
        ("[model]\ndepth = 4.0", "model.depth: given 4.0, expected int"),
        ("[model]\ndepth = true", "model.depth: given True, expected int"),
        ("[model]\nn_embd = true", "model.n_embd: given True, expected int | None"),
        ("[run]\ncompile = 1", "run.compile: given 1, expected bool | None"),
        ("[optim]\nmatrix_lr = false", "optim.matrix_lr: given False, expected float"),
        ("[optim]\nmatrix_lr = 9007199254740993", "optim.matrix_lr: given 9007199254740993, expected float"),
        *(
            (
                f"[{section}]\n{name} = 1{'0' * 400}",
                f"{section}.{name}: given a number of more than 64 bits, expected one below 2^63",
            )
            for section, name in (("optim", "matrix_lr"), ("run", "seed"), ("train", "total_tokens"))
        ),
        ("[data]\nfiles = 'a.txt'", "data.files: given 'a.txt', expected tuple[str, ...]"),
        ("[data]\nfiles = [1]", "data.files: given 1, expected str"),
        ("model = 3", "model: given 3, expected a table"),
        ("[model]\ngka = true", "model.gka: given True, expected a table"),
        ("[model]\nattention = 'linear'", "model.attention: given 'linear', expected 'softmax' or 'gka' or 'gka_conv'"),
        ("[run]\ndtype = 3", "run.dtype: given 3, expected Literal['auto', 'float32', 'bfloat16']"),
    ],
)
def test_a_field_of_a_file_that_cannot_be_read_is_named(toml, text, problem):
    assert problems_of(toml(text)) == [problem]
    if "attention" not in text:  # under an override too
        assert problems_of(toml(text), ["--run.seed=3"]) == [problem]


def test_all_problems_of_a_file_are_reported_at_once(toml):
    text = "[run]\nseed = -1\nlog_every = 0\n[model]\ndept = 3\n[model.gka]\nrope = 1\n[train]\nwarmup_steps = 1.5\n"
    with pytest.raises(ConfigError) as caught:
        from_dict(Config, read_toml(toml(text)))
    expected = ["run.seed", "run.log_every", "model.dept", "model.gka.rope", "train.warmup_steps"]
    assert fields_of(caught.value.problems) == expected


def test_invalid_values_of_a_file_and_overrides_are_reported_at_once(toml):
    path = toml("[run]\nseed = -1\nlog_every = 0\n[model]\nvocab_size = 1\nhead_dim = 7\n")
    assert fields_of(problems_of(path, ["--optim.matrix_lr=-1", "--tokenizer.vocab_size", "5"])) == [
        "run.seed", "run.log_every", "tokenizer.vocab_size", "model.vocab_size", "model.head_dim",
        "optim.matrix_lr",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("field", "values"),
    {
        "model.depth": [0, -1, 1001],
        "model.head_dim": [0, 1, 3, -2],
        "model.sequence_len": [1, 0],
        "model.window_pattern": ["", "SLX", "sl", "S L"],
        "model.vocab_size": [1, 0],
        "model.n_embd": [0, 8, -64, 100, 1000, 2**17],
        "tokenizer.vocab_size": [511, 65_537, 0],
        "tokenizer.train_chars": [0],
        "tokenizer.doc_chars": [0],
        "data.val_fraction": [0.0, 1.0, -0.5, 2.0],
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
        "train.tokens_per_param": [0.0, float("nan")],
        "train.warmup_steps": [-1],
        "train.eval_every": [-1],
        "train.warmdown_fraction": [-0.1, 1.1],
        "train.final_lr_fraction": [-0.1, 1.1],
        "optim.matrix_lr": [-1.0, float("nan")],
        "optim.weight_decay": [-1.0],
    }.items(),
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_value_that_is_invalid_is_named(field, values):
    section, name = field.split(".")
    for value in values:
        with pytest.raises(ConfigError) as caught:
            from_dict(Config, {section: {name: value}})
        assert any(problem.startswith(f"{field}: given ") for problem in caught.value.problems), value


FLOATS = [
    (cls, section.name, option.name)
    for cls in (TuningConfig, VisionConfig)
    for section in dataclasses.fields(cls)
    for option in dataclasses.fields(section.default_factory)
    if re.search(r"\bfloat\b", str(option.type))
]


def test_numbers_that_are_not_finite_are_refused_in_files_and_overrides(toml):
    assert len(FLOATS) > 35
    for cls, section, name in FLOATS:
        for value in ("inf", "-inf", "nan"):
            with pytest.raises(ConfigError, match=rf"^{section}\.{name}: given {value}, expected a finite number$"):
                load_config(toml(f"[{section}]\n{name} = {value}\n"), cls=cls)
    for cls, section, name in FLOATS[::9]:  # the rest of the way is the same for all
        with pytest.raises(ConfigError, match=rf"^{section}\.{name}: given inf, expected a finite number$"):
            load_config(None, [f"--{section}.{name}=inf"], cls)
    with pytest.raises(ConfigError, match="temperature: given nan, expected a finite number"):
        Sampling(temperature=math.nan)


def test_options_of_another_source_are_refused():
    with pytest.raises(ConfigError, match=r"chat\.files: given \('a\.jsonl',\), expected none unless source is files"):
        load_config(None, ["--chat.files=a.jsonl"], TuningConfig)
    for options, problem in (
        ({"files": ("a.txt",)}, r"data\.files: given \('a\.txt',\), expected --data\.source files"),
        ({"subset": "en"}, r"data\.subset: given 'en', expected --data\.source huggingface"),
        (
            {"source": "files", "files": ("a",), "site_packages": True},
            r"data\.site_packages: given True, expected --data",
        ),
    ):
        with pytest.raises(ConfigError, match=problem):
            Corpus(DataConfig(**options))


def test_files_are_required_when_they_are_the_source():
    assert problems_of(None, ["--data.source", "files"]) == [
        "data.files: given (), expected paths when source is files"
    ]


@pytest.mark.parametrize(
    ("shape", "n_embd", "head_dim", "n_head"),
    [
        ({"depth": 20}, 1280, 128, 10),
        ({"depth": 4}, 256, 128, 2),
        ({"depth": 3}, 256, 128, 2),
        ({"depth": 3, "head_dim": 64}, 192, 64, 3),
        ({"depth": 4, "n_embd": 384}, 384, 128, 3),
        ({"depth": 4, "n_embd": 96, "head_dim": 24}, 96, 24, 4),
    ],
)
def test_width_and_heads_follow_from_depth_unless_they_are_set(shape, n_embd, head_dim, n_head):
    config = GPTConfig(**shape)
    assert (config.n_embd, config.head_dim, config.n_head) == (n_embd, head_dim, n_head)


def test_heads_of_gka_conv_have_channels_beside_the_three_of_their_bias():
    GPTConfig(depth=1, head_dim=2, attention="gka")
    with pytest.raises(ConfigError, match=r"^head_dim: given 2, expected an even number, 4 or more$"):
        GPTConfig(depth=1, head_dim=2, attention="gka_conv")


@pytest.mark.parametrize("shape", [{"n_embd": 200}, {"n_embd": 128, "head_dim": 48}, {"n_embd": 192, "head_dim": 128}])
def test_channels_that_do_not_divide_into_heads_are_refused(shape):
    with pytest.raises(ConfigError, match=r"^n_embd: given \d+, expected 16 to 65536 and a multiple of head_dim \d+$"):
        GPTConfig(**shape)


@pytest.mark.parametrize(
    ("sequence_len", "short"),
    [(2048, 512), (2052, 640), (1024, 256), (1000, 256), (256, 128), (130, 128), (129, None), (64, None), (2, None)],
)
def test_a_short_window_is_the_token_and_a_quarter_of_the_sequence_rounded_up_to_128(sequence_len, short):
    window = GPTConfig(depth=4, sequence_len=sequence_len, window_pattern="S").window(0)
    assert window == (None if short is None else short + 1)


@pytest.mark.parametrize(
    ("pattern", "letters"), [("SSSL", "SSSLSSL"), ("S", "SSSSSSL"), ("L", "LLLLLLL"), ("SL", "SLSLSLL")]
)
def test_the_pattern_repeats_and_the_last_layer_is_always_long(pattern, letters):
    shape = GPTConfig(depth=7, sequence_len=2048, window_pattern=pattern)
    assert [shape.window(layer) for layer in range(7)] == [{"S": 513, "L": None}[letter] for letter in letters]


def test_attention_reads_the_embedding_by_default_in_gka_conv_alone():
    for name in ATTENTIONS:
        shape = GPTConfig(attention=name)
        assert shape.uses_attention_x0 == (name == "gka_conv")
        assert [dataclasses.replace(shape, attention_x0=given).uses_attention_x0 for given in (True, False)] == [1, 0]


def test_another_attention_of_the_same_shape_has_its_own_defaults():
    shape = GPTConfig(depth=4, attention="softmax", value_embeddings=False, attention_x0=True, short_conv=True)
    assert shape.with_attention("gka_conv") == GPTConfig(depth=4, attention="gka_conv", short_conv=True)
    assert shape.with_attention("softmax").uses_value_embeddings


def test_value_embeddings_are_by_default_those_of_softmax_alone():
    default = GPTConfig()
    assert {name: dataclasses.replace(default, attention=name).uses_value_embeddings for name in ATTENTIONS} == {
        name: name == "softmax" for name in ATTENTIONS
    }
    assert not GPTConfig(value_embeddings=False).uses_value_embeddings
    assert not ViTConfig().uses_value_embeddings and not ViTConfig().uses_attention_x0
    for name in ("gka", "gka_conv"):
        with pytest.raises(
            ConfigError, match=rf"^value_embeddings: given True, expected false with attention '{name}'"
        ):
            GPTConfig(attention=name, value_embeddings=True)


def test_the_models_vocabulary_follows_the_tokenizers(toml):
    path = toml("[tokenizer]\nvocab_size = 1000\n")
    assert load_config(path).model.vocab_size == 1000
    assert load_config(path, ["--tokenizer.vocab_size", "2000"]).model.vocab_size == 2000
    assert load_config(path, ["--model.vocab_size", "1024"]).model.vocab_size == 1024
    assert problems_of(path, ["--model.vocab_size=999"]) == [
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


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_config_with_a_byte_order_mark_and_line_ends_of_windows_is_read(tmp_path, encoding):
    (tmp_path / "a.toml").write_bytes("[run]\r\nname = 'über'\r\n".encode(encoding))
    assert load_config(tmp_path / "a.toml").run.name == "über"


def test_a_tilde_in_home_and_paths_is_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("GKACHAT_HOME", "~/own")
    assert home() == tmp_path / "own"
    monkeypatch.delenv("GKACHAT_HOME")
    assert home() == tmp_path / ".cache" / "gkachat"
    (tmp_path / "a.toml").write_text("[model]\ndepth = 3\n")
    assert load_config("~/a.toml").model.depth == 3

    def paths(out: Path, more: Path | None = None) -> tuple[Path, Path | None]:
        return out, more

    assert parse_args(paths, ["--out=~/x"]) == (tmp_path / "x", None)
    assert parse_args(paths, ["--out", "y", "--more", "~/z"]) == (Path("y"), tmp_path / "z")


@pytest.mark.parametrize("name", ["-x", "~x", "a/b", "..", "a\0b"])
def test_a_name_that_is_a_path_or_looks_like_an_option_is_refused_when_it_is_made(name):
    for section in (RunConfig, DataConfig):
        with pytest.raises(ConfigError, match="expected a directory name, not a path, that does not start with - or ~"):
            section(name=name)
