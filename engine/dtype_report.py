"""What half precision would lose of a file's values, tensor by tensor, and of the type bf16 itself.

Of values with 16 bits only their patterns are counted, 65,536 at most; of all others each value is
rounded. Memory is bounded by a chunk, not by the tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import numpy as np
from numpy.typing import NDArray

from engine.dtypes import BF16, F16, F32
from engine.gguf import GGUFFile, TensorInfo
from engine.kernels import decode, encode_f16

CHUNK = 1 << 18  # elements: a chunk and what is made of it stay in the cache
_SMALLEST_NORMAL = np.float32(2.0**-14)


@dataclass(frozen=True, slots=True)
class Losses:
    """What rounding some values to f16 does.

    Attributes
    ----------
    n_values : int
    not_finite : int
        Infinities and NaN; counted nowhere else.
    inexact : int
        Finite values that f16 does not hold exactly, those below among them.
    overflow : int
        Finite values that become infinite.
    subnormal : int
        Values that become subnormal: exact ones, too.
    zero : int
        Values other than 0 that become 0.
    largest_error : float
        Largest relative error of a finite value that does not overflow; 1 where one becomes 0.
    """

    n_values: int = 0
    not_finite: int = 0
    inexact: int = 0
    overflow: int = 0
    subnormal: int = 0
    zero: int = 0
    largest_error: float = 0.0

    def __add__(self, other: Losses) -> Losses:
        """Count both together."""
        return Losses(
            self.n_values + other.n_values,
            self.not_finite + other.not_finite,
            self.inexact + other.inexact,
            self.overflow + other.overflow,
            self.subnormal + other.subnormal,
            self.zero + other.zero,
            max(self.largest_error, other.largest_error),
        )


def losses_of(values: NDArray[np.float32], counts: NDArray[np.int64] | None = None) -> Losses:
    """Round values to f16 and count.

    Parameters
    ----------
    values : ndarray of shape (n,), float32
    counts : ndarray of shape (n,), int64, optional
        How often each of them stands there; once when absent.
    """
    finite = np.isfinite(values)
    halves = encode_f16(values)
    rounded = decode(F16.id, halves.view(np.uint8), len(halves))
    wrong = finite & (rounded != values)
    overflow = wrong & np.isinf(rounded)
    small = (np.abs(rounded) < _SMALLEST_NORMAL) & (values != 0)

    def count(where: NDArray[np.bool_]) -> int:
        return int(where.sum() if counts is None else counts[where].sum())

    with np.errstate(all="ignore"):
        errors = np.abs((rounded - values) / values)  # the difference is exact
    kept = wrong & ~overflow if counts is None else wrong & ~overflow & (counts > 0)
    n = len(values) if counts is None else int(counts.sum())
    return Losses(
        n,
        n - count(finite),
        count(wrong),
        count(overflow),
        count(small & (rounded != 0)),
        count(small & (rounded == 0)),
        float(np.max(errors, where=kept, initial=0.0)),
    )


def bf16_losses() -> Losses:
    """Round every one of the 65,536 values of bf16."""
    return losses_of(_patterns(BF16.id))


def tensor_losses(
    file: GGUFFile, info: TensorInfo, progress: Callable[[int], None] = lambda _n: None
) -> Losses:
    """Round every value of a stored tensor.

    Parameters
    ----------
    progress : callable
        Told of bytes that have been looked at.
    """
    dtype, data, n = info.dtype, file.data(info.name), prod(info.shape)
    counts = np.zeros(65536, np.int64)
    losses = Losses()
    for first in range(0, n, CHUNK):
        count = min(CHUNK, n - first)
        start = dtype.row_bytes(first)
        part = data[start : start + dtype.row_bytes(count)]
        if dtype in (BF16, F16):
            counts += np.bincount(part.view("<u2"), minlength=65536)
        elif dtype is F32:
            losses += losses_of(part.view("<f4"))
        else:
            losses += losses_of(decode(dtype.id, part, count))
        progress(part.size)
    if dtype in (BF16, F16):
        losses = losses_of(_patterns(dtype.id), counts)
    return losses


def _patterns(type_id: int) -> NDArray[np.float32]:
    """Values of all 16-bit patterns."""
    return decode(type_id, np.arange(65536, dtype="<u2").view(np.uint8), 65536)
