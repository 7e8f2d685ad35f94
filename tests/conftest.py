"""Fixtures that every test may use."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
from numpy.typing import NDArray

from engine import kernels

DATA = Path(__file__).parent / "data"

Guard = Callable[[NDArray], NDArray]


@pytest.fixture
def data_dir() -> Path:
    """Folder of recorded files."""
    return DATA


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """Seeded generator; the seed is printed, and ENGINE_TEST_SEED repeats it."""
    seed = int(os.environ.get("ENGINE_TEST_SEED", "0")) or int.from_bytes(os.urandom(4), "little")
    print(f"ENGINE_TEST_SEED={seed}")
    return np.random.default_rng(seed)


def skip_or_fail(isa: str, lack: str) -> NoReturn:
    """End a test whose variant lacks a feature: by failure where the variant is required."""
    if isa in os.environ.get("ENGINE_REQUIRE_ISA", "").split(","):
        pytest.fail(f"kernel variant {isa} must run here, but {lack} is missing")
    pytest.skip(f"kernel variant {isa}: this machine lacks {lack}")


@pytest.fixture(params=[*kernels.isas(), *kernels.missing_features()])
def isa(request: pytest.FixtureRequest) -> str:
    """Name of a kernel variant: the test runs once for each.

    One that this machine lacks is skipped with the missing feature's name; where the environment's
    ENGINE_REQUIRE_ISA (names with commas between) lists it, that is a failure.
    """
    lack = kernels.missing_features().get(request.param)
    if lack is not None:
        skip_or_fail(request.param, lack)
    return request.param


def before_locked_page(array: NDArray) -> NDArray:
    """A copy of `array` whose last byte is followed by a page that cannot be touched."""
    page = mmap.PAGESIZE
    size = (array.nbytes + page - 1) // page * page
    pages = mmap.mmap(-1, size + page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(pages))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(start + size), ctypes.c_size_t(page), 0) != 0:
        raise OSError(ctypes.get_errno(), "mprotect")
    copy = np.frombuffer(pages, array.dtype, array.size, size - array.nbytes)
    copy = copy.reshape(array.shape)
    copy[...] = array
    return copy


@pytest.fixture
def guarded() -> Guard:
    """Function that copies an array to where a locked page follows: one byte more is a crash."""
    return before_locked_page


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the matrix of ops, types and variants at the end of a run of its tests alone."""
    reports = [r for name in ("passed", "failed") for r in terminalreporter.getreports(name)]
    cells = [value for r in reports for name, value in r.user_properties if name == "cell"]
    if not cells or not all(r.nodeid.startswith("tests/test_matrix.py") for r in reports):
        return
    from bench.results import processor
    from tests import matrix

    columns = {
        isa: matrix.Column(isa, processor(), matrix.cells_of([c[1:] for c in cells if c[0] == isa]))
        for isa in matrix.VARIANTS
        if any(c[0] == isa for c in cells)
    }
    terminalreporter.section("largest error of each cell, as a part of what its arithmetic allows")
    terminalreporter.write_line(matrix.tables(columns))
    terminalreporter.write_line(matrix.summary(columns))
    if os.environ.get("ENGINE_KEEP_MATRIX") and not terminalreporter.getreports("failed"):
        for column in columns.values():
            matrix.keep(column)
