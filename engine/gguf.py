"""GGUF files: versions 1 to 3 read through a map of the file, version 3 written.

A file is never trusted: each length, count, offset and product is compared with what the file can
hold before it is used, and nothing is allocated because of a number that the file merely claims.
Whatever is wrong ends in one line, `PATH: key or tensor: what is wrong; mend`.

Layout: magic, version, counts of tensors and keys, the keys, a table of tensors, zeros up to the
alignment, the tensors' bytes. Sizes are stored fastest first; a shape here is NumPy's, the reverse.
"""

from __future__ import annotations

import mmap
import os
import stat
import struct
from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

import numpy as np

from engine.dtypes import BY_ID, REMOVED, UNSUPPORTED, DType
from engine.errors import EngineError, FormatError
from engine.gguf_write import (
    BYTE,
    DEFAULT_ALIGNMENT,
    I64,
    MAGIC,
    MAX_DIMS,
    MAX_KEY_BYTES,
    MAX_TENSOR_NAME_BYTES,
    NUMBERS,
    U32,
    U64,
    VERSION,
    KeyType,
    ValueType,
    align,
    atomic_write,
    is_power_of_two,
    shown,
    times,
    type_name,
    write_gguf,
)

__all__ = [
    "GGUFFile",
    "KeyType",
    "Scalar",
    "TensorInfo",
    "ValueType",
    "atomic_write",
    "read_gguf",
    "write_gguf",
]

_CUT_OFF = "the file is cut off or damaged: download or copy it again"
_DAMAGED = "the file is damaged: download or convert it again"
_REQUIRED: Any = object()

Scalar = int | float | bool | str

# The type of an added key, and how a message calls it.
_OVERRIDES: dict[type, tuple[ValueType, str]] = {
    int: (ValueType.I64, "an integer"),
    float: (ValueType.F64, "a float"),
    bool: (ValueType.BOOL, "a bool"),
    str: (ValueType.STRING, "a string"),
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies in its file.

    Attributes
    ----------
    name : str
    shape : tuple of int
        NumPy order, slowest first: (n_out, n_in) for a matrix with rows of n_in elements.
    dtype : DType
    offset : int
        Absolute, in bytes from the start of the file.
    n_bytes : int
    """

    name: str
    shape: tuple[int, ...]
    dtype: DType
    offset: int
    n_bytes: int


class GGUFFile:
    """A GGUF file that was read and found sound; its tensors stay in the file's map.

    Attributes
    ----------
    path : Path
    version : int
        1, 2 or 3.
    alignment : int
        Tensor data starts at multiples of this many bytes.
    metadata : Mapping of str to value
        In file order. Strings are str, numbers and bools Python's, arrays of numbers and bools
        NumPy arrays, arrays of strings lists of bytes (token texts need not be UTF-8).
    value_types : Mapping of str to ValueType or (ValueType.ARRAY, element's ValueType)
        With `metadata`, what `write_gguf` takes.
    tensors : dict of str to TensorInfo
        In file order.
    """

    def __init__(
        self,
        path: Path,
        version: int,
        alignment: int,
        metadata: Mapping[str, Any],
        value_types: Mapping[str, KeyType],
        tensors: dict[str, TensorInfo],
        buffer: mmap.mmap | bytes,
    ) -> None:
        self.path = path
        self.version = version
        self.alignment = alignment
        self.metadata = metadata
        self.value_types = value_types
        self.tensors = tensors
        self._bytes: np.ndarray | None = np.frombuffer(buffer, np.uint8)
        self._bytes.setflags(write=False)

    def __enter__(self) -> GGUFFile:
        """Return the file itself; leaving the block closes it."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Close."""
        self.close()

    def lock(self) -> str:
        """Keep the whole file in memory, as far as the system lets the process.

        Returns
        -------
        str
            Why it could not be done; empty when it was.
        """
        import ctypes

        if self._bytes is None:
            raise ValueError(f"{self.path} is closed")
        libc = ctypes.CDLL(None, use_errno=True)
        start, n_bytes = ctypes.c_void_p(self._bytes.ctypes.data), ctypes.c_size_t(self._bytes.size)
        return os.strerror(ctypes.get_errno()) if libc.mlock(start, n_bytes) else ""

    def close(self) -> None:
        """Give the map up; it goes away with the last array that `data` handed out."""
        self._bytes = None

    @property
    def kind(self) -> str:
        """What the file holds: ``model``, ``adapter`` or ``checkpoint``."""
        if "training.type" in self.metadata:
            return "checkpoint"
        return "adapter" if self.get_str("general.type", "model") == "adapter" else "model"

    @property
    def header(self) -> np.ndarray:
        """Bytes before the first tensor's, in the file's map: ndarray of uint8, read-only."""
        if self._bytes is None:
            raise ValueError(f"{self.path} is closed")
        end = min((info.offset for info in self.tensors.values()), default=len(self._bytes))
        return self._bytes[:end]

    def data(self, name: str) -> np.ndarray:
        """Bytes of a tensor, in the file's map.

        Returns
        -------
        ndarray of shape (n_bytes,), uint8, read-only
            Keeps the map alive, also after `close`.

        Raises
        ------
        FormatError
            If the file has no such tensor.
        """
        if self._bytes is None:
            raise ValueError(f"{self.path} is closed")
        info = self.tensors.get(name)
        if info is None:
            raise FormatError(f"{self.path}: tensor {name}: is missing; give a complete file")
        return self._bytes[info.offset : info.offset + info.n_bytes]

    def overridden(self, values: Mapping[str, Scalar]) -> GGUFFile:
        """Give the same file with other metadata; the file itself stays as it is.

        Parameters
        ----------
        values : mapping of str to int, float, bool or str
            A key that the file has must hold that type there (of any width); one that it does not
            have is added.

        Raises
        ------
        FormatError
            If the file's key has another type.
        """
        if not values:
            return self
        file = copy(self)
        types = dict(self.value_types)
        for key, value in values.items():
            had, stored, described = types.get(key), *_OVERRIDES[type(value)]
            if had is not None and type(self.metadata[key]) is not type(value):
                raise FormatError(
                    f"{self.path}: key {key}: has type {type_name(had)}, which {described} cannot "
                    "override; give the other type"
                )
            types[key] = stored if had is None else had
        file.metadata = MappingProxyType({**self.metadata, **values})
        file.value_types = MappingProxyType(types)
        return file

    def get_int(self, key: str, default: int = _REQUIRED) -> int:
        """Return the integer (of any width) at `key`, or `default`; FormatError without either."""
        return self._get(key, default, int, "an integer")

    def get_float(self, key: str, default: float = _REQUIRED) -> float:
        """Return the F32 or F64 at `key`, or `default`; FormatError without either."""
        return self._get(key, default, float, "a float")

    def get_str(self, key: str, default: str = _REQUIRED) -> str:
        """Return the string at `key`, or `default`; FormatError without either."""
        return self._get(key, default, str, "a string")

    def get_bool(self, key: str, default: bool = _REQUIRED) -> bool:
        """Return the bool at `key`, or `default`; FormatError without either."""
        return self._get(key, default, bool, "a bool")

    def _get(self, key: str, default: Any, wanted: type, described: str) -> Any:
        if key not in self.metadata:
            if default is _REQUIRED:
                raise FormatError(f"{self.path}: key {key}: is missing; convert the model again")
            return default
        value = self.metadata[key]
        if type(value) is not wanted:  # a bool is an int to isinstance
            raise FormatError(
                f"{self.path}: key {key}: has type {type_name(self.value_types[key])}, "
                f"{described} is expected; convert the model again"
            )
        return value


def read_gguf(path: str | os.PathLike[str], *, mapped: bool = True) -> GGUFFile:
    """Map a GGUF file and check everything in it but the values of the tensors.

    Parameters
    ----------
    path : path of the file
    mapped : bool
        Else the whole file is read into memory.

    Raises
    ------
    FormatError
        If the file is not sound; names the file, the key or tensor, and what is wrong.
    EngineError
        If the file cannot be opened.
    """
    path = Path(path)
    cursor = _Cursor(path, _map_file(path, mapped))
    version = _read_version(cursor)
    n_tensors, n_keys = _read_counts(cursor)
    metadata, value_types = _read_keys(cursor, n_keys)
    alignment = _find_alignment(cursor, metadata, value_types)
    _refuse_split(cursor, metadata)
    tensors = _place(cursor, _read_infos(cursor, n_tensors), alignment)
    return GGUFFile(
        path,
        version,
        alignment,
        MappingProxyType(metadata),
        MappingProxyType(value_types),
        tensors,
        cursor.buffer,
    )


def _map_file(path: Path, mapped: bool) -> mmap.mmap | bytes:
    """Map or read a regular file; the size is asked for once, of the open descriptor."""
    try:
        # Asked before opening: opening a pipe would wait for its writer.
        if not stat.S_ISREG(path.stat().st_mode):
            raise FormatError(f"{path}: is not a regular file; give a GGUF file")
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if not size:
                return b""
            if mapped:
                return mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
            return _read_whole(file, size)
    except OSError as error:
        reason = error.strerror or error
        raise EngineError(f"{path}: cannot be read: {reason}; check the name") from error
    except ValueError as error:
        raise FormatError(f"{path}: cannot be mapped: {error}; check the name") from error


def _read_whole(file: BinaryIO, size: int) -> mmap.mmap:
    """Read a file into pages of its own, in pieces that the system takes at once."""
    pages = mmap.mmap(-1, size)
    view, place = memoryview(pages), 0
    while place < size:
        n = file.readinto(view[place : place + (64 << 20)])  # type: ignore[attr-defined]
        if not n:
            raise ValueError("it has become shorter meanwhile")
        place += n
    return pages


class _Cursor:
    """A place in the mapped file; every read is checked against the bytes that remain.

    `what` says what is being read ("key general.name") and begins every message.
    """

    def __init__(self, path: Path, buffer: mmap.mmap | bytes) -> None:
        self.path = path
        self.buffer = buffer
        self.end = len(buffer)
        self.position = 0
        self.what = "header"
        self.length = U64  # of strings and arrays
        self.size = I64  # of counts and dimensions

    def error(self, problem: str, mend: str = _DAMAGED) -> FormatError:
        return FormatError(f"{self.path}: {self.what}: {problem}; {mend}")

    def need(self, n_bytes: int, part: str) -> None:
        left = self.end - self.position
        if n_bytes > left:
            problem = f"{part} needs {n_bytes} bytes, {n_bytes - left} are missing"
            raise self.error(problem, _CUT_OFF)

    def raw(self, n_bytes: int, part: str) -> bytes:
        self.need(n_bytes, part)
        start = self.position
        self.position += n_bytes
        return self.buffer[start : self.position]

    def number(self, form: struct.Struct, part: str) -> Any:
        return form.unpack(self.raw(form.size, part))[0]

    def string(self, part: str, limit: int | None = None) -> str:
        length = self.number(self.length, f"length of the {part}")
        self.need(length, part)
        if limit is not None and length > limit:
            raise self.error(f"{part} has {length} bytes, at most {limit} are allowed")
        try:
            return self.raw(length, part).decode()
        except UnicodeDecodeError as error:
            raise self.error(f"{part} is not UTF-8 at its byte {error.start}") from None

    def strings(self, count: int) -> list[bytes]:
        """Read an array of strings: a loop over 100,000 and more, so it avoids calls."""
        width, unpack_from = self.length.size, self.length.unpack_from
        buffer, position, end = self.buffer, self.position, self.end
        texts: list[bytes] = []
        for _ in range(count):
            start = position + width
            if start > end:
                break
            position = start + unpack_from(buffer, position)[0]
            if position > end:
                break
            texts.append(buffer[start:position])
        if len(texts) < count:
            raise self.error(
                f"element {len(texts)} of {count} ends {max(start, position) - end} bytes after "
                "the file",
                _CUT_OFF,
            )
        self.position = position
        return texts

    def numbers(self, form: struct.Struct, count: int) -> np.ndarray:
        # A copy: bytes of the file are not aligned, and arrays should not hold the map.
        values = np.frombuffer(self.buffer, form.format, count, self.position).copy()
        self.position += values.nbytes
        return values


def _read_version(cursor: _Cursor) -> int:
    if not cursor.end:
        raise cursor.error("the file is empty", _CUT_OFF)
    magic = cursor.raw(4, "magic")
    if magic != MAGIC:
        raise cursor.error(f"begins with {magic!r}, not with {MAGIC!r}", "give a GGUF file")
    version = cursor.number(U32, "version")
    if version and not version & 0xFFFF:
        raise cursor.error("big-endian files are not supported", "convert the model again")
    if not 1 <= version <= VERSION:
        problem = f"version {version} is unknown, this engine reads 1 to {VERSION}"
        raise cursor.error(problem, "convert the model again")
    if version == 1:
        cursor.length = cursor.size = U32
    return version


def _read_counts(cursor: _Cursor) -> tuple[int, int]:
    n_tensors = cursor.number(cursor.size, "count of tensors")
    n_keys = cursor.number(cursor.size, "count of keys")
    left = cursor.end - cursor.position
    # The least a table entry takes: length of a name, n_dims, type and offset of a tensor;
    # length of a name, one byte of it, type and one byte of value of a key.
    least_tensor = cursor.length.size + 4 + 4 + 8
    least_key = cursor.length.size + 1 + 4 + 1
    for count, least, thing in ((n_tensors, least_tensor, "tensors"), (n_keys, least_key, "keys")):
        if not 0 <= count <= left // least:
            problem = f"{count} {thing} cannot be in the remaining {left} bytes"
            raise cursor.error(problem, _CUT_OFF)
    return n_tensors, n_keys


def _read_keys(cursor: _Cursor, count: int) -> tuple[dict[str, Any], dict[str, KeyType]]:
    metadata: dict[str, Any] = {}
    value_types: dict[str, KeyType] = {}
    for i in range(count):
        cursor.what = f"key {i + 1} of {count}"
        key = cursor.string("name", MAX_KEY_BYTES)
        if not key:
            raise cursor.error("name is empty")
        cursor.what = f"key {shown(key)}"
        if key in metadata:
            raise cursor.error("is there twice")
        value_types[key], metadata[key] = _read_value(cursor)
    return metadata, value_types


def _read_value(cursor: _Cursor) -> tuple[KeyType, Any]:
    kind = _read_type(cursor, "type")
    if kind is ValueType.ARRAY:
        element = _read_type(cursor, "element type")
        return (kind, element), _read_array(cursor, element)
    if kind is ValueType.STRING:
        return kind, cursor.string("value")
    if kind is ValueType.BOOL:
        value = cursor.number(BYTE, "value")
        if value > 1:
            raise cursor.error(f"bool has the value {value}, 0 or 1 is allowed")
        return kind, bool(value)
    return kind, cursor.number(NUMBERS[kind], "value")


def _read_type(cursor: _Cursor, part: str) -> ValueType:
    number = cursor.number(U32, part)
    try:
        return ValueType(number)
    except ValueError:
        raise cursor.error(f"{part} {number} is unknown") from None


def _read_array(cursor: _Cursor, element: ValueType) -> np.ndarray | list[bytes]:
    if element is ValueType.ARRAY:
        raise cursor.error("arrays of arrays are not supported")
    count = cursor.number(cursor.length, "count of elements")
    if element is ValueType.STRING:
        cursor.need(count * cursor.length.size, f"array of {count} strings")
        return cursor.strings(count)
    form = NUMBERS.get(element, BYTE)
    cursor.need(count * form.size, f"array of {count} {element.name}")
    values = cursor.numbers(form, count)
    if element is not ValueType.BOOL:
        return values
    if count and values.max() > 1:
        i = int(np.argmax(values > 1))
        raise cursor.error(f"bool {i} has the value {values[i]}, 0 or 1 is allowed")
    return values.astype(np.bool_)


def _find_alignment(
    cursor: _Cursor, metadata: Mapping[str, Any], value_types: Mapping[str, KeyType]
) -> int:
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    cursor.what = "key general.alignment"
    kind = value_types.get("general.alignment", ValueType.U32)
    if kind is not ValueType.U32:
        raise cursor.error(f"has type {type_name(kind)}, U32 is expected")
    if not is_power_of_two(alignment):
        raise cursor.error(f"{alignment} is not a power of two")
    return alignment


def _refuse_split(cursor: _Cursor, metadata: Mapping[str, Any]) -> None:
    count = metadata.get("split.count", 0)
    cursor.what = "key split.count"
    if type(count) is not int:
        raise cursor.error("is not an integer")
    if count > 1:
        problem = f"the file is one of {count} parts of a split model, which are not supported"
        raise cursor.error(problem, f"merge the {count} parts into one file first")


# Name, sizes in file order, type, offset from the start of the data.
_Info = tuple[str, tuple[int, ...], DType, int]


def _read_infos(cursor: _Cursor, count: int) -> list[_Info]:
    infos: list[_Info] = []
    seen: set[str] = set()
    for i in range(count):
        cursor.what = f"tensor {i + 1} of {count}"
        name = cursor.string("name", MAX_TENSOR_NAME_BYTES)
        cursor.what = f"tensor {shown(name)}"
        if name in seen:
            raise cursor.error("is there twice")
        seen.add(name)
        sizes = _read_sizes(cursor)
        dtype = _read_dtype(cursor)
        row = sizes[0] if sizes else 1
        if row % dtype.block:
            raise cursor.error(f"rows of {row} are not whole {dtype.name} blocks of {dtype.block}")
        infos.append((name, sizes, dtype, cursor.number(U64, "offset")))
    return infos


def _read_sizes(cursor: _Cursor) -> tuple[int, ...]:
    n_dims = cursor.number(U32, "number of dimensions")
    if n_dims > MAX_DIMS:
        raise cursor.error(f"has {n_dims} dimensions, at most {MAX_DIMS} are allowed")
    sizes = tuple(cursor.number(cursor.size, "sizes") for _ in range(n_dims))
    if min(sizes, default=1) < 1:
        raise cursor.error(f"size {min(sizes)} in {times(sizes)} is below 1")
    if prod(sizes) >= 1 << 63:
        raise cursor.error(f"sizes {times(sizes)} make 2^63 elements or more")
    return sizes


def _read_dtype(cursor: _Cursor) -> DType:
    number = cursor.number(U32, "type")
    if number in BY_ID:
        return BY_ID[number]
    if number in REMOVED:
        problem = f"type {REMOVED[number]} was removed from GGUF"
        raise cursor.error(problem, "convert the original model again")
    if number in UNSUPPORTED:
        names = ", ".join(dtype.name for dtype in BY_ID.values())
        problem = f"type {UNSUPPORTED[number]} is not supported yet by this engine"
        raise cursor.error(problem, f"use a file of type {names}")
    raise cursor.error(f"type number {number} is unknown")


def _place(cursor: _Cursor, infos: list[_Info], alignment: int) -> dict[str, TensorInfo]:
    """Turn offsets into places of the file; refuse what lies outside, or upon another tensor."""
    start = align(cursor.position, alignment)
    tensors: dict[str, TensorInfo] = {}
    for name, sizes, dtype, offset in infos:
        cursor.what = f"tensor {shown(name)}"
        if offset % alignment:
            raise cursor.error(f"offset {offset} is not a multiple of the alignment {alignment}")
        n_bytes = prod(sizes) // dtype.block * dtype.block_bytes
        if start + offset + n_bytes > cursor.end:
            problem = (
                f"{times(sizes[::-1])} {dtype.name} needs {n_bytes} bytes from {start + offset} "
                f"on, the file ends after {cursor.end}"
            )
            raise cursor.error(problem, _CUT_OFF)
        tensors[name] = TensorInfo(name, sizes[::-1], dtype, start + offset, n_bytes)
    by_place = sorted(tensors.values(), key=lambda info: info.offset)
    for before, info in pairwise(by_place):
        if before.offset + before.n_bytes > info.offset:
            cursor.what = f"tensor {shown(info.name)}"
            raise cursor.error(f"overlaps tensor {shown(before.name)}")
    return tensors
