"""Rows of keys and values: appended, moved, turned, forgotten; and positions in groups."""

from __future__ import annotations

import numpy as np
import pytest

from engine import ops
from engine.dtypes import CACHE_TYPES, DType
from engine.errors import ShapeError
from engine.graph import Graph
from engine.kernels import decode
from engine.kvcache import KVCache
from engine.rope import Rope
from engine.self_extend import GroupAttention
from engine.tensor import Tensor
from tests import reference

N_LAYER, N_CTX, N_HEAD, HEAD_DIM = 2, 24, 3, 32
WIDTH = N_HEAD * HEAD_DIM
ROPE = Rope(HEAD_DIM, scaling="yarn", freq_scale=0.5, original_context=64)

# What storing a number again and again may change, as a part of the row's largest.
PRECISION = {
    "f32": 1e-6,
    "f16": 1e-3,
    "bf16": 8e-3,
    "q8_0": 1e-2,
    "q5_1": 0.04,
    "q5_0": 0.07,
    "q4_1": 0.07,
    "q4_0": 0.13,
    "iq4_nl": 0.13,
}


def filled(rng: np.random.Generator, dtype: DType, n: int) -> tuple[KVCache, list[np.ndarray]]:
    """A cache of n rows with keys that were rotated to their places, and the keys before."""
    cache = KVCache(N_LAYER, N_CTX, N_HEAD, HEAD_DIM, dtype, dtype)
    tables = ROPE.tables(range(N_CTX))
    plain = []
    for layer in range(N_LAYER):
        x = rng.standard_normal((n, WIDTH)).astype(np.float32)
        plain.append(x)
        graph = Graph(1)
        given = Tensor.external("x", x, n, WIDTH)
        turned = ops.rope(graph, given, np.arange(n, dtype=np.int32), tables, N_HEAD)
        ops.cache_store(graph, turned, cache.keys[layer], cache.n_past)
        ops.cache_store(graph, given, cache.values[layer], cache.n_past)
        graph.plan()
        graph.run()
    cache.append(n)
    return cache, plain


def rows(tensor: Tensor, n: int) -> np.ndarray:
    data = np.asarray(tensor.owner).reshape(-1)
    return decode(tensor.type, data, n * WIDTH).reshape(n, WIDTH)


def turned(plain: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Keys as they are where they stand at these positions."""
    cos, sin = (table[:, None, :] for table in ROPE.tables(positions))
    heads = plain.reshape(len(plain), N_HEAD, HEAD_DIM)
    swapped = heads.reshape(len(plain), N_HEAD, -1, 2)[..., ::-1].reshape(heads.shape)
    return (heads * cos + swapped * sin).reshape(plain.shape)


@pytest.mark.parametrize("name", CACHE_TYPES)
def test_shifted_keys_are_those_of_their_new_positions(rng: np.random.Generator, name: str) -> None:
    cache, plain = filled(rng, CACHE_TYPES[name], 20)
    before = [rows(t, 20) for t in cache.values]
    cache.shift(3, 8, ROPE.tables([8], unit=True))
    assert cache.n_past[0] == 12
    assert cache.next_position == 12
    kept = np.r_[0:3, 11:20]
    for layer in range(N_LAYER):
        want = turned(plain[layer][kept], np.arange(12))
        error = np.abs(rows(cache.keys[layer], 12) - want).max() / np.abs(want).max()
        assert error < 2 * PRECISION[name]
        assert np.array_equal(rows(cache.values[layer], 12), before[layer][kept])


@pytest.mark.parametrize("name", CACHE_TYPES)
def test_rows_that_move_alone_keep_their_place(rng: np.random.Generator, name: str) -> None:
    cache, plain = filled(rng, CACHE_TYPES[name], 10)
    first = rows(cache.keys[0], 3)
    positions = np.array([0, 1, 2, 2, 2, 3, 3, 4, 5, 6], np.int32)
    old = cache.positions[:10].copy()
    cache.move(positions, ROPE.tables(old - positions, unit=True))
    assert np.array_equal(cache.positions[:10], positions)
    assert cache.next_position == 7
    want = turned(plain[0], positions)
    have = rows(cache.keys[0], 10)
    assert np.abs(have - want).max() / np.abs(want).max() < 2 * PRECISION[name]
    assert np.array_equal(have[:3], first)


def test_positions_go_on_behind_the_last(rng: np.random.Generator) -> None:
    cache, _ = filled(rng, CACHE_TYPES["f16"], 6)
    assert list(cache.positions[:6]) == [0, 1, 2, 3, 4, 5]
    cache.truncate(2)
    assert cache.next_position == 2
    cache.append(3)
    assert list(cache.positions[:5]) == [0, 1, 2, 3, 4]
    cache.truncate(0)
    assert cache.next_position == 0


def test_a_head_is_whole_blocks() -> None:
    KVCache(1, 8, 3, 8, CACHE_TYPES["bf16"], CACHE_TYPES["f32"])
    for types in (("q8_0", "f16"), ("f16", "q4_0")):
        with pytest.raises(ShapeError, match="heads of 8 are not whole blocks of 32"):
            KVCache(1, 8, 3, 8, *(CACHE_TYPES[t] for t in types))


def test_a_cache_takes_the_bytes_of_its_types() -> None:
    cache = KVCache(2, 10, 3, 32, CACHE_TYPES["q8_0"], CACHE_TYPES["q4_0"])
    assert cache.n_bytes == 2 * 10 * 3 * (34 + 18)


@pytest.mark.parametrize("keys", CACHE_TYPES)
@pytest.mark.parametrize("values", ["f32", "f16", "q4_1"])
def test_attention_sees_what_is_stored(
    isa: str, rng: np.random.Generator, keys: str, values: str
) -> None:
    """Over a cache of any two types: as over the numbers that its rows decode to."""
    n_past, n_new = 70, 11
    cache = KVCache(1, n_past + n_new, N_HEAD, HEAD_DIM, CACHE_TYPES[keys], CACHE_TYPES[values])
    cache.positions = np.zeros(n_past + n_new, np.int32)
    for n in (n_past, n_new):
        graph = Graph(2, isa)
        for tensor in (cache.keys[0], cache.values[0]):
            x = rng.standard_normal((n, WIDTH)).astype(np.float32)
            ops.cache_store(graph, Tensor.external("x", x, n, WIDTH), tensor, cache.n_past)
        q = rng.standard_normal((n, 2 * WIDTH)).astype(np.float32)
        given = Tensor.external("q", q, n, 2 * WIDTH)
        out = graph.keep(
            ops.attention(
                graph,
                given,
                cache.keys[0],
                cache.values[0],
                1,
                2 * N_HEAD,
                N_HEAD,
                0.2,
                cache.n_past,
            )
        )
        graph.plan()
        graph.run()
        cache.append(n)
    seen = [rows(t[0], n_past + n_new) for t in (cache.keys, cache.values)]
    want = reference.attention(q, *seen, 1, 2 * N_HEAD, N_HEAD, 0.2, n_past)
    np.testing.assert_allclose(out.numpy(), want, rtol=0, atol=2e-4)


@pytest.mark.parametrize("keep, discard", [(-1, 2), (0, 0), (2, 5), (7, 1)])
def test_what_is_not_there_cannot_be_dropped(
    rng: np.random.Generator, keep: int, discard: int
) -> None:
    cache, _ = filled(rng, CACHE_TYPES["f16"], 6)
    with pytest.raises(ShapeError, match="cannot drop"):
        cache.shift(keep, discard, ROPE.tables([discard], unit=True))


@pytest.mark.parametrize("n", [-1, 7])
def test_more_than_there_is_cannot_be_kept(rng: np.random.Generator, n: int) -> None:
    cache, _ = filled(rng, CACHE_TYPES["f16"], 6)
    with pytest.raises(ShapeError, match="cannot keep"):
        cache.truncate(n)


# ---------------------------------------------------------------- groups


def grouped_step_by_step(n_tokens: int, factor: int, width: int) -> tuple[list[int], int]:
    """Positions after each token, moved as the paper's reference code moves them: three ranges."""
    positions: list[int] = []
    place = grouped = 0
    for _ in range(n_tokens):
        while place >= grouped + width:
            done = factor * grouped // width
            rest = width // factor * (factor - 1)
            back = width // factor - done * rest - width
            up = [p + done * rest if grouped <= p < place else p for p in positions]
            low, high = grouped + done * rest, grouped + done * rest + width
            divided = [p // factor if low <= p < high else p for p in up]
            positions = [p + back if high <= p < place + done * rest else p for p in divided]
            place -= rest
            grouped += width // factor
        positions.append(place)
        place += 1
    return positions, place


@pytest.mark.parametrize("factor, width", [(2, 8), (4, 16), (3, 12), (2, 2), (5, 5), (1, 4)])
def test_positions_are_divided_as_the_reference_does(factor: int, width: int) -> None:
    for n_tokens in range(1, 90):
        group = GroupAttention(factor, width)
        positions = np.zeros(0, np.int32)
        for _ in range(n_tokens):
            positions = group.regroup(positions)
            place = int(positions[-1]) + 1 if len(positions) else 0
            positions = np.append(positions, np.int32(place)).astype(np.int32)
        want, place = grouped_step_by_step(n_tokens, factor, width)
        assert list(positions) == want
        assert (np.diff(positions) >= 0).all()
        assert positions[-1] + 1 == place


def test_many_tokens_are_divided_at_once() -> None:
    group = GroupAttention(4, 8)
    positions = np.arange(20, dtype=np.int32)
    again = group.regroup(positions)
    assert list(again) == [n // 4 for n in range(16)] + [4, 5, 6, 7]
    assert group.grouped == 4
    assert group.regroup(again) is again


@pytest.mark.parametrize("factor, width", [(0, 8), (3, 8), (2, 0), (-2, -4)])
def test_a_width_that_does_not_divide_is_refused(factor: int, width: int) -> None:
    with pytest.raises(ShapeError, match="multiple"):
        GroupAttention(factor, width)


def test_grouped_positions_are_not_taken_back_but_all_may_be() -> None:
    group = GroupAttention(2, 4)
    group.regroup(np.arange(9, dtype=np.int32))
    assert group.grouped == 4
    group.truncate(4)
    with pytest.raises(ShapeError, match="grouped, up to 4"):
        group.truncate(3)
    group.truncate(0)
    assert group.grouped == 0
