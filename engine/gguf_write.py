"""The GGUF layout, as its writer needs it: value types, limits, files of version 3.

`engine.gguf` reads, and hands these names on; a file reaches its place whole or not at all.
"""

from __future__ import annotations

import contextlib
import os
import stat
import struct
from collections.abc import Iterable, Iterator, Sequence
from contextvars import ContextVar
from enum import IntEnum
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from engine.dtypes import DType
from engine.errors import EngineError, FormatError

MAGIC = b"GGUF"
VERSION = 3
DEFAULT_ALIGNMENT = 32
MAX_KEY_BYTES = 65_535
MAX_TENSOR_NAME_BYTES = 63
MAX_DIMS = 4


class ValueType(IntEnum):
    """Types of metadata values, by their number in the file."""

    U8 = 0
    I8 = 1
    U16 = 2
    I16 = 3
    U32 = 4
    I32 = 5
    F32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    U64 = 10
    I64 = 11
    F64 = 12


# The type of a key's value; an array carries the type of its elements.
KeyType = ValueType | tuple[ValueType, ValueType]

U32 = struct.Struct("<I")
U64 = struct.Struct("<Q")
I64 = struct.Struct("<q")

NUMBERS = {
    ValueType.U8: struct.Struct("<B"),
    ValueType.I8: struct.Struct("<b"),
    ValueType.U16: struct.Struct("<H"),
    ValueType.I16: struct.Struct("<h"),
    ValueType.U32: U32,
    ValueType.I32: struct.Struct("<i"),
    ValueType.F32: struct.Struct("<f"),
    ValueType.U64: U64,
    ValueType.I64: I64,
    ValueType.F64: struct.Struct("<d"),
}
BYTE = NUMBERS[ValueType.U8]


def shown(name: str) -> str:
    """Fit a name from a file into a line of a message, whatever it holds."""
    short = name if len(name) <= 80 else name[:80] + "…"
    return short if short.isprintable() and short else ascii(short)


def times(sizes: Sequence[int]) -> str:
    """Write sizes for a message: 4 × 32."""
    return " × ".join(map(str, sizes)) or "1"


def type_name(kind: KeyType) -> str:
    """Name a key's type for a message."""
    return f"array of {kind[1].name}" if isinstance(kind, tuple) else kind.name


def align(position: int, alignment: int) -> int:
    """Round up to a multiple of `alignment`."""
    return -(-position // alignment) * alignment


def is_power_of_two(n: int) -> bool:
    """Tell whether `n` can be an alignment."""
    return n > 0 and not n & (n - 1)


class Deferred:
    """New files that wait beside those whose places they will take.

    What `atomic_write` completes inside the block ``with deferred.collect():`` takes no place
    until `commit`, and is gone after `drop`.
    """

    def __init__(self) -> None:
        self._waiting: dict[Path, Path] = {}  # target → file beside it

    @contextlib.contextmanager
    def collect(self) -> Iterator[None]:
        """Hold back the files of a block; a device or a pipe is written as it is."""
        token = _DEFERRED.set(self)
        try:
            yield
        finally:
            _DEFERRED.reset(token)

    def commit(self) -> list[EngineError]:
        """Let every file that waits take its place; returns what went wrong."""
        waiting, self._waiting = self._waiting, {}
        problems = []
        for target, temporary in waiting.items():
            try:
                os.replace(temporary, target)
            except OSError as error:
                _remove(temporary)
                problems.append(_not_written(target, error))
        return problems

    def drop(self) -> None:
        """Remove the files that wait; what they were to replace stays."""
        for temporary in self._waiting.values():
            _remove(temporary)
        self._waiting = {}

    def put(self, target: Path, temporary: Path) -> None:
        """Let a file wait."""
        self._waiting[target] = temporary

    def forget(self, target: Path) -> None:
        """Let nothing wait for a place any more, as another file is written for it."""
        self._waiting.pop(target, None)


_DEFERRED: ContextVar[Deferred | None] = ContextVar("deferred", default=None)


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)


def _not_written(path: str | os.PathLike[str], error: OSError) -> EngineError:
    reason = error.strerror or error
    return EngineError(
        f"{os.fspath(path)}: cannot be written: {reason}; choose another place or make room"
    )


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Give a binary file that takes the place of `path` when all of it is on the disk.

    The bytes go to a file beside the target, are flushed and synced, then renamed; whatever
    interrupts the block, the former file stays whole and the new one is removed. A symbolic link
    stays and its target is replaced; a device or a pipe is written as it is. `Deferred` puts the
    renaming off.

    Raises
    ------
    EngineError
        If the file cannot be written; names the file and the reason.
    """
    target = Path(os.path.realpath(path))
    try:
        if target.exists() and not target.is_file():
            with target.open("wb") as device:
                yield device
            return
        # One name a target: what a killed process left is overwritten by the next, not gathered.
        temporary = target.with_name(f".{target.name[:200]}.tmp")
        deferred = _DEFERRED.get()
        try:
            if deferred:
                deferred.forget(target)
            with temporary.open("wb") as file:
                if target.exists():
                    os.fchmod(file.fileno(), stat.S_IMODE(target.stat().st_mode))
                yield file
                file.flush()
                os.fsync(file.fileno())
            if deferred:
                deferred.put(target, temporary)
            else:
                os.replace(temporary, target)
        except BaseException:
            _remove(temporary)
            raise
    except OSError as error:
        raise _not_written(path, error) from error


def write_gguf(
    path: str | os.PathLike[str],
    keys: Sequence[tuple[str, KeyType, Any]],
    tensors: Sequence[tuple[str, DType, tuple[int, ...], Any]],
) -> None:
    """Write a GGUF file of version 3: beside the target, synced, then renamed.

    Parameters
    ----------
    path : path of the file
    keys : sequence of (name, type, value)
        In the order of the file; an array's type is (ValueType.ARRAY, element type), its value
        a sequence or an array. `general.alignment` among them sets the alignment.
    tensors : sequence of (name, dtype, shape, buffer)
        In the order of the file; shapes in NumPy order. A buffer is contiguous and of the exact
        size; or a function without arguments that gives such buffers, which together have it. It is
        called when the tensor's turn comes, so that a model need not be in memory as a whole.

    Raises
    ------
    FormatError
        If something cannot be stored; the former file is whole then.
    EngineError
        If the file cannot be written; the former file is whole then.
    """
    where = os.fspath(path)
    for thing, names in (("key", [k[0] for k in keys]), ("tensor", [t[0] for t in tensors])):
        _check_names(where, thing, names)
    alignment = _chosen_alignment(where, keys)
    sizes = [_checked_size(where, *tensor) for tensor in tensors]
    head = [MAGIC, U32.pack(VERSION), I64.pack(len(tensors)), I64.pack(len(keys))]
    head.extend(_pack_key(where, *key) for key in keys)
    offset = 0
    for (name, dtype, shape, _), n_bytes in zip(tensors, sizes, strict=True):
        packed = struct.pack(f"<I{len(shape)}q", len(shape), *reversed(shape))
        head.append(_pack_string(name) + packed + U32.pack(dtype.id) + U64.pack(offset))
        offset += align(n_bytes, alignment)
    with atomic_write(path) as file:
        start = file.write(b"".join(head))
        file.write(bytes(-start % alignment))
        for (name, _, _, data), n_bytes in zip(tensors, sizes, strict=True):
            written = sum(map(file.write, _parts(data)))
            if written != n_bytes:
                raise FormatError(
                    f"{where}: tensor {shown(name)}: {written} bytes came, {n_bytes} were announced"
                )
            file.write(bytes(-n_bytes % alignment))


def _chosen_alignment(where: str, keys: Sequence[tuple[str, KeyType, Any]]) -> int:
    for key, kind, value in keys:
        if key == "general.alignment":
            if kind is ValueType.U32 and type(value) is int and is_power_of_two(value):
                return value
            raise FormatError(f"{where}: key {key}: {value} is not a U32 power of two; give 32")
    return DEFAULT_ALIGNMENT


def _check_names(where: str, thing: str, names: Sequence[str]) -> None:
    limit = MAX_KEY_BYTES if thing == "key" else MAX_TENSOR_NAME_BYTES
    seen: set[str] = set()
    for name in names:
        length = len(name.encode())
        if not 1 <= length <= limit:
            raise FormatError(
                f"{where}: {thing} {shown(name)}: its name has {length} bytes, 1 to {limit} are "
                "allowed; shorten it"
            )
        if name in seen:
            raise FormatError(f"{where}: {thing} {shown(name)}: is given twice; give it once")
        seen.add(name)


def _parts(data: Any) -> Iterable[memoryview]:
    """Bytes of a tensor, one buffer after the other."""
    buffers = data() if callable(data) else [data]
    return (np.frombuffer(buffer, np.uint8).data for buffer in buffers)


def _checked_size(where: str, name: str, dtype: DType, shape: tuple[int, ...], data: Any) -> int:
    """Bytes of a tensor, after a look at its shape, and at its buffer where it is there already."""
    problem = ""
    row = shape[-1] if shape else 1
    n_bytes = prod(shape) // dtype.block * dtype.block_bytes
    if len(shape) > MAX_DIMS or min(shape, default=1) < 1:
        problem = f"{times(shape)} is no shape that GGUF can hold"
    elif row % dtype.block:
        problem = f"rows of {row} are not whole {dtype.name} blocks of {dtype.block}"
    elif not callable(data) and (given := np.frombuffer(data, np.uint8).nbytes) != n_bytes:
        problem = f"{times(shape)} {dtype.name} needs {n_bytes} bytes, {given} are given"
    if problem:
        raise FormatError(f"{where}: tensor {shown(name)}: {problem}; give another shape or type")
    return n_bytes


def _pack_key(where: str, key: str, kind: KeyType, value: Any) -> bytes:
    try:
        return _pack_string(key) + _pack_value(kind, value)
    except (struct.error, OverflowError, TypeError, ValueError) as error:
        raise FormatError(
            f"{where}: key {shown(key)}: value does not fit {type_name(kind)}: {error}; "
            "choose another type"
        ) from None


def _pack_value(kind: KeyType, value: Any) -> bytes:
    if not isinstance(kind, tuple):
        if isinstance(value, bytes):
            value = value.decode()  # only the elements of arrays may be other than UTF-8
        return U32.pack(kind) + _pack_elements(kind, [value])
    array, element = kind
    values = value.tolist() if isinstance(value, np.ndarray) else list(value)
    head = U32.pack(array) + U32.pack(element) + U64.pack(len(values))
    return head + _pack_elements(element, values)


def _pack_elements(kind: ValueType, values: list[Any]) -> bytes:
    if kind is ValueType.STRING:
        return b"".join(map(_pack_string, values))
    if kind is ValueType.ARRAY:
        raise ValueError("arrays of arrays are not supported")
    code = "?" if kind is ValueType.BOOL else NUMBERS[kind].format[1:]
    return struct.pack(f"<{len(values)}{code}", *values)


def _pack_string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else bytes(memoryview(text))
    return U64.pack(len(raw)) + raw
