"""Kernels one by one, each checked against plain arithmetic on the very buffers that are timed.

Percent of peak is of float32 multiply-adds, or of reads from memory, measured in the same run by
the same variant.
"""

from __future__ import annotations

import numpy as np
import pytest

from bench.peaks import THREADS
from engine import kernels, ops
from engine.dtypes import BF16, F32, Q4_1, Q8_0, DType
from engine.graph import Graph
from engine.tensor import Tensor

RNG = np.random.default_rng(1)
PRODUCTS = [(512, 2048, 5632), (512, 576, 1536), (256, 576, 49152), (32, 2048, 5632)]
TYPES = [F32, BF16, Q8_0, Q4_1]


def weights(dtype: DType, rows: int, cols: int) -> np.ndarray:
    """Random stored rows: any codes, scales around 0.01."""
    if dtype is F32:
        return (0.05 * RNG.standard_normal((rows, cols), dtype=np.float32)).view(np.uint8)
    if dtype is BF16:
        return (RNG.standard_normal((rows, cols), dtype=np.float32).view(np.uint32) >> 16).astype(
            np.uint16
        )
    stored = RNG.integers(0, 256, (rows, cols // dtype.block, dtype.block_bytes), np.uint8)
    scales = np.full((rows, cols // dtype.block, 1), 0.01, np.float16).view(np.uint8)
    stored[..., :2] = scales
    if dtype is Q4_1:
        stored[..., 2:4] = scales
    return stored


def tensor(name: str, rows: int, cols: int) -> Tensor:
    return Tensor.external(name, RNG.standard_normal((rows, cols), dtype=np.float32), rows, cols)


def decoded(dtype: DType, stored: np.ndarray, rows: int, cols: int) -> np.ndarray:
    flat = np.ascontiguousarray(stored).reshape(-1).view(np.uint8)
    return kernels.decode(dtype.id, flat, rows * cols).reshape(rows, cols)


@pytest.mark.parametrize("dtype", TYPES, ids=lambda t: t.name)
@pytest.mark.parametrize("shape", PRODUCTS, ids=str)
def test_linear(report, isa, shape, dtype):
    tokens, k, n = shape
    stored = weights(dtype, n, k)
    x = tensor("x", tokens, k)
    graph = Graph(THREADS, isa)
    y = graph.keep(ops.linear(graph, x, Tensor.external("w", stored, n, k, dtype.id)))
    graph.run()
    expected = x.numpy() @ decoded(dtype, stored, n, k)[:64].T
    assert np.allclose(y.numpy()[:, :64], expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())
    report(graph.run, flops=2 * tokens * k * n)


@pytest.mark.parametrize("dtype", TYPES, ids=lambda t: t.name)
@pytest.mark.parametrize("shape", PRODUCTS[1:3], ids=str)
def test_linear_back(report, isa, shape, dtype):
    tokens, k, n = shape
    stored = weights(dtype, n, k)
    dy = tensor("dy", tokens, n)
    graph = Graph(THREADS, isa)
    w = Tensor.external("w", stored, n, k, dtype.id)
    dx = graph.keep(graph.add(ops.LinearBack, dy, w, None)[0])
    graph.run()
    expected = dy.numpy()[:8] @ decoded(dtype, stored, n, k)
    assert np.allclose(dx.numpy()[:8], expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())
    report(graph.run, flops=2 * tokens * k * n)


@pytest.mark.parametrize("dtype", TYPES, ids=lambda t: t.name)
def test_one_token(report, isa, dtype):
    """Weights larger than most last-level caches, read once."""
    k, n = 2048, 65536
    stored = weights(dtype, n, k)
    graph = Graph(THREADS, isa)
    graph.partner = True
    y = graph.keep(
        ops.linear(graph, tensor("x", 1, k), Tensor.external("w", stored, n, k, dtype.id))
    )
    graph.run()
    assert np.isfinite(y.numpy()).all()
    report(graph.run, n_bytes=stored.nbytes, flops=2 * k * n)


@pytest.mark.parametrize("n_query", [512, 2048])
def test_attention(report, isa, n_query):
    n_head, n_head_kv, dim = 9, 3, 64
    graph = Graph(THREADS, isa)
    q = tensor("q", n_query, n_head * dim)
    k, v = (tensor(name, n_query, n_head_kv * dim) for name in "kv")
    out = graph.keep(ops.attention(graph, q, k, v, 1, n_head, n_head_kv, dim**-0.5))
    graph.run()
    assert np.allclose(out.numpy()[0].reshape(n_head, dim)[0], v.numpy()[0, :dim], atol=1e-5)
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
