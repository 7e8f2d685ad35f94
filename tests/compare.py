"""Comparison of a kernel's result with its reference, by a bound made of the arithmetic."""

from __future__ import annotations

from math import sqrt

import numpy as np
from numpy.typing import ArrayLike, NDArray

EPS = 2.0**-24  # largest relative error of one rounding to float32
PAIR_EPS = 2.0**-23  # of a step of bf16 pairs: two roundings
TINY = 2.0**-126  # smallest normal float32: below it errors are absolute


def chain(n: int) -> float:
    """Roundings to allow for a sum of `n` products.

    Single errors are independent and of either sign, so their sum grows with the root of their
    number (Higham and Mary, SIAM J. Sci. Comput. 41, 2019); a factor of 4 makes misses rare enough
    never to be seen, and a lost or doubled term is still far outside.
    """
    return 4 + 4 * sqrt(n)


def excess(
    actual: ArrayLike, expected: ArrayLike, magnitude: ArrayLike, k: float, eps: float = EPS
) -> NDArray[np.float64]:
    """Errors as parts of what is allowed, ``|actual - expected| / (k eps magnitude)``.

    Parameters
    ----------
    actual, expected : arrays of one shape
        Infinities must agree exactly, and NaN must meet NaN; where they do not, it is infinite.
    magnitude : array that broadcasts to their shape
        Sum of the magnitudes of what was added up for an element, ``sum |a| |b|``.
    k : float
        Roundings that the result may have suffered (see `chain`).
    eps : float
        Relative error of one of them.
    """
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, f"shape {actual.shape}, expected {expected.shape}"
    assert np.isfinite(magnitude).all(), "the magnitude is not finite, every result would pass"
    tolerance = np.broadcast_to(k * (eps * np.asarray(magnitude, np.float64) + TINY), actual.shape)
    same = (actual == expected) | (np.isnan(actual) & np.isnan(expected))
    with np.errstate(invalid="ignore", divide="ignore"):
        part = np.abs(actual - expected) / tolerance
    wrong = np.isnan(part) | ~np.isfinite(expected)
    return np.where(same, 0, np.where(wrong, np.inf, part))


def assert_close(
    actual: ArrayLike, expected: ArrayLike, magnitude: ArrayLike, k: float, eps: float = EPS
) -> None:
    """Fail unless ``|actual - expected| <= k eps magnitude`` everywhere; see `excess`."""
    parts = excess(actual, expected, magnitude, k, eps)
    if (parts <= 1).all():
        return
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    tolerance = np.broadcast_to(k * (eps * np.asarray(magnitude, np.float64) + TINY), actual.shape)
    at = tuple(int(i) for i in np.unravel_index(parts.argmax(), parts.shape))
    raise AssertionError(
        f"{(parts > 1).sum()} of {parts.size} differ; worst at {at}: {actual[at]!r}, expected "
        f"{expected[at]!r}, tolerance {tolerance[at]:.3g}, {parts[at]:.3g} times too far"
    )


def assert_same_bits(actual: ArrayLike, expected: ArrayLike) -> None:
    """Fail unless both arrays hold the same bytes: NaN payloads and signs of zero count."""
    actual, expected = np.ascontiguousarray(actual), np.ascontiguousarray(expected)
    assert actual.dtype == expected.dtype, f"dtype {actual.dtype}, expected {expected.dtype}"
    assert actual.shape == expected.shape, f"shape {actual.shape}, expected {expected.shape}"
    size = actual.dtype.itemsize
    a = actual.reshape(-1).view(np.uint8).reshape(-1, size)
    b = expected.reshape(-1).view(np.uint8).reshape(-1, size)
    differ = (a != b).any(axis=1).reshape(actual.shape)
    if differ.any():
        at = tuple(int(i[0]) for i in np.nonzero(differ))
        raise AssertionError(
            f"{differ.sum()} of {differ.size} differ in bits; first at {at}: "
            f"{actual[at]!r}, expected {expected[at]!r}"
        )
