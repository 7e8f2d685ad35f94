"""Stored types: decoding and encoding agree bit for bit with their formats, in every variant."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from engine import dtypes, kernels
from engine.dtypes import DType
from tests import formats, formats_search, reference
from tests.compare import assert_same_bits
from tests.conftest import Guard
from tests.graphs import f32, random

Array = NDArray[Any]
TYPES = list(dtypes.BY_ID.values())
QUANTIZED = [t for t in TYPES if t.block > 1]
LENGTHS = [1, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 47, 64, 130, 1009]

by_type = pytest.mark.parametrize("dtype", TYPES, ids=lambda t: t.name)
by_quantized = pytest.mark.parametrize("dtype", QUANTIZED, ids=lambda t: t.name)

# Sixteen-bit patterns and what separates them: every halfway point and its neighbours.
EVERY_HALF = np.arange(2**16, dtype=np.uint16)


def awkward_floats(rng: np.random.Generator) -> Array:
    """Values around every bf16 and every half, random patterns, special values."""
    upper = EVERY_HALF.astype(np.uint32) << 16
    near_bf16 = [upper | low for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)]
    finite = EVERY_HALF.view(np.float16).astype(f32)
    finite = finite[np.isfinite(finite)]
    midway = ((finite[1:].astype(np.float64) + finite[:-1]) / 2).astype(f32)
    with np.errstate(over="ignore"):
        near_half = [finite, midway, np.nextafter(midway, f32(0)), np.nextafter(midway, f32(1e9))]
    anything = rng.integers(0, 2**32, 100_003, np.uint32)
    special = f32([0.0, -0.0, np.inf, -np.inf, np.nan, 65504, 65519.996, 65520, 3.4e38, 1e-45])
    floats = np.concatenate([*near_half, special])
    return np.concatenate([*near_bf16, anything, floats.view(np.uint32)]).view(f32)


def random_blocks(rng: np.random.Generator, dtype: DType, n_blocks: int) -> Array:
    """Random bytes whose scales and offsets are finite."""
    blocks = rng.integers(0, 256, (n_blocks, dtype.block_bytes), np.uint8)
    for place in formats.scale_places(dtype):
        halves = rng.integers(0, 0x7C00, (n_blocks, 1), np.uint16)
        halves |= rng.integers(0, 2, (n_blocks, 1), np.uint16) << 15
        blocks[:, place : place + 2] = halves.view(np.uint8)
    return blocks.reshape(-1)


# ---------------------------------------------------------------- decoding


@by_quantized
def test_decoding_blocks_is_exact(
    isa: str, dtype: DType, rng: np.random.Generator, guarded: Guard
) -> None:
    for n_blocks in (1, 2, 7, 501):
        data = guarded(random_blocks(rng, dtype, n_blocks))
        decoded = kernels.decode(dtype.id, data, n_blocks * dtype.block, isa)
        assert_same_bits(decoded, reference.decode_row(dtype, data))


def test_decoding_sixteen_bits_is_exact_for_every_pattern(isa: str) -> None:
    for dtype in (dtypes.F16, dtypes.BF16):
        data = EVERY_HALF.view(np.uint8)
        decoded = kernels.decode(dtype.id, data, 2**16, isa)
        expected = reference.decode_row(dtype, data)
        quiet = np.isnan(expected)  # F16C makes signalling NaN quiet, NumPy may not
        assert_same_bits(decoded[~quiet], expected[~quiet])
        assert np.isnan(decoded[quiet]).all()


@pytest.mark.parametrize("dtype", [dtypes.F32, dtypes.F16, dtypes.BF16], ids=lambda t: t.name)
def test_decoding_takes_any_length_and_any_alignment(
    isa: str, dtype: DType, rng: np.random.Generator, guarded: Guard
) -> None:
    for n in LENGTHS:
        data = reference.encode(dtype, random(rng, n))
        expected = reference.decode_row(dtype, data)
        shifted = np.concatenate([np.zeros(1, np.uint8), data])[1:]
        for place in (guarded(data), shifted):
            assert_same_bits(kernels.decode(dtype.id, place, n, isa), expected)


def test_decoding_nothing_gives_nothing(isa: str) -> None:
    assert kernels.decode(dtypes.F32.id, np.zeros(0, np.uint8), 0, isa).shape == (0,)


def test_decoding_refuses_what_does_not_fit(isa: str) -> None:
    for dtype in TYPES:
        short = np.zeros(dtype.block_bytes - 1, np.uint8)
        with pytest.raises(ValueError, match="do not fit"):
            kernels.decode(dtype.id, short, dtype.block, isa)
    with pytest.raises(ValueError, match="31 elements of type 2 do not fit"):
        kernels.decode(dtypes.Q4_0.id, np.zeros(100, np.uint8), 31, isa)
    with pytest.raises(ValueError, match="type 16 is not known"):
        kernels.decode(16, np.zeros(1000, np.uint8), 256, isa)


# ---------------------------------------------------------------- encoding


def test_encoding_bf16_is_exact(isa: str, rng: np.random.Generator) -> None:
    x = awkward_floats(rng)
    assert_same_bits(kernels.encode_bf16(x, isa), reference.encode_bf16(x))


def test_encoding_f16_is_exact(isa: str, rng: np.random.Generator) -> None:
    x = awkward_floats(rng)
    numbers = x[~np.isnan(x)]
    assert_same_bits(kernels.encode_f16(numbers, isa), reference.encode_f16(numbers))
    encoded = kernels.encode_f16(x[np.isnan(x)], isa)
    assert np.isnan(encoded.view(np.float16)).all()


def test_encoding_takes_any_length(isa: str, rng: np.random.Generator, guarded: Guard) -> None:
    for n in LENGTHS:
        x = guarded(random(rng, n))
        assert_same_bits(kernels.encode_bf16(x, isa), reference.encode_bf16(x))
        assert_same_bits(kernels.encode_f16(x, isa), reference.encode_f16(x))
    assert kernels.encode_bf16(np.zeros(0, f32), isa).shape == (0,)
    assert kernels.encode_f16(np.zeros(0, f32), isa).shape == (0,)


# ---------------------------------------------------------------- the reference's own encoders


def hard_blocks(rng: np.random.Generator, dtype: DType) -> Array:
    """Random blocks, zeros, heavy tails, ties, values that bf16 holds."""
    plain = random(rng, 40, dtype.block)
    tails = plain * np.exp(2 * random(rng, 40, dtype.block))
    ties = np.round(2 * plain) / 2
    rounded = (plain.view(np.uint32) & np.uint32(0xFFFF0000)).view(f32)
    zeros = np.zeros((2, dtype.block), f32)
    return np.concatenate([plain, tails, ties, rounded, zeros]).astype(f32)


SEARCHED = [t for t in QUANTIZED if t.name in formats_search.QUANTIZE_BLOCKS]
SIMPLE = [t for t in QUANTIZED if t.name in formats.ENCODE_BLOCKS]


@pytest.mark.parametrize("dtype", SIMPLE, ids=lambda t: t.name)
def test_the_reference_encodes_within_half_a_step(dtype: DType, rng: np.random.Generator) -> None:
    x = random(rng, 60, dtype.block)
    decoded = reference.decode_row(dtype, reference.encode(dtype, x)).reshape(x.shape)
    reach = abs(x).max(axis=1, keepdims=True)
    span = x.max(axis=1, keepdims=True) - x.min(axis=1, keepdims=True)
    # The symmetric types lose a whole step on the side away from their largest element.
    step = {
        "Q4_0": reach / 8,
        "Q5_0": reach / 16,
        "Q8_0": reach / 127 / 2,
        "Q4_1": span / 15 / 2,
        "Q5_1": span / 31 / 2,
    }[dtype.name]
    assert (abs(decoded - x) <= step * 1.01 + reach * 2.0**-10).all()


@pytest.mark.parametrize("dtype", SEARCHED, ids=lambda t: t.name)
def test_the_reference_searches_come_as_near_as_their_bits_allow(
    dtype: DType, rng: np.random.Generator
) -> None:
    x = random(rng, 60, dtype.block)
    wrong = reference.decode_row(dtype, reference.encode(dtype, x)).reshape(x.shape) - x
    # Root mean square of the error on normal numbers, a little above what each type reaches.
    limit = {"Q2_K": 0.34, "Q3_K": 0.19, "Q4_K": 0.09, "Q5_K": 0.045, "Q6_K": 0.025}
    limit |= {"IQ4_NL": 0.09, "IQ4_XS": 0.09}
    assert limit[dtype.name] / 2 < np.sqrt((wrong**2).mean()) < limit[dtype.name]


@by_quantized
def test_the_reference_decodes_anything_as_the_gguf_package_does(
    dtype: DType, rng: np.random.Generator
) -> None:
    gguf = pytest.importorskip("gguf")
    data = random_blocks(rng, dtype, 300)
    theirs = gguf.dequantize(data.reshape(300, -1), gguf.GGMLQuantizationType(dtype.id))
    assert_same_bits(reference.decode_row(dtype, data), theirs.astype(f32).reshape(-1))


@by_type
def test_the_reference_agrees_with_the_gguf_package(dtype: DType, rng: np.random.Generator) -> None:
    gguf = pytest.importorskip("gguf")
    kind = gguf.GGMLQuantizationType(dtype.id)
    x = hard_blocks(rng, dtype if dtype.block > 1 else dtypes.Q8_0)
    data = reference.encode(dtype, x)
    if dtype not in SEARCHED:  # the package decodes those, but has no encoder
        theirs = np.ascontiguousarray(gguf.quantize(x, kind)).reshape(-1).view(np.uint8)
        assert_same_bits(data, theirs)
    decoded = gguf.dequantize(data.reshape(len(x), -1), kind).astype(f32)
    assert_same_bits(reference.decode_row(dtype, data), decoded.reshape(-1))


# ---------------------------------------------------------------- checking, sums


@by_type
def test_a_sound_row_has_nothing_invalid(isa: str, dtype: DType, rng: np.random.Generator) -> None:
    for n_blocks in (1, 3, 50):
        data = reference.encode(dtype, random(rng, n_blocks * dtype.block))
        assert kernels.find_invalid(dtype.id, data, n_blocks * dtype.block, isa) == -1
    assert kernels.find_invalid(dtype.id, np.zeros(0, np.uint8), 0, isa) == -1


@by_type
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf], ids=str)
def test_the_first_invalid_element_or_block_is_found(
    isa: str, dtype: DType, bad: float, rng: np.random.Generator, guarded: Guard
) -> None:
    if dtype.block == 1:
        value = reference.encode(dtype, f32([bad]))
        places = [0]
    else:
        value = np.float16([bad]).view(np.uint8)
        places = formats.scale_places(dtype)
    for at in (0, 1, 16, 18):
        for place in places:
            data = reference.encode(dtype, random(rng, 19 * dtype.block))
            for block in (at, 18):
                start = block * dtype.block_bytes + place
                data[start : start + value.size] = value
            assert reference.find_invalid(dtype, data) == at
            assert kernels.find_invalid(dtype.id, guarded(data), 19 * dtype.block, isa) == at


def test_the_sum_of_squares_is_taken_in_double(
    isa: str, rng: np.random.Generator, guarded: Guard
) -> None:
    for n in LENGTHS:
        x = guarded(random(rng, n))
        expected = reference.sum_squares(x)
        assert abs(kernels.sum_squares(x, isa) - expected) <= 1e-14 * n * expected
    x = np.full(100_003, 0.1, f32)
    expected = 100_003 * float(f32(0.1) * f32(0.1))
    assert abs(kernels.sum_squares(x, isa) - expected) <= 1e-10 * expected
    assert kernels.sum_squares(np.zeros(0, f32), isa) == 0
    assert np.isnan(kernels.sum_squares(f32([1, np.nan, 2]), isa))
