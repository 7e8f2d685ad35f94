"""The ``.bin`` form: u32 magic, version, r, alpha; then records to the end of the file.

A record is u32 dimensions, name length and type, the sizes (fastest first), the name, zeros up to a
multiple of 32 bytes of the file, the numbers: one row of `rank` numbers for every input of A or
output of B. The header's r and alpha give the scale alpha / r of every tensor, whatever its rank.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.errors import FormatError
from engine.gguf import atomic_write

Rows = NDArray[np.floating]  # (n, rank), as files have it

BIN_MAGIC = b"algg"  # the number 0x67676c61, little-endian

_VERSION = 1
_ALIGNMENT = 32
_TYPES: dict[int, np.dtype] = {0: np.dtype("<f4"), 1: np.dtype("<f2")}
_MAX_NAME_BYTES = 255
_MAX_SIZE = 2**31 - 1


class BinContent(NamedTuple):
    """What a ``.bin`` file holds: of each tensor A as (n_in, rank) and B as (n_out, rank)."""

    r: int
    alpha: int
    tensors: dict[str, tuple[Rows, Rows]]


def bin_refusals(alpha: float) -> list[str]:
    """Say what of an adapter the header cannot hold."""
    if 0 <= alpha < 2**32 and alpha == int(alpha):
        return []
    return [
        f"alpha {alpha} is not a whole number, as the .bin form needs; give a whole --lora-alpha"
    ]


def write_bin(path: Path | str, r: int, alpha: float, tensors: Iterable[tuple[str, Rows]]) -> None:
    """Write a ``.bin`` file beside `path`, then rename.

    Parameters
    ----------
    path : path of the file
    r, alpha : int, float
        Of the header.
    tensors : iterable of (name, ndarray of shape (n, rank), float32)
        Names with their suffix.

    Raises
    ------
    FormatError
        If alpha is no whole number, which the header cannot hold.
    """
    for problem in bin_refusals(alpha):
        raise FormatError(f"{path}: {problem}")
    with atomic_write(path) as out:
        position = out.write(BIN_MAGIC + struct.pack("<3I", _VERSION, r, int(alpha)))
        for name, rows in tensors:
            position += out.write(_record_head(name, rows, position))
            position += out.write(np.ascontiguousarray(rows, "<f4").data)


def read_bin(content: bytes, source: str) -> BinContent:
    """Read the content of a ``.bin`` file, tensors in its order.

    Raises
    ------
    FormatError
        Naming the file, the tensor and the reason.
    """
    version, r, alpha = _unpack("<3I", content, 4, source, "the header")
    if version != _VERSION:
        raise FormatError(f"{source}: adapter version {version} is unknown, expected 1")
    if r == 0 or r > _MAX_SIZE:
        raise FormatError(f"{source}: r is {r}, expected a rank from 1 to {_MAX_SIZE}")
    records = {}
    position = 16
    while position < len(content):
        record, position = _record(content, position, source)
        if record.name in records:
            raise FormatError(f"{source}: tensor {record.name} is there twice")
        records[record.name] = record
    return BinContent(r, alpha, _paired(records, source))


@dataclass(slots=True)
class _Record:
    """One tensor of a ``.bin`` file; `rows` is (n, rank), in the file's type."""

    name: str
    rows: Rows


def _record_head(name: str, rows: Rows, position: int) -> bytes:
    """Sizes, name and padding of a tensor that begins at `position` of the file."""
    n, rank = rows.shape
    sizes = (rank, n) if n > 1 else (rank,)
    encoded = name.encode()
    head = struct.pack(f"<3I{len(sizes)}I", len(sizes), len(encoded), 0, *sizes) + encoded
    return head + bytes(-(position + len(head)) % _ALIGNMENT)


def _record(content: bytes, position: int, source: str) -> tuple[_Record, int]:
    """Read the record at `position`; returns it and where the next one begins."""
    where = f"the tensor at byte {position}"
    n_dims, n_name, type_id = _unpack("<3I", content, position, source, where)
    if n_dims not in (1, 2):
        raise FormatError(f"{source}: {where} has {n_dims} dimensions, expected 1 or 2")
    if not 1 <= n_name <= _MAX_NAME_BYTES:
        raise FormatError(f"{source}: {where} has a name of {n_name} bytes")
    sizes = _unpack(f"<{n_dims}I", content, position + 12, source, where)
    begin = position + 12 + 4 * n_dims
    (encoded,) = _unpack(f"{n_name}s", content, begin, source, where)
    try:
        name = encoded.decode()
    except UnicodeDecodeError as error:
        raise FormatError(f"{source}: {where} has a name that is not UTF-8: {encoded!r}") from error
    if not name.isprintable():
        raise FormatError(f"{source}: {where} has an unprintable name: {name!r}")
    if type_id not in _TYPES:
        raise FormatError(
            f"{source}: tensor {name} has type {type_id}, expected 0 (F32) or 1 (F16)"
        )
    if not all(1 <= size <= _MAX_SIZE for size in sizes):
        shape = " × ".join(map(str, sizes))
        raise FormatError(f"{source}: tensor {name} has an impossible size {shape}")
    rank, n = sizes if n_dims == 2 else (sizes[0], 1)
    dtype = _TYPES[type_id]
    begin += n_name
    begin += -begin % _ALIGNMENT
    end = begin + rank * n * dtype.itemsize
    if end > len(content):
        raise FormatError(
            f"{source}: tensor {name} ends at byte {end}, the file after {len(content)};"
            " it is cut off"
        )
    rows = np.frombuffer(content, dtype, rank * n, begin).reshape(n, rank)
    return _Record(name, rows), end


def _paired(records: dict[str, _Record], source: str) -> dict[str, tuple[Rows, Rows]]:
    """Join the records ``NAME.weight.loraA`` and ``.loraB`` of each tensor."""
    found: dict[str, tuple[Rows, Rows]] = {}
    for full_name in records:
        name, _, suffix = full_name.rpartition(".weight.")
        if not name or suffix not in ("loraA", "loraB"):
            raise FormatError(
                f"{source}: tensor {full_name}: expected a name that ends in"
                " .weight.loraA or .weight.loraB"
            )
        a, b = (records.get(f"{name}.weight.{half}") for half in ("loraA", "loraB"))
        if a is None or b is None:
            missing = "loraA" if a is None else "loraB"
            raise FormatError(f"{source}: tensor {name}.weight.{missing} is missing")
        found[name] = (a.rows, b.rows)
    return found


def _unpack(layout: str, content: bytes, position: int, source: str, what: str) -> tuple[Any, ...]:
    """Unpack `layout` at `position`, or say that the file ends within `what`."""
    if position + struct.calcsize(layout) > len(content):
        raise FormatError(
            f"{source}: the file ends after {len(content)} bytes, within {what}; it is cut off"
        )
    return struct.unpack_from(layout, content, position)
