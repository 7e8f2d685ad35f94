"""Every stored value of a file, or scale of a block, looked at for what cannot be.

The reader (`engine.gguf`) has checked counts, types, sizes and places; here are the values.
Elements of F32, F16 and BF16 may be neither infinite nor NaN, nor may half-precision scales and
offsets of block types. The codes of a block can be any: all of their patterns mean something.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod

import numpy as np
from numpy.typing import NDArray

from engine.gguf import GGUFFile, TensorInfo
from engine.gguf_write import shown
from engine.kernels import decode, find_invalid

CHUNK_BYTES = 1 << 24  # between two reports of progress


@dataclass(frozen=True, slots=True)
class Fault:
    """The first value of a row that cannot be.

    Attributes
    ----------
    tensor : str
    row, element : int
        Element within the row; of a block type, the first of the block.
    what : str
    """

    tensor: str
    row: int
    element: int
    what: str

    def __str__(self) -> str:
        """Write the fault without the file's name."""
        return f"tensor {shown(self.tensor)}: {self.what} in row {self.row}, element {self.element}"


def find_faults(
    file: GGUFFile, progress: Callable[[int], None] = lambda _n_bytes: None
) -> Iterator[Fault]:
    """Look at every row of every tensor.

    Parameters
    ----------
    progress : callable
        Told of bytes that have been looked at, some megabytes at a time.

    Yields
    ------
    Fault
        One a row that has any, in the order of the file.
    """
    for info in file.tensors.values():
        row_bytes = info.dtype.row_bytes(_row(info))
        data = file.data(info.name)
        step = max(1, CHUNK_BYTES // row_bytes) * row_bytes
        for start in range(0, info.n_bytes, step):
            part = data[start : start + step]
            yield from _faults_of(info, part, start // row_bytes)
            progress(part.size)


def _row(info: TensorInfo) -> int:
    return info.shape[-1] if info.shape else 1


def n_rows(info: TensorInfo) -> int:
    """Rows of a tensor."""
    return prod(info.shape[:-1])


def _faults_of(info: TensorInfo, data: NDArray[np.uint8], first_row: int) -> Iterator[Fault]:
    dtype, n = info.dtype, _row(info)
    row_bytes = dtype.row_bytes(n)
    row, end = 0, data.size // row_bytes
    while row < end:
        left = data[row * row_bytes :]
        block = find_invalid(dtype.id, left, (end - row) * n)
        if block < 0:
            return
        bad_row, element = divmod(block * dtype.block, n)
        at = block * dtype.block_bytes
        what = _what(info, left[at : at + dtype.block_bytes])
        yield Fault(info.name, first_row + row + bad_row, element, what)
        row += bad_row + 1


def _what(info: TensorInfo, block: NDArray[np.uint8]) -> str:
    if info.dtype.block > 1:
        return "infinite or NaN block scale"
    return "NaN" if np.isnan(decode(info.dtype.id, block, 1)[0]) else "infinite value"
