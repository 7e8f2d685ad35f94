"""Stored types written: byte for byte by the rules of their references, in every variant."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from engine import dtypes, kernels
from engine.dtypes import DType
from tests import reference
from tests.conftest import Guard

f32 = np.float32
SIMPLE_TYPES = [dtypes.Q4_0, dtypes.Q4_1, dtypes.Q5_0, dtypes.Q5_1, dtypes.Q8_0]
BLOCK_TYPES = [*SIMPLE_TYPES, dtypes.IQ4_NL]
TYPES = [dtypes.F32, dtypes.F16, dtypes.BF16, *SIMPLE_TYPES]

by_type = pytest.mark.parametrize("dtype", TYPES, ids=lambda t: t.name)
by_simple_type = pytest.mark.parametrize("dtype", SIMPLE_TYPES, ids=lambda t: t.name)
by_block_type = pytest.mark.parametrize("dtype", BLOCK_TYPES, ids=lambda t: t.name)


def inputs(rng: np.random.Generator) -> NDArray[Any]:
    """Blocks of many sizes, values that meet ties, equal extremes, and zeros."""
    x = rng.standard_normal((3000, 32)).astype(f32)
    x[:1000] *= f32(2.0) ** rng.integers(-30, 12, (1000, 1)).astype(f32)
    x[1000:2000] = rng.integers(-16, 17, (1000, 32)).astype(f32) / f32(8)
    x[2000:2100] = np.abs(x[2000:2100])
    x[2100:2200] = -np.abs(x[2100:2200])
    x[2200:2300] = x[2200:2300, :1]
    x[2300] = 0
    x[2301, :16] = 0
    return x.reshape(-1)


@by_type
def test_stored_rows_are_those_of_the_reference(
    isa: str, dtype: DType, rng: np.random.Generator, guarded: Guard
) -> None:
    x = guarded(inputs(rng))
    want = reference.encode_row(dtype, x)
    if dtype.block > 1:
        blocks = want.reshape(-1, dtype.block_bytes)
        blocks[2300, :2] = kernels.encode(dtype.id, np.zeros(32, f32), isa)[:2]  # the sign of 0
        want = blocks.reshape(-1)
    assert np.array_equal(kernels.encode(dtype.id, x, isa), want)


def test_iq4_nl_is_stored_without_a_search(
    isa: str, rng: np.random.Generator, guarded: Guard
) -> None:
    x = guarded(inputs(rng))
    have = kernels.encode(dtypes.IQ4_NL.id, x, isa)
    assert np.array_equal(have, reference.plain_iq4_nl(x))


@by_block_type
def test_what_is_stored_again_stays(isa: str, dtype: DType, rng: np.random.Generator) -> None:
    """Blocks come back as they are, up to the scale's rounding; IQ4_NL's fits anew."""
    x = inputs(rng)
    once = kernels.decode(dtype.id, kernels.encode(dtype.id, x, isa), len(x), isa)
    twice = kernels.decode(dtype.id, kernels.encode(dtype.id, once, isa), len(x), isa)
    size = np.abs(x).reshape(-1, 32).max(axis=1).repeat(32)
    assert (np.abs(once - twice) <= (0.1 if dtype is dtypes.IQ4_NL else 2e-3) * size + 1e-6).all()


@by_block_type
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_block_with_no_number_decodes_to_none_and_leaves_the_others(
    isa: str, dtype: DType, bad: float, rng: np.random.Generator
) -> None:
    x = rng.standard_normal(96).astype(f32)
    x[40] = bad
    decoded = kernels.decode(dtype.id, kernels.encode(dtype.id, x, isa), 96, isa)
    assert np.isnan(decoded[32:64]).all()
    assert np.isfinite(decoded[:32]).all()
    assert np.isfinite(decoded[64:]).all()


@by_block_type
@pytest.mark.parametrize("tiny", [1e-45, 1e-39, -2e-38])
def test_blocks_too_small_for_a_scale_are_zero(isa: str, dtype: DType, tiny: float) -> None:
    data = kernels.encode(dtype.id, np.full(32, tiny, f32), isa)
    assert not kernels.decode(dtype.id, data, 32, isa).any()


@by_block_type
def test_the_largest_numbers_are_no_undefined_conversion(isa: str, dtype: DType) -> None:
    x = np.tile(f32([3.4e38, -3.4e38]), 16)
    decoded = kernels.decode(dtype.id, kernels.encode(dtype.id, x, isa), 32, isa)
    assert not np.isfinite(decoded).all()


@by_type
def test_what_is_not_whole_blocks_is_refused(isa: str, dtype: DType) -> None:
    assert len(kernels.encode(dtype.id, np.zeros(0, f32), isa)) == 0
    if dtype.block > 1:
        with pytest.raises(ValueError, match="not whole blocks"):
            kernels.encode(dtype.id, np.zeros(33, f32), isa)


def test_a_type_that_cannot_be_written_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot be written"):
        kernels.encode(99, np.zeros(32, f32))


@by_simple_type
def test_the_gguf_package_writes_the_same(isa: str, dtype: DType, rng: np.random.Generator) -> None:
    quants = pytest.importorskip("gguf.quants")
    constants = pytest.importorskip("gguf.constants")
    x = inputs(rng).reshape(-1, 32)[:2300]
    kind = constants.GGMLQuantizationType(dtype.id)
    want = quants.quantize(x, kind).reshape(-1)
    assert np.array_equal(kernels.encode(dtype.id, x.reshape(-1), isa), want)
