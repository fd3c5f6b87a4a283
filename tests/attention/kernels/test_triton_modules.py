"""What every Triton module must hold, so that its kernels work in a model that torch.compile compiles for a GPU."""

import ast
import contextlib
import importlib
import math
from pathlib import Path

import pytest
import torch
from conftest import ROOT

pytest.importorskip("triton")

import triton.language as tl

from gkachat.attention.kernels.gaussian_triton import on_device_of_first

FILES = [path for path in sorted((ROOT / "gkachat").rglob("*.py")) if "\nimport triton\n" in path.read_text()]
MODULES = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
OPERATOR = "torch.library.custom_op"


def launches(tree: ast.Module) -> dict[str, list[ast.Call]]:
    """Return the launches, kernel[grid](...), of each function that has any."""
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    found = {
        function.name: [n for n in ast.walk(function) if isinstance(n, ast.Call) and isinstance(n.func, ast.Subscript)]
        for function in functions
    }
    return {name: calls for name, calls in found.items() if calls}


def operators(tree: ast.Module) -> set[str]:
    """Return the functions that are operators, and those that only operators call."""
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    found = {
        name for name, node in functions.items()
        if any(ast.unparse(decorator).startswith(OPERATOR) for decorator in node.decorator_list)
    }  # fmt: skip
    callers = {
        name: {
            other for other, node in functions.items()
            if any(isinstance(n, ast.Name) and n.id == name for n in ast.walk(node)) and other != name
        }
        for name in functions
    }  # fmt: skip
    while new := {name for name, by in callers.items() if by and by <= found} - found:
        found |= new
    return found


@MODULES
def test_kernels_are_launched_by_operators(path: Path):
    """torch.compile leaves an operator alone. A bare launch it writes anew: a Python number becomes float64."""
    tree, has_operators = ast.parse(path.read_text()), OPERATOR in path.read_text()
    assert bool(launches(tree)) == has_operators, "no launch found: this test looks for kernel[grid](...)"
    assert launches(tree).keys() <= operators(tree)


@MODULES
def test_operators_launch_on_the_device_of_their_tensors(path: Path):
    """Triton launches on the current device. Only with one GPU is that always the device of the tensors."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef):
            decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
            if decorators and decorators[0].startswith(OPERATOR):
                assert decorators[1:] == ["on_device_of_first"], node.name


def test_an_operator_makes_the_device_of_its_first_tensor_current(monkeypatch):
    seen, x = [], torch.ones(2)
    monkeypatch.setattr(torch.cuda, "device_of", lambda t: seen.append(t) or contextlib.nullcontext())
    assert on_device_of_first(lambda a, b: (a, b))(x, 3) == (x, 3)
    assert seen == [x]


@MODULES
def test_global_constants_are_finite(path: Path):
    """torch.compile writes a constant with repr(), and repr(-inf) is a name that does not exist."""
    module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
    for name, constant in vars(module).items():
        if isinstance(constant, tl.constexpr) and isinstance(constant.value, float):
            assert math.isfinite(constant.value), name
