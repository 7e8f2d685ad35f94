"""Rows as the original's quantize stores them: byte for byte, in every variant."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from engine import dtypes, kernels
from engine.dtypes import DType
from engine.gguf import read_gguf
from tests import reference
from tests.compare import assert_same_bits
from tests.conftest import Guard
from tests.graphs import f32, random

Array = NDArray[Any]
TYPES = list(dtypes.BY_ID.values())
BY_NAME = {dtype.name: dtype for dtype in TYPES}
BLOCK_TYPES = [t for t in TYPES if t.block > 1]

by_type = pytest.mark.parametrize("dtype", TYPES, ids=lambda t: t.name)
by_block_type = pytest.mark.parametrize("dtype", BLOCK_TYPES, ids=lambda t: t.name)

KINDS = {
    "normal": lambda x: x,
    "tails": lambda x: x * np.exp(2 * x),
    "bf16": lambda x: (x.view(np.uint32) & np.uint32(0xFFFF0000)).view(f32),
    "ties": lambda x: np.round(4 * x) / 4,
    "sparse": lambda x: np.where(np.abs(x) < 1.2, f32(0), x),
    "positive": lambda x: np.abs(x) + 3,
    "negative": lambda x: -np.abs(x) - 3,
    "small": lambda x: x * 1e-6,
    "below what counts": lambda x: x * 1e-19,
    "large": lambda x: x * 1e3,
    "constant": lambda x: np.full_like(x, 0.7),
    "zeros": np.zeros_like,
}
by_kind = pytest.mark.parametrize("kind", KINDS)


def rows(rng: np.random.Generator, dtype: DType, kind: str, n_rows: int = 3) -> Array:
    """Rows of an odd number of blocks; a block and a half are zero in one of them."""
    x = KINDS[kind](random(rng, n_rows, 5 * max(dtype.block, 32))).astype(f32)
    x[1, : dtype.block * 3 // 2] = 0
    return x


def importances(rng: np.random.Generator, n: int) -> Array:
    """Mean squares of columns, some of which are never used."""
    w = random(rng, n) ** 2
    w[rng.random(n) < 0.1] = 0
    return w.astype(f32)


@by_type
@by_kind
def test_rows_are_those_of_the_reference(
    isa: str, dtype: DType, kind: str, rng: np.random.Generator, guarded: Guard
) -> None:
    x = guarded(rows(rng, dtype, kind))
    have = kernels.quantize(dtype.id, x, None, isa)
    assert_same_bits(have.reshape(-1), reference.quantize_row(dtype, x))


@by_block_type
@by_kind
def test_rows_of_importance_are_those_of_the_reference(
    isa: str, dtype: DType, kind: str, rng: np.random.Generator, guarded: Guard
) -> None:
    x = guarded(rows(rng, dtype, kind))
    w = guarded(importances(rng, x.shape[1]))
    have = kernels.quantize(dtype.id, x, w, isa)
    assert_same_bits(have.reshape(-1), reference.quantize_row(dtype, x, w))


@by_block_type
def test_any_number_of_blocks_and_any_alignment(
    isa: str, dtype: DType, rng: np.random.Generator, guarded: Guard
) -> None:
    for n_blocks in (1, 2, 3, 17, 18):
        x = random(rng, 1, n_blocks * dtype.block)
        expected = reference.quantize_row(dtype, x)
        shifted = np.concatenate([np.zeros(4, np.uint8), x.view(np.uint8)[0]])[4:].view(f32)
        for place in (guarded(x), shifted[None]):
            assert_same_bits(kernels.quantize(dtype.id, place, None, isa)[0], expected)
    assert kernels.quantize(dtype.id, np.zeros((0, dtype.block), f32), None, isa).size == 0
    assert kernels.quantize(dtype.id, np.zeros((4, 0), f32), None, isa).shape == (4, 0)


@by_block_type
def test_numbers_too_small_for_a_scale_become_zeros(isa: str, dtype: DType) -> None:
    for tiny in (1e-45, 1e-39, -2e-38):
        x = np.full((1, dtype.block), tiny, f32)
        x[0, ::2] *= -0.5
        data = kernels.quantize(dtype.id, x, None, isa)
        assert not kernels.decode(dtype.id, data.reshape(-1), dtype.block, isa).any()


@by_block_type
@pytest.mark.parametrize("important", [False, True], ids=["plain", "important"])
def test_numbers_too_large_are_no_undefined_conversion(
    isa: str, dtype: DType, important: bool
) -> None:
    x = np.tile(f32([[3.4e38, -3.4e38]]), dtype.block // 2)
    w = np.ones(dtype.block, f32) if important else None
    data = kernels.quantize(dtype.id, x, w, isa).reshape(-1)
    assert kernels.find_invalid(dtype.id, data, dtype.block, isa) == 0


def test_what_does_not_fit_is_refused(isa: str) -> None:
    with pytest.raises(ValueError, match="rows of 33 are not whole blocks of type 2"):
        kernels.quantize(dtypes.Q4_0.id, np.zeros((1, 33), f32), None, isa)
    with pytest.raises(ValueError, match="type 99 is not known"):
        kernels.quantize(99, np.zeros((1, 32), f32), None, isa)
    with pytest.raises(ValueError, match="31 importances do not fit rows of 32"):
        kernels.quantize(dtypes.Q4_0.id, np.zeros((1, 32), f32), np.zeros(31, f32), isa)


# ---------------------------------------------------------------- the original's own bytes


def test_bytes_are_the_recorded_ones(isa: str, data_dir: Path) -> None:
    recorded = json.loads((data_dir / "quantize.json").read_text())["quantize"]
    name = "blk.0.attn_k.weight"
    with read_gguf(data_dir / "midi-attn_k.gguf") as file:
        x = file.data(name).view("<f4").reshape(file.tensors[name].shape)
        met = set()
        for target, record in recorded.items():
            kind, digest = record["tensors"][name]
            met.add(kind)
            data = kernels.quantize(BY_NAME[kind].id, x, None, isa)
            assert sha256(data.tobytes()).hexdigest() == digest, target
    assert met == set(BY_NAME) - {"F32"}


@by_block_type
def test_errors_are_smaller_with_more_bits(dtype: DType, rng: np.random.Generator) -> None:
    """Root mean square of the error on normal numbers, within a tenth of what the types reach."""
    reached = {"Q2_K": 0.295, "Q3_K": 0.150, "Q4_K": 0.0712, "Q5_K": 0.0360, "Q6_K": 0.0177}
    reached |= {"Q4_0": 0.0857, "Q4_1": 0.0780, "Q5_0": 0.0425, "Q5_1": 0.0377, "Q8_0": 0.0053}
    reached |= {"IQ4_NL": 0.0760, "IQ4_XS": 0.0766}
    x = random(rng, 64, 1024)
    data = kernels.quantize(dtype.id, x)
    wrong = kernels.decode(dtype.id, data.reshape(-1), x.size).reshape(x.shape) - x
    assert np.sqrt(np.mean(wrong**2)) == pytest.approx(reached[dtype.name], rel=0.1)


@by_block_type
def test_importance_moves_errors_to_where_they_matter_less(
    dtype: DType, rng: np.random.Generator
) -> None:
    x = random(rng, 64, 1024)
    w = np.where(rng.random(1024) < 0.25, f32(100), f32(0.01))

    def weighted_error(importance: Array | None) -> float:
        data = kernels.quantize(dtype.id, x, importance)
        wrong = kernels.decode(dtype.id, data.reshape(-1), x.size).reshape(x.shape) - x
        return float((w * wrong**2).sum())

    plain, important = weighted_error(None), weighted_error(w)
    assert important == plain if dtype is dtypes.Q8_0 else important < 0.97 * plain
