"""The encoders that search for their scales, in plain NumPy: the K types, IQ4_NL and IQ4_XS.

A row of a matrix is a group (of 16 or 32 elements), so that a column is what a sum takes next. The
searches are those of llama.cpp's quantize of June 2024, without an importance matrix.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from tests.formats import IQ4_VALUES, Bytes, Codes, Floats, f32, first_largest, pack_nibbles

NOTHING = f32(1e-15)  # a group whose largest element is below is taken for zeros


def total(x: Floats) -> Floats:
    """Sum of each row, element after element in float32, as a column."""
    return np.add.accumulate(x, axis=1, dtype=f32)[:, -1:]


def nearest(x: Floats, low: int, high: int) -> Floats:
    """Nearest whole number, ties to even, within bounds."""
    return np.clip(np.rint(x), low, high).astype(f32)


def divided(a: Floats, b: Floats) -> Floats:
    """a / b, 0 where b is 0."""
    a, b = np.broadcast_arrays(a, b)
    return np.divide(a, b, out=np.zeros(a.shape, f32), where=b != 0)


def as_half(x: Floats) -> Floats:
    return x.astype(np.float16).astype(f32)


def bytes_of(halves: Floats) -> Bytes:
    return np.ascontiguousarray(halves).astype("<f2").view(np.uint8)


# ---------------------------------------------------------------- searches


def affine_search(
    x: Floats, w: Floats, top: int, first: float, n_steps: int, error: Callable[[Floats], Floats]
) -> tuple[Floats, Floats, Floats]:
    """Scale, minus the minimum, and codes 0 ... top: least weighted error of several fits."""
    low = np.minimum(x.min(axis=1, keepdims=True), f32(0))
    high = x.max(axis=1, keepdims=True)
    flat = high == low
    sum_w, sum_x = total(w), total(w * x)
    inverse = divided(f32(top), high - low)
    scale = divided(f32(1), inverse)
    codes = nearest(inverse * (x - low), 0, top)
    best = total(w * error(scale * codes + low - x))
    for step in range(n_steps + 1):
        inverse = divided(f32(first) + f32(0.1) * f32(step) + f32(top), high - low)
        c = nearest(inverse * (x - low), 0, top)
        sum_c, sum_cc, sum_cx = total(w * c), total(w * c * c), total(w * c * x)
        determinant = sum_w * sum_cc - sum_c * sum_c
        fit = divided(sum_w * sum_cx - sum_x * sum_c, determinant)
        base = divided(sum_cc * sum_x - sum_c * sum_cx, determinant)
        above = base > 0
        fit = np.where(above, divided(sum_cx, sum_cc), fit)
        base = np.where(above, f32(0), base)
        wrong = total(w * error(fit * c + base - x))
        better = (determinant > 0) & (wrong < best) & ~flat
        best = np.where(better, wrong, best)
        scale, low = np.where(better, fit, scale), np.where(better, base, low)
        codes = np.where(better, c, codes)
    return np.where(flat, f32(0), scale), -low, np.where(flat, f32(0), codes)


def symmetric_search(x: Floats, top: int) -> tuple[Floats, Floats]:
    """Scale and codes -top ... top - 1: the best of 19 roundings by the weighted cosine."""
    largest = first_largest(x)
    nothing = np.abs(largest) < NOTHING
    w = x * x
    scale, best = np.zeros_like(largest), np.zeros_like(largest)
    codes = np.full_like(x, -top)
    for step in (0, *range(-9, 0), *range(1, 10)):
        inverse = divided(-(f32(top) + f32(0.1) * f32(step)), largest)
        c = nearest(inverse * x, -top, top - 1)
        sum_cx, sum_cc = total(w * x * c), total(w * c * c)
        better = (sum_cc > 0) & (sum_cx * sum_cx > best * sum_cc) & ~nothing
        if step == 0:
            better = ~nothing
        fit = divided(sum_cx, sum_cc)
        scale = np.where(better, fit, scale)
        best = np.where(better, fit * sum_cx, best)
        codes = np.where(better, c, codes)
    return scale, codes


def descent(x: Floats, top: int) -> tuple[Floats, Floats]:
    """Scale and codes -top ... top - 1: single codes change while that helps, five times over."""
    largest = first_largest(x)
    nothing = np.abs(largest) < NOTHING
    w = x * x
    codes = nearest(divided(f32(-top), largest) * x, -top, top - 1)
    sum_cx, sum_cc = total(w * x * codes), total(w * codes * codes)
    for _ in range(5):  # a round that changes nothing is its own end
        for j in range(x.shape[1]):
            xj, wj, cj = x[:, j : j + 1], w[:, j : j + 1], codes[:, j : j + 1]
            cx, cc = sum_cx - wj * xj * cj, sum_cc - wj * cj * cj
            positive = cx > 0
            new = nearest(divided(xj * cc, np.where(positive, cx, f32(0))), -top, top - 1)
            cx, cc = cx + wj * xj * new, cc + wj * new * new
            better = positive & (new != cj) & (cc > 0)
            better &= cx * cx * sum_cc > sum_cx * sum_cx * cc
            codes[:, j : j + 1] = np.where(better, new, cj)
            sum_cx, sum_cc = np.where(better, cx, sum_cx), np.where(better, cc, sum_cc)
    codes[nothing[:, 0]] = -top
    return np.where(nothing, f32(0), divided(sum_cx, sum_cc)), codes


def table_codes(x: Floats) -> Codes:
    """Number of the nearest of IQ4's values, the upper one of two."""
    middles = (IQ4_VALUES[1:] + IQ4_VALUES[:-1]) / f32(2)
    return (x[:, :, None] >= middles.astype(f32)).sum(axis=2, dtype=np.int32)


def table_search(x: Floats) -> Floats:
    """Scale for IQ4's values: the best of 16 roundings by the weighted cosine."""
    largest = first_largest(x)
    nothing = np.abs(largest) < NOTHING
    w = x * x
    scale, best = np.zeros_like(largest), np.zeros_like(largest)
    lowest = f32(IQ4_VALUES[0])
    for attempt in (None, *range(-7, 8)):
        if attempt is None:
            inverse = divided(f32(1), divided(-largest, lowest))
        else:
            inverse = divided(f32(attempt) + lowest, largest)
        v = IQ4_VALUES[table_codes(inverse * x)].astype(f32)
        sum_vx, sum_vv = total(w * v * x), total(w * v * v)
        better = (sum_vv > 0) & (sum_vx * sum_vx > best * sum_vv)
        if attempt is None:
            better = np.ones_like(nothing)
        fit = divided(sum_vx, sum_vv)
        scale, best = np.where(better, fit, scale), np.where(better, fit * sum_vx, best)
    return np.where(nothing, f32(0), scale)


# ---------------------------------------------------------------- packing


def pack_planes(codes: Codes, bits: int) -> Bytes:
    """Codes of `bits` bits, 256 a row, as `planes` reads them."""
    spread = codes.reshape(len(codes), -1, 8 // bits, 32)
    shifts = np.arange(0, 8, bits)[:, None]
    return (spread << shifts).sum(axis=2).astype(np.uint8).reshape(len(codes), -1)


def pack_six_bit_pairs(scales: Codes, minima: Codes) -> Bytes:
    low = scales[:, :4] | (scales[:, 4:] >> 4) << 6
    mid = minima[:, :4] | (minima[:, 4:] >> 4) << 6
    high = (scales[:, 4:] & 15) | (minima[:, 4:] & 15) << 4
    return np.concatenate([low, mid, high], axis=1).astype(np.uint8)


def pack_six_bit_scales(scales: Codes) -> Bytes:
    low = (scales[:, :8] & 15) | (scales[:, 8:] & 15) << 4
    upper = ((scales >> 4).reshape(-1, 4, 4) << np.array([0, 2, 4, 6])[:, None]).sum(axis=1)
    return np.concatenate([low, upper], axis=1).astype(np.uint8)


# ---------------------------------------------------------------- the types


def small_scales(values: Floats, top: int) -> tuple[Floats, Codes]:
    """A block's scale (a half's value), and the groups' own as multiples of it, 0 ... top."""
    largest = np.maximum(values.max(axis=1, keepdims=True), f32(0))
    small = np.rint(divided(f32(top), largest) * values).astype(np.int32) & 255
    return as_half(largest / f32(top)), np.minimum(small, top)


def largest_scale(values: Floats) -> Floats:
    """The scale of largest magnitude with its sign; the first of several."""
    return first_largest(values)


def with_offsets(
    x: Floats, n_groups: int, top: int, small_top: int, search: tuple[Floats, Floats, Floats]
) -> tuple[Floats, Floats, Codes, Codes, Codes]:
    """Scales of blocks and groups, and the codes that the rounded scales ask for."""
    scales, minima, codes = (part.reshape(len(x), n_groups, -1) for part in search)
    d, small = small_scales(scales[:, :, 0], small_top)
    dmin, small_min = small_scales(minima[:, :, 0], small_top)
    step = (d * small.astype(f32))[:, :, None]
    base = (dmin * small_min.astype(f32))[:, :, None]
    groups = x.reshape(codes.shape)
    codes = np.where(step != 0, nearest(divided(groups + base, step), 0, top), codes)
    return d, dmin, small, small_min, codes.reshape(len(x), -1).astype(np.int32)


def without_offsets(x: Floats, codes: Floats, d: Floats, small: Codes, top: int) -> Codes:
    """Codes less their middle that the rounded scales ask for."""
    step = (d * small.astype(f32))[:, :, None]
    groups = x.reshape(len(x), small.shape[1], -1)
    old = codes.reshape(groups.shape)
    new = np.where(step != 0, nearest(divided(groups, step), -top, top - 1), old)
    return new.reshape(len(x), -1).astype(np.int32)


def encode_q2_k(x: Floats) -> list[Bytes]:
    groups = x.reshape(-1, 16)
    search = affine_search(groups, np.abs(groups), 3, -0.5, 15, np.abs)
    d, dmin, small, small_min, codes = with_offsets(x, 16, 3, 15, search)
    scales = (small | small_min << 4).astype(np.uint8)
    return [scales, pack_planes(codes, 2), bytes_of(d), bytes_of(dmin)]


def encode_four_or_five(x: Floats, top: int, first: float, n_steps: int) -> list[Bytes]:
    groups = x.reshape(-1, 32)
    w = np.sqrt(total(groups * groups) / f32(32)) + np.abs(groups)
    search = affine_search(groups, w, top, first, n_steps, np.square)
    d, dmin, small, small_min, codes = with_offsets(x, 8, top, 63, search)
    head = [bytes_of(d), bytes_of(dmin), pack_six_bit_pairs(small, small_min)]
    fifth = [pack_planes(codes >> 4, 1)] if top == 31 else []
    return [*head, *fifth, pack_planes(codes & 15, 4)]


def encode_q4_k(x: Floats) -> list[Bytes]:
    return encode_four_or_five(x, 15, -1, 20)


def encode_q5_k(x: Floats) -> list[Bytes]:
    return encode_four_or_five(x, 31, -0.5, 15)


def encode_q3_k(x: Floats) -> list[Bytes]:
    scales, codes = descent(x.reshape(-1, 16), 4)
    scales = scales.reshape(len(x), 16)
    inverse = divided(f32(-32), largest_scale(scales))
    small = nearest(inverse * scales, -32, 31).astype(np.int32)
    d = as_half(divided(f32(1), inverse))
    stored = small + 32
    stored[(inverse == 0)[:, 0]] = 0  # bytes of zeros mean -32 with d = 0
    codes = without_offsets(x, codes, d, small, 4) + 4
    return [
        pack_planes(codes >> 2, 1),
        pack_planes(codes & 3, 2),
        pack_six_bit_scales(stored),
        bytes_of(d),
    ]


def encode_q6_k(x: Floats) -> list[Bytes]:
    scales, codes = symmetric_search(x.reshape(-1, 16), 32)
    scales = scales.reshape(len(x), 16)
    largest = largest_scale(scales)
    empty = (np.abs(largest) < NOTHING)[:, 0]
    inverse = divided(f32(-128), largest)
    small = np.minimum(np.rint(inverse * scales), 127).astype(np.int32)
    d = as_half(divided(f32(1), inverse))
    codes = without_offsets(x, codes, d, small, 32) + 32
    low = (codes & 15).reshape(-1, 2, 2, 64)
    low = (low[:, :, 0] | low[:, :, 1] << 4).astype(np.uint8).reshape(-1, 128)
    fields = [low, pack_planes(codes >> 4, 2), small.astype(np.int8).view(np.uint8), bytes_of(d)]
    for field in fields:
        field[empty] = 0
    return fields


def encode_iq4_nl(x: Floats) -> list[Bytes]:
    scale = table_search(x)
    codes = table_codes(divided(f32(1), scale) * x)
    return [bytes_of(scale), pack_nibbles(codes)]


def encode_iq4_xs(x: Floats) -> list[Bytes]:
    scales = table_search(x.reshape(-1, 32)).reshape(-1, 8)
    d = -largest_scale(scales) / f32(32)  # the search of codes uses it before it is rounded
    small = nearest(divided(f32(1), d) * scales, -32, 31)
    inverse = divided(f32(1), d * small).reshape(-1, 1)
    codes = table_codes(inverse * x.reshape(-1, 32))
    stored = small.astype(np.int32) + 32
    low = (stored & 15).reshape(-1, 4, 2)
    high = ((stored >> 4) << np.arange(0, 16, 2)).sum(axis=1, keepdims=True)
    return [
        bytes_of(d),
        high.astype("<u2").view(np.uint8),
        (low[:, :, 0] | low[:, :, 1] << 4).astype(np.uint8),
        pack_nibbles(codes).reshape(-1, 128),
    ]


ENCODE_BLOCKS: dict[str, Callable[[NDArray[np.float32]], list[Bytes]]] = {
    "Q2_K": encode_q2_k,
    "Q3_K": encode_q3_k,
    "Q4_K": encode_q4_k,
    "Q5_K": encode_q5_k,
    "Q6_K": encode_q6_k,
    "IQ4_NL": encode_iq4_nl,
    "IQ4_XS": encode_iq4_xs,
}
