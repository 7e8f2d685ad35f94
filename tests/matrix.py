"""Every op on every stored type in every kernel variant: the largest error as a part of its bound.

`test_matrix.py` measures the cells and prints them. With ENGINE_KEEP_MATRIX set it also keeps them,
a file a variant in ``tests/data/matrix``, so columns of other machines stay as they were.
``python -m tests.matrix`` writes the tables of ``docs/types-matrix.md`` from these files.

Inputs are the same at each run, so that figures can be compared; random ones are in the ops' own
tests.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.report import grid
from engine import dtypes, kernels, ops
from engine.autograd import backward
from engine.dtypes import DType
from engine.graph import Graph
from engine.tensor import Tensor
from engine.training.optimizer import AdamW, AdamWParams
from tests import reference
from tests.bounds import attention_back_size, attention_size, in_bf16, rounded_size
from tests.compare import PAIR_EPS, chain, excess
from tests.graphs import (
    adapter_of,
    compute,
    f32,
    given,
    gradients,
    planned,
    random,
    stored,
    trained,
)

Array = NDArray[Any]
Rng = np.random.Generator
Cells = Mapping[str, Mapping[str, float]]  # by op, then by type

ROOT = Path(__file__).parents[1]
RECORDS = Path(__file__).parent / "data" / "matrix"
DOCUMENT = ROOT / "docs" / "types-matrix.md"
BEGIN = "<!-- matrix: begin, written by tests/matrix.py -->"
END = "<!-- matrix: end -->"

VARIANTS = ("avx2", "avx512", "avx512bf16", "amx")
TYPES = tuple(sorted(dtypes.BY_ID.values(), key=lambda t: t.block / t.block_bytes))
BLOCK_TYPES = tuple(t for t in TYPES if t.block > 1)
PAIR_TYPES = tuple(t for t in TYPES if t is not dtypes.F32)
CACHE_TYPES = tuple(t for t in TYPES if t in dtypes.CACHE_TYPES.values())
FLOAT = (dtypes.F32,)

RANK, SCALE = 5, 1.75


@dataclass(frozen=True)
class Case:
    """A row of cells.

    Attributes
    ----------
    name : str
        What is computed.
    kernels : tuple of str
        The kernels that compute it, by their names in kernels.def.
    types : tuple of DType
        Stored types that it can meet.
    measure : function of (variant, type, generator)
        The largest error as a part of its bound; where results are exact: 0, or infinity.
    exact : bool
        Whether every bit must be the reference's.
    pairs : bool
        Whether only variants with a bf16 product have it.
    """

    name: str
    kernels: tuple[str, ...]
    types: tuple[DType, ...]
    measure: Callable[[str, DType, Rng], float]
    exact: bool = False
    pairs: bool = False

    @property
    def of_floats(self) -> bool:
        """Whether no stored type enters."""
        return self.types is FLOAT

    def text(self, value: float) -> str:
        """Write a cell's value: a part of its bound in percent."""
        return ("exact" if value == 0 else "wrong") if self.exact else f"{100 * value:.2g} %"


def same(actual: Array, expected: Array) -> float:
    """0 if both hold the same bytes, else infinity."""
    a, b = np.ascontiguousarray(actual), np.ascontiguousarray(expected)
    alike = (a.dtype, a.shape) == (b.dtype, b.shape) and a.tobytes() == b.tobytes()
    return 0.0 if alike else float("inf")


def worst(*parts: float | Array) -> float:
    return max(float(np.max(part)) for part in parts)


# ---------------------------------------------------------------- stored weights


def shapes(dtype: DType) -> list[tuple[int, int]]:
    """(n_in, n_out): rows that end within a vector where the type allows it, and of one block."""
    if dtype.block == 1:
        return [(130, 53), (33, 7), (64, 1)]
    if dtype.block == 32:
        return [(544, 53), (32, 7)]
    return [(768, 53), (256, 7)]


@cache
def weights(dtype: DType, n_out: int, n_in: int) -> tuple[Array, Array]:
    """Stored bytes of a matrix, and what they mean."""
    data = reference.encode(dtype, random(np.random.default_rng([n_out, n_in]), n_out, n_in))
    return data, reference.decode_row(dtype, data).reshape(n_out, n_in)


def decode(isa: str, dtype: DType, rng: Rng) -> float:
    n = max(dtype.block, 7) * 11
    data = reference.encode(dtype, random(rng, n))
    return same(kernels.decode(dtype.id, data, n, isa), reference.decode_row(dtype, data))


def stored_at_once(dtype: DType, x: Array) -> Array:
    """Rows as a cache and a merge store them: IQ4_NL without its search."""
    return reference.plain_iq4_nl(x) if dtype is dtypes.IQ4_NL else reference.encode(dtype, x)


def encode(isa: str, dtype: DType, rng: Rng) -> float:
    x = random(rng, max(dtype.block, 7) * 11)
    return same(kernels.encode(dtype.id, x, isa), stored_at_once(dtype, x))


def quantize(isa: str, dtype: DType, rng: Rng) -> float:
    x = random(rng, 3, max(dtype.block, 32) * 5)
    have = kernels.quantize(dtype.id, x, None, isa)
    return same(have.reshape(-1), reference.quantize_row(dtype, x))


def embed(isa: str, dtype: DType, rng: Rng) -> float:
    parts = []
    for n_in, n_out in shapes(dtype):
        data, w = weights(dtype, n_out, n_in)
        ids = rng.integers(0, n_out, 21, np.int32)
        rows = stored(data, dtype, n_out, n_in)
        (y,) = compute(isa, lambda g, w=rows, i=ids: ops.embed(g, w, i, 21))
        parts.append(same(y, w[ids]))
    return worst(*parts)


def validate(isa: str, dtype: DType, rng: Rng) -> float:
    """The element or block whose number or scale is infinite is found, and none before."""
    n = 19 * dtype.block
    data = reference.encode(dtype, random(rng, n))
    value = f32([np.inf]) if dtype.block == 1 else np.float16([np.inf])
    bad = reference.encode(dtype, value) if dtype.block == 1 else value.view(np.uint8)
    place = 0 if dtype.block == 1 else reference.scale_places(dtype)[-1]
    found = [kernels.find_invalid(dtype.id, data, n, isa)]
    for at in (17, 0):
        begin = at * dtype.block_bytes + place
        data[begin : begin + bad.size] = bad
        found.append(kernels.find_invalid(dtype.id, data, n, isa))
    return 0.0 if found == [-1, 17, 0] else float("inf")


def product(n_tokens: int, *, partner: bool = False) -> Callable[[str, DType, Rng], float]:
    """x W' with activations as they are, or rounded as the original rounds them."""

    def measure(isa: str, dtype: DType, rng: Rng) -> float:
        parts = []
        for n_in, n_out in shapes(dtype):
            data, w = weights(dtype, n_out, n_in)
            x = random(rng, n_tokens, n_in)

            def build(graph: Graph, data: Array = data, x: Array = x, n_out: int = n_out) -> Tensor:
                graph.partner = partner
                return ops.linear(graph, given(x), stored(data, dtype, n_out, x.shape[1]))

            (y,) = compute(isa, build)
            if partner:
                expected, size = reference.linear_rounded(x, dtype, data, n_out), rounded_size(x, w)
            else:
                expected, size = reference.linear(x, w), reference.linear(abs(x), abs(w))
            parts.append(excess(y, expected, size, chain(n_in)))
        return worst(*(part.max() for part in parts))

    return measure


def adapted(n_tokens: int) -> Callable[[str, DType, Rng], float]:
    """x W' + scale x A' B."""

    def measure(isa: str, dtype: DType, rng: Rng) -> float:
        n_in, n_out = shapes(dtype)[0]
        data, w = weights(dtype, n_out, n_in)
        x, a, b = random(rng, n_tokens, n_in), random(rng, RANK, n_in), random(rng, RANK, n_out)
        held = stored(data, dtype, n_out, n_in)
        adapter = (given(a, "A"), given(b, "B"), SCALE)
        (y,) = compute(isa, lambda g: ops.linear(g, given(x), held, adapter))
        u, size_u = reference.lora_down(x, a), reference.lora_down(abs(x), abs(a))
        expected = reference.linear(x, w, u, b, SCALE)
        size = reference.linear(abs(x), abs(w), size_u, abs(b), SCALE)
        return worst(excess(y, expected, size, chain(n_in) + chain(RANK)))

    return measure


def fed(n_tokens: int) -> Callable[[str, DType, Rng], float]:
    """base + (silu(x G') (x U')) D' in one step."""

    def measure(isa: str, dtype: DType, rng: Rng) -> float:
        n = max(dtype.block, 96)  # all three are square, and one
        data, w = weights(dtype, n, n)
        held = stored(data, dtype, n, n)
        # No gate is shut, so every weight counts.
        x, base = f32(0.05) * random(rng, n_tokens, n), random(rng, n_tokens, n)
        (y,) = compute(isa, lambda g: ops.feed_forward(g, given(x), held, held, held, given(base)))
        # An error of gate or up is multiplied by the other; silu's slope is at most 1.1.
        terms, up = reference.linear(abs(x), abs(w)), reference.linear(x, w)
        gate = reference.silu_mul(up, np.ones_like(up))
        between = terms * (1.1 * abs(up) + abs(gate)) + abs(gate * up)
        size = abs(base) + reference.linear(between, abs(w))
        expected = reference.feed_forward(x, w, w, w, base)
        return worst(excess(y, expected, size, chain(n)))

    return measure


def gradient(n_tokens: int) -> Callable[[str, DType, Rng], float]:
    """dx += dy W."""

    def measure(isa: str, dtype: DType, rng: Rng) -> float:
        parts = []
        for n_in, n_out in shapes(dtype):
            data, w = weights(dtype, n_out, n_in)
            dy, before = random(rng, n_tokens, n_out), random(rng, n_tokens, n_in)
            grad = before.copy()
            graph = Graph(1, isa)
            x = Tensor.parameter("x", np.zeros_like(before), grad)
            y = ops.linear(graph, x, stored(data, dtype, n_out, n_in))
            backward(graph, list(graph.nodes), {y: given(dy)})
            graph.run()
            size = abs(before) + reference.linear_back(abs(dy), abs(w))
            expected = before + reference.linear_back(dy, w)
            parts.append(excess(grad, expected, size, chain(n_out)).max())
        return worst(*parts)

    return measure


def adapted_gradients(isa: str, dtype: DType, rng: Rng) -> float:
    """dx, dA and dB of an adapted product."""
    n_in, n_out = shapes(dtype)[0]
    n_tokens = 21
    data, w = weights(dtype, n_out, n_in)
    x, dy = random(rng, n_tokens, n_in), random(rng, n_tokens, n_out)
    a, b = random(rng, RANK, n_in), random(rng, RANK, n_out)
    graph = Graph(1, isa)
    source = planned(graph, x)
    first = len(graph.nodes)
    (pa, da), (pb, db) = trained(a, "A"), trained(b, "B")
    y = ops.linear(graph, source, stored(data, dtype, n_out, n_in), (pa, pb, SCALE))
    found = backward(graph, graph.nodes[first:], {y: given(dy)})
    graph.keep(found[source])
    graph.run()

    def exact(x: Array, a: Array, b: Array, w: Array, dy: Array) -> list[Array]:
        u, du = reference.lora_down(x, a), reference.lora_down(dy, b, SCALE)
        dx = reference.linear_back(dy, w) + reference.linear_back(du, a)
        zero_a, zero_b = np.zeros(a.shape), np.zeros(b.shape)
        da = reference.lora_outer(zero_a, du, x, 1.0)
        return [dx, da, reference.lora_outer(zero_b, u, dy, SCALE)]

    k = chain(n_in) + chain(n_out) + chain(n_tokens)
    expected, sizes = exact(x, a, b, w, dy), exact(*map(np.abs, (x, a, b, w, dy)))
    have = [found[source].numpy(), da, db]
    return worst(*(excess(*three, k) for three in zip(have, expected, sizes, strict=True)))


def paired(back: bool) -> Callable[[str, DType, Rng], float]:
    """Products in pairs of bf16, against operands that are rounded to it; forth or back."""

    def measure(isa: str, dtype: DType, rng: Rng) -> float:
        n_tokens, (n_in, n_out) = 65, shapes(dtype)[0]
        data, w = weights(dtype, n_out, n_in)
        x = random(rng, n_tokens, n_out if back else n_in)
        held = stored(data, dtype, n_out, n_in)

        def build(graph: Graph) -> Tensor:
            graph.pairs = True
            if back:
                made: Tensor = graph.add(ops.LinearBack, given(x), held, None, True)[0]
                return made
            return ops.linear(graph, given(x), held)

        (y,) = compute(isa, build)
        x, w = in_bf16(x), in_bf16(w)
        f = reference.linear_back if back else reference.linear
        size, length = f(abs(x), abs(w)), n_out if back else n_in
        return worst(excess(y, f(x, w), size, chain(length), PAIR_EPS))

    return measure


# ---------------------------------------------------------------- the cache


def cache_store(isa: str, dtype: DType, rng: Rng) -> float:
    n_cols = 96
    x, before = random(rng, 5, n_cols), rng.integers(0, 256, (9, dtype.row_bytes(n_cols)), np.uint8)
    cache = before.copy()
    graph = Graph(1, isa)
    target = Tensor.external("cache", cache, 9, n_cols, dtype.id, True)
    ops.cache_store(graph, given(x), target, np.array([2], np.int32))
    graph.run()
    want = before.copy()
    want[2:7] = stored_at_once(dtype, x).reshape(5, -1)
    return same(cache, want)


def cached_attention(n_query: int) -> Callable[[str, DType, Rng], float]:
    """Queries over keys and values of a stored type, some of them before the queries' own."""

    def measure(isa: str, dtype: DType, rng: Rng) -> float:
        n_head, n_head_kv, dim, n_past = 6, 2, 32, 70
        n_key = n_past + n_query
        q = random(rng, n_query, n_head * dim)
        data = [reference.encode(dtype, random(rng, n_key, n_head_kv * dim)) for _ in "kv"]
        k, v = (reference.decode_row(dtype, d).reshape(n_key, -1) for d in data)
        caches = [stored(d, dtype, n_key, n_head_kv * dim) for d in data]
        args = (1, n_head, n_head_kv, dim**-0.5)
        past = np.array([n_past], np.int32)
        (y,) = compute(isa, lambda g: ops.attention(g, given(q), *caches, *args, past))
        expected = reference.attention(q, k, v, *args, n_past)
        size = attention_size(q, k, v, 1, (n_head, n_head_kv), args[3], n_past)
        return worst(excess(y, expected, size, chain(dim + n_key)))

    return measure


# ---------------------------------------------------------------- ops that no stored type enters


def rms_norm(isa: str, _: DType, rng: Rng) -> float:
    x, w = random(rng, 5, 97), random(rng, 1, 97)
    (y,) = compute(isa, lambda g: ops.rms_norm(g, given(x), given(w), 1e-5))
    expected = reference.rms_norm(x, w, 1e-5)
    return worst(excess(y, expected, abs(expected), 8))


def rms_norm_back(isa: str, _: DType, rng: Rng) -> float:
    x, w, dy = random(rng, 5, 97), random(rng, 1, 97), random(rng, 5, 97)
    _, *found = gradients(isa, [x, w], lambda g, x, w: ops.rms_norm(g, x, w, 1e-5), dy)
    right = reference.rms_norm_back(x, w, 1e-5, dy)
    r = 1 / np.sqrt((x.astype(np.float64) ** 2).mean(axis=1, keepdims=True) + 1e-5)
    wdy = abs(w * dy)
    sizes = [
        r * (wdy + abs(x) * r * r * (wdy * abs(x)).mean(axis=1, keepdims=True)),
        (abs(dy * x) * r).sum(axis=0, keepdims=True),
    ]
    return worst(*(excess(*three, chain(97)) for three in zip(found, right, sizes, strict=True)))


def rope(isa: str, _: DType, rng: Rng) -> float:
    x, positions = random(rng, 7, 3 * 34), rng.integers(0, 50, 7, np.int32)
    cos, sin = reference.rope_tables(50, 18)
    (y,) = compute(isa, lambda g: ops.rope(g, given(x), positions, (cos, sin), 3))
    size = reference.rope(abs(x), positions, (abs(cos), abs(sin)), 3)
    return worst(excess(y, reference.rope(x, positions, (cos, sin), 3), size, 3))


def silu_mul(isa: str, _: DType, rng: Rng) -> float:
    g, u = 4 * random(rng, 3, 97), random(rng, 3, 97)
    (y,) = compute(isa, lambda graph: ops.silu_mul(graph, given(g), given(u)))
    expected = reference.silu_mul(g, u)
    return worst(excess(y, expected, abs(expected), 10))


def silu_mul_back(isa: str, _: DType, rng: Rng) -> float:
    g, u, dy = 4 * random(rng, 3, 97), random(rng, 3, 97), random(rng, 3, 97)
    _, *found = gradients(isa, [g, u], ops.silu_mul, dy)
    right = reference.silu_mul_back(g, u, dy)
    s = reference.logistic(g)
    sizes = [abs(dy * u) * s * (1 + abs(g) * (1 - s)), abs(right[1])]
    return worst(*(excess(*three, 16) for three in zip(found, right, sizes, strict=True)))


def add(isa: str, _: DType, rng: Rng) -> float:
    a, b = random(rng, 3, 97), random(rng, 3, 97)
    (y,) = compute(isa, lambda g: ops.add(g, given(a), given(b)))
    return same(y, a + b)


def zero(isa: str, _: DType, rng: Rng) -> float:
    (y,) = compute(isa, lambda g: ops.zero(g, "zero", 3, 97))
    return same(y, np.zeros((3, 97), f32))


HEADS, DIM = (9, 3), 33


def attention(isa: str, _: DType, rng: Rng) -> float:
    q, k, v = (random(rng, 2 * 65, n * DIM) for n in (HEADS[0], HEADS[1], HEADS[1]))
    args = (2, *HEADS, DIM**-0.5)
    (y,) = compute(isa, lambda g: ops.attention(g, given(q), given(k), given(v), *args))
    size = attention_size(q, k, v, 2, HEADS, args[3])
    return worst(excess(y, reference.attention(q, k, v, *args), size, chain(DIM + 65)))


def attention_back(isa: str, _: DType, rng: Rng) -> float:
    arrays = [random(rng, 2 * 65, n * DIM) for n in (HEADS[0], HEADS[1], HEADS[1])]
    dout = random(rng, 2 * 65, HEADS[0] * DIM)
    args = (2, *HEADS, DIM**-0.5)
    _, *found = gradients(isa, arrays, lambda g, *t: ops.attention(g, *t, *args), dout)
    right = reference.attention_back(*arrays, dout, *args)
    sizes = attention_back_size(*arrays, dout, *args)
    k = 2 * chain(DIM + 65)
    return worst(*(excess(*three, k) for three in zip(found, right, sizes, strict=True)))


def paired_attention(isa: str, _: DType, rng: Rng) -> float:
    """Operands are rounded to 8 bits, relatively; a score's error moves its probability as much."""
    q, k, v = (
        in_bf16(0.5 * random(rng, 2 * 65, n * 40)).astype(f32)
        for n in (HEADS[0], HEADS[1], HEADS[1])
    )
    dout = in_bf16(0.5 * random(rng, 2 * 65, HEADS[0] * 40)).astype(f32)
    args = (2, *HEADS, 40**-0.5)

    def attend(graph: Graph, *tensors: Tensor) -> Tensor:
        return ops.attention(graph, *tensors, *args, pairs=True)

    have = gradients(isa, [q, k, v], attend, dout)
    right = [reference.attention(q, k, v, *args), *reference.attention_back(q, k, v, dout, *args)]
    return worst(
        *(excess(a, b, abs(b).max(), 3, 2.0**-8) for a, b in zip(have, right, strict=True))
    )


def lora_down(isa: str, _: DType, rng: Rng) -> float:
    x, m = random(rng, 7, 97), random(rng, RANK, 97)
    (u,) = compute(isa, lambda g: ops.lora_down(g, given(x), given(m)))
    size = reference.lora_down(abs(x), abs(m))
    return worst(excess(u, reference.lora_down(x, m), size, chain(97)))


def lora_up(isa: str, _: DType, rng: Rng) -> float:
    u, m, base = random(rng, 7, RANK), random(rng, RANK, 97), random(rng, 7, 97)
    (y,) = compute(isa, lambda g: ops.lora_up(g, given(base), given(u), given(m), SCALE))
    size = reference.lora_up(abs(base), abs(u), abs(m), SCALE)
    return worst(excess(y, reference.lora_up(base, u, m, SCALE), size, chain(RANK)))


def lora_gather(isa: str, _: DType, rng: Rng) -> float:
    m, ids = random(rng, RANK, 97), rng.integers(0, 97, 11, np.int32)
    (u,) = compute(isa, lambda g: ops.lora_gather(g, given(m), ids, 11))
    return same(u, m[:, ids].T)


def embedding_adapter(isa: str, _: DType, rng: Rng) -> float:
    """dA and dB of rows gathered from B, the same row several times."""
    ids = np.array([2, 5, 2, 2, 0, 6, 5], np.int32)
    base, dy = random(rng, 7, 97), random(rng, 7, 97)
    a, b = random(rng, RANK, 97), random(rng, RANK, 8)
    graph = Graph(1, isa)
    (pa, da), (pb, db) = trained(a, "A"), trained(b, "B")
    y = ops.lora_up(graph, given(base), ops.lora_gather(graph, pb, ids, 7), pa, SCALE)
    backward(graph, list(graph.nodes), {y: given(dy)})
    graph.run()

    def exact(a: Array, b: Array, dy: Array) -> list[Array]:
        u, du = reference.lora_gather(b, ids), reference.lora_down(dy, a, SCALE)
        scattered = reference.lora_scatter(np.zeros(b.shape), ids, du)
        return [reference.lora_outer(np.zeros(a.shape), u, dy, SCALE), scattered]

    right, sizes = exact(a, b, dy), exact(abs(a), abs(b), abs(dy))
    k = 2 * chain(97 + 7)
    return worst(*(excess(*three, k) for three in zip([da, db], right, sizes, strict=True)))


def cross_entropy(isa: str, _: DType, rng: Rng) -> float:
    logits, targets = 3 * random(rng, 37, 1009), rng.integers(0, 1009, 37, np.int32)
    factor = np.array([0.25], f32)
    loss, slope = compute(isa, lambda g: ops.cross_entropy(g, planned(g, logits), targets, factor))
    expected, right = reference.cross_entropy(logits, targets, 0.25)
    size = 1 + np.abs(logits).max()
    slope_size = (abs(right) + 0.25e-8 + 0.25 * (right < 0)) * size
    return worst(excess(loss, expected, size, 16), excess(slope, right, slope_size, 16))


def square_sums(isa: str, _: DType, rng: Rng) -> float:
    """Sums of squares in float64, of a row and of a gradient in parts."""
    x, part = random(rng, 40_003), 1 << 14
    optimizer = AdamW(adapter_of(np.zeros_like(x), [(x.size, 0, 2)]), AdamWParams(), 1, isa)
    have = [kernels.sum_squares(x, isa), optimizer.norm(x) ** 2]
    right = [reference.sum_squares(x), reference.square_sums(x, part).sum()]
    return worst(excess(have, right, right, chain(x.size), 2.0**-53))


def adamw(isa: str, _: DType, rng: Rng) -> float:
    """A first step from zero moments; 1 - 0.999 in float32 is off by 500 roundings of v."""
    n, alpha = 77, 1e-2
    x, g = random(rng, n), random(rng, n)
    flat = x.copy()
    optimizer = AdamW(
        adapter_of(flat, [(33, n - 33, 5)]), AdamWParams(alpha=alpha, gclip=3.0), 1, isa
    )
    optimizer.step(g.copy(), 1.0, 1)
    right, m, v = reference.adamw(
        x,
        g,
        np.zeros(n),
        np.zeros(n),
        clip=min(1, 3.0 / np.sqrt(reference.sum_squares(g))),
        beta1=0.9,
        beta2=0.999,
        step=alpha / (1 - 0.9),
        correction=1 / (1 - 0.999),
        decay=0.1 * alpha,
    )
    return worst(
        excess(optimizer.m, m, abs(m), 16),
        excess(optimizer.v, v, abs(v), 600),
        excess(flat, right, abs(right) + 0.1, 600),
    )


# ---------------------------------------------------------------- the cells

TOKENS = {1: "1 token", 5: "5 tokens", 65: "65 tokens"}  # dots, dots of several, tiles
CASES = (
    Case("rows decoded", ("decode_row",), TYPES, decode, exact=True),
    Case("rows of an embedding", ("embed", "decode_row"), TYPES, embed, exact=True),
    Case("rows stored by `quantize`", ("quantize_row",), TYPES, quantize, exact=True),
    Case(
        "rows stored by a merge",
        ("encode_row", "encode_bf16", "encode_f16"),
        CACHE_TYPES,
        encode,
        exact=True,
    ),
    Case("rows checked by `validate`", ("find_invalid",), TYPES, validate, exact=True),
    *(Case(f"x W', {text}", ("linear", "pack"), TYPES, product(n)) for n, text in TOKENS.items()),
    *(
        Case(f"x W' with x in bytes, {text}", ("linear",), BLOCK_TYPES, product(n, partner=True))
        for n, text in TOKENS.items()
    ),
    *(
        Case(f"feed-forward in one step, {text}", ("feed_forward",), TYPES, fed(n))
        for n, text in TOKENS.items()
    ),
    Case("x W' in bf16 pairs, 65 tokens", ("linear",), PAIR_TYPES, paired(False), pairs=True),
    *(
        Case(f"x W' with an adapter, {text}", ("linear", "lora_down"), TYPES, adapted(n))
        for n, text in TOKENS.items()
    ),
    *(
        Case(f"gradient dy W, {text}", ("linear_back",), TYPES, gradient(n))
        for n, text in TOKENS.items()
    ),
    Case(
        "gradient dy W in bf16 pairs, 65 tokens",
        ("linear_back",),
        PAIR_TYPES,
        paired(True),
        pairs=True,
    ),
    Case(
        "gradients of x, A and B, 21 tokens",
        ("linear_back", "lora_up", "lora_outer"),
        TYPES,
        adapted_gradients,
    ),
    Case("keys and values stored", ("cache_store",), CACHE_TYPES, cache_store, exact=True),
    *(
        Case(f"attention to a cache, {text}", ("attention",), CACHE_TYPES, cached_attention(n))
        for n, text in {1: "1 query", 5: "5 queries", 40: "40 queries"}.items()
    ),
    Case("RMS norm", ("rms_norm",), FLOAT, rms_norm),
    Case("RMS norm, gradients", ("rms_norm_back",), FLOAT, rms_norm_back),
    Case("rotation", ("rope",), FLOAT, rope),
    Case("gate", ("silu_mul",), FLOAT, silu_mul),
    Case("gate, gradients", ("silu_mul_back",), FLOAT, silu_mul_back),
    Case("sum", ("add",), FLOAT, add, exact=True),
    Case("zeros", ("zero",), FLOAT, zero, exact=True),
    Case("attention", ("attention",), FLOAT, attention),
    Case("attention, gradients", ("attention_back",), FLOAT, attention_back),
    Case(
        "attention in bf16 pairs, with gradients",
        ("attention", "attention_back"),
        FLOAT,
        paired_attention,
        pairs=True,
    ),
    Case("adapter, x A'", ("lora_down",), FLOAT, lora_down),
    Case("adapter, y + u B", ("lora_up",), FLOAT, lora_up),
    Case("adapter of an embedding, rows", ("lora_gather",), FLOAT, lora_gather, exact=True),
    Case(
        "adapter of an embedding, gradients",
        ("lora_scatter", "lora_outer"),
        FLOAT,
        embedding_adapter,
    ),
    Case("loss and its gradient", ("cross_entropy",), FLOAT, cross_entropy),
    Case("sums of squares", ("sum_squares", "square_sums"), FLOAT, square_sums),
    Case("AdamW", ("adamw",), FLOAT, adamw),
)


def measured(case: Case, isa: str, dtype: DType) -> float:
    """Measure a cell, with the same inputs at each call."""
    seed = [*case.name.encode(), dtype.id]
    return case.measure(isa, dtype, np.random.default_rng(seed))


# ---------------------------------------------------------------- records and tables


@dataclass(frozen=True)
class Column:
    """The cells of a variant, and the processor that it ran on."""

    isa: str
    processor: str
    cells: Cells


def cells_of(values: Sequence[tuple[str, str, float]]) -> dict[str, dict[str, float]]:
    """Cells from (op, type, value), in the order of the cases."""
    by_name: dict[str, dict[str, float]] = {case.name: {} for case in CASES}
    for name, dtype, value in values:
        by_name[name][dtype] = value
    return {
        case.name: {
            t.name: by_name[case.name][t.name] for t in case.types if t.name in by_name[case.name]
        }
        for case in CASES
    }


def keep(column: Column, folder: Path = RECORDS) -> None:
    """Replace the record of a variant."""
    folder.mkdir(exist_ok=True)
    cells = {
        name: {dtype: float(f"{value:.3g}") for dtype, value in row.items()}
        for name, row in column.cells.items()
        if row
    }
    content = {"isa": column.isa, "processor": column.processor, "cells": cells}
    text = json.dumps(content, indent=1, ensure_ascii=False)
    (folder / f"{column.isa}.json").write_text(text + "\n", "utf-8")


def kept(folder: Path = RECORDS) -> dict[str, Column]:
    """Records by variant."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text("utf-8"))
        found[path.stem] = Column(content["isa"], content["processor"], content["cells"])
    return found


def cell(case: Case, dtype: DType, column: Column | None) -> str:
    """Text of a cell: its value, or why there is none."""
    if column is None:
        return "not run"
    value = column.cells.get(case.name, {}).get(dtype.name)
    return "" if value is None else case.text(value)


def tables(columns: Mapping[str, Column]) -> str:
    """Make a table for each op that meets stored types, and one for all others."""
    parts = []
    for case in CASES:
        if not case.of_floats:
            rows = [
                [t.name, *(cell(case, t, columns.get(isa)) for isa in VARIANTS)] for t in case.types
            ]
            parts.append(f"### {case.name}\n\n{grid([[' ', *VARIANTS], *rows])}")
    rows = [
        [case.name, *(cell(case, dtypes.F32, columns.get(isa)) for isa in VARIANTS)]
        for case in CASES
        if case.of_floats
    ]
    parts.append(f"### Ops that no stored type enters\n\n{grid([[' ', *VARIANTS], *rows])}")
    return "\n\n".join(parts)


def summary(columns: Mapping[str, Column]) -> str:
    """A line a variant: how many cells it has, and the largest error."""
    lines = []
    for isa in VARIANTS:
        if isa not in columns:
            lines.append(f"- `{isa}` has not been run yet.")
            continue
        every = [value for row in columns[isa].cells.values() for value in row.values()]
        lines.append(
            f"- `{isa}`, run on {columns[isa].processor}: {len(every)} cells, the largest error is "
            f"{100 * max(every):.2g} % of its bound."
        )
    return "\n".join(lines)


def document(text: str, columns: Mapping[str, Column]) -> str:
    """Replace what stands between the markers of the document."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the lines {BEGIN!r} and {END!r} are needed, in this order")
    return f"{before}{begin}\n{summary(columns)}\n\n{tables(columns)}\n{end}{after}"


def main() -> int:
    """Write the tables of the records."""
    try:
        DOCUMENT.write_text(document(DOCUMENT.read_text("utf-8"), kept()), "utf-8")
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
