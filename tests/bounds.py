"""What the errors of an op are measured by: sums of the magnitudes of what it adds up."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.dtypes import BF16, DType
from tests import reference

Array = NDArray[Any]

BLOCK = 32  # activations that are rounded together


def rounding_error(dtype: DType, x: Array, w: Array, data: Array) -> Array:
    """Bound of what rounding activations to signed bytes can do to x W'.

    Each block of 32 becomes multiples of its largest / 127, so an element is off by half of that at
    most, and a little by the scale's own rounding to half precision; so is a block's sum.
    """
    blocks = np.abs(x).reshape(len(x), -1, BLOCK)
    step = np.repeat(blocks.max(axis=2) / 127, BLOCK, axis=1)
    error = (step / 2 + abs(x) * 2.0**-11 + 2.0**-25) @ np.abs(w).T
    if dtype in reference.OFFSET_TYPES:
        offsets = abs(reference.half(data.reshape(-1, dtype.block_bytes), 2)).reshape(len(w), -1)
        error += (blocks.sum(axis=2) * 2.0**-9) @ offsets.T
        error += np.abs(x).sum(axis=1, keepdims=True) * 2.0**-10 * np.abs(w).max()
    return error


def attention_size(
    q: Array, k: Array, v: Array, n_seq: int, heads: tuple[int, int], scale: float, n_past: int = 0
) -> Array:
    """Sensitivity of attention: an error of a score moves a probability by as much, relatively."""
    n_head, n_head_kv = heads
    mean = reference.attention(q, k, abs(v), n_seq, n_head, n_head_kv, scale, n_past)
    dim = q.shape[1] // n_head
    norm_q = np.sqrt((q.reshape(-1, dim) ** 2).sum(axis=1).max())
    norm_k = np.sqrt((k.astype(np.float64).reshape(-1, dim) ** 2).sum(axis=1).max())
    return mean * (1 + 2 * scale * norm_q * norm_k)


def attention_back_size(
    q: Array, k: Array, v: Array, dout: Array, n_seq: int, n_head: int, n_head_kv: int, scale: float
) -> tuple[Array, Array, Array]:
    """What is added up for dq, dk and dv, without its signs.

    A probability carries the error of its score, relatively, hence the factor.
    """
    group = n_head // n_head_kv
    queries = reference.head_rows(q, n_seq, n_head)
    d = reference.head_rows(abs(dout), n_seq, n_head)
    keys = reference.head_rows(k, n_seq, n_head_kv, group)
    values = reference.head_rows(abs(v), n_seq, n_head_kv, group)
    p, _ = reference.attention_weights(queries, keys, scale, 0)
    scores = scale * abs(queries) @ abs(keys).swapaxes(2, 3)
    p = p * (1 + 2 * scores.max())
    dp = d @ values.swapaxes(2, 3)
    ds = p * (dp + (p * dp).sum(axis=3, keepdims=True))
    dq, dk = scale * ds @ abs(keys), scale * ds.swapaxes(2, 3) @ abs(queries)
    rows = reference.token_rows
    return rows(dq), rows(dk, group), rows(p.swapaxes(2, 3) @ d, group)


def rounded_size(x: Array, w: Array) -> Array:
    """What is added up for x W' where activations are rounded: codes without signs, and offsets.

    Codes of a group reach over twice its largest weight, and the offset takes back what was added
    to them; a group may leave a part of its codes unused, hence 4. Groups lie within 256 columns.
    """
    rounded = np.abs(reference.round_activations(x)[0])
    n = w.shape[1]
    blocks = np.abs(w).reshape(len(w), -1, 256 if n % 256 == 0 else BLOCK)
    reach = np.repeat(blocks.max(axis=2), blocks.shape[2], axis=1)
    return reference.linear(rounded, abs(w) + 4 * reach)


def in_bf16(x: Array) -> NDArray[np.float64]:
    """Floats as pairs of bf16 hold them."""
    data = reference.encode(BF16, x)
    return reference.decode_row(BF16, data).astype(np.float64).reshape(x.shape)
