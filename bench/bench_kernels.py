"""Kernels one by one, each checked against plain arithmetic on the very buffers that are timed.

Percent of peak is of the best vector unit and of matrix tiles where the variant has them, or of
reads from memory, measured in the same run by the same variant.
"""

from __future__ import annotations

import numpy as np
import pytest

from bench.peaks import READ_BYTES, THREADS
from bench.results import last_level_cache
from engine import kernels, ops
from engine.dtypes import BF16, F32, Q4_0, Q4_1, Q8_0, DType
from engine.graph import Graph
from engine.tensor import Tensor

RNG = np.random.default_rng(1)
PRODUCTS = [
    (512, 2048, 5632),
    (512, 576, 1536),
    (256, 576, 49152),
    (512, 5632, 2048),
    (32, 2048, 5632),
]
TYPES = [F32, BF16, Q8_0, Q4_1, Q4_0]
ROWS_DRAWN = 256  # random rows that the others repeat: drawing all would outlast the benchmark


def weights(dtype: DType, rows: int, cols: int) -> np.ndarray:
    """Random stored rows: any codes, scales around 0.01."""
    n = min(rows, ROWS_DRAWN)
    if dtype is F32:
        drawn = 0.05 * RNG.standard_normal((n, cols), dtype=np.float32)
    elif dtype is BF16:
        drawn = kernels.encode_bf16(RNG.standard_normal(n * cols, dtype=np.float32))
    else:
        drawn = RNG.integers(0, 256, (n, cols // dtype.block, dtype.block_bytes), np.uint8)
        scales = np.full((n, cols // dtype.block, 1), 0.01, np.float16).view(np.uint8)
        drawn[..., :2] = scales
        if dtype is Q4_1:
            drawn[..., 2:4] = scales
    drawn = drawn.reshape(n, -1).view(np.uint8)
    return np.resize(drawn, (rows, drawn.shape[1]))


def tensor(name: str, rows: int, cols: int) -> Tensor:
    return Tensor.external(name, RNG.standard_normal((rows, cols), dtype=np.float32), rows, cols)


def decoded(dtype: DType, stored: np.ndarray, rows: int, cols: int) -> np.ndarray:
    return kernels.decode(dtype.id, stored[:rows].reshape(-1), rows * cols).reshape(rows, cols)


def in_pairs(isa: str, dtype: DType) -> Graph:
    """A graph that multiplies as training does: float32 weights exactly, others as is fastest."""
    graph = Graph(THREADS, isa)
    graph.pairs = dtype is not F32 and kernels.prefers_pairs(isa)
    return graph


def assert_product(got: np.ndarray, x: np.ndarray, w: np.ndarray, graph: Graph) -> None:
    """Compare with x w: each product may be off by the rounding of its factors, or of the sum."""
    off = 2.0**-8 if graph.pairs else 1e-5
    assert (np.abs(got - x @ w) <= off * (np.abs(x) @ np.abs(w))).all()


@pytest.mark.parametrize("dtype", TYPES, ids=lambda t: t.name)
@pytest.mark.parametrize("shape", PRODUCTS, ids=str)
def test_linear(report, isa, shape, dtype):
    tokens, k, n = shape
    stored = weights(dtype, n, k)
    x = tensor("x", tokens, k)
    graph = in_pairs(isa, dtype)
    y = graph.keep(ops.linear(graph, x, Tensor.external("w", stored, n, k, dtype.id)))
    graph.run()
    assert_product(y.numpy()[:, :64], x.numpy(), decoded(dtype, stored, 64, k).T, graph)
    report(graph.run, flops=2 * tokens * k * n)


@pytest.mark.parametrize("dtype", TYPES, ids=lambda t: t.name)
@pytest.mark.parametrize("shape", PRODUCTS[1:3], ids=str)
def test_linear_back(report, isa, shape, dtype):
    tokens, k, n = shape
    stored = weights(dtype, n, k)
    dy = tensor("dy", tokens, n)
    graph = in_pairs(isa, dtype)
    w = Tensor.external("w", stored, n, k, dtype.id)
    dx = graph.keep(graph.add(ops.LinearBack, dy, w, None, graph.pairs)[0])
    graph.run()
    assert_product(dx.numpy()[:8], dy.numpy()[:8], decoded(dtype, stored, n, k), graph)
    report(graph.run, flops=2 * tokens * k * n)


@pytest.mark.parametrize("dtype", TYPES, ids=lambda t: t.name)
def test_one_token(report, isa, dtype):
    """Matrices in rotation, more than any cache holds, each read once a round."""
    k, n = 2048, 32768
    n_bytes = n * dtype.row_bytes(k)
    least = max(READ_BYTES * 5 // 8, last_level_cache() * 5 // 4)
    x = tensor("x", 1, k)
    graph = Graph(THREADS, isa)
    graph.partner = True
    for _ in range(-(-least // n_bytes)):
        stored = weights(dtype, n, k)
        y = graph.keep(ops.linear(graph, x, Tensor.external("w", stored, n, k, dtype.id)))
    graph.run()
    exact = decoded(dtype, stored, 64, k) @ x.numpy()[0]
    assert np.allclose(y.numpy()[0, :64], exact, atol=0.02 * np.linalg.norm(exact) / 8)
    report(graph.run, n_bytes=len(graph.nodes) * n_bytes)


@pytest.mark.parametrize("n_query", [512, 2048])
def test_attention(report, isa, n_query):
    n_head, n_head_kv, dim = 9, 3, 64
    graph = in_pairs(isa, BF16)
    q = tensor("q", n_query, n_head * dim)
    k, v = (tensor(name, n_query, n_head_kv * dim) for name in "kv")
    scale, pairs = dim**-0.5, graph.pairs
    out = graph.keep(ops.attention(graph, q, k, v, 1, n_head, n_head_kv, scale, pairs=pairs))
    graph.run()
    first, value = out.numpy()[0, :dim], v.numpy()[0, :dim]  # the first token sees itself alone
    assert np.allclose(first, value, rtol=2.0**-8 if pairs else 1e-5)
    report(graph.run, flops=2 * n_query * n_query * n_head * dim)


ROWS, COLUMNS = 512, 1536
PASSES = {
    "rms_norm": (lambda g, a, b: ops.rms_norm(g, a, tensor("w", 1, COLUMNS), 1e-5), 8),
    "silu_mul": (ops.silu_mul, 12),
    "add": (ops.add, 12),
    "lora_down": (lambda g, a, b: ops.lora_down(g, a, tensor("m", 4, COLUMNS)), 4),
}


@pytest.mark.parametrize("name", PASSES)
def test_rows(report, isa, name):
    """Passes over activations, from cache: bytes read and written."""
    make, bytes_each = PASSES[name]
    graph = Graph(THREADS, isa)
    make(graph, tensor("a", ROWS, COLUMNS), tensor("b", ROWS, COLUMNS))
    report(graph.run, n_bytes=bytes_each * ROWS * COLUMNS)


def test_cross_entropy(report, isa):
    n_tokens, n_vocab = 64, 49152
    graph = Graph(THREADS, isa)
    logits = ops.zero(graph, "logits", n_tokens, n_vocab)
    loss, _ = ops.cross_entropy(graph, logits, np.zeros(n_tokens, np.int32), np.ones(1, np.float32))
    graph.keep(loss)
    graph.run()
    assert np.allclose(loss.numpy(), np.log(n_vocab), atol=1e-4)
    report(graph.run, n_bytes=12 * n_tokens * n_vocab)
