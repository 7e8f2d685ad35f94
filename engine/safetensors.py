"""The safetensors container: u64 length, that many bytes of JSON, the tensors' bytes.

The format is small enough to be read and written here, without the package of that name: the JSON
maps a tensor's name to its type, its shape (slowest size first) and the begin and end of its bytes,
which follow each other without gaps. Every number is compared with the file before it is used.
`read_entries` says where tensors lie, for a reader that streams a model which memory does not hold
and keeps the bits of bf16 (NumPy, and so the package's face for it, has no such type);
`read_safetensors` gives small files whole.

Source: https://github.com/huggingface/safetensors, its section "Format".
"""

from __future__ import annotations

import json
import mmap
import os
import struct
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from engine.errors import EngineError, FormatError
from engine.gguf_write import atomic_write

MAX_HEADER_BYTES = 100_000_000

_LENGTH = struct.Struct("<Q")
_TYPES: dict[str, np.dtype] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),  # the upper half of a float32
}
# Types without a decoder here, by the bytes of an element: tensors that are passed over.
_OTHER_SIZES = {
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
    "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "C64": 8,
}  # fmt: skip
_METADATA = "__metadata__"
_DAMAGED = "the file is damaged: copy it again"


def looks_like_safetensors(head: bytes, n_bytes: int) -> bool:
    """Tell whether a file of `n_bytes` that begins with `head` (9 bytes) may be of this form."""
    return len(head) >= 9 and head[8:9] == b"{" and _LENGTH.unpack(head[:8])[0] <= n_bytes - 8


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a tensor lies in its file.

    Attributes
    ----------
    name : str
    dtype : str
        As the format spells it: ``BF16``.
    shape : tuple of int
    offset, n_bytes : int
        Absolute, from the start of the file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    n_bytes: int


def read_entries(path: Path) -> dict[str, Entry]:
    """Read what a file holds, in the order of its bytes, and no tensor.

    Raises
    ------
    FormatError
        If the header contradicts itself or the file; names the file and the tensor.
    EngineError
        If the file cannot be opened.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            (n_header,) = _LENGTH.unpack(file.read(8).ljust(8, b"\0"))
            if not 0 < n_header <= min(size - 8, MAX_HEADER_BYTES):
                raise FormatError(
                    f"{path}: a header of {n_header} bytes does not fit a file of {size};"
                    f" {_DAMAGED}"
                )
            header = parse_json(file.read(n_header), f"{path}: header")
    except OSError as error:
        raise EngineError(f"{path}: cannot be read: {error.strerror or error}") from error
    header.pop(_METADATA, None)
    start, end = 8 + n_header, 8 + n_header
    entries = [_entry(path, start, name, entry) for name, entry in header.items()]
    entries.sort(key=lambda entry: entry.offset)
    for entry in entries:
        first, last = entry.offset, entry.offset + entry.n_bytes
        if first != end or last > size:
            raise FormatError(
                f"{path}: tensor {entry.name}: bytes {first - start} to {last - start}, expected"
                f" from {end - start} on and at most {size - start}; {_DAMAGED}"
            )
        end = last
    if end != size:
        raise FormatError(f"{path}: {size - end} bytes belong to no tensor; {_DAMAGED}")
    return {entry.name: entry for entry in entries}


def read_safetensors(path: Path) -> dict[str, NDArray[np.floating]]:
    """Read the tensors of a file, in the order of their bytes.

    Returns
    -------
    dict of str to ndarray
        F64, F32 and F16 as they are, views of the file's map; BF16 as float32.

    Raises
    ------
    FormatError
        Naming the file, the tensor and the reason.
    EngineError
        If the file cannot be opened.
    """
    entries = read_entries(path)
    content = np.frombuffer(_map_file(path), np.uint8)
    tensors: dict[str, NDArray[np.floating]] = {}
    for name, entry in entries.items():
        if entry.dtype not in _TYPES:
            known = ", ".join(_TYPES)
            raise FormatError(f"{path}: tensor {name}: has type {entry.dtype}, known are {known}")
        data = content[entry.offset : entry.offset + entry.n_bytes]
        tensors[name] = _decoded(data, entry.dtype).reshape(entry.shape)
    return tensors


def write_safetensors(
    path: Path, tensors: Sequence[tuple[str, NDArray[np.float32]]], metadata: Mapping[str, str]
) -> None:
    """Write tensors as F32, in the order given: beside the target, then renamed.

    Raises
    ------
    EngineError
        If the file cannot be written; the former file is whole then.
    """
    header: dict[str, Any] = {_METADATA: dict(metadata)}
    end = 0
    for name, tensor in tensors:
        begin, end = end, end + 4 * tensor.size
        header[name] = {"dtype": "F32", "shape": tensor.shape, "data_offsets": (begin, end)}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # so that the data can be mapped as numbers
    with atomic_write(path) as out:
        out.write(_LENGTH.pack(len(encoded)) + encoded)
        for _, tensor in tensors:
            out.write(np.ascontiguousarray(tensor, "<f4").data)


def parse_json(content: bytes, where: str) -> dict[str, Any]:
    """Parse a JSON object and nothing else: no name twice, no NaN.

    Parameters
    ----------
    content : bytes
    where : str
        Begins the message.

    Raises
    ------
    FormatError
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            (twice, _), *_ = Counter(name for name, _ in pairs).most_common(1)
            raise ValueError(f"{twice[:80]!r} is there twice")
        return found

    def no_constant(word: str) -> NoReturn:
        raise ValueError(f"{word} is no JSON")

    try:
        value = json.loads(content, object_pairs_hook=unique, parse_constant=no_constant)
    except (ValueError, RecursionError) as error:  # decoding errors are ValueErrors
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise FormatError(f"{where}: is not sound JSON: {reason}; {_DAMAGED}") from None
    if not isinstance(value, dict):
        raise FormatError(f"{where}: is no JSON object; {_DAMAGED}")
    return value


def _map_file(path: Path) -> mmap.mmap | bytes:
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            return mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) if size else b""
    except OSError as error:
        raise EngineError(f"{path}: cannot be read: {error.strerror or error}") from error


def _entry(path: Path, start: int, name: str, fields: Any) -> Entry:
    """Check one entry of the header by itself."""
    if not name.isprintable():
        raise FormatError(f"{path}: a tensor has the unprintable name {name[:80]!r}; {_DAMAGED}")
    fields = fields if isinstance(fields, dict) else {}
    dtype: Any = fields.get("dtype")
    shape: Any = fields.get("shape")
    place: Any = fields.get("data_offsets")
    if not (_are_sizes(shape) and _are_sizes(place) and len(place) == 2):
        raise FormatError(f"{path}: tensor {name}: its shape or its place is missing; {_DAMAGED}")
    item = (
        _TYPES[dtype].itemsize
        if isinstance(dtype, str) and dtype in _TYPES
        else _OTHER_SIZES.get(str(dtype), 0)
    )
    if not item:
        known = ", ".join(_TYPES)
        raise FormatError(f"{path}: tensor {name}: has type {str(dtype)[:20]}, known are {known}")
    n_bytes = prod(shape) * item
    if place[1] - place[0] != n_bytes or not n_bytes:
        raise FormatError(
            f"{path}: tensor {name}: {' × '.join(map(str, shape))} {dtype} needs {n_bytes} bytes,"
            f" it has {place[1] - place[0]}; {_DAMAGED}"
        )
    return Entry(name, dtype, tuple(shape), start + place[0], n_bytes)


def _are_sizes(value: Any) -> bool:
    """Tell whether `value` is a short list of sizes that a file can have."""
    return (
        isinstance(value, list)
        and len(value) <= 8
        and all(type(n) is int and 0 <= n < 2**63 for n in value)
    )


def _decoded(data: NDArray[np.uint8], dtype: str) -> NDArray[np.floating]:
    values = data.view(_TYPES[dtype])
    return (values.astype(np.uint32) << 16).view(np.float32) if dtype == "BF16" else values
