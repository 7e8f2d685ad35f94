"""The Python face: few names, each loaded when it is first asked for."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import engine

FOLDER = Path(engine.__file__).parent


def modules_after(code: str) -> set[str]:
    """Names of the modules that a fresh interpreter has loaded once it has run `code`."""
    command = [sys.executable, "-c", f"{code}\nimport sys\nprint(*sys.modules)"]
    return set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())


def test_importing_the_package_loads_neither_numpy_nor_a_compiled_module() -> None:
    loaded = modules_after("import engine\nengine.__version__")
    assert "engine" in loaded
    assert not loaded & {"numpy", "regex", "engine.kernels", "engine.model"}


def test_a_public_name_loads_its_own_module() -> None:
    assert "engine.kernels" in modules_after("import engine\nengine.isa()")


@pytest.mark.parametrize("name", engine.__all__)
def test_every_public_name_is_there_and_documented(name: str) -> None:
    assert getattr(engine, name).__doc__
    assert name in dir(engine)


def test_the_chosen_variant_is_one_that_runs_here() -> None:
    assert engine.isa() in engine.isas()


def test_the_version_is_the_distribution_s() -> None:
    assert engine.__version__.count(".") == 2
    assert "__version__" in dir(engine)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'engine' has no attribute 'Weights'"):
        _ = engine.Weights  # type: ignore[attr-defined]


def test_the_headers_are_where_the_package_says() -> None:
    assert {"kernels.h", "blocks.h", "team.h"} <= {
        p.name for p in Path(engine.get_include()).iterdir()
    }


def test_the_stub_promises_what_the_package_loads() -> None:
    stub = ast.parse((FOLDER / "__init__.pyi").read_text())
    homes = {
        (alias.asname or alias.name): (node.module, alias.name)
        for node in stub.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert homes == engine._HOMES
