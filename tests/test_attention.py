"""Attention and the cache of its keys and values against float64, in every kernel variant."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from engine import dtypes, ops
from engine.dtypes import DType
from engine.graph import Graph
from engine.kernels import has_pairs
from engine.tensor import Tensor
from tests import reference
from tests.bounds import attention_size
from tests.compare import assert_close, assert_same_bits, chain
from tests.conftest import Guard
from tests.graphs import compute, given, random, stored

Array = NDArray[Any]

WRITTEN = [
    *(dtypes.F32, dtypes.F16, dtypes.BF16),
    *(dtypes.Q4_0, dtypes.Q4_1, dtypes.Q5_0, dtypes.Q5_1, dtypes.Q8_0),
]


def attention(
    isa: str, q: Array, k: Array, v: Array, n_seq: int, n_head: int, n_head_kv: int, scale: float
) -> Array:
    args = (n_seq, n_head, n_head_kv, scale)
    return compute(isa, lambda g: ops.attention(g, given(q), given(k), given(v), *args))[0]


@pytest.mark.parametrize(
    "dtype, n_cols",
    [(t, n) for t in WRITTEN for n in (32, 96, *((1, 33) if t.block == 1 else ()))],
    ids=str,
)
def test_cache_store_appends_rows_and_leaves_the_others(
    isa: str, n_cols: int, dtype: DType, rng: np.random.Generator, guarded: Guard
) -> None:
    x = guarded(random(rng, 5, n_cols))
    for n_past in (0, 2, 4):
        before = rng.integers(0, 256, (9, dtype.row_bytes(n_cols)), np.uint8)
        cache, past = guarded(before), np.array([n_past], np.int32)
        graph = Graph(2, isa)
        target = Tensor.external("cache", cache, 9, n_cols, dtype.id, True)
        ops.cache_store(graph, given(x), target, past)
        graph.run()
        assert np.array_equal(cache, reference.cache_store(x, dtype, before, n_past))
        past[0] = 1
        graph.run()
        assert np.array_equal(cache[1:6], reference.cache_store(x, dtype, before, 1)[1:6])


def heads_name(heads: tuple[int, int]) -> str:
    return f"{heads[0]}over{heads[1]}"


@pytest.mark.parametrize("head_dim", [1, 7, 16, 33, 64])
@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (9, 3), (5, 1)], ids=heads_name)
def test_attention_agrees_with_float64(
    isa: str, head_dim: int, heads: tuple[int, int], rng: np.random.Generator, guarded: Guard
) -> None:
    n_head, n_head_kv = heads
    for n_seq, n_query in [(1, 1), (3, 5), (2, 63), (1, 64), (2, 65), (1, 130)]:
        q = guarded(random(rng, n_seq * n_query, n_head * head_dim))
        k, v = (guarded(random(rng, n_seq * n_query, n_head_kv * head_dim)) for _ in "kv")
        scale = head_dim**-0.5
        args = (n_seq, n_head, n_head_kv, scale)
        y = attention(isa, q, k, v, *args)
        size = attention_size(q, k, v, n_seq, heads, scale)
        assert_close(y, reference.attention(q, k, v, *args), size, chain(head_dim + n_query))


@pytest.mark.parametrize("dtype", [dtypes.F32, dtypes.F16], ids=lambda t: t.name)
@pytest.mark.parametrize("n_query", [1, 2, 33, 70])
def test_attention_over_a_cache_agrees_with_float64(
    isa: str, dtype: DType, n_query: int, rng: np.random.Generator, guarded: Guard
) -> None:
    n_head, n_head_kv, dim = 6, 2, 24
    for n_past in (0, 1, 63, 64, 100):
        n_key = n_past + n_query
        q = guarded(random(rng, n_query, n_head * dim))
        data = [guarded(reference.encode(dtype, random(rng, n_key, n_head_kv * dim))) for _ in "kv"]
        k, v = (reference.decode_row(dtype, d).reshape(n_key, -1) for d in data)
        caches = [stored(d, dtype, n_key, n_head_kv * dim) for d in data]
        past = np.array([n_past], np.int32)
        args = (1, n_head, n_head_kv, dim**-0.5)
        (y,) = compute(
            isa, lambda g, q=q, c=caches, a=args, p=past: ops.attention(g, given(q), *c, *a, p)
        )
        expected = reference.attention(q, k, v, *args, n_past)
        size = attention_size(q, k, v, 1, (n_head, n_head_kv), args[3], n_past)
        assert_close(y, expected, size, chain(dim + n_key))


@pytest.mark.parametrize("n_query", [1, 16, 17, 90])
def test_a_cache_may_be_of_any_two_types(
    isa: str, n_query: int, rng: np.random.Generator, guarded: Guard
) -> None:
    n_head, n_head_kv, dim, n_past = 4, 2, 32, 70
    n_key = n_past + n_query
    for types in [(dtypes.Q8_0, dtypes.Q4_0), (dtypes.BF16, dtypes.F32), (dtypes.F16, dtypes.Q8_0)]:
        q = random(rng, n_query, n_head * dim)
        data = [guarded(reference.encode(t, random(rng, n_key, n_head_kv * dim))) for t in types]
        pairs = list(zip(types, data, strict=True))
        k, v = (reference.decode_row(t, d).reshape(n_key, -1) for t, d in pairs)
        caches = [stored(d, t, n_key, n_head_kv * dim) for t, d in pairs]
        past, args = np.array([n_past], np.int32), (1, n_head, n_head_kv, dim**-0.5)
        (y,) = compute(
            isa, lambda g, q=q, c=caches, a=args, p=past: ops.attention(g, given(q), *c, *a, p)
        )
        size = attention_size(q, k, v, 1, (n_head, n_head_kv), args[3], n_past)
        assert_close(y, reference.attention(q, k, v, *args, n_past), size, chain(dim + n_key))


@pytest.mark.parametrize("n_query", [7, 70, 200])
def test_attention_can_begin_at_a_key_of_each_query(
    isa: str, n_query: int, rng: np.random.Generator
) -> None:
    n_seq, n_head, n_head_kv, dim = 2, 4, 2, 16
    n = n_seq * n_query
    q = random(rng, n, n_head * dim)
    k, v = (random(rng, n, n_head_kv * dim) for _ in "kv")
    position = np.arange(n_query)
    first = np.concatenate([position // 13 * 13, np.minimum(position, 69)]).astype(np.int32)
    args = (n_seq, n_head, n_head_kv, dim**-0.5)
    (y,) = compute(
        isa, lambda g: ops.attention(g, given(q), given(k), given(v), *args, first_key=first)
    )
    expected = reference.attention(q, k, v, *args, first_key=first)
    # A query that sees few keys has a small sum of magnitudes: the largest values bound it.
    size = np.full_like(expected, abs(v).max()) * (1 + 2 * args[3] * dim * abs(q).max())
    assert_close(y, expected, size, chain(dim + n_query))


def test_a_query_gets_the_same_bits_alone_and_among_a_few(
    isa: str, rng: np.random.Generator
) -> None:
    n_past, dim = 600, 64
    q = random(rng, 5, 6 * dim)
    caches = [random(rng, n_past + 5, 2 * dim).astype(np.float16) for _ in "kv"]
    tensors = [
        stored(c.view(np.uint8).reshape(-1), dtypes.F16, n_past + 5, 2 * dim) for c in caches
    ]

    def run(queries: Array, past: int) -> Array:
        n = np.array([past], np.int32)
        return compute(
            isa, lambda g: ops.attention(g, given(queries), *tensors, 1, 6, 2, 0.125, n)
        )[0]

    together = run(q, n_past)
    for i in range(5):
        assert_same_bits(run(q[i : i + 1], n_past + i), together[i : i + 1])


@pytest.mark.parametrize("pairs", [False, True])
def test_attention_of_many_queries_has_the_same_bits_whoever_takes_which_block(
    isa: str, pairs: bool, rng: np.random.Generator
) -> None:
    n_query, n_past, n_head, n_head_kv, dim = 331, 70, 9, 3, 16
    q = random(rng, n_query, n_head * dim)
    k, v = (random(rng, n_past + n_query, n_head_kv * dim) for _ in "kv")
    args = (1, n_head, n_head_kv, dim**-0.5)
    past = np.array([n_past], np.int32)

    def build(graph: Graph) -> Tensor:
        pair = pairs and has_pairs(isa)
        return ops.attention(graph, given(q), given(k), given(v), *args, past, pairs=pair)

    (alone,) = compute(isa, build)
    if not pairs:
        size = attention_size(q, k, v, 1, (n_head, n_head_kv), args[3], n_past)
        expected = reference.attention(q, k, v, *args, n_past)
        assert_close(alone, expected, size, chain(dim + n_past + n_query))
    for n_threads in (2, 3, 5):
        assert_same_bits(compute(isa, build, n_threads)[0], alone)


def test_attention_survives_large_scores(isa: str, rng: np.random.Generator) -> None:
    q, k, v = 100 * random(rng, 40, 16), 100 * random(rng, 40, 16), random(rng, 40, 16)
    y = attention(isa, q, k, v, 1, 1, 1, 1.0)
    expected = reference.attention(q, k, v, 1, 1, 1, 1.0)
    assert_close(y, expected, attention_size(q, k, v, 1, (1, 1), 1.0), chain(56))


def test_attention_does_not_look_ahead(isa: str, rng: np.random.Generator) -> None:
    q, k, v = (random(rng, 100, 32) for _ in "qkv")
    before = attention(isa, q, k, v, 1, 2, 2, 0.2)
    k[70:], v[70:] = 9, -9
    assert_same_bits(attention(isa, q, k, v, 1, 2, 2, 0.2)[:70], before[:70])
