"""The encoders that search for their scales, in plain NumPy: the K types, IQ4_NL and IQ4_XS.

A row of a matrix is a group (of 16 or 32 elements), so that a column is what a sum takes next. The
searches are those of llama.cpp's quantize of June 2024, also with an importance matrix, where the
types of 32 elements search, too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from tests.formats import (
    IQ4_VALUES,
    Bytes,
    Codes,
    Floats,
    f32,
    first_largest,
    pack_fifth_bits,
    pack_nibbles,
)

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


class Attempts(NamedTuple):
    """How `affine_search` divides the range: by top + first + change * step."""

    first: float
    change: float
    n_steps: int
    error: Callable[[Floats], Floats] = np.square


IMPORTANT = Attempts(-0.9, 0.05, 36)


def affine_search(
    x: Floats, w: Floats, top: int, attempts: Attempts
) -> tuple[Floats, Floats, Floats]:
    """Scale, minus the minimum, and codes 0 ... top: least weighted error of several fits."""
    first, change, n_steps, error = attempts
    low = np.minimum(x.min(axis=1, keepdims=True), f32(0))
    high = x.max(axis=1, keepdims=True)
    with np.errstate(over="ignore"):
        flat = ~(divided(f32(top), high - low) > 0) | np.isinf(divided(f32(top), high - low))
    sum_w, sum_x = total(w), total(w * x)
    inverse = divided(f32(top), high - low)
    scale = divided(f32(1), inverse)
    codes = nearest(inverse * (x - low), 0, top)
    best = total(w * error(scale * codes + low - x))
    for step in range(n_steps + 1):
        inverse = divided(f32(first) + f32(change) * f32(step) + f32(top), high - low)
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


def symmetric_search(x: Floats, w: Floats, top: int) -> tuple[Floats, Floats]:
    """Scale and codes -top ... top - 1: the best of 19 roundings by the weighted cosine."""
    largest = first_largest(x)
    nothing = np.abs(largest) < NOTHING
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


def descent(x: Floats, w: Floats, top: int) -> tuple[Floats, Floats]:
    """Scale and codes -top ... top - 1: single codes change while that helps, five times over."""
    largest = first_largest(x)
    nothing = np.abs(largest) < NOTHING
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


def table_search(x: Floats, w: Floats) -> Floats:
    """Scale for IQ4's values: the best of 16 roundings by the weighted cosine."""
    largest = first_largest(x)
    nothing = np.abs(largest) < NOTHING
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


# ---------------------------------------------------------------- scales of a block's groups


def positive_multiples(values: Floats, top: int, w: Floats | None) -> tuple[Floats, Codes]:
    """A scale for each row of positive numbers, and their multiples of it, 0 ... top."""
    largest = np.maximum(values.max(axis=1, keepdims=True), f32(0))
    if w is None:
        codes = nearest(divided(f32(top), largest) * values, 0, top)
        return largest / f32(top), codes.astype(np.int32)
    inverse, best = np.zeros_like(largest), np.zeros_like(largest)
    for step in (0, *range(-4, 0), *range(1, 5)):
        tried = divided(f32(0.1) * f32(step) + f32(top), largest)
        codes = np.minimum(np.rint(tried * values), f32(top))
        difference = values - divided(f32(1), tried) * codes
        error = total(w * difference * difference)
        better = np.ones_like(largest, np.bool_) if step == 0 else error < best
        inverse, best = np.where(better, tried, inverse), np.where(better, error, best)
    codes = np.minimum(np.rint(inverse * values), f32(top))
    sum_cx, sum_cc = total(w * values * codes), total(w * codes * codes)
    for _ in range(5):
        for j in range(values.shape[1]):
            x, wj, c = values[:, j : j + 1], w[:, j : j + 1], codes[:, j : j + 1]
            cx, cc = sum_cx - wj * x * c, sum_cc - wj * c * c
            some = (cx > 0) & (cc > 0)
            new = np.minimum(np.rint(divided(x * cc, np.where(some, cx, f32(0)))), f32(top))
            cx, cc = cx + wj * x * new, cc + wj * new * new
            better = some & (new != c) & (cx * cx * sum_cc > sum_cx * sum_cx * cc)
            codes[:, j : j + 1] = np.where(better, new, c)
            sum_cx, sum_cc = np.where(better, cx, sum_cx), np.where(better, cc, sum_cc)
    return divided(sum_cx, sum_cc), codes.astype(np.int32)


def group_sums(w: Floats, group: int, n_blocks: int) -> Floats:
    return total(w.reshape(-1, group)).reshape(n_blocks, -1)


# ---------------------------------------------------------------- the types of 256 elements
# x: blocks x 256. w: weights of the same shape. important: they come from an importance matrix.


def with_minima(
    x: Floats, w: Floats, important: bool, group: int, top: int, small_top: int, plain: Attempts
) -> tuple[Floats, Floats, Codes, Codes, Codes]:
    """Scales of blocks and groups, and the codes that the rounded scales ask for."""
    search = affine_search(
        x.reshape(-1, group), w.reshape(-1, group), top, IMPORTANT if important else plain
    )
    scales, minima, codes = (part.reshape(len(x), 256 // group, -1) for part in search)
    sums = group_sums(w, group, len(x)) if important else None
    d, small = positive_multiples(scales[:, :, 0], small_top, sums)
    dmin, small_min = positive_multiples(minima[:, :, 0], small_top, sums)
    step = (as_half(d) * small.astype(f32))[:, :, None]
    base = (as_half(dmin) * small_min.astype(f32))[:, :, None]
    again = nearest(divided(x.reshape(codes.shape) + base, step), 0, top)
    codes = np.where(step != 0, again, codes)
    return d, dmin, small, small_min, codes.reshape(len(x), -1).astype(np.int32)


def without_minima(x: Floats, codes: Floats, d: Floats, small: Codes, top: int) -> Codes:
    """Codes less their middle that the rounded scales ask for."""
    step = (as_half(d) * small.astype(f32))[:, :, None]
    groups = x.reshape(len(x), small.shape[1], -1)
    new = nearest(divided(groups, step), -top, top - 1)
    return np.where(step != 0, new, codes.reshape(groups.shape)).reshape(x.shape).astype(np.int32)


def quantize_q2_k(x: Floats, w: Floats, important: bool) -> list[Bytes]:
    plain = Attempts(-0.5, 0.1, 15, np.abs)
    d, dmin, small, small_min, codes = with_minima(x, w, important, 16, 3, 15, plain)
    scales = (small | small_min << 4).astype(np.uint8)
    return [scales, pack_planes(codes, 2), bytes_of(d), bytes_of(dmin)]


def quantize_q4_k(x: Floats, w: Floats, important: bool) -> list[Bytes]:
    plain = Attempts(-1, 0.1, 20)
    d, dmin, small, small_min, codes = with_minima(x, w, important, 32, 15, 63, plain)
    scales = pack_six_bit_pairs(small, small_min)
    return [bytes_of(d), bytes_of(dmin), scales, pack_planes(codes, 4)]


def quantize_q5_k(x: Floats, w: Floats, important: bool) -> list[Bytes]:
    plain = Attempts(-0.5, 0.1, 15)
    d, dmin, small, small_min, codes = with_minima(x, w, important, 32, 31, 63, plain)
    scales = pack_six_bit_pairs(small, small_min)
    planes = [pack_planes(codes >> 4, 1), pack_planes(codes & 15, 4)]
    return [bytes_of(d), bytes_of(dmin), scales, *planes]


def quantize_q3_k(x: Floats, w: Floats, important: bool) -> list[Bytes]:
    search = symmetric_search if important else descent
    scales, codes = search(x.reshape(-1, 16), w.reshape(-1, 16), 4)
    scales = scales.reshape(len(x), 16)
    if important:
        d, multiples = symmetric_search(scales, group_sums(w, 16, len(x)), 32)
        small = multiples.astype(np.int32)
        stored = small + 32
    else:
        inverse = divided(f32(-32), first_largest(scales))
        small = nearest(inverse * scales, -32, 31).astype(np.int32)
        d = divided(f32(1), inverse)
        stored = np.where(inverse == 0, 0, small + 32)
    codes = without_minima(x, codes, d, small, 4) + 4
    planes = [pack_planes(codes >> 2, 1), pack_planes(codes & 3, 2)]
    return [*planes, pack_six_bit_scales(stored), bytes_of(d)]


def quantize_q6_k(x: Floats, w: Floats, important: bool) -> list[Bytes]:
    scales, codes = symmetric_search(x.reshape(-1, 16), w.reshape(-1, 16), 32)
    scales = scales.reshape(len(x), 16)
    largest = first_largest(scales)
    inverse = divided(f32(-128), largest)
    small = nearest(inverse * scales, -128, 127).astype(np.int32)
    d = divided(f32(1), inverse)
    codes = without_minima(x, codes, d, small, 32) + 32
    low = (codes & 15).reshape(-1, 2, 2, 64)
    low = (low[:, :, 0] | low[:, :, 1] << 4).astype(np.uint8).reshape(-1, 128)
    fields = [low, pack_planes(codes >> 4, 2), small.astype(np.int8).view(np.uint8), bytes_of(d)]
    for field in fields:
        field[(np.abs(largest) < NOTHING)[:, 0]] = 0
    return fields


def quantize_iq4_xs(x: Floats, w: Floats, important: bool) -> list[Bytes]:
    scales = table_search(x.reshape(-1, 32), w.reshape(-1, 32)).reshape(-1, 8)
    d = -first_largest(scales) / f32(32)  # codes are found with it as it is, not as a half
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


# ---------------------------------------------------------------- the types of 32 elements


def quantize_iq4_nl(x: Floats, w: Floats, important: bool) -> list[Bytes]:
    scale = table_search(x, w)
    codes = table_codes(divided(f32(1), scale) * x)
    return [bytes_of(scale), pack_nibbles(codes)]


def small_symmetric(x: Floats, w: Floats, top: int) -> list[Bytes]:
    scale, codes = symmetric_search(x, w, top)
    stored = codes.astype(np.int32) + top
    fifth = [pack_fifth_bits(stored)] if top == 16 else []
    return [bytes_of(scale), *fifth, pack_nibbles(stored)]


def small_affine(x: Floats, w: Floats, top: int) -> list[Bytes]:
    scale, minimum, codes = affine_search(x, w, top, IMPORTANT)
    stored = codes.astype(np.int32)
    fifth = [pack_fifth_bits(stored)] if top == 31 else []
    return [bytes_of(scale), bytes_of(-minimum), *fifth, pack_nibbles(stored)]


QUANTIZE_BLOCKS: dict[str, Callable[[Floats, Floats, bool], list[Bytes]]] = {
    "Q2_K": quantize_q2_k,
    "Q3_K": quantize_q3_k,
    "Q4_K": quantize_q4_k,
    "Q5_K": quantize_q5_k,
    "Q6_K": quantize_q6_k,
    "IQ4_NL": quantize_iq4_nl,
    "IQ4_XS": quantize_iq4_xs,
}
IMPORTANT_BLOCKS: dict[str, Callable[[Floats, Floats, bool], list[Bytes]]] = {
    **QUANTIZE_BLOCKS,
    "Q4_0": lambda x, w, _: small_symmetric(x, w, 8),
    "Q4_1": lambda x, w, _: small_affine(x, w, 15),
    "Q5_0": lambda x, w, _: small_symmetric(x, w, 16),
    "Q5_1": lambda x, w, _: small_affine(x, w, 31),
}


def plain_weights(name: str, x: Floats) -> Floats:
    """Weights of errors when nothing is known of the columns' importance."""
    if name == "Q2_K":
        return np.abs(x)
    if name in ("Q4_K", "Q5_K"):
        groups = x.reshape(-1, 32)
        return (np.sqrt(total(groups * groups) / f32(32)) + np.abs(groups)).reshape(x.shape)
    return x * x


def important_weights(name: str, rows: Floats, x: Floats, importance: Floats) -> Floats:
    """Importance times the root of x^2 and a mean square: the block's, or the row's."""
    q = np.tile(importance, len(rows)).reshape(x.shape)
    if name == "Q6_K":
        return q
    if name in ("Q4_0", "Q4_1", "Q5_0", "Q5_1"):
        spread = total(rows * rows) / f32(rows.shape[1])
        spread = np.repeat(spread, x.shape[0] // len(rows), axis=0)
    else:
        factor = 1 if name == "Q2_K" else 2
        spread = total(x * x) * f32(factor / x.shape[1])  # a power of two: exact
    return q * np.sqrt(spread + x * x)


def quantize(name: str, block: int, rows: Floats, importance: Floats | None) -> list[Bytes]:
    """Fields of the blocks of `rows` (n_rows x n)."""
    x = rows.reshape(-1, block)
    with np.errstate(all="ignore"):
        if importance is None:
            return QUANTIZE_BLOCKS[name](x, plain_weights(name, x), False)
        w = important_weights(name, rows, x, importance)
        return IMPORTANT_BLOCKS[name](x, w, True)
