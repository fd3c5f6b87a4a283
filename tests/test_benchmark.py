"""Benchmarks: contestants take turns, bounds are counted right, and every bench script runs from end to end."""

import importlib
import json
import subprocess
import sys
from functools import partial

import pytest
import torch
from conftest import ROOT

from gkachat.benchmark import benchmark, show, table
from scripts import cli
from scripts.bench import attention as bench_attention
from scripts.bench.attention import bound, naive, operators

SIZES = {
    "bench_attention": ["--tokens", 48, "--heads", 2, "--head-dim", 16, "--windows", 8, "full", "--rounds", 2],
    "bench_step": ["--depth", 1, "--tokens", 32, "--batch", 2, "--vocab-size", 64, "--rounds", 2],
    "bench_decode": ["--depth", 1, "--tokens", 32, 40, "--batch", 1, 2, "--vocab-size", 64, "--rounds", 2],
}


def run_script(script, monkeypatch, *args):
    """Run a bench script in this process; return its exit code."""
    monkeypatch.setattr(sys, "argv", [script, *map(str, args)])
    with pytest.raises(SystemExit) as exit:
        cli.run(importlib.import_module(f"scripts.{script}").main)
    return exit.value.code or 0


def test_contestants_take_turns():
    order = []
    timings = benchmark({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, torch.device("cpu"), rounds=4)
    runs = [name for name, before in zip(order, [None, *order], strict=False) if name != before]
    assert runs == ["a", "b"] * 5  # a warm-up, then four rounds
    assert all(0 < t.low <= t.median <= t.high for t in timings.values())


def test_a_table_leaves_out_what_was_not_measured():
    rows = [{"name": "a", "ms": 1.25, "peak": None}, {"name": "b", "ms": None, "peak": None}]
    columns = {"": "{name}", "ms": "{ms:.1f}", "peak": "{peak:.0f}"}
    assert table(rows, columns) == "|  | ms |\n| --- | ---: |\n| a | 1.2 |\n| b |  |\n"


@pytest.mark.parametrize("window", [None, 7])
def test_the_timed_gka_operator_computes_what_the_naive_one_does(window):
    _, (fused, inputs), _, (literal, _) = operators((2, 40, 2, 16), window, torch.device("cpu"), torch.float32).values()
    torch.testing.assert_close(fused(*inputs), literal(*inputs), rtol=1e-4, atol=1e-5)
    assert literal.func is naive


def test_a_kernel_that_cannot_run_is_left_out_with_the_reason(capsys):
    def fails(x, error):
        raise error

    x = torch.zeros(1, requires_grad=True)
    for error, reason in ((RuntimeError("no build\nat all"), "no build"), (ImportError(), "ImportError")):
        assert not bench_attention.runs("gka (a)", partial(fails, error=error), [x])
        assert capsys.readouterr().out == f"left out: gka (a): {reason}\n"
    assert bench_attention.runs("gka (a)", torch.square, [x])


def test_every_shape_is_compiled_and_none_runs_eagerly(monkeypatch):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def operator(x):
        return 2 * x

    def contestants(shape, *args):
        x = torch.ones(shape, requires_grad=True)
        return {"softmax": (torch.compile(operator, backend=backend, dynamic=False), [x])}

    monkeypatch.setitem(bench_attention.LEVELS, "operator", contestants)
    cpu, n = torch.device("cpu"), 10  # torch's limit is 8
    for T in range(2, 2 + n):
        bench_attention.measure("operator", (1, T, 1, 2), None, cpu, torch.float32, (1.0, 1.0), False, rounds=2)
    assert len(graphs) == n


def test_the_bound_counts_products_and_traffic():
    shape, T = (2, 8, 3, 4), 8
    pairs = T * (T + 1) // 2
    flops, seconds = bound("softmax", False, shape, None, torch.float32, (1.0, 1e30))
    assert flops == seconds == 7 * 2 * 2 * 3 * 4 * pairs
    _, seconds = bound("gka", False, shape, None, torch.float32, (1e30, 1.0))
    assert seconds == 6 * 2 * 8 * 3 * 4 * 4
    assert bound("gka", False, shape, 1, torch.float32, (1.0, 1e30))[0] == 7 * 2 * 2 * 3 * 4 * T
    projections = [bound(n, True, shape, None, torch.float32, (1.0, 1e30))[0] - flops for n in ("softmax", "gka")]
    assert projections[0] == 4 * projections[1] == 4 * 6 * 2 * 8 * 12**2


@pytest.mark.parametrize(("script", "n_rows"), [("bench_attention", 14), ("bench_step", 5), ("bench_decode", 12)])
def test_a_bench_script_prints_its_table_and_writes_its_figures(script, n_rows, tmp_path, monkeypatch, capsys):
    assert run_script(script, monkeypatch, *SIZES[script], "--out", tmp_path / "out") == 0
    figures = json.loads((tmp_path / "out.json").read_text())
    assert figures["facts"]["torch"] == torch.__version__ and script in figures["command"]
    assert len(figures["rows"]) == n_rows
    printed, written = capsys.readouterr().out, (tmp_path / "out.md").read_text()
    for row in figures["rows"]:
        assert f"| {row['name']} |" in printed and f"| {row['name']} |" in written


def test_tables_are_drawn_in_a_terminal_and_stay_markdown_elsewhere(monkeypatch, capsys):
    text = f"before\n\n{table([{'': 'a', 'tokens/s': '[b]1', 'x': ''}, {'': 'b', 'tokens/s': '2', 'x': '3'}])}\nafter"
    show(text)
    assert capsys.readouterr().out == f"{text}\n"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    show(text)
    drawn = capsys.readouterr().out
    assert "|" not in drawn and drawn.startswith("before\n") and drawn.endswith("after\n")
    rows = [line.split() for line in drawn.splitlines()]
    assert ["a", "[b]1"] in rows and ["b", "2", "3"] in rows


def test_bench_scripts_need_only_torch_and_numpy():
    """In a process of its own, where importing any other dependency fails."""
    others = ["tyro", "tomli_w", "wandb", "datasets", "tiktoken", "tokenizers", "transformers", "filelock", "scipy"]
    others += ["safetensors", "rich", "matplotlib", "yaml"]
    modules = ", ".join(f"scripts.{script}, scripts.{script.replace('_', '.')}" for script in SIZES)
    code = f"import sys\nsys.modules |= dict.fromkeys({others})\nimport {modules}"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_a_missing_device_ends_with_one_line(monkeypatch, capsys):
    assert run_script("bench_step", monkeypatch, "--device", "warp") == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1


@pytest.mark.parametrize(
    ("script", "option", "value"),
    [("bench_attention", "--windows", "0"), ("bench_step", "--rounds", "-3"), ("bench_decode", "--tokens", "many")],
)
def test_an_invalid_number_is_named(script, option, value, monkeypatch, capsys):
    assert run_script(script, monkeypatch, f"{option}={value}") == 2
    assert f"{option}: given '{value}', expected a number above 0" in capsys.readouterr().err
