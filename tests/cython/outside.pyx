"""A module of somebody else: decodes stored rows and runs a graph through the engine's C face."""

from libc.stdint cimport int64_t

import numpy as np

from engine import ops
from engine cimport Graph, Tensor, decode_row, row_bytes

cdef enum:
    Q8_0 = 8  # GGUF's number


def decoded(const unsigned char[::1] row, int64_t n):
    """Decode n Q8_0 elements without the GIL: ndarray of shape (n,), float32."""
    cdef float[::1] out = np.empty(n, np.float32)
    if row_bytes(Q8_0, n) != row.shape[0]:
        raise ValueError(f"{n} elements do not fit {row.shape[0]} bytes")
    with nogil:
        decode_row(Q8_0, &row[0], n, &out[0])
    return np.asarray(out)


def product(const float[:, ::1] x, const unsigned char[:, ::1] w, int64_t n_in):
    """x W' for a stored Q8_0 matrix, read from the result tensor's own memory."""
    cdef int64_t i, n_tokens = x.shape[0], n_out = w.shape[0]
    cdef Graph graph = Graph(2)
    cdef Tensor a = Tensor.external("x", x, n_tokens, n_in)
    cdef Tensor b = Tensor.external("w", w, n_out, n_in, Q8_0)
    cdef Tensor y = graph.keep(ops.linear(graph, a, b))
    graph.run()
    cdef const float *values = y.floats()
    return np.array([values[i] for i in range(y.rows * y.cols)], np.float32).reshape(y.shape)
