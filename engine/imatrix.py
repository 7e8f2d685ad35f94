"""Importance matrices: how much each input of a matrix matters, measured over a text.

The file of llama.cpp's ``imatrix`` of June 2024: i32 number of entries; for each of them i32 length
of the name and the name, i32 number of calls, i32 number of values, and float32 sums; then, in
newer files, i32 number of chunks, i32 length and name of the text.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engine.errors import EngineError, FormatError
from engine.gguf_write import shown

_I32 = struct.Struct("<i")


@dataclass(frozen=True, slots=True)
class ImportanceMatrix:
    """Mean squares of what reaches a matrix's columns.

    Attributes
    ----------
    path : str
    values : dict of str to ndarray of shape (n_in,), float32
        By the tensor's name.
    n_chunks : int
        Of how many parts of the text it was made; 0 where the file does not say.
    dataset : str
    """

    path: str
    values: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    n_chunks: int = 0
    dataset: str = ""

    def only(self, included: Sequence[str], excluded: Sequence[str]) -> ImportanceMatrix:
        """Keep entries whose name has one of `included` (if any) in it, and none of `excluded`."""
        kept = {
            name: values
            for name, values in self.values.items()
            if (not included or any(part in name for part in included))
            and not any(part in name for part in excluded)
        }
        return replace(self, values=kept)


def read_imatrix(path: str | os.PathLike[str]) -> ImportanceMatrix:
    """Read an importance matrix.

    Raises
    ------
    EngineError
        If the file cannot be read.
    FormatError
        If it is not what it should be; nothing is allocated for what it merely claims.
    """
    where = os.fspath(path)
    try:
        raw = Path(path).read_bytes()
    except OSError as error:
        raise EngineError(
            f"{where}: {error.strerror or error}; give an importance matrix"
        ) from None
    return _Reader(where, raw).read()


class _Reader:
    """A place in the file's bytes, and what is read there."""

    def __init__(self, where: str, raw: bytes) -> None:
        self.where, self.raw, self.place = where, raw, 0

    def read(self) -> ImportanceMatrix:
        values: dict[str, NDArray[np.float32]] = {}
        count = self.number("number of entries", 1)
        for i in range(count):
            name = self.text(f"entry {i + 1} of {count}: name", 1)
            calls = self.number(f"entry {shown(name)}: number of calls", None)
            n = self.number(f"entry {shown(name)}: number of values", 1)
            sums = np.frombuffer(self.take(4 * n, f"entry {shown(name)}: values"), "<f4")
            mean = (sums / np.float32(calls) if calls > 0 else sums).astype(np.float32)
            if not (np.isfinite(mean).all() and (mean >= 0).all()):
                raise self.error(f"entry {shown(name)}: a value is negative, infinite or NaN")
            values[name] = mean
        if self.place == len(self.raw):
            return ImportanceMatrix(self.where, values)
        chunks = self.number("number of chunks", None)
        return ImportanceMatrix(
            self.where, values, max(0, chunks), self.text("name of the text", 0)
        )

    def take(self, n: int, what: str) -> bytes:
        part = self.raw[self.place : self.place + n]
        if len(part) < n:
            raise self.error(f"{what}: ends {n - len(part)} bytes after the file")
        self.place += n
        return part

    def number(self, what: str, least: int | None) -> int:
        value: int = _I32.unpack(self.take(_I32.size, what))[0]
        if least is not None and value < least:
            raise self.error(f"{what} is {value}")
        return value

    def text(self, what: str, least: int) -> str:
        return self.take(self.number(f"length of {what}", least), what).decode("utf-8", "replace")

    def error(self, problem: str) -> FormatError:
        return FormatError(f"{self.where}: {problem}; give a file of llama.cpp's imatrix")
