"""Rounding to sixteen bits: every one of the 2^32 floats, and every one of the 2^16 results."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from engine import dtypes, kernels
from tests import reference
from tests.compare import assert_same_bits

Array = NDArray[Any]
f32 = np.float32

CHUNK = 1 << 20  # stays in the caches
EVERY_PATTERN = np.arange(2**16, dtype=np.uint16)
EXPONENT, FRACTION = 0x7F800000, 0x007FFFFF


def bits_of_f16(bits: Array) -> Array:
    """Nearest f16 of floats given as bits, by whole numbers alone; NaN keeps its upper payload."""
    sign = (bits >> 16) & 0x8000
    size = bits & 0x7FFFFFFF
    exponent = (size >> 23).astype(np.int32) - 127
    # Normal: 13 bits of the fraction go. Subnormal: 14 and more, of a fraction with its first one.
    significand = np.where(exponent >= -14, size & FRACTION, (size & FRACTION) | 0x00800000)
    gone = np.where(exponent >= -14, 13, np.minimum(-exponent - 1, 31)).astype(np.uint32)
    kept = significand >> gone
    rest = significand & ((np.uint32(1) << gone) - np.uint32(1))
    half = np.uint32(1) << (gone - np.uint32(1))
    base = np.where(exponent >= -14, (exponent + 15) << 10, 0).astype(np.uint32)
    result = base + kept
    result += (rest > half) | ((rest == half) & (result & 1 == 1))
    result = np.where(exponent > 15, 0x7C00, np.minimum(result, 0x7C00))
    is_nan = size > EXPONENT
    result = np.where(is_nan, 0x7E00 | (size & FRACTION) >> 13, result)
    return (sign | result).astype(np.uint16)


ROUNDINGS = {
    "bf16": (kernels.encode_bf16, lambda bits: reference.encode_bf16(bits.view(f32))),
    "f16": (kernels.encode_f16, bits_of_f16),
}
by_type = pytest.mark.parametrize("name", ROUNDINGS)


def check(isa: str, name: str, bits: Array) -> None:
    encode, expected = ROUNDINGS[name]
    assert_same_bits(encode(bits.view(f32), isa), expected(bits))


def near_every_result() -> Array:
    """Bits around each result and each middle of two, of bf16; and around those of f16."""
    upper = EVERY_PATTERN.astype(np.uint32) << 16
    lower = (0, 1, 0x1000, 0x1001, 0x2000, 0x7FFF, 0x8000, 0x8001, 0xEFFF, 0xF000, 0xFFFF)
    f16 = EVERY_PATTERN.view(np.float16).astype(f32).view(np.uint32)
    steps = (0, 1, 0xFFF, 0x1000, 0x1001, 0x1FFF, 0x2000)
    around = [f16 + np.uint32(s) for s in steps] + [f16 - np.uint32(s) for s in steps]
    return np.concatenate([upper | np.uint32(low) for low in lower] + around)


@by_type
def test_rounding_is_exact_around_every_result(isa: str, name: str) -> None:
    check(isa, name, near_every_result())


@by_type
def test_tiny_numbers_are_rounded_like_all_others(isa: str, name: str) -> None:
    """Subnormal floats: bf16 keeps the nearest of its own, to f16 they are nothing."""
    bits = np.concatenate([np.arange(0, 1 << 23, 61, dtype=np.uint32), np.uint32([FRACTION])])
    for sign in (0, 0x80000000):
        check(isa, name, bits | np.uint32(sign))
    smallest = ROUNDINGS[name][0](np.uint32([0x8001, 0x7FFF]).view(f32), isa)
    assert smallest.tolist() == ([1, 0] if name == "bf16" else [0, 0])


@by_type
def test_special_values_keep_what_they_are(isa: str, name: str) -> None:
    special = f32([0.0, -0.0, np.inf, -np.inf])
    encoded = ROUNDINGS[name][0](special, isa)
    top = 0x7F80 if name == "bf16" else 0x7C00
    assert encoded.tolist() == [0, 0x8000, top, top | 0x8000]
    signalling = np.uint32([0x7F800001, 0xFFA00000, 0x7FC12345])
    nan = ROUNDINGS[name][0](signalling.view(f32), isa)
    quiet = 0x40 if name == "bf16" else 0x200
    assert ((nan & top) == top).all()
    assert ((nan & quiet) == quiet).all()
    assert (nan >> 15).tolist() == [0, 1, 0]


@pytest.mark.slow
@by_type
def test_every_float_is_rounded_exactly(isa: str, name: str) -> None:
    for start in range(0, 1 << 32, CHUNK):
        check(isa, name, np.arange(start, start + CHUNK, dtype=np.uint32))


@by_type
def test_every_number_returns_as_itself(isa: str, name: str) -> None:
    dtype = dtypes.BF16 if name == "bf16" else dtypes.F16
    decoded = kernels.decode(dtype.id, EVERY_PATTERN.view(np.uint8), 2**16, isa)
    numbers = ~np.isnan(decoded)
    assert_same_bits(ROUNDINGS[name][0](decoded[numbers], isa), EVERY_PATTERN[numbers])


def test_every_bf16_is_that_of_ml_dtypes(isa: str) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    theirs = EVERY_PATTERN.view(ml_dtypes.bfloat16).astype(f32)
    decoded = kernels.decode(dtypes.BF16.id, EVERY_PATTERN.view(np.uint8), 2**16, isa)
    numbers = ~np.isnan(theirs)
    assert_same_bits(decoded[numbers], theirs[numbers])
    assert np.isnan(decoded[~numbers]).all()
    x = near_every_result().view(f32)
    x = x[~np.isnan(x)]
    with np.errstate(over="ignore"):
        rounded = x.astype(ml_dtypes.bfloat16).view(np.uint16)
    assert_same_bits(kernels.encode_bf16(x, isa), rounded)
