"""The benchmarks: taking turns, bounds by count, and the scripts from end to end at sizes of no meaning."""

import json

import pytest
import torch
from conftest import call

from gkachat.benchmark import benchmark
from scripts.bench_attention import bound, naive, operators


def test_contestants_take_turns():
    order = []
    timings = benchmark({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, torch.device("cpu"), rounds=4)
    runs = [name for name, before in zip(order, [None, *order], strict=False) if name != before]
    assert runs == ["a", "b"] * 5  # a warm-up, then four rounds
    assert all(0 < t.low <= t.median <= t.high for t in timings.values())


def test_all_gka_contestants_compute_the_same():
    for window in (None, 7):
        found = operators((2, 40, 2, 16), window, torch.device("cpu"), torch.float32)
        x, sigma = torch.randn(2, 40, 2, 16), torch.tensor([2.0, 3.0])
        plain, by_hand = (
            next(f for name, (f, _) in found.items() if name.startswith(n)) for n in ("gka (", "gka naive")
        )
        torch.testing.assert_close(plain(x, sigma), by_hand(x, sigma), rtol=1e-4, atol=1e-5)
        assert by_hand.func is naive


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


@pytest.mark.parametrize(
    ("script", "args"),
    [
        ("bench_attention", ["--tokens", 48, "--heads", 2, "--head-dim", 16, "--windows", 8, "full", "--rounds", 2]),
        ("bench_step", ["--depth", 1, "--tokens", 32, "--batch", 2, "--vocab-size", 64, "--rounds", 2]),
        ("bench_decode", ["--depth", 1, "--tokens", 32, 40, "--batch", 1, 2, "--vocab-size", 64, "--rounds", 2]),
    ],
)
def test_a_benchmark_prints_a_table_and_leaves_its_figures(script, args, tmp_path):
    result = call(script, *args, "--out", tmp_path / "out", home=tmp_path)
    assert result.returncode == 0, result.stderr
    figures = json.loads((tmp_path / "out.json").read_text())
    assert figures["facts"]["torch"] == torch.__version__ and script in figures["command"]
    assert len(figures["rows"]) == {"bench_attention": 14, "bench_step": 5, "bench_decode": 12}[script]
    written = (tmp_path / "out.md").read_text()
    for row in figures["rows"]:
        assert f"| {row['name']} |" in result.stdout and f"| {row['name']} |" in written


@pytest.mark.parametrize("script", ["bench_attention", "bench_step", "bench_decode"])
def test_a_device_that_is_not_there_gets_one_line(script, tmp_path):
    result = call(script, "--device", "warp", home=tmp_path)
    assert result.returncode == 1 and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("script", "option"),
    [
        ("bench_attention", "--windows"),
        ("bench_step", "--batch"),
        ("bench_decode", "--tokens"),
        ("bench_step", "--rounds"),
    ],
)
def test_a_number_that_is_none_is_named(script, option, tmp_path):
    for value in ("0", "-3", "many"):
        result = call(script, f"{option}={value}", home=tmp_path)
        assert result.returncode == 2 and f"{option}: given '{value}', expected a number above 0" in result.stderr
