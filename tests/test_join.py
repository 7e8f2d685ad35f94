"""Adapters joined for a model: factors in half precision beside quantized weights."""

from __future__ import annotations

import numpy as np
import pytest

from engine.dtypes import F16, F32
from engine.llama import AdapterTensors
from engine.lora import in_halves
from engine.ops import DOT_RANK
from engine.tensor import Tensor


def pair(rng: np.random.Generator, rank: int, size_of_a: float, size_of_b: float) -> AdapterTensors:
    """Factors for 40 inputs and 24 outputs; the rows of B differ by powers of ten."""
    a = size_of_a * rng.standard_normal((rank, 40), np.float32)
    b = size_of_b * rng.standard_normal((rank, 24), np.float32)
    b /= np.float32(10) ** (np.arange(rank) % 5).astype(np.float32)[:, None]
    tensors = (Tensor.external("f", m, *m.shape) for m in (a, b))
    return AdapterTensors(*tensors, 0.75)


def delta(adapter: AdapterTensors) -> np.ndarray:
    """What the adapter adds to its weight, in float64."""
    a, b, scale = adapter
    return scale * b.numpy().astype(float).T @ a.numpy().astype(float)


@pytest.mark.parametrize("sizes", [(1, 1), (1e-7, 1e6), (1e8, 1e-12), (3e-20, 2e-15)])
@pytest.mark.parametrize("rank", [1, 4])
def test_rounded_factors_are_off_by_no_more_than_halves_are(rng, rank, sizes):
    given = pair(rng, rank, *sizes)
    floats, halves = in_halves({"w": given}, ["w"])
    error = abs(delta(floats["w"]) - delta(given))
    a, b, scale = given
    magnitude = scale * abs(b.numpy().astype(float)).T @ abs(a.numpy().astype(float))
    assert 0 < error.max()
    assert (error <= (2**-10 + 2**-20) * magnitude).all()
    assert halves["w"].scale == floats["w"].scale
    for rounded, half in zip(floats["w"][:2], halves["w"][:2], strict=True):
        assert (rounded.type, half.type) == (F32.id, F16.id)
        assert half.shape == rounded.shape
        assert half.nbytes * 2 == rounded.nbytes


def test_an_adapter_of_zeros_stays_one(rng):
    given = pair(rng, 2, 1, 0)
    floats, _ = in_halves({"w": given}, ["w"])
    assert not delta(floats["w"]).any()


def test_a_row_of_zeros_takes_no_range_from_the_others(rng):
    given = pair(rng, 2, 1, 1)
    given.a.numpy()[1] = 0
    given.b.numpy()[1] = 1e30
    floats, _ = in_halves({"w": given}, ["w"])
    error, size = abs(delta(floats["w"]) - delta(given)), abs(delta(given))
    assert 0 < size.max()
    assert (error <= 2**-10 * size).all()


@pytest.mark.parametrize(
    "a, b", [(np.inf, 1), (np.nan, 1), (1, np.nan), (1e30, 1e10), (3e38, 3e38)]
)
def test_what_float32_cannot_hold_stays_so_without_a_word(recwarn, a, b):
    values = [np.array([[v, 1]], np.float32) for v in (a, b)]
    tensors = (Tensor.external("f", m, 1, 2) for m in values)
    floats, _ = in_halves({"w": AdapterTensors(*tensors, 1.0)}, ["w"])
    assert not recwarn.list
    with np.errstate(invalid="ignore"):
        assert not np.isfinite(delta(floats["w"])).all()


def test_other_weights_and_high_ranks_keep_their_factors(rng):
    joined = {"plain": pair(rng, 2, 1, 1), "high": pair(rng, DOT_RANK + 1, 1, 1)}
    floats, halves = in_halves(joined, ["high", "absent"])
    assert floats == joined
    assert halves == joined
