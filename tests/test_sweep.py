"""Sweeps: planned runs, resuming, fits, tables and figures."""

import io
import json
import signal
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, TINY, run_script
from hypothesis import given, settings
from hypothesis import strategies as st

from gkachat import sweep as sweeps
from gkachat.checks import ConfigError
from gkachat.config_file import load_config, to_toml
from gkachat.model.stats import model_stats
from gkachat.sweep import Run, fit_parabola, fit_power_law, load_sweep


@pytest.fixture
def plan(tmp_path):
    """A sweep of TINY models."""
    (tmp_path / "tiny.toml").write_text(to_toml(load_config(ROOT / "configs" / "laptop.toml", TINY)))

    def load(grid='"model.attention" = ["softmax", "gka"]', fixed="", head='name = "t"\nbase = "tiny.toml"', words=()):
        path = tmp_path / "sweep.toml"
        path.write_text(f"[sweep]\n{head}\n[sweep.grid]\n{grid}\n[sweep.set]\n{fixed}\n")
        return load_sweep(path, words)

    return load


def problems(plan, *args, **options):
    with pytest.raises(ConfigError) as caught:
        plan(*args, **options)
    return caught.value.problems


def test_every_combination_is_a_run_whose_name_says_what_it_is(plan):
    sweep = plan('model.depth = [1, 2]\n"model.attention" = ["softmax", "gka"]\n"run.seed" = [3, 4]')
    assert [run.name for run in sweep.runs[:5]] == [
        "t_d1_softmax_s3", "t_d1_softmax_s4", "t_d1_gka_s3", "t_d1_gka_s4", "t_d2_softmax_s3",
    ]  # fmt: skip
    assert len({run.name for run in sweep.runs}) == len(sweep.runs) == 8
    last = sweep.runs[-1]
    assert last.axes == {"model.depth": 2, "model.attention": "gka", "run.seed": 4}
    config = last.config
    assert (config.model.depth, config.model.attention, config.run.seed) == (2, "gka", 4)
    assert config.run.name == last.name and config.model.n_embd == 32


def test_names_and_series_tell_other_fields_and_options_win_over_what_is_set(plan):
    sweep = plan('"model.gka.rope" = [true, false]\n"optim.sigma_lr" = [0.02, 1e-3]', words=["--run.seed", "7"])
    assert sweep.runs[1].name == "t_ropeTrue_sigma_lr0.001_s7"
    assert sweep.runs[1].series == "softmax, rope True, sigma_lr 0.001"
    sweep = plan(fixed='"model.head_dim" = 8\nmodel.n_embd = "none"', words=["--model.head_dim=32"])
    assert {(run.config.model.head_dim, run.config.model.n_embd) for run in sweep.runs} == {(32, 128)}


def test_runs_of_a_budget_train_until_it_is_spent(plan):
    head = 'name = "t"\nbase = "tiny.toml"\nflops = [1e9, 2e9]'
    sweep = plan('"model.depth" = [1, 2]\n"model.attention" = ["softmax", "gka"]', head=head)
    assert [run.name for run in sweep.runs][::5] == ["t_flops1e9_d1_softmax_s42", "t_flops2e9_d1_gka_s42"]
    for run in sweep.runs:
        a_token, budget = model_stats(run.config.model).flops_per_token, run.axes["flops"]
        assert abs(run.config.train.total_tokens * a_token - budget) <= a_token
        assert abs(run.flops - budget) <= 256 * a_token / 2 + a_token  # whole steps of 256 tokens


def test_options_of_an_attention_hold_for_its_runs_alone(plan):
    fixed = '"model.short_conv" = true\n[sweep.set.softmax]\n"model.value_embeddings" = false'
    shapes = [run.config.model for run in plan('"model.attention" = ["softmax", "gka", "gka_conv"]', fixed).runs]
    assert [shape.value_embeddings for shape in shapes] == [False, None, None]
    assert all(shape.short_conv for shape in shapes)


@pytest.mark.parametrize(
    ("head", "fields"),
    [
        ('name = "a/b"\nbase = "tiny.toml"\nflops = [0]', ["sweep.name", "sweep.flops"]),
        ("name = 3\nbase = 4\nflop = 5", ["sweep.flop", "sweep.name", "sweep.base"]),
        ('base = "tiny.toml"', ["sweep.name"]),
        ('name = ".."\nbase = "tiny.toml"', ["sweep.name"]),
        ('name = "t"\nbase = "none.toml"', ["sweep.base"]),
        ('name = "t"', ["sweep.base"]),
    ],
)
def test_problems_of_a_sweep_table_are_named_at_once(plan, head, fields):
    assert [problem.partition(":")[0] for problem in problems(plan, head=head)] == fields


def test_an_axis_without_different_values_and_a_field_set_twice_are_named(plan):
    found = problems(
        plan,
        '"model.depth" = []\n"model.n_embd" = 3\n"run.seed" = [1, 1]\n"run.name" = ["a"]',
        '"run.name" = "x"\n"run.seed" = 3',
        'name = "t"\nbase = "tiny.toml"\nflops = [1e10]',
        words=["--run.seed=4", "--train.total_tokens", "5"],
    )
    assert [problem.partition(":")[0] for problem in found] == [
        "sweep.grid.model.depth", "sweep.grid.model.n_embd", "sweep.grid.run.seed", "sweep.grid.run.name",
        "sweep.set.run.name", "sweep.set.run.seed", "--run.seed", "--train.total_tokens",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "words"), [("[model]\ndepth = 3", "no .sweep. table"), ("sweep = 3", "expected a table")]
)
def test_a_file_without_a_sweep_is_refused(tmp_path, text, words):
    (tmp_path / "a.toml").write_text(text)
    with pytest.raises(ConfigError, match=words):
        load_sweep(tmp_path / "a.toml")
    with pytest.raises(FileNotFoundError, match="no config file"):
        load_sweep(tmp_path / "b.toml")


def test_a_value_that_a_config_refuses_is_named_with_its_run(plan):
    [problem] = problems(plan, fixed="model.dept = 1")
    assert problem.startswith("model.dept: unknown field (did you mean model.depth?) (in t_softmax")
    found = problems(plan, '"model.head_dim" = [16, 3]')
    assert [problem.partition(":")[0] for problem in found] == ["model.n_embd", "model.head_dim"]
    assert all(problem.endswith("(in t_head_dim3)") for problem in found)
    [problem] = problems(plan, '"model.depth" = [2]', head='name = "t"\nbase = "tiny.toml"\nflops = [10000]')
    assert problem.startswith("sweep.flops: given 10000") and problem.endswith("(in t_flops10000_d2_s42)")
    [problem] = problems(plan, '"data.name" = ["a b", "a-b"]')
    assert problem == "two runs are named t_namea-b_s42: write their values differently"


@settings(deadline=None)  # the first call imports scipy
@given(a=st.floats(0.1, 10), b=st.floats(-1, 1), unit=st.sampled_from([1.0, 1e6, 1e15]), n=st.integers(3, 9))
def test_a_power_law_is_recovered_at_any_scale(a, b, unit, n):
    x = unit * np.geomspace(1, 100, n)
    fit = fit_power_law(x, a * x**-b)
    assert fit["b"] == pytest.approx(b, abs=1e-9) and fit["a"] == pytest.approx(a, rel=1e-6) and fit["points"] == n
    assert fit["b_interval"][1] - fit["b_interval"][0] < 1e-9


def test_intervals_cover_the_truth_nineteen_times_in_twenty():
    """1,000 draws of five points: 0.95 within four standard errors of 0.0069. Normal quantiles would give 0.85."""
    rng, x = np.random.default_rng(0), np.array([1e13, 1e13, 1e14, 1e15, 1e16])
    fits = [fit_power_law(x, 8.0 * x**-0.05 * np.exp(0.02 * rng.standard_normal(5))) for _ in range(1000)]
    for name, truth in (("a", 8.0), ("b", 0.05)):
        covered = np.mean([fit[f"{name}_interval"][0] <= truth <= fit[f"{name}_interval"][1] for fit in fits])
        assert 0.92 < covered < 0.98


def test_a_parabola_has_its_minimum_only_where_it_opens_upward():
    sizes = np.array([1e6, 3e6, 1e7, 3e7])
    bowl = 1.2 + 0.1 * np.log(sizes / 5e6) ** 2
    fit = fit_parabola(sizes, bowl)
    assert (fit["params"], fit["bpb"], fit["inside"]) == (pytest.approx(5e6), pytest.approx(1.2), True)
    assert fit_parabola([1e7, 3e7, 1e8], [1.25, 1.5, 2.1])["inside"] is False
    assert fit_parabola(sizes, -bowl) is None


def test_two_sizes_are_too_few_to_fit(plan, monkeypatch):
    assert fit_power_law([1, 1, 2, 2], [4.0, 4.1, 3.0, 3.1]) is None
    assert fit_parabola([1, 1, 2, 2], [4.0, 4.1, 3.0, 3.1]) is None
    assert fit_power_law([], []) is None
    assert fit_power_law([10.0, 11.0, 11.9], [4.0, 3.9, 3.7]) is None  # nor three that hardly differ
    sweep = plan("model.depth = [1, 2]", head='name = "t"\nbase = "tiny.toml"\nflops = [1e10]')
    fake_results(sweep, monkeypatch)
    text = sweeps.markdown(sweeps.analyse(sweep))
    assert "no parabola that opens upward" in text and text.count("too few points") == 2


def fake_results(sweep, monkeypatch, without=()):
    """Give each run 8 FLOPs^-0.05 bits per byte, gka a tenth more, with the best size of any budget at 2e5."""

    def result(run):
        if run.name in without:
            return None
        gka, params = run.config.model.attention == "gka", model_stats(run.config.model).params["total"]
        bpb = 8 * (run.axes.get("flops") or run.flops) ** -0.05 * (1.1 if gka else 1) + 1e-4 * run.config.run.seed
        if "flops" in run.axes:
            bpb += 0.1 * np.log(params / 2e5) ** 2
        return {
            "run": run.name, "series": run.series, "axes": run.axes, "seed": run.config.run.seed, "params": params,
            "depth": run.config.model.depth, "tokens": run.config.train.total_tokens, "flops": run.flops,
            "val_bpb": bpb, "train_bpb": bpb - 0.1, "gap": 0.1, "seconds": 60.0,
            "sigma": [4.0] * run.config.model.depth if gka else [], "val_sha256": ["0"],
        }  # fmt: skip

    monkeypatch.setattr(Run, "result", result)


SIZES = 'model.depth = [1, 2, 3]\n"model.attention" = ["softmax", "gka"]\n'


def test_seeds_are_averaged_and_each_attention_is_fitted(plan, monkeypatch, tmp_path):
    monkeypatch.setenv("GKACHAT_HOME", str(tmp_path))
    sweep = plan(SIZES + '"run.seed" = [0, 10]', 'model.n_embd = "none"')
    fake_results(sweep, monkeypatch, without=["t_d3_gka_s10"])
    text = sweeps.write_sweep(sweep, {"commit": "abc"})
    found = json.loads((sweep.directory / "sweep.json").read_text())
    assert [mean["seeds"] for mean in found["means"]] == [2, 2, 2, 2, 2, 1]
    assert found["means"][0]["val_bpb_spread"] == pytest.approx(0.001 / np.sqrt(2))
    assert found["means"][-1]["val_bpb_spread"] is None
    assert {series: fits["flops"]["points"] for series, fits in found["fits"].items()} == {"softmax": 6, "gka": 5}
    low, high = found["fits"]["softmax"]["flops"]["b_interval"]
    assert low < 0.05 < high and high - low < 0.01
    assert "- not finished: t_d3_gka_s10" in text and "Means over seeds" in text and text.count("95 % intervals") == 4
    assert "commit abc" in (sweep.directory / "sweep.md").read_text()
    assert (sweep.directory / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_each_budget_has_its_best_size_and_the_fit_goes_through_these(plan, monkeypatch):
    sweep = plan(SIZES, 'model.n_embd = "none"', 'name = "t"\nbase = "tiny.toml"\nflops = [1e10, 1e11, 1e12]')
    fake_results(sweep, monkeypatch)
    found = sweeps.analyse(sweep)
    assert [one["params"] for one in found["minima"]] == [pytest.approx(2e5)] * 6
    assert found["fits"]["gka"]["flops"]["b"] == pytest.approx(0.05, abs=1e-3)
    assert found["fits"]["gka"]["params"] is None  # one best size: nothing to go along
    figure = sweeps.draw(found)
    assert len(figure.axes) == 4 + 3
    figure.savefig(image := io.BytesIO(), format="png")
    assert image.getvalue().startswith(b"\x89PNG")
    text = sweeps.markdown(found)
    assert text.count("least bits per byte") == 6 and "too few points" in text


def test_a_sweep_is_interrupted_by_ctrl_c(plan, tiny_home, tmp_path):
    _, gka = plan().runs
    command = [sys.executable, "-u", "-m", "scripts.sweep", str(tmp_path / "sweep.toml")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while "begins" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    assert "the same command continues it" in process.stderr.read() and not gka.directory.exists()


def test_a_sweep_outlives_a_run_that_fails_and_skips_what_is_done(plan, tiny_home, tmp_path):
    sweep, path = plan('"model.attention" = ["gka", "softmax"]'), tmp_path / "sweep.toml"
    with pytest.raises(ValueError, match="no run of the sweep 't' is finished"):
        sweeps.write_sweep(sweep, {})
    gka, softmax = sweep.runs
    gka.directory.parent.mkdir()
    gka.directory.write_text("in the way")
    failed = run_script("sweep", path, home=tiny_home)
    assert failed.returncode == 1 and failed.stderr.startswith(f"error: run {gka.name}: scripts.base_train ended with")
    assert "2 runs, 2 to do" in failed.stdout and "2 of 2, 0s left" in failed.stdout
    assert f"- not finished: {gka.name}" in failed.stdout and softmax.result() and not gka.result()

    gka.directory.unlink()
    for script, argument in (("base_train", sweep.directory / "runs" / f"{gka.name}.toml"), ("base_eval", gka.name)):
        trained = run_script(script, argument, home=tiny_home)  # in this process, which is faster
        assert trained.returncode == 0, trained.stderr
    finished = run_script("sweep", path, home=tiny_home)
    assert finished.returncode == 0 and "2 runs, 0 to do" in finished.stdout
    rows = json.loads((sweep.directory / "sweep.json").read_text())["runs"]
    bpb = gka.directory / "evals" / "bpb_step_000008.json"
    assert [row["run"] for row in rows] == [gka.name, softmax.name]
    assert rows[0]["val_bpb"] == json.loads(bpb.read_text())["val_bpb"]
    assert rows[0]["tokens"] == 2048 and rows[0]["flops"] == gka.flops and len(rows[0]["sigma"]) == 2

    changed = run_script("sweep", path, "--optim.matrix_lr=0.01", home=tiny_home)
    assert changed.returncode == 1 and changed.stderr.count("\n") == 1
    assert f"{gka.directory}: optim.matrix_lr: given 0.01, the run has" in changed.stderr
    assert "delete these runs, or give the sweep another name" in changed.stderr

    # A run with other options, or evaluated at another step, is no result of this sweep.
    other = plan('"model.attention" = ["gka"]', words=["--optim.matrix_lr=0.01"]).runs[0]
    assert other.name == gka.name and other.result() is None
    bpb.rename(bpb.with_name("bpb_step_000004.json"))
    assert gka.result() is None and gka.is_trained()
