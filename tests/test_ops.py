"""Values of every op against float64, in every kernel variant.

To each op the same questions: sizes at, below and above its tile, several tiles, primes; every
stored type; in place; special values; inputs that end at a locked page; nothing written past the
output.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from engine import dtypes, ops
from engine.dtypes import DType
from engine.errors import ShapeError
from engine.graph import Graph
from engine.tensor import Tensor
from tests import reference
from tests.bounds import BLOCK, rounding_error
from tests.compare import assert_close, assert_same_bits, chain
from tests.conftest import Guard
from tests.graphs import compute, f32, given, planned, random, stored, weight

Array = NDArray[Any]

# A tile is 6 rows of 64 lanes, or of 16; up to GEMV_TOKENS, 8, go another way.
TOKENS = [1, 4, 5, 6, 7, 8, 9, 16, 63, 64, 65, 130]
COLUMNS = [1, 3, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 97, 130]
TYPES = list(dtypes.BY_ID.values())
ROUNDED = [dtypes.Q4_0, dtypes.Q4_1, dtypes.Q5_0, dtypes.Q5_1, dtypes.Q8_0]

by_tokens = pytest.mark.parametrize("n_tokens", TOKENS)
by_columns = pytest.mark.parametrize("n_cols", COLUMNS)
by_type = pytest.mark.parametrize("dtype", TYPES, ids=lambda t: t.name)


def linear(
    isa: str, x: Array, data: Array, dtype: DType, n_out: int, partner: bool = False
) -> Array:
    """x W' for a weight of `n_out` stored rows."""
    w = stored(data, dtype, n_out, x.shape[1])

    def build(graph: Graph) -> Tensor:
        graph.partner = partner
        return ops.linear(graph, given(x), w)

    return compute(isa, build)[0]


def widths(dtype: DType) -> list[tuple[int, int]]:
    """(n_in, n_out) to try: n_in whole blocks of the type."""
    if dtype.block == 1:
        return [(64, 6), (33, 7), (7, 64), (130, 53), (1, 1), (48, 96)]
    if dtype.block == 256:
        return [(256, 6), (768, 53), (2304, 1)]
    return [(64, 6), (32, 7), (96, 53), (288, 1), (544, 48)]


# ---------------------------------------------------------------- embedding and matrix products


@by_type
@by_tokens
def test_embed_gives_the_decoded_rows(
    isa: str, dtype: DType, n_tokens: int, rng: np.random.Generator, guarded: Guard
) -> None:
    for n_cols, _ in widths(dtype):
        data, w = weight(rng, dtype, 9, n_cols)
        ids = guarded(rng.integers(0, 9, n_tokens, np.int32))
        tensor = stored(guarded(data), dtype, 9, n_cols)
        (y,) = compute(isa, lambda g, t=tensor, i=ids: ops.embed(g, t, i, n_tokens))
        assert_same_bits(y, w[ids])


@by_type
@by_tokens
def test_linear_agrees_with_float64(
    isa: str, dtype: DType, n_tokens: int, rng: np.random.Generator, guarded: Guard
) -> None:
    for n_in, n_out in widths(dtype):
        data, w = weight(rng, dtype, n_out, n_in)
        x = guarded(random(rng, n_tokens, n_in))
        y = linear(isa, x, guarded(data), dtype, n_out)
        magnitude = reference.linear(abs(x), abs(w))
        assert_close(y, reference.linear(x, w), magnitude, chain(n_in))


@pytest.mark.parametrize("n_tokens", [9, 16, 63, 64, 65, 130])
def test_packed_floats_are_panels_of_tokens(
    isa: str, n_tokens: int, rng: np.random.Generator
) -> None:
    x = random(rng, n_tokens, 37)
    (packed,) = compute(isa, lambda g: g.add(ops.Pack, given(x), 0, False, False)[0])
    lanes, panel = (8, 16) if isa == "avx2" else (16, 64)
    expected = reference.pack(x, lanes, panel)
    assert_same_bits(packed.reshape(-1)[: expected.size], expected)


@by_type
@pytest.mark.parametrize("n_tokens", [1, 8, 9, 70])
def test_a_base_comes_on_top_of_the_product_and_its_adapter(
    isa: str, dtype: DType, n_tokens: int, rng: np.random.Generator, guarded: Guard
) -> None:
    n_in, n_out = widths(dtype)[1]
    data, _ = weight(rng, dtype, n_out, n_in)
    w, x = stored(guarded(data), dtype, n_out, n_in), given(random(rng, n_tokens, n_in))
    adapter = (given(random(rng, 3, n_in)), given(random(rng, 3, n_out)), 0.5)
    base = guarded(random(rng, n_tokens, n_out))
    for chosen in (None, adapter):
        (y,) = compute(isa, lambda g, a=chosen: ops.linear(g, x, w, a))
        (on_top,) = compute(isa, lambda g, a=chosen: ops.linear(g, x, w, a, given(base)))
        assert_same_bits(on_top, base + y)


@by_type
@pytest.mark.parametrize("partner", [False, True])
@pytest.mark.parametrize("n_tokens", [1, 8, 9, 70, 130])
def test_feed_forward_has_the_bits_of_its_steps(
    isa: str, dtype: DType, n_tokens: int, partner: bool, rng: np.random.Generator
) -> None:
    n_between = max(dtype.block, 6 * 9 if dtype.block == 1 else 96)
    for n_in, n_out in widths(dtype)[:3]:
        sizes = [(n_between, n_in), (n_between, n_in), (n_out, n_between)]
        weights = [stored(weight(rng, dtype, *s)[0], dtype, *s) for s in sizes]
        x, base = random(rng, n_tokens, n_in), random(rng, n_tokens, n_out)

        def steps(graph: Graph, x: Array = x, base: Array = base, w: Any = weights) -> Tensor:
            gate, up = (ops.linear(graph, given(x), one) for one in w[:2])
            return ops.linear(graph, ops.silu_mul(graph, gate, up), w[2], None, given(base))

        for pairs in (False, True):
            for n_threads in (1, 3):

                def prepared(build: Callable[[Graph], Tensor], n: int, pairs: bool) -> Array:
                    graph = Graph(n, isa)
                    graph.partner, graph.pairs = partner, pairs
                    y = graph.keep(build(graph))
                    graph.run()
                    return y.numpy().copy()

                whole = prepared(
                    lambda g, x=x, w=weights, b=base: ops.feed_forward(g, given(x), *w, given(b)),
                    n_threads,
                    pairs,
                )
                assert_same_bits(whole, prepared(steps, 1, pairs))


@pytest.mark.parametrize("dtype", [dtypes.F32, dtypes.BF16, dtypes.Q4_1], ids=lambda t: t.name)
@pytest.mark.parametrize("n_tokens", [1, 3, 8])
@pytest.mark.parametrize("rank", [1, 4, 7])
def test_few_tokens_meet_adapters_within_the_product_with_the_same_bits(
    isa: str, dtype: DType, n_tokens: int, rank: int, rng: np.random.Generator
) -> None:
    sizes = [(96, 64), (96, 64), (32, 96)]
    held = [stored(weight(rng, dtype, *s)[0], dtype, *s) for s in sizes]
    x, base = given(random(rng, n_tokens, 64)), given(random(rng, n_tokens, 32))
    made = [(given(random(rng, rank, n)), given(random(rng, rank, m)), 0.5) for m, n in sizes]
    adapters = (made[0], None, made[2])

    def apart(graph: Graph, x: Tensor, w: Tensor, adapter: Any) -> Tensor:
        """The adapter's products as steps of their own."""
        y = ops.linear(graph, x, w)
        return (
            y
            if adapter is None
            else ops.lora_up(graph, y, ops.lora_down(graph, x, adapter[0]), *adapter[1:])
        )

    def steps(graph: Graph) -> Tensor:
        graph.partner = True
        gate, up = (apart(graph, x, held[i], adapters[i]) for i in (0, 1))
        h = ops.silu_mul(graph, gate, up)
        return ops.add(graph, base, apart(graph, h, held[2], adapters[2]))

    def whole(graph: Graph) -> Tensor:
        graph.partner = True
        return ops.feed_forward(graph, x, *held, base, adapters)

    assert all(ops.meets_within(x, adapter) for adapter in made)
    assert_same_bits(compute(isa, whole)[0], compute(isa, steps)[0])
    wide = (given(random(rng, 65, 64)), given(random(rng, 65, 96)), 0.5)
    assert not ops.meets_within(x, wide)
    with pytest.raises(ShapeError, match="wants a step of its own"):
        compute(isa, lambda g: ops.feed_forward(g, x, *held, base, (wide, None, None)))


@pytest.mark.parametrize("dtype", [dtypes.F32, dtypes.Q4_1], ids=lambda t: t.name)
@pytest.mark.parametrize("rank", [1, 4, 7])
def test_factors_stored_as_halves_give_the_bits_of_the_same_numbers_as_floats(
    isa: str, dtype: DType, rank: int, rng: np.random.Generator, guarded: Guard
) -> None:
    for n_in, n_out in widths(dtype):
        w = stored(weight(rng, dtype, n_out, n_in)[0], dtype, n_out, n_in)
        x = given(random(rng, 3, n_in))
        halves = [random(rng, rank, n).astype(np.float16) for n in (n_in, n_out)]

        def adapted(kind: DType, values: list[Any], x: Tensor = x, w: Tensor = w) -> Array:
            factors = [stored(guarded(v), kind, *v.shape) for v in values]

            def build(graph: Graph) -> Tensor:
                graph.partner = True
                return ops.linear(graph, x, w, (*factors, 0.5))

            return compute(isa, build)[0]

        floats = adapted(dtypes.F32, [v.astype(np.float32) for v in halves])
        assert_same_bits(adapted(dtypes.F16, halves), floats)


@pytest.mark.parametrize("dtype", ROUNDED, ids=lambda t: t.name)
@pytest.mark.parametrize("n_tokens", [1, 2, 7, 8, 9, 17, 65])
def test_linear_with_rounded_activations_agrees_with_the_formula(
    isa: str, dtype: DType, n_tokens: int, rng: np.random.Generator, guarded: Guard
) -> None:
    for n_in, n_out in widths(dtype):
        data, w = weight(rng, dtype, n_out, n_in)
        x = guarded(random(rng, n_tokens, n_in) + f32(0.5))  # sums of codes that do not cancel
        x[:, : n_in // 2] *= 8  # scales that differ by block
        y = linear(isa, x, guarded(data), dtype, n_out, partner=True)
        # Signed codes may be shifted by 128 on the way and back: terms up to twice the largest.
        step = np.abs(x).reshape(n_tokens, -1, BLOCK).max(axis=2)
        scale = abs(reference.half(data.reshape(-1, dtype.block_bytes), 0)).reshape(n_out, -1)
        magnitude = reference.linear(abs(x), abs(w)) + 2 * 128 * BLOCK * step @ scale.T
        assert_close(y, reference.linear_rounded(x, dtype, data, n_out), magnitude, 4)


@pytest.mark.parametrize("dtype", [*ROUNDED, dtypes.IQ4_NL], ids=lambda t: t.name)
def test_linear_takes_any_number_of_blocks_and_gives_a_token_among_others_its_bits(
    isa: str, dtype: DType, rng: np.random.Generator, guarded: Guard
) -> None:
    for n_blocks in range(1, 36):  # groups of 8 or 16 blocks, whole and cut
        data, w = weight(rng, dtype, 3, n_blocks * BLOCK)
        x = random(rng, 7, n_blocks * BLOCK)
        y = linear(isa, x, guarded(data), dtype, 3, partner=True)
        assert (abs(y - reference.linear(x, w)) <= rounding_error(dtype, x, w, data)).all()
        for n_tokens in range(1, 7):
            some = linear(isa, x[:n_tokens], guarded(data), dtype, 3, partner=True)
            assert_same_bits(some, y[:n_tokens])
        assert_same_bits(linear(isa, x[6:], guarded(data), dtype, 3, partner=True), y[6:])


@pytest.mark.parametrize("dtype", TYPES, ids=lambda t: t.name)
@pytest.mark.parametrize("n_tokens", [1, 8, 9, 65])
def test_linear_with_rounded_activations_stays_near_the_exact_product(
    isa: str, dtype: DType, n_tokens: int, rng: np.random.Generator
) -> None:
    for n_in, n_out in widths(dtype):
        data, w = weight(rng, dtype, n_out, n_in)
        x = random(rng, n_tokens, n_in)
        y = linear(isa, x, data, dtype, n_out, partner=True)
        if dtype.block > 1:
            assert (abs(y - reference.linear(x, w)) <= rounding_error(dtype, x, w, data)).all()
        else:
            assert_same_bits(y, linear(isa, x, data, dtype, n_out))


@by_type
@by_tokens
@pytest.mark.parametrize("rank", [1, 4, 5])
def test_linear_adds_the_adapter(
    isa: str, dtype: DType, n_tokens: int, rank: int, rng: np.random.Generator, guarded: Guard
) -> None:
    n_in, n_out, scale = max(96, dtype.block), 53, 1.75
    data, _ = weight(rng, dtype, n_out, n_in)
    x = random(rng, n_tokens, n_in)
    a, b = guarded(random(rng, rank, n_in)), guarded(random(rng, rank, n_out))
    w = stored(guarded(data), dtype, n_out, n_in)

    def plain_and_adapted(graph: Graph) -> list[Tensor]:
        inputs = given(x)
        adapter = (given(a, "A"), given(b, "B"), scale)
        return [ops.linear(graph, inputs, w), ops.linear(graph, inputs, w, adapter)]

    plain, adapted = compute(isa, plain_and_adapted)
    u, size = reference.lora_down(x, a), reference.lora_down(abs(x), abs(a))
    expected = plain + scale * (u @ b)
    magnitude = abs(plain) + scale * (size @ abs(b))
    assert_close(adapted, expected, magnitude, chain(n_in + rank))


def test_linear_reads_unaligned_weights(isa: str, rng: np.random.Generator) -> None:
    for dtype in TYPES:
        for n_tokens in (8, 21):
            n_in = max(64, dtype.block)
            data, _ = weight(rng, dtype, 13, n_in)
            x = random(rng, n_tokens, n_in)
            shifted = np.empty(data.size + 1, np.uint8)
            shifted[1:] = data
            aligned = linear(isa, x, data, dtype, 13)
            assert_same_bits(linear(isa, x, shifted[1:], dtype, 13), aligned)


def test_linear_takes_long_rows(isa: str, rng: np.random.Generator) -> None:
    n_in = 57344
    w, x = random(rng, 13, n_in), random(rng, 9, n_in)
    for dtype in (dtypes.F32, dtypes.BF16):
        data = reference.encode(dtype, w)
        decoded = reference.decode_row(dtype, data).reshape(w.shape)
        y = linear(isa, x, data, dtype, 13)
        expected, size = reference.linear(x, decoded), reference.linear(abs(x), abs(decoded))
        assert_close(y, expected, size, chain(n_in))


def test_linear_of_zeros_is_zero(isa: str, rng: np.random.Generator) -> None:
    for dtype in TYPES:
        for n_tokens in (2, 16):
            n_in = max(64, dtype.block)
            data, _ = weight(rng, dtype, 7, n_in)
            x = np.zeros((n_tokens, n_in), f32)
            assert (linear(isa, x, data, dtype, 7) == 0).all()


@by_type
@pytest.mark.parametrize("n_tokens", [1, 8, 9, 70])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf], ids=str)
@pytest.mark.parametrize("partner", [False, True], ids=["exact", "rounded"])
def test_linear_lets_no_invalid_activation_vanish(
    isa: str, dtype: DType, n_tokens: int, bad: float, partner: bool, rng: np.random.Generator
) -> None:
    n_in = max(96, dtype.block)
    data, w = weight(rng, dtype, 9, n_in)
    x = random(rng, n_tokens, n_in)
    token, column = int(rng.integers(n_tokens)), int(rng.integers(n_in))
    x[token, column] = bad
    invalid = ~np.isfinite(linear(isa, x, data, dtype, 9, partner))
    rounded = partner and dtype.block > 1  # then a block's scale is invalid, and all its elements
    touched = np.ones(9, bool) if rounded else (w[:, column] != 0) | bool(np.isnan(bad))
    assert invalid[token][touched].all()
    assert not np.delete(invalid, token, axis=0).any()


@pytest.mark.parametrize("partner", [False, True], ids=["exact", "rounded"])
def test_linear_takes_tiny_activations(isa: str, partner: bool, rng: np.random.Generator) -> None:
    for dtype in TYPES:
        n_in = max(64, dtype.block)
        data, w = weight(rng, dtype, 9, n_in)
        for n_tokens, tiny in [(2, 1e-30), (9, 1e-38), (2, 1e-44)]:
            x = (random(rng, n_tokens, n_in) * tiny).astype(f32)
            y = linear(isa, x, data, dtype, 9, partner)
            size = reference.linear(abs(x), abs(w)).max() + abs(w).sum() * 2.0**-149
            assert np.isfinite(y).all()
            assert abs(y - reference.linear(x, w)).max() <= size


# ---------------------------------------------------------------- norm, rotation, gate, sum


@by_columns
def test_rms_norm_agrees_with_float64(
    isa: str, n_cols: int, rng: np.random.Generator, guarded: Guard
) -> None:
    for n_tokens in (1, 5, 65):
        x, w = guarded(random(rng, n_tokens, n_cols)), guarded(random(rng, 1, n_cols))
        (y,) = compute(isa, lambda g, x=x, w=w: ops.rms_norm(g, given(x), given(w), 1e-5))
        expected = reference.rms_norm(x, w, 1e-5)
        assert_close(y, expected, abs(expected), 8)  # squares round once, then 5 steps follow


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf], ids=str)
def test_rms_norm_spoils_the_row_of_an_invalid_value_and_no_other(
    isa: str, bad: float, rng: np.random.Generator
) -> None:
    w = np.ones((1, 21), f32)
    for column in range(21):
        x = random(rng, 4, 21)
        x[2, column] = bad
        (y,) = compute(isa, lambda g, x=x: ops.rms_norm(g, given(x), given(w), 1e-5))
        assert np.isnan(y[2, column])
        assert np.isfinite(np.delete(y, 2, axis=0)).all()


def test_rms_norm_of_zeros_and_of_tiny_values(isa: str) -> None:
    x = np.zeros((3, 19), f32)
    x[1], x[2] = 1e-30, 1e-44
    (y,) = compute(isa, lambda g: ops.rms_norm(g, given(x), given(np.ones((1, 19), f32)), 1e-6))
    assert_close(y, reference.rms_norm(x, np.ones((1, 19)), 1e-6), abs(x) * 1e3, 8)


@pytest.mark.parametrize("head_dim", [2, 6, 16, 18, 34, 64, 80, 130])
def test_rope_agrees_with_float64(
    isa: str, head_dim: int, rng: np.random.Generator, guarded: Guard
) -> None:
    for n_rot in sorted({2, head_dim // 2 // 2 * 2 or 2, head_dim}):
        for n_head in (1, 3):
            x = guarded(random(rng, 7, n_head * head_dim))
            positions = guarded(rng.integers(0, 50, 7, np.int32))
            cos, sin = (guarded(table) for table in reference.rope_tables(50, n_rot))
            args = (positions, (cos, sin), n_head)
            (y,) = compute(isa, lambda g, x=x, a=args: ops.rope(g, given(x), *a))
            expected = reference.rope(x, positions, (cos, sin), n_head)
            size = reference.rope(abs(x), positions, (abs(cos), abs(sin)), n_head)
            assert_close(y, expected, size, 3)


def test_rope_rounds_to_half_precision_when_asked(isa: str, rng: np.random.Generator) -> None:
    x, positions = random(rng, 5, 68), np.arange(5, dtype=np.int32)
    tables = reference.rope_tables(5, 20)
    args = (positions, tables, 2)
    plain, rounded = compute(
        isa, lambda g: [ops.rope(g, given(x), *args, to_half) for to_half in (False, True)]
    )
    assert_same_bits(rounded, plain.astype(np.float16).astype(f32))


@by_columns
def test_silu_mul_agrees_with_float64(
    isa: str, n_cols: int, rng: np.random.Generator, guarded: Guard
) -> None:
    for n_tokens in (1, 3):
        g, u = guarded(4 * random(rng, n_tokens, n_cols)), guarded(random(rng, n_tokens, n_cols))
        (y,) = compute(isa, lambda graph, g=g, u=u: ops.silu_mul(graph, given(g), given(u)))
        expected = reference.silu_mul(g, u)
        # e^-g takes 4 roundings, then come a sum, a quotient and two products.
        assert_close(y, expected, abs(expected), 10)


def test_silu_is_accurate_over_its_whole_range(isa: str) -> None:
    g = np.linspace(-87, 87, 40_001, dtype=f32)[None]
    (y,) = compute(isa, lambda graph: ops.silu_mul(graph, given(g), given(np.ones_like(g))))
    expected = reference.silu_mul(g, np.ones_like(g))
    assert_close(y, expected, abs(expected), 10)


def test_silu_of_special_values(isa: str) -> None:
    g = np.array([[0.0, -0.0, 1e-45, -1e-45, 1e30, 3e38, -100, -1e4, -1e30, -3e38]], f32)
    one = np.ones_like(g)
    (y,) = compute(isa, lambda graph: ops.silu_mul(graph, given(g), given(one)))
    assert_close(y, reference.silu_mul(g, one), abs(reference.silu_mul(g, one)), 10)
    assert_same_bits(np.signbit(y[0, :2]), np.array([False, True]))


def test_silu_of_infinities_and_nan(isa: str) -> None:
    g, one = np.array([[np.inf, np.nan] * 9], f32), np.ones((1, 18), f32)
    (y,) = compute(isa, lambda graph: ops.silu_mul(graph, given(g), given(one)))
    assert_same_bits(np.isposinf(y), np.isposinf(g))
    assert_same_bits(np.isnan(y), np.isnan(g))
    (y,) = compute(isa, lambda graph: ops.silu_mul(graph, given(one), given(g)))
    assert_same_bits(np.isnan(y), np.isnan(g))


@by_columns
def test_add_is_exact(isa: str, n_cols: int, rng: np.random.Generator, guarded: Guard) -> None:
    a, b = guarded(random(rng, 3, n_cols)), guarded(random(rng, 3, n_cols))
    a[0, 0], b[1, 0], b[2, 0] = np.nan, np.inf, -0.0
    (y,) = compute(isa, lambda g: ops.add(g, given(a), given(b)))
    assert_same_bits(y, a + b)


# ---------------------------------------------------------------- adapters


@by_columns
@pytest.mark.parametrize("rank", [1, 4, 5])
def test_lora_down_agrees_with_float64(
    isa: str, n_cols: int, rank: int, rng: np.random.Generator, guarded: Guard
) -> None:
    for n_tokens in (1, 7):
        x, m = guarded(random(rng, n_tokens, n_cols)), guarded(random(rng, rank, n_cols))
        (u,) = compute(isa, lambda g, x=x, m=m: ops.lora_down(g, given(x), given(m)))
        size = reference.lora_down(abs(x), abs(m))
        assert_close(u, reference.lora_down(x, m), size, chain(n_cols))


@by_columns
@pytest.mark.parametrize("rank", [1, 4, 5])
def test_lora_up_agrees_with_float64(
    isa: str, n_cols: int, rank: int, rng: np.random.Generator, guarded: Guard
) -> None:
    for n_tokens in (1, 7):
        u, m = guarded(random(rng, n_tokens, rank)), guarded(random(rng, rank, n_cols))
        for base in (None, guarded(random(rng, n_tokens, n_cols))):
            (y,) = compute(
                isa,
                lambda g, u=u, m=m, b=base: ops.lora_up(
                    g, None if b is None else given(b), given(u), given(m), -0.75
                ),
            )
            size = abs(base) if base is not None else None
            magnitude = reference.lora_up(size, abs(u), abs(m), 0.75)
            assert_close(y, reference.lora_up(base, u, m, -0.75), magnitude, chain(rank))


@by_columns
def test_lora_gather_takes_columns(
    isa: str, n_cols: int, rng: np.random.Generator, guarded: Guard
) -> None:
    m, ids = guarded(random(rng, 5, n_cols)), guarded(rng.integers(0, n_cols, 11, np.int32))
    (u,) = compute(isa, lambda g: ops.lora_gather(g, given(m), ids, 11))
    assert_same_bits(u, m[:, ids].T)


# ---------------------------------------------------------------- loss


def loss_and_gradient(isa: str, logits: Array, targets: Array, weight: float) -> list[Array]:
    factor = np.array([weight], f32)
    return compute(isa, lambda g: ops.cross_entropy(g, planned(g, logits), targets, factor))


@pytest.mark.parametrize("n_vocab", [2, 7, 16, 17, 33, 130, 1009])
def test_cross_entropy_agrees_with_float64(
    isa: str, n_vocab: int, rng: np.random.Generator, guarded: Guard
) -> None:
    for n_tokens in (1, 5, 37):
        logits = guarded(3 * random(rng, n_tokens, n_vocab))
        targets = rng.integers(0, n_vocab, n_tokens, np.int32)
        targets[n_tokens // 2] = -1 if n_tokens > 1 else targets[0]
        loss, gradient = loss_and_gradient(isa, logits, guarded(targets), 0.25)
        expected, slope = reference.cross_entropy(logits, targets, 0.25)
        # e^(x - max): 4, and the difference's rounding, which the exponential multiplies.
        size = 1 + np.abs(logits).max()
        assert_close(loss, expected, size, 16)
        counted = (targets >= 0)[:, None]
        assert_close(gradient, slope, (abs(slope) + 0.25e-8 + 0.25 * (slope < 0)) * size, 16)
        assert (loss[~counted] == 0).all()
        assert (gradient[targets < 0] == 0).all()


def test_cross_entropy_covers_the_exponentials_range(isa: str) -> None:
    logits = np.concatenate([[0], np.linspace(-87, -1e-3, 20_000)]).astype(f32)[None]
    (_, gradient) = loss_and_gradient(isa, logits, np.zeros(1, np.int32), 1.0)
    _, expected = reference.cross_entropy(logits, np.zeros(1, np.int32), 1.0)
    # Where the floor 1e-9 does not hide it, e^x is within 2 units in the last place.
    assert_close(gradient[0, 1:], expected[0, 1:], expected[0, 1:], 10)


def test_cross_entropy_of_far_logits_is_the_floor(isa: str) -> None:
    logits = np.array([[0, -104, -1e4, -3e38, -np.inf] * 5], f32)
    logits[0, 5:] = -200
    loss, gradient = loss_and_gradient(isa, logits, np.array([3], np.int32), 1.0)
    assert_close(loss, [[-np.log(1e-9)]], 1, 40)
    assert_close(gradient[0, [1, 2, 4]], [1e-9] * 3, 1e-9, 4)


@pytest.mark.parametrize("bad", [np.nan, np.inf], ids=str)
def test_cross_entropy_of_an_invalid_logit_is_nan(
    isa: str, bad: float, rng: np.random.Generator
) -> None:
    for column in range(37):
        logits = random(rng, 3, 37)
        logits[1, column] = bad
        loss, gradient = loss_and_gradient(isa, logits, np.array([0, 1, 2], np.int32), 1.0)
        assert_same_bits(np.isnan(loss[:, 0]), np.array([False, True, False]))
        assert np.isnan(gradient[1]).any()
        assert np.isfinite(gradient[[0, 2]]).all()


def test_cross_entropy_refuses_logits_that_are_read_later(
    isa: str, rng: np.random.Generator
) -> None:
    graph = Graph(1, isa)
    logits = graph.keep(planned(graph, random(rng, 2, 5)))
    ops.cross_entropy(graph, logits, np.zeros(2, np.int32), np.ones(1, f32))
    with pytest.raises(ShapeError, match="works in place"):
        graph.plan()


# ---------------------------------------------------------------- in place, and within bounds

ROWS, COLS = 16, 7  # 112 floats are 7 times 64 bytes: no gap follows them in an arena
TABLES = reference.rope_tables(ROWS, 4)
POSITIONS = np.arange(ROWS, dtype=np.int32)
Op = Callable[[Graph, Tensor, Tensor], Tensor]

IN_PLACE: dict[str, Op] = {
    "rms_norm": lambda g, x, other: ops.rms_norm(g, x, other.view(0, 1), 1e-5),
    "rope": lambda g, x, other: ops.rope(g, x, POSITIONS, TABLES, 1),
    "silu_mul": lambda g, x, other: ops.silu_mul(g, x, other),
    "add": lambda g, x, other: ops.add(g, other, x),
    "lora_up": lambda g, x, other: ops.lora_up(g, x, given(U), given(M), 0.5),
}
OUT_OF_PLACE: dict[str, Op] = {
    "embed": lambda g, x, other: ops.embed(g, other, POSITIONS, ROWS),
    "linear": lambda g, x, other: ops.linear(g, x, other.view(0, COLS)),
    "lora_down": lambda g, x, other: ops.lora_down(g, x, other.view(0, COLS)),
    "lora_gather": lambda g, x, other: ops.lora_gather(g, given(M7), POSITIONS, ROWS),
    "attention": lambda g, x, other: ops.attention(g, x, other, other, 1, 1, 1, 0.5),
}
U = np.linspace(-1, 1, ROWS * 3, dtype=f32).reshape(ROWS, 3)
M = np.linspace(-2, 1, 3 * COLS, dtype=f32).reshape(3, COLS)
M7 = np.linspace(-2, 1, COLS * ROWS, dtype=f32).reshape(COLS, ROWS)


@pytest.mark.parametrize("name", IN_PLACE)
def test_an_op_in_place_gives_the_same_bits(isa: str, name: str, rng: np.random.Generator) -> None:
    x, other = random(rng, ROWS, COLS), random(rng, ROWS, COLS)

    def result(keep_input: bool) -> tuple[Array, int]:
        graph = Graph(1, isa)
        source = planned(graph, x)
        if keep_input:
            graph.keep(source)
        y = graph.keep(IN_PLACE[name](graph, source, given(other)))
        graph.run()
        return y.numpy().copy(), graph.arena_bytes

    apart, more = result(True)
    in_place, less = result(False)
    assert less <= more - ROWS * COLS * 4
    assert_same_bits(in_place, apart)


@pytest.mark.parametrize("name", [*IN_PLACE, *OUT_OF_PLACE])
def test_an_op_writes_nothing_behind_its_output(
    isa: str, name: str, rng: np.random.Generator
) -> None:
    x, other = random(rng, ROWS, COLS), random(rng, ROWS, COLS)
    graph = Graph(1, isa)
    source = graph.keep(planned(graph, x))  # kept: the output is a buffer of its own
    hole = planned(graph, other)
    behind = graph.keep(ops.add(graph, given(x), hole))
    y = graph.keep((IN_PLACE | OUT_OF_PLACE)[name](graph, source, given(other)))
    graph.run()
    assert y.shape == (ROWS, COLS)
    assert_same_bits(behind.numpy(), x + other)
    assert_same_bits(source.numpy(), x)


# ---------------------------------------------------------------- shapes that do not fit


def test_ops_refuse_shapes_that_do_not_fit(isa: str, rng: np.random.Generator) -> None:
    graph = Graph(1, isa)
    x = given(random(rng, 6, 8), "x")
    wrong = given(random(rng, 5, 7), "wrong")
    tables = reference.rope_tables(6, 6)
    refused: list[tuple[str, Callable[[], Any]]] = [
        ("wrong: rows of 7 meet activations of 8", lambda: ops.linear(graph, x, wrong)),
        ("wrong: rows of 7 meet activations of 8", lambda: ops.lora_down(graph, x, wrong)),
        ("wrong: rank 5 meets 8", lambda: ops.lora_up(graph, None, x, wrong, 1.0)),
        ("wrong: 7 weights for 8 columns", lambda: ops.rms_norm(graph, x, wrong, 1e-5)),
        ("8 columns are not 3 heads", lambda: ops.rope(graph, x, POSITIONS, tables, 3)),
        ("6 rotated dimensions in heads of 4", lambda: ops.rope(graph, x, POSITIONS, tables, 2)),
        ("gate of 8 columns meets 7", lambda: ops.silu_mul(graph, x, wrong)),
        ("sum of 6 x 8 and 5 x 7", lambda: ops.add(graph, x, wrong)),
        ("wrong: rows of 7 meet 8", lambda: ops.cache_store(graph, x, wrong, POSITIONS)),
        ("heads do not fit", lambda: ops.attention(graph, x, wrong, wrong, 1, 1, 1, 1.0)),
        ("do not divide", lambda: ops.attention(graph, x, x, x, 4, 1, 1, 1.0)),
    ]
    for message, build in refused:
        with pytest.raises(ShapeError, match=message):
            build()
    assert graph.nodes == []


def test_a_plan_refuses_too_few_token_ids(isa: str, rng: np.random.Generator) -> None:
    graph = Graph(1, isa)
    ops.embed(graph, given(random(rng, 4, 8)), np.zeros(2, np.int32), 3)
    with pytest.raises(ShapeError, match="3 integers expected, there are 2"):
        graph.plan()
