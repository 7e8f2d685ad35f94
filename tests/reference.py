"""Every kernel once more, in plain NumPy, written to be read.

Ops compute in float64 whatever they are given; the formulas are in ``engine/simd/kernels.h``.
Stored types are in ``formats.py``: as they round in float32, bits can be compared.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from engine import dtypes
from engine.dtypes import DType
from tests.formats import Bytes, half, reciprocal
from tests.formats import decode_row as decode_row
from tests.formats import encode as encode
from tests.formats import encode as encode_row
from tests.formats import encode_bf16 as encode_bf16
from tests.formats import encode_f16 as encode_f16
from tests.formats import find_invalid as find_invalid
from tests.formats import plain_iq4_nl as plain_iq4_nl
from tests.formats import quantize_row as quantize_row
from tests.formats import scale_places as scale_places

Floats = NDArray[np.float64]

f32 = np.float32


def wide(x: ArrayLike) -> Floats:
    return np.asarray(x, np.float64)


# ---------------------------------------------------------------- the optimizer's pass


def sum_squares(x: ArrayLike) -> float:
    """Each square rounded to float32, their sum in float64."""
    x = np.asarray(x, f32)
    return float((x * x).astype(np.float64).sum())


def square_sums(x: ArrayLike, part: int) -> Floats:
    """Sums of squares of the parts of x, the last one shorter."""
    x = np.asarray(x, f32)
    return np.array([sum_squares(x[i : i + part]) for i in range(0, x.size, part)])


def adamw(
    x: ArrayLike,
    g: ArrayLike,
    m: ArrayLike,
    v: ArrayLike,
    *,
    clip: float,
    beta1: float,
    beta2: float,
    step: float,
    correction: float,
    decay: float,
) -> tuple[Floats, Floats, Floats]:
    """One step of AdamW (arXiv:1711.05101); returns the new x, m, v."""
    g = clip * wide(g)
    m = beta1 * wide(m) + (1 - beta1) * g
    v = beta2 * wide(v) + (1 - beta2) * g * g
    x = wide(x) * (1 - decay) - step * m / (np.sqrt(v * correction) + 1e-8)
    return x, m, v


# ---------------------------------------------------------------- embedding and matrix products


def embed(w: ArrayLike, ids: NDArray[np.int32]) -> Floats:
    return wide(w)[ids]


def linear(
    x: ArrayLike,
    w: ArrayLike,
    u: ArrayLike | None = None,
    b: ArrayLike | None = None,
    scale: float = 0.0,
) -> Floats:
    """x W' + scale u b."""
    y = wide(x) @ wide(w).T
    return y if u is None else y + scale * (wide(u) @ wide(b))


def pack(x: NDArray[np.float32], lanes: int, panel: int) -> NDArray[np.float32]:
    """Panels of so many tokens, the last as wide as whole vectors are: columns, then its tokens."""
    n_tokens, n_cols = x.shape
    wide_enough = np.zeros((-(-n_tokens // lanes) * lanes, n_cols), np.float32)
    wide_enough[:n_tokens] = x
    parts = range(0, len(wide_enough), panel)
    return np.concatenate([wide_enough[p : p + panel].T.reshape(-1) for p in parts])


def feed_forward(
    x: ArrayLike, gate: ArrayLike, up: ArrayLike, down: ArrayLike, base: ArrayLike
) -> Floats:
    return wide(base) + linear(silu_mul(linear(x, gate), linear(x, up)), down)


OFFSET_TYPES = (dtypes.Q4_1, dtypes.Q5_1)


def round_activations(x: ArrayLike) -> tuple[Floats, Floats]:
    """Rows in blocks of 32 signed bytes, and each block's sum as stored offsets meet it.

    Codes and sums come from the scale ``max |x| / 127``; scale and sums are then stored as halves.
    """
    x = np.asarray(x, f32)
    blocks = x.reshape(len(x), -1, 32)
    largest = np.abs(blocks).max(axis=2, keepdims=True)
    codes = np.rint(blocks * reciprocal(largest, 127))
    scale = largest / f32(127)
    sums = codes.sum(axis=2, keepdims=True) * scale
    rounded = wide(codes) * wide(scale.astype(np.float16))
    return rounded.reshape(x.shape), wide(sums.astype(np.float16))[:, :, 0]


def linear_rounded(x: ArrayLike, dtype: DType, data: Bytes, n_out: int) -> Floats:
    """x W' with activations rounded as the original's integer products do it."""
    rounded, sums = round_activations(x)
    if dtype not in OFFSET_TYPES:
        return linear(rounded, decode_row(dtype, data).reshape(n_out, -1))
    blocks = data.reshape(-1, dtype.block_bytes).copy()
    offsets = half(blocks, 2).reshape(n_out, -1)
    blocks[:, 2:4] = 0
    return linear(rounded, decode_row(dtype, blocks).reshape(n_out, -1)) + linear(sums, offsets)


def linear_back(dy: ArrayLike, w: ArrayLike) -> Floats:
    return wide(dy) @ wide(w)


# ---------------------------------------------------------------- norm, rotation, gate, sum, cache


def rms_norm(x: ArrayLike, w: ArrayLike, eps: float) -> Floats:
    x = wide(x)
    return wide(w) * x / np.sqrt((x * x).mean(axis=1, keepdims=True) + eps)


def rms_norm_back(x: ArrayLike, w: ArrayLike, eps: float, dy: ArrayLike) -> tuple[Floats, Floats]:
    """dx and dw."""
    x, dy = wide(x), wide(dy)
    r = 1 / np.sqrt((x * x).mean(axis=1, keepdims=True) + eps)
    wdy = wide(w) * dy
    dx = r * (wdy - x * r * r * (wdy * x).mean(axis=1, keepdims=True))
    return dx, (dy * x * r).sum(axis=0, keepdims=True)


def rope_tables(
    n_positions: int, n_rot: int, base: float = 10000.0
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Cosines and sines as the kernel wants them: doubled for pairs, the sines signed."""
    frequency = base ** (-np.arange(0, n_rot, 2) / n_rot)
    angle = np.repeat(np.arange(n_positions)[:, None] * frequency, 2, axis=1)
    signs = np.tile([-1.0, 1.0], n_rot // 2)
    return np.cos(angle).astype(f32), (np.sin(angle) * signs).astype(f32)


def rope(
    x: ArrayLike,
    positions: NDArray[np.int32],
    tables: tuple[ArrayLike, ArrayLike],
    n_head: int,
    sign: int = 1,
) -> Floats:
    """Turns pair (a, b) at angle t to (a cos t - b sin t, a sin t + b cos t)."""
    x = wide(x)
    cos, sin = wide(tables[0])[positions, None, :], wide(tables[1])[positions, None, :]
    n_rot = cos.shape[2]
    heads = x.reshape(len(x), n_head, -1)
    turned = heads[:, :, :n_rot]
    swapped = turned.reshape(len(x), n_head, -1, 2)[..., ::-1].reshape(turned.shape)
    y = heads.copy()
    y[:, :, :n_rot] = turned * cos + sign * swapped * sin
    return y.reshape(x.shape)


def logistic(x: ArrayLike) -> Floats:
    with np.errstate(over="ignore"):
        return 1 / (1 + np.exp(-wide(x)))


def silu_mul(g: ArrayLike, u: ArrayLike) -> Floats:
    return wide(g) * logistic(g) * wide(u)


def silu_mul_back(g: ArrayLike, u: ArrayLike, dy: ArrayLike) -> tuple[Floats, Floats]:
    """dg and du."""
    g, dy = wide(g), wide(dy)
    s = logistic(g)
    return dy * wide(u) * s * (1 + g * (1 - s)), dy * g * s


def add(a: ArrayLike, b: ArrayLike) -> Floats:
    return wide(a) + wide(b)


def zero(n_rows: int, n_cols: int) -> Floats:
    return np.zeros((n_rows, n_cols))


def cache_store(x: ArrayLike, dtype: DType, cache: Bytes, n_past: int) -> Bytes:
    """The cache's rows of bytes after rows x were appended behind row n_past."""
    after, rows = cache.copy(), np.asarray(x, f32)
    after[n_past : n_past + len(rows)] = encode_row(dtype, rows).reshape(len(rows), -1)
    return after


# ---------------------------------------------------------------- attention


def head_rows(x: ArrayLike, n_seq: int, n_head: int, group: int = 1) -> Floats:
    """Rows as (sequence, head, token, head_dim); each head repeated `group` times."""
    x = wide(x)
    heads = x.reshape(n_seq, len(x) // n_seq, n_head, -1).transpose(0, 2, 1, 3)
    return np.repeat(heads, group, axis=1)


def token_rows(x: Floats, group: int = 1) -> Floats:
    """Inverse of head_rows; heads of a group are summed."""
    n_seq, n_head, n_tokens, dim = x.shape
    grouped = x.reshape(n_seq, n_head // group, group, n_tokens, dim).sum(axis=2)
    return grouped.transpose(0, 2, 1, 3).reshape(n_seq * n_tokens, -1)


def attention_weights(
    q: Floats, k: Floats, scale: float, n_past: int, first_key: ArrayLike | None = None
) -> tuple[Floats, Floats]:
    """Probabilities over the visible keys, and the logarithm of their divisor."""
    scores = scale * q @ k.swapaxes(2, 3)
    n_query, n_key = scores.shape[2:]
    visible = np.arange(n_key) <= n_past + np.arange(n_query)[:, None]
    if first_key is not None:
        first = np.asarray(first_key).reshape(len(q), 1, n_query, 1)
        visible = visible & (np.arange(n_key) >= first)
    scores = np.where(visible, scores, -np.inf)
    top = scores.max(axis=3, keepdims=True)
    e = np.exp(scores - top)
    total = e.sum(axis=3, keepdims=True)
    return e / total, top + np.log(total)


def attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    n_seq: int,
    n_head: int,
    n_head_kv: int,
    scale: float,
    n_past: int = 0,
    first_key: ArrayLike | None = None,
) -> Floats:
    group = n_head // n_head_kv
    keys, values = head_rows(k, n_seq, n_head_kv, group), head_rows(v, n_seq, n_head_kv, group)
    p, _ = attention_weights(head_rows(q, n_seq, n_head), keys, scale, n_past, first_key)
    return token_rows(p @ values)


def attention_back(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    dout: ArrayLike,
    n_seq: int,
    n_head: int,
    n_head_kv: int,
    scale: float,
    first_key: ArrayLike | None = None,
) -> tuple[Floats, Floats, Floats]:
    """dq, dk and dv, the whole matrix of probabilities at hand."""
    group = n_head // n_head_kv
    queries, d = head_rows(q, n_seq, n_head), head_rows(dout, n_seq, n_head)
    keys, values = head_rows(k, n_seq, n_head_kv, group), head_rows(v, n_seq, n_head_kv, group)
    p, _ = attention_weights(queries, keys, scale, 0, first_key)
    dp = d @ values.swapaxes(2, 3)
    ds = p * (dp - (p * dp).sum(axis=3, keepdims=True))
    dq, dk, dv = scale * ds @ keys, scale * ds.swapaxes(2, 3) @ queries, p.swapaxes(2, 3) @ d
    return token_rows(dq), token_rows(dk, group), token_rows(dv, group)


# ---------------------------------------------------------------- adapters


def lora_down(x: ArrayLike, m: ArrayLike, scale: float = 1.0) -> Floats:
    return scale * (wide(x) @ wide(m).T)


def lora_up(base: ArrayLike | None, u: ArrayLike, m: ArrayLike, scale: float) -> Floats:
    y = scale * (wide(u) @ wide(m))
    return y if base is None else wide(base) + y


def lora_outer(g: ArrayLike, u: ArrayLike, x: ArrayLike, scale: float) -> Floats:
    return wide(g) + scale * (wide(u).T @ wide(x))


def lora_gather(m: ArrayLike, ids: NDArray[np.int32]) -> Floats:
    return wide(m)[:, ids].T


def lora_scatter(g: ArrayLike, ids: NDArray[np.int32], du: ArrayLike, scale: float = 1.0) -> Floats:
    after = wide(g).copy()
    np.add.at(after.T, ids, scale * wide(du))
    return after


# ---------------------------------------------------------------- loss


def cross_entropy(
    logits: ArrayLike, targets: NDArray[np.int32], weight: float, eps: float = 1e-9
) -> tuple[Floats, Floats]:
    """Loss of each row and the gradient of weight times their sum; target -1 leaves a row out.

    The gradient is that of the loss with eps = 0, to which eps is then added, so differences of the
    loss show it at eps = 0 only.
    """
    x = wide(logits)
    e = np.exp(x - x.max(axis=1, keepdims=True))
    p = e / e.sum(axis=1, keepdims=True)
    rows, counted = np.arange(len(x)), targets >= 0
    loss = -np.log((1 - eps) * p[rows, targets] + eps)
    gradient = (1 - eps) * p + eps
    gradient[rows, targets] -= 1
    return np.where(counted, loss, 0)[:, None], weight * np.where(counted[:, None], gradient, 0)


# ---------------------------------------------------------------- central differences


def central_differences(f: Callable[[Floats], float], x: ArrayLike, step: float = 1e-3) -> Floats:
    """Gradient of a float64 function at `x` from four points an element; the error is O(step^4)."""
    x = wide(x).copy()
    gradient = np.empty_like(x)
    for i in np.ndindex(x.shape):
        at, value = x[i], {}
        for k in (-2, -1, 1, 2):
            x[i] = at + k * step
            value[k] = f(x)
        x[i] = at
        gradient[i] = (8 * (value[1] - value[-1]) - (value[2] - value[-2])) / (12 * step)
    return gradient
