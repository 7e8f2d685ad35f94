"""How workers share steps: results do not depend on their number, and no step outruns another."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from engine import dtypes, ops
from engine.dtypes import DType
from engine.graph import Graph
from engine.tensor import Tensor
from tests import reference
from tests.compare import assert_same_bits
from tests.graphs import compute, f32, given, random, stored
from tests.toy_model import Training, make_toy

Array = NDArray[Any]
TYPES = list(dtypes.BY_ID.values())
MORE_THREADS = [2, 3, 5]


@pytest.mark.parametrize("checkpoints", [False, True], ids=["kept", "checkpoints"])
@pytest.mark.parametrize("dtype", [dtypes.F32, dtypes.BF16, dtypes.Q5_1], ids=lambda t: t.name)
def test_a_training_step_has_the_same_bits_for_any_number_of_threads(
    isa: str, dtype: DType, checkpoints: bool, rng: np.random.Generator
) -> None:
    toy = make_toy(rng, dtype=dtype, n_tokens=37)
    expected = Training(toy, isa, 1, checkpoints).results()
    for n_threads in MORE_THREADS:
        for name, value in Training(toy, isa, n_threads, checkpoints).results().items():
            assert_same_bits(value, expected[name])


@pytest.mark.parametrize("dtype", TYPES, ids=lambda t: t.name)
@pytest.mark.parametrize("n_tokens", [1, 8, 9, 70])
def test_linear_has_the_same_bits_for_any_number_of_threads(
    isa: str, dtype: DType, n_tokens: int, rng: np.random.Generator
) -> None:
    for n_out in (1, 7, 53, 96):
        n_in = max(96, dtype.block)
        data = reference.encode(dtype, random(rng, n_out, n_in))
        x = random(rng, n_tokens, n_in)
        adapter = (given(random(rng, 3, n_in)), given(random(rng, 3, n_out)), 0.5)
        w = stored(data, dtype, n_out, n_in)
        results = [
            compute(isa, lambda g, x=x, w=w, a=adapter: ops.linear(g, given(x), w, a), n)[0]
            for n in (1, *MORE_THREADS)
        ]
        for more in results[1:]:
            assert_same_bits(more, results[0])


@pytest.mark.parametrize("n_query", [1, 2, 70])
def test_attention_over_a_cache_has_the_same_bits_for_any_number_of_threads(
    isa: str, n_query: int, rng: np.random.Generator
) -> None:
    q = random(rng, n_query, 9 * 16)
    k, v = random(rng, 200, 3 * 16), random(rng, 200, 3 * 16)
    past = np.array([200 - n_query], np.int32)

    def build(graph: Graph) -> Tensor:
        return ops.attention(graph, given(q), given(k), given(v), 1, 9, 3, 0.25, past)

    results = [compute(isa, build, n)[0] for n in (1, *MORE_THREADS)]
    for more in results[1:]:
        assert_same_bits(more, results[0])


@pytest.mark.parametrize("n_threads", [2, 3])
def test_no_step_outruns_another(isa: str, n_threads: int, rng: np.random.Generator) -> None:
    training = Training(make_toy(rng, n_tokens=21), isa, n_threads)
    expected = training.results()
    for _ in range(50):
        for name, value in training.results().items():
            assert_same_bits(value, expected[name])


@pytest.mark.parametrize("n_threads", [2, 3, 5])
def test_steps_that_read_what_the_last_one_wrote_wait_for_it(isa: str, n_threads: int) -> None:
    """Each step shifts rows by one, so that every worker reads what its neighbour wrote."""
    n, cols, rounds = 60, 16, 40
    shift = np.roll(np.arange(n, dtype=np.int32), 1)
    graph = Graph(n_threads, isa)
    x = given(np.arange(n * cols, dtype=f32).reshape(n, cols))
    cache = np.zeros((n, cols), f32)
    start = np.zeros(1, np.int32)
    target = Tensor.external("cache", cache, n, cols, 0, True)
    ops.cache_store(graph, x, target, start)
    for _ in range(rounds):
        ops.cache_store(graph, ops.embed(graph, target, shift, n), target, start)
    graph.plan()
    for _ in range(20):
        graph.run()
        assert_same_bits(cache, np.roll(x.numpy(), rounds, axis=0))


def test_more_threads_than_work_are_fine(isa: str, rng: np.random.Generator) -> None:
    a, b = random(rng, 1, 3), random(rng, 1, 3)
    (y,) = compute(isa, lambda g: ops.add(g, given(a), given(b)), 5)
    assert_same_bits(y, a + b)
