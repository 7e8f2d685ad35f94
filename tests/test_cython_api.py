"""The face for Cython: an outside module that cimports the engine, built and run."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import engine
from engine import kernels
from engine.dtypes import Q8_0

SOURCES = Path(__file__).parent / "cython"


@pytest.fixture(scope="module")
def outside(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """Build ``cython/outside.pyx`` in a folder of its own and import it."""
    pytest.importorskip("Cython", reason="building an outside module needs Cython")
    pytest.importorskip("setuptools", reason="building an outside module needs setuptools")
    if shutil.which("gcc") is None and shutil.which("cc") is None:
        pytest.skip("building an outside module needs a C compiler")
    folder = tmp_path_factory.mktemp("outside")
    for name in ("setup.py", "outside.pyx"):
        shutil.copy(SOURCES / name, folder)
    # An editable installation is found by an import hook, which Cython does not ask.
    path = [str(Path(engine.__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path), "CFLAGS": "-O0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    spec = importlib.util.spec_from_file_location("outside", next(folder.glob("outside*.so")))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def random_q8_0(rng: np.random.Generator, rows: int, cols: int) -> np.ndarray:
    """Bytes of a Q8_0 matrix: in each block of 32 a half-precision scale and the codes."""
    scales = rng.uniform(0.01, 0.1, (rows, cols // 32, 1)).astype(np.float16)
    codes = rng.integers(-127, 128, (rows, cols // 32, 32), dtype=np.int8)
    blocks = np.concatenate([scales.view(np.uint8), codes.view(np.uint8)], axis=2)
    return np.ascontiguousarray(blocks.reshape(rows, -1))


def test_an_outside_module_decodes_a_row(outside: ModuleType, rng: np.random.Generator) -> None:
    row = random_q8_0(rng, 1, 96)[0]
    blocks = row.reshape(3, 34)
    expected = blocks[:, :2].copy().view(np.float16).astype(np.float32) * blocks[:, 2:].view(
        np.int8
    )
    assert np.array_equal(outside.decoded(row, 96), expected.reshape(-1))


def test_an_outside_module_is_told_of_rows_that_cannot_be(
    outside: ModuleType, rng: np.random.Generator
) -> None:
    row = random_q8_0(rng, 1, 96)[0]
    for n in (95, 64, 128):
        with pytest.raises(ValueError, match="do not fit 102 bytes"):
            outside.decoded(row, n)


def test_an_outside_module_builds_and_runs_a_graph(
    outside: ModuleType, rng: np.random.Generator
) -> None:
    n_tokens, n_in, n_out = 3, 64, 5
    x = rng.standard_normal((n_tokens, n_in), np.float32)
    w = random_q8_0(rng, n_out, n_in)
    decoded = kernels.decode(Q8_0.id, w.reshape(-1), n_out * n_in).reshape(n_out, n_in)
    exact = x.astype(np.float64) @ decoded.T.astype(np.float64)
    bound = n_in * np.finfo(np.float32).eps * (np.abs(x) @ np.abs(decoded).T)
    assert (np.abs(outside.product(x, w, n_in) - exact) <= bound).all()
