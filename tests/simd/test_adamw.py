"""The optimizer's two passes over its parameters, against float64."""

from __future__ import annotations

import numpy as np
import pytest

from engine.training.optimizer import AdamW, AdamWParams
from tests import reference
from tests.compare import assert_close, assert_same_bits
from tests.conftest import Guard
from tests.graphs import adapter_of, f32, random

SQUARE_PART = 1 << 14


@pytest.mark.parametrize("n_out", [1, 5], ids=["norm", "matrix"])
def test_adamw_agrees_with_float64(isa: str, n_out: int, rng: np.random.Generator) -> None:
    n, a_size, sched, gclip = 77, 33, 0.5, 3.0
    x, gradients = random(rng, n), random(rng, 4, n)
    gradients[3] *= f32(0.01)  # below the clip
    flat = x.copy()
    adapter = adapter_of(flat, [(a_size, n - a_size, n_out)])
    optimizer = AdamW(adapter, AdamWParams(alpha=1e-2, gclip=gclip), isa=isa)
    m = v = np.zeros(n)
    decay = np.full(n, 0.1 * 1e-2 * sched)
    if n_out == 1:
        decay[a_size:] = 0  # a norm's B is one number a rank: it has one dimension
    for iteration, g in enumerate(gradients, 1):
        norm = np.sqrt(reference.sum_squares(g))
        x, m, v = reference.adamw(
            x,
            g,
            m,
            v,
            clip=min(1, gclip / norm),
            beta1=0.9,
            beta2=0.999,
            step=1e-2 * sched / (1 - 0.9**iteration),
            correction=1 / (1 - 0.999**iteration),
            decay=decay,
        )
        given = g.copy()
        assert optimizer.step(given, sched, iteration) == pytest.approx(norm, rel=1e-12)
        assert (given == 0).all()
    size = np.abs(gradients).max()
    assert_close(optimizer.m, m, size, 16)
    # 1 - 0.999 in float32 is off by 2^-25 / 0.001, that is 500 roundings of the result.
    assert_close(optimizer.v, v, size * size, 600)
    assert_close(flat, x, abs(x) + 0.1, 600)


# Norms among matrices, ends within vectors and within the workers' parts, more than one part.
SIZES = [(3, 4, 4), (16, 1, 1), (33, 47, 7), (5, 2, 1), (2 * SQUARE_PART, 1001, 9), (1, 1, 1)]


def test_the_number_of_threads_changes_no_bit(isa: str, rng: np.random.Generator) -> None:
    n = sum(a + b for a, b, _ in SIZES)
    x, gradients = random(rng, n), random(rng, 3, n)
    results = []
    for n_threads in (1, 2, 3, 5):
        flat = x.copy()
        optimizer = AdamW(adapter_of(flat, SIZES), AdamWParams(alpha=0.1), n_threads, isa)
        norms = [optimizer.step(g.copy(), 1.0, i) for i, g in enumerate(gradients, 1)]
        results.append((np.array(norms), flat, optimizer.m, optimizer.v))
    assert not np.array_equal(results[0][1], x)
    for result in results[1:]:
        for value, expected in zip(result, results[0], strict=True):
            assert_same_bits(value, expected)


def test_each_stretch_decays_or_not_wherever_it_ends(isa: str, rng: np.random.Generator) -> None:
    n = sum(a + b for a, b, _ in SIZES)
    x = random(rng, n) + f32(2)
    flat = x.copy()
    optimizer = AdamW(adapter_of(flat, SIZES), AdamWParams(alpha=0.5, decay=0.5), 2, isa)
    optimizer.step(np.zeros(n, f32), 1.0, 1)  # without a gradient only the decay moves
    decays = np.concatenate([np.repeat([True, n_out > 1], [a, b]) for a, b, n_out in SIZES])
    assert_same_bits(flat, np.where(decays, x * f32(0.75), x))


def test_the_norm_is_taken_in_parts_that_the_size_decides(
    isa: str, rng: np.random.Generator, guarded: Guard
) -> None:
    for n in (1, 15, SQUARE_PART - 1, SQUARE_PART, SQUARE_PART + 1, 3 * SQUARE_PART + 77):
        grad = guarded(random(rng, n))
        expected = np.sqrt(reference.square_sums(grad, SQUARE_PART).sum())
        optimizer = AdamW(adapter_of(np.zeros(n, f32), [(n, 0, 2)]), AdamWParams(), 2, isa)
        assert optimizer.norm(grad) == pytest.approx(expected, rel=1e-12)
        grad[n // 2] = np.nan
        assert np.isnan(optimizer.norm(grad))


def test_a_norm_that_is_known_is_not_taken_again(isa: str, rng: np.random.Generator) -> None:
    x, grad = random(rng, 40), random(rng, 40)
    moved = []
    for factor in (1.0, 4.0):
        flat = x.copy()
        optimizer = AdamW(adapter_of(flat, [(40, 0, 2)]), AdamWParams(gclip=1.0), 1, isa)
        optimizer.step(grad.copy(), 1.0, 1, factor * optimizer.norm(grad))
        moved.append(optimizer.m.copy())
    assert_close(moved[1], moved[0].astype(np.float64) / 4, np.abs(moved[0]), 8)
