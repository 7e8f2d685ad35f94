"""The tests' own tools: comparisons that fail when they should, and a locked page that locks."""

from __future__ import annotations

import signal
import subprocess
import sys

import numpy as np
import pytest

from tests.compare import EPS, assert_close, assert_same_bits, chain
from tests.conftest import Guard
from tests.reference import central_differences

ONE = np.ones((2, 3))


def test_close_values_pass() -> None:
    assert_close(ONE, ONE, 1, 0)
    assert_close(ONE + 0.99 * EPS, ONE, 1, 1)
    assert_close(ONE + 99 * EPS, ONE, 100 * ONE, 1)
    assert_close([np.nan, np.inf, -np.inf], [np.nan, np.inf, -np.inf], 1, 1)
    assert_close([0.0], [2.0**-140], 0, 1)


@pytest.mark.parametrize(
    ("actual", "expected"),
    [
        ([1 + 1.01 * EPS], [1.0]),
        ([1 - 1.01 * EPS], [1.0]),
        ([1.0, 1.0, 1.001], [1.0, 1.0, 1.0]),
        ([np.nan], [1.0]),
        ([1.0], [np.nan]),
        ([np.inf], [1.0]),
        ([1.0], [np.inf]),
        ([-np.inf], [np.inf]),
        ([np.nan], [np.inf]),
        ([np.inf], [np.nan]),
        ([1e-30], [0.0]),
    ],
    ids=str,
)
def test_values_too_far_apart_fail(actual: list[float], expected: list[float]) -> None:
    magnitude = np.where(np.array(expected) == 0, 0, 1)
    with pytest.raises(AssertionError, match="1 of"):
        assert_close(actual, expected, magnitude, 1)


def test_another_shape_fails_even_where_it_would_broadcast() -> None:
    with pytest.raises(AssertionError, match="shape"):
        assert_close(ONE, ONE[:1], 1, 1)
    with pytest.raises(AssertionError, match="shape"):
        assert_same_bits(ONE, ONE[:1])


def test_an_infinite_magnitude_is_refused() -> None:
    for bad in (np.inf, np.nan):
        with pytest.raises(AssertionError, match="magnitude"):
            assert_close(ONE, ONE, bad, 1)


def test_the_worst_element_is_named() -> None:
    other = ONE.copy()
    other[0, 1], other[1, 2] = 1.001, 3.0
    with pytest.raises(AssertionError, match=r"2 of 6 differ; worst at \(1, 2\)"):
        assert_close(other, ONE, 1, 1)


def test_same_bits_sees_what_equality_does_not() -> None:
    nan = np.array([0x7FC00000, 0x7FC00001], np.uint32).view(np.float32)
    assert_same_bits(nan[:1], nan[:1])
    for a, b in [(nan[:1], nan[1:]), (np.float32([0.0]), np.float32([-0.0]))]:
        with pytest.raises(AssertionError, match="1 of 1 differ in bits"):
            assert_same_bits(a, b)
    with pytest.raises(AssertionError, match="dtype"):
        assert_same_bits(np.float32([1]), np.float64([1]))


def test_the_tolerance_of_a_sum_sees_one_lost_term(rng: np.random.Generator) -> None:
    for n in (32, 1024):
        a, b = rng.uniform(0.5, 1, n), rng.uniform(0.5, 1, n)  # errors that do not cancel
        size = (abs(a) * abs(b)).sum()
        exact = float(a @ b)
        assert_close((a.astype(np.float32) * b.astype(np.float32)).sum(), exact, size, chain(n))
        with pytest.raises(AssertionError):
            assert_close(exact - a[5] * b[5], exact, size, chain(n))
        rounded = (a.astype(np.float32).view(np.uint32) & 0xFFFF0000).view(np.float32) @ b
        with pytest.raises(AssertionError):
            assert_close(rounded, exact, size, chain(n))


def test_central_differences_give_a_polynomials_gradient() -> None:
    x = np.array([[1.0, -2.0], [0.5, 3.0]])
    gradient = central_differences(lambda x: float((x**3).sum()), x)
    assert_close(gradient, 3 * x * x, 3 * x * x, 1)


def test_a_guarded_buffer_holds_the_values_and_ends_at_a_page(guarded: Guard) -> None:
    for array in (np.arange(7, dtype=np.float32), np.ones((3, 2000), np.uint8)):
        copy = guarded(array)
        assert_same_bits(copy, array)
        assert (copy.ctypes.data + copy.nbytes) % 4096 == 0


def test_reading_behind_a_guarded_buffer_is_a_crash() -> None:
    script = (
        "import ctypes, numpy as np\n"
        "from tests.conftest import before_locked_page\n"
        "a = before_locked_page(np.arange(5, dtype=np.uint8))\n"
        "print(ctypes.string_at(a.ctypes.data + 4, 1)[0], flush=True)\n"
        "print(ctypes.string_at(a.ctypes.data + 4, 2)[1], flush=True)\n"
    )
    child = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert child.stdout == "4\n"
    assert child.returncode == -signal.SIGSEGV
