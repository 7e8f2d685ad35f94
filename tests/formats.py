"""The stored types once more, in plain NumPy, written to be read.

Decoding and encoding round as the formats say: float32, once an operation, sums in the order of the
elements. So bits can be compared. The searches of the K types and IQ4 are in `formats_search`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from engine import dtypes
from engine.dtypes import DType

Floats = NDArray[np.float32]
Codes = NDArray[np.int32]
Bytes = NDArray[np.uint8]

f32 = np.float32


# ---------------------------------------------------------------- decoding


def decode_row(dtype: DType, data: Bytes) -> Floats:
    """All whole blocks of `data` as float32."""
    if dtype.block == 1:
        return DECODE_PLAIN[dtype.name](data)
    blocks = data.reshape(-1, dtype.block_bytes)
    return DECODE_BLOCKS[dtype.name](blocks).reshape(-1)


def decode_bf16(data: Bytes) -> Floats:
    return (data.view("<u2").astype(np.uint32) << 16).view(f32)


DECODE_PLAIN: dict[str, Callable[[Bytes], Floats]] = {
    "F32": lambda data: data.view("<f4").astype(f32),
    "F16": lambda data: data.view("<f2").astype(f32),
    "BF16": decode_bf16,
}


def half(blocks: Bytes, at: int) -> Floats:
    """The half-precision field at byte `at` of each block, as a column."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2").astype(f32)


def nibbles(blocks: Bytes, at: int) -> Codes:
    """32 four-bit codes a block: low nibbles of 16 bytes, then the high ones."""
    q = blocks[:, at : at + 16]
    return np.concatenate([q & 15, q >> 4], axis=1).astype(np.int32)


def fifth_bits(blocks: Bytes, at: int) -> Codes:
    """Bit e of the 32-bit word at byte `at` as 16 for element e."""
    word = np.ascontiguousarray(blocks[:, at : at + 4]).view("<u4")
    return (((word >> np.arange(32, dtype=np.uint32)) & 1) << 4).astype(np.int32)


def decode_q4_0(b: Bytes) -> Floats:
    return (nibbles(b, 2) - 8).astype(f32) * half(b, 0)


def decode_q4_1(b: Bytes) -> Floats:
    return nibbles(b, 4).astype(f32) * half(b, 0) + half(b, 2)


def decode_q5_0(b: Bytes) -> Floats:
    return (nibbles(b, 6) + fifth_bits(b, 2) - 16).astype(f32) * half(b, 0)


def decode_q5_1(b: Bytes) -> Floats:
    return (nibbles(b, 8) + fifth_bits(b, 4)).astype(f32) * half(b, 0) + half(b, 2)


def decode_q8_0(b: Bytes) -> Floats:
    return np.ascontiguousarray(b[:, 2:]).view(np.int8).astype(f32) * half(b, 0)


# The blocks of 256: codes (blocks x 256), scales and minima (blocks x groups), in place.


def planes(fields: Bytes, bits: int) -> Codes:
    """Codes of `bits` bits: 32 neighbours share 32 bytes with those 32, 64, ... elements on."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    spread = fields.reshape(len(fields), -1, 1, 32) >> shifts & ((1 << bits) - 1)
    return spread.reshape(len(fields), -1).astype(np.int32)


def one_bit(fields: Bytes) -> Codes:
    """Bit e / 32 of byte e % 32 for element e."""
    return planes(fields, 1)


def six_bit_pairs(s: Bytes) -> tuple[Codes, Codes]:
    """Eight scales and eight minima of 12 bytes."""
    low, mid, high = s[:, :4], s[:, 4:8], s[:, 8:]
    scales = np.concatenate([low & 63, (high & 15) | (low >> 6) << 4], axis=1)
    minima = np.concatenate([mid & 63, high >> 4 | (mid >> 6) << 4], axis=1)
    return scales.astype(np.int32), minima.astype(np.int32)


def six_bit_scales(s: Bytes) -> Codes:
    """Sixteen scales of 12 bytes, 0 ... 63."""
    low = np.concatenate([s[:, :8] & 15, s[:, :8] >> 4], axis=1)
    upper = (s[:, None, 8:] >> np.array([0, 2, 4, 6], np.uint8)[:, None]) & 3
    return (low | upper.reshape(-1, 16) << 4).astype(np.int32)


def scaled(codes: Codes, d: Floats, scales: Codes, dmin: Floats | None, minima: Codes) -> Floats:
    """(d scale) code - dmin min, a row of groups for each block."""
    n_groups = scales.shape[1]
    groups = codes.reshape(len(codes), n_groups, -1).astype(f32)
    y = groups * (d * scales.astype(f32))[:, :, None]
    return y if dmin is None else y - (dmin * minima.astype(f32))[:, :, None]


NONE = np.zeros((0, 0), np.int32)


def decode_q2_k(b: Bytes) -> Floats:
    s = b[:, :16].astype(np.int32)
    return scaled(planes(b[:, 16:80], 2), half(b, 80), s & 15, half(b, 82), s >> 4)


def decode_q3_k(b: Bytes) -> Floats:
    codes = planes(b[:, 32:96], 2) + 4 * one_bit(b[:, :32]) - 4
    return scaled(codes, half(b, 108), six_bit_scales(b[:, 96:108]) - 32, None, NONE)


def decode_q4_k(b: Bytes) -> Floats:
    scales, minima = six_bit_pairs(b[:, 4:16])
    return scaled(planes(b[:, 16:], 4), half(b, 0), scales, half(b, 2), minima)


def decode_q5_k(b: Bytes) -> Floats:
    scales, minima = six_bit_pairs(b[:, 4:16])
    codes = planes(b[:, 48:], 4) + 16 * one_bit(b[:, 16:48])
    return scaled(codes, half(b, 0), scales, half(b, 2), minima)


def decode_q6_k(b: Bytes) -> Floats:
    low = b[:, :128].reshape(-1, 2, 64)
    low = np.concatenate([low & 15, low >> 4], axis=2).reshape(-1, 256)
    codes = low + 16 * planes(b[:, 128:192], 2) - 32
    scales = np.ascontiguousarray(b[:, 192:208]).view(np.int8).astype(np.int32)
    return scaled(codes, half(b, 208), scales, None, NONE)


IQ4_VALUES = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.int32
)


def decode_iq4_nl(b: Bytes) -> Floats:
    return IQ4_VALUES[nibbles(b, 2)].astype(f32) * half(b, 0)


def decode_iq4_xs(b: Bytes) -> Floats:
    high = np.ascontiguousarray(b[:, 2:4]).view("<u2") >> np.arange(0, 16, 2, dtype=np.uint16)
    low = b[:, 4:8, None] >> np.array([0, 4], np.uint8) & 15
    scales = low.reshape(-1, 8) + 16 * (high & 3).astype(np.int32) - 32
    codes = np.concatenate([nibbles(b, 8 + 16 * g) for g in range(8)], axis=1)
    return scaled(IQ4_VALUES[codes], half(b, 0), scales, None, NONE)


DECODE_BLOCKS: dict[str, Callable[[Bytes], Floats]] = {
    "Q4_0": decode_q4_0,
    "Q4_1": decode_q4_1,
    "Q5_0": decode_q5_0,
    "Q5_1": decode_q5_1,
    "Q8_0": decode_q8_0,
    "Q2_K": decode_q2_k,
    "Q3_K": decode_q3_k,
    "Q4_K": decode_q4_k,
    "Q5_K": decode_q5_k,
    "Q6_K": decode_q6_k,
    "IQ4_NL": decode_iq4_nl,
    "IQ4_XS": decode_iq4_xs,
}


# ---------------------------------------------------------------- encoding


def encode_bf16(x: ArrayLike) -> NDArray[np.uint16]:
    """Nearest, ties to even; NaN made quiet, subnormals rounded like the rest."""
    bits = np.asarray(x, f32).view(np.uint32)
    nearest = (bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16
    is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
    return np.where(is_nan, (bits >> 16) | 0x40, nearest).astype(np.uint16)


def encode_f16(x: ArrayLike) -> NDArray[np.uint16]:
    """Nearest, ties to even, overflow to infinity."""
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray(x, f32).astype(np.float16).view(np.uint16)


def reciprocal(d: Floats, of: float = 1) -> Floats:
    """of / d; 0 where that is no number."""
    with np.errstate(over="ignore"):
        inverse = np.divide(f32(of), d, out=np.zeros_like(d), where=d != 0)
    return np.where(np.isfinite(inverse), inverse, f32(0))


def halves(d: Floats) -> Bytes:
    return d.astype("<f2").view(np.uint8)


def pack_nibbles(codes: Codes) -> Bytes:
    low = codes & 15
    return (low[:, :16] | low[:, 16:] << 4).astype(np.uint8)


def pack_fifth_bits(codes: Codes) -> Bytes:
    bits = ((codes >> 4) & 1).astype(np.uint32) << np.arange(32, dtype=np.uint32)
    return bits.sum(axis=1, dtype=np.uint32)[:, None].astype("<u4").view(np.uint8)


def first_largest(x: Floats) -> Floats:
    """The first element of each block whose magnitude is not exceeded later, with its sign."""
    return np.take_along_axis(x, np.abs(x).argmax(axis=1)[:, None], axis=1)


def symmetric(x: Floats, levels: int) -> tuple[Bytes, Codes]:
    """Scale and codes of the types whose middle code stands for zero."""
    d = first_largest(x) / f32(-levels)
    codes = (x * reciprocal(d) + f32(levels + 0.5)).astype(np.int32)
    return halves(d), np.minimum(codes, 2 * levels - 1)


def affine(x: Floats, top: int) -> tuple[Bytes, Bytes, Codes]:
    """Scale, offset and codes of the types that store their minimum."""
    low, high = x.min(axis=1, keepdims=True), x.max(axis=1, keepdims=True)
    d = (high - low) / f32(top)
    codes = ((x - low) * reciprocal(d) + f32(0.5)).astype(np.int32)
    return halves(d), halves(low), np.minimum(codes, top)


def encode_q8_0(x: Floats) -> list[Bytes]:
    d = np.abs(x).max(axis=1, keepdims=True) / f32(127)
    scaled = (x * reciprocal(d)).astype(np.float64)  # 0.5 less one bit plus 0.5 is 1 in float32
    codes = np.trunc(scaled + np.copysign(0.5, scaled)).astype(np.int8)
    return [halves(d), codes.view(np.uint8)]


def encode_q4_0(x: Floats) -> list[Bytes]:
    d, codes = symmetric(x, 8)
    return [d, pack_nibbles(codes)]


def encode_q4_1(x: Floats) -> list[Bytes]:
    d, m, codes = affine(x, 15)
    return [d, m, pack_nibbles(codes)]


def encode_q5_0(x: Floats) -> list[Bytes]:
    d, codes = symmetric(x, 16)
    return [d, pack_fifth_bits(codes), pack_nibbles(codes)]


def encode_q5_1(x: Floats) -> list[Bytes]:
    d, m, codes = affine(x, 31)
    return [d, m, pack_fifth_bits(codes), pack_nibbles(codes)]


ENCODE_BLOCKS: dict[str, Callable[[Floats], list[Bytes]]] = {
    "Q4_0": encode_q4_0,
    "Q4_1": encode_q4_1,
    "Q5_0": encode_q5_0,
    "Q5_1": encode_q5_1,
    "Q8_0": encode_q8_0,
}


def encode(dtype: DType, x: ArrayLike) -> Bytes:
    """`x` as stored bytes of `dtype`; its size is a whole number of blocks."""
    flat = np.ascontiguousarray(x, f32).reshape(-1)
    if dtype is dtypes.F32:
        return flat.astype("<f4").view(np.uint8)
    if dtype is dtypes.F16:
        return encode_f16(flat).view(np.uint8)
    if dtype is dtypes.BF16:
        return encode_bf16(flat).view(np.uint8)
    if dtype.name not in ENCODE_BLOCKS:
        return quantize_row(dtype, flat)
    fields = ENCODE_BLOCKS[dtype.name](flat.reshape(-1, dtype.block))
    return np.concatenate(fields, axis=1).reshape(-1)


def plain_iq4_nl(x: Floats) -> Bytes:
    """Nearest codes for the largest element's scale, then the scale of weighted least squares."""
    values = f32([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113])
    blocks = x.reshape(-1, 32)
    out = np.zeros((len(blocks), 18), np.uint8)
    for block, row in zip(blocks, out, strict=True):
        top = block[np.abs(block).argmax()]
        codes, d = np.full(32, 8), f32(0)
        if abs(top) >= f32(1e-15):
            scaled = block * (f32(1) / (top / f32(-127)))
            codes = 15 - np.abs(scaled[:, None] - values[::-1]).argmin(axis=1)
            product = square = f32(0)
            for v, q in zip(block, values[codes], strict=True):
                product += v * v * q * v
                square += v * v * q * q
            d = product / square
        row[:2] = f32([d]).astype("<f2").view(np.uint8)
        row[2:] = codes[:16] | codes[16:] << 4
    return out.reshape(-1)


def quantize_row(dtype: DType, x: ArrayLike, importance: Floats | None = None) -> Bytes:
    """`x` as the original's quantize stores it: scales are searched for K types and IQ4.

    With the importances of its columns they are for all types of blocks but Q8_0.
    """
    from tests import formats_search  # which needs the packing above

    simple = (
        formats_search.QUANTIZE_BLOCKS if importance is None else formats_search.IMPORTANT_BLOCKS
    )
    if dtype.name not in simple:
        return encode(dtype, x)
    rows = np.atleast_2d(np.ascontiguousarray(x, f32))
    fields = formats_search.quantize(dtype.name, dtype.block, rows, importance)
    return np.concatenate(fields, axis=1).reshape(-1)


def scale_places(dtype: DType) -> list[int]:
    """Where in a block its half-precision scale, and its offset or minimum, are."""
    places = {"Q4_1": [0, 2], "Q5_1": [0, 2], "Q2_K": [80, 82], "Q3_K": [108], "Q4_K": [0, 2]}
    places |= {"Q5_K": [0, 2], "Q6_K": [208]}
    return places.get(dtype.name, [0])


def find_invalid(dtype: DType, data: Bytes) -> int:
    """First element or block that is, or whose scale or offset is, infinite or NaN; -1 if none."""
    if dtype.block == 1:
        bad = ~np.isfinite(decode_row(dtype, data))
    else:
        blocks = data.reshape(-1, dtype.block_bytes)
        fields = [half(blocks, at) for at in scale_places(dtype)]
        bad = ~np.isfinite(np.concatenate(fields, axis=1)).all(axis=1)
    return int(bad.argmax()) if bad.any() else -1
