"""Faces of the compiled modules: a stub for those who import, a .pxd for those who cimport."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

import engine

FOLDER = Path(engine.__file__).parent
COMPILED = sorted(p.relative_to(FOLDER) for p in FOLDER.rglob("*.pyx"))


def test_there_are_compiled_modules() -> None:
    assert {"kernels.pyx", "products.pyx", "tensor.pyx"} <= {p.name for p in COMPILED}


@pytest.mark.parametrize("path", COMPILED, ids=str)
def test_a_compiled_module_has_a_stub(path: Path) -> None:
    assert (FOLDER / path.with_suffix(".pyi")).exists()


@pytest.mark.parametrize("path", COMPILED, ids=str)
def test_a_stub_names_what_the_module_has(path: Path) -> None:
    module = importlib.import_module("engine." + ".".join(path.with_suffix("").parts))
    stub = ast.parse((FOLDER / path.with_suffix(".pyi")).read_text())
    for node in stub.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            assert hasattr(module, node.name), f"{path}: the stub promises {node.name}"
        if isinstance(node, ast.ClassDef):
            members = [n for n in node.body if isinstance(n, ast.FunctionDef)]
            missing = [m.name for m in members if not hasattr(getattr(module, node.name), m.name)]
            assert not missing, f"{path}: the stub promises {missing} of {node.name}"


@pytest.mark.parametrize("path", COMPILED, ids=str)
def test_public_things_of_a_compiled_module_are_documented(path: Path) -> None:
    module = importlib.import_module("engine." + ".".join(path.with_suffix("").parts))
    assert module.__doc__
    stub = ast.parse((FOLDER / path.with_suffix(".pyi")).read_text())
    for node in stub.body:
        if isinstance(node, ast.FunctionDef):
            assert getattr(module, node.name).__doc__, f"{path}: {node.name} says nothing"
