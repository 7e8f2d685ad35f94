"""Log-probabilities of a text in 16 bits: what one model writes and another is compared with.

Layout, little-endian: ``_logits_``; i32 tokens of a window, i32 vocabulary, i32 windows; i32 tokens
of all windows; then a record for each scored token, which are those of every window's second half:
f32 scale, f32 lowest, u16 codes, one for each token of the vocabulary and one more where that is
odd. A log-probability is lowest + code * scale; more than 16 below the highest counts as 16.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from engine.errors import EngineError, FormatError
from engine.gguf import atomic_write
from engine.measure.softmax import log_sum_exp
from engine.measure.windows import Logits, Windows

MAGIC = b"_logits_"
_HEAD = struct.Struct("<3i")
_RANGE = np.float32(16)
_LARGEST_CODE = np.float32(65535)


def _record(n_vocab: int) -> np.dtype:
    """Layout of a scored token's record."""
    n_codes = n_vocab + n_vocab % 2
    return np.dtype([("scale", "<f4"), ("lowest", "<f4"), ("codes", "<u2", (n_codes,))])


class LogitWriter:
    """Writes records into a file that `open_logit_writer` has begun."""

    def __init__(self, file: BinaryIO, n_vocab: int) -> None:
        self._file = file
        self._record = np.zeros((), _record(n_vocab))
        self._scratch = np.empty(n_vocab, np.float32)
        self._codes = self._record["codes"][:n_vocab]

    def add(self, logits: Logits) -> None:
        """Write the records of rows of logits."""
        for row in logits:
            self._encode(row)
            self._file.write(self._record.tobytes())

    def _encode(self, row: Logits) -> None:
        top = row.max()
        low = max(row.min(), top - _RANGE)
        log_sum = np.float32(log_sum_exp(row, self._scratch) - float(top))
        scale = (top - low) / _LARGEST_CODE
        self._record["scale"] = scale
        self._record["lowest"] = low - top - log_sum
        if scale > 0:
            steps = np.maximum(row, low, out=self._scratch)
            steps -= low
            steps *= np.float32(1) / scale
            self._codes[:] = np.minimum(np.rint(steps, out=steps), _LARGEST_CODE)
        else:
            self._codes[:] = 0


@contextmanager
def open_logit_writer(path: Path | str, windows: Windows, n_vocab: int) -> Iterator[LogitWriter]:
    """Begin a file beside `path`; it takes its place at the end of the block.

    Parameters
    ----------
    path : path of the file
    windows : Windows
        From `halves`; all of them are to be written.
    n_vocab : int

    Raises
    ------
    EngineError
        If the file cannot be written; the former one is whole then.
    """
    with atomic_write(path) as file:
        file.write(MAGIC + _HEAD.pack(windows.n_ctx, n_vocab, windows.count))
        used = windows.tokens[: windows.n_ctx * windows.count]
        file.write(np.ascontiguousarray(used, "<i4").data)
        yield LogitWriter(file, n_vocab)


@dataclass(frozen=True, slots=True)
class LogitFile:
    """A file's tokens, and its log-probabilities in the file's map.

    Attributes
    ----------
    path : Path
    windows : Windows
        Without a first token of the model's own.
    n_vocab : int
    """

    path: Path
    windows: Windows
    n_vocab: int
    _records: NDArray[np.void]

    def log_probabilities(self, index: int) -> Logits:
        """Decode those of a scored token, counted from the first of the file.

        Raises
        ------
        FormatError
            If they are not finite.
        """
        record = self._records[index]
        scale, lowest = record["scale"], record["lowest"]
        if not (np.isfinite(scale) and np.isfinite(lowest)):
            raise FormatError(
                f"{self.path}: scored token {index}: its scale or its lowest value is not finite; "
                "write the file again"
            )
        return record["codes"][: self.n_vocab] * scale + lowest


def read_logit_file(path: Path | str) -> LogitFile:
    """Map a file of log-probabilities and check that its sizes fit.

    Raises
    ------
    FormatError
        Naming the file and what is wrong.
    EngineError
        If it cannot be read.
    """
    path = Path(path)
    try:
        if not path.is_file():
            raise FormatError(f"{path}: is not a regular file; give one of log-probabilities")
        with path.open("rb") as file:
            head = file.read(len(MAGIC) + _HEAD.size)
            n_bytes = path.stat().st_size
            if head[: len(MAGIC)] != MAGIC:
                raise FormatError(
                    f"{path}: begins with {head[:8]!r}, not with {MAGIC!r}; give a file that "
                    "perplexity --kl-divergence-base has written"
                )
            if len(head) < len(MAGIC) + _HEAD.size:
                raise FormatError(f"{path}: the file ends within its head; write it again")
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise EngineError(
            f"{path}: cannot be read: {error.strerror or error}; check the name"
        ) from error
    return _checked(path, n_bytes, content)


def _checked(path: Path, n_bytes: int, content: mmap.mmap) -> LogitFile:
    n_ctx, n_vocab, count = _HEAD.unpack_from(content, len(MAGIC))
    if n_ctx < 3 or n_vocab < 1 or count < 1:
        raise FormatError(
            f"{path}: {count} windows of {n_ctx} tokens of a vocabulary of {n_vocab} cannot be; "
            "write the file again"
        )
    begin = len(MAGIC) + _HEAD.size
    n_tokens = n_ctx * count
    n_scored = (n_ctx - 1 - n_ctx // 2) * count
    n_codes = n_vocab + n_vocab % 2
    needed = begin + 4 * n_tokens + n_scored * (8 + 2 * n_codes)
    if needed > n_bytes:
        raise FormatError(
            f"{path}: {count} windows of {n_ctx} tokens need {needed} bytes, the file has "
            f"{n_bytes}; it is cut off: write it again"
        )
    tokens = np.frombuffer(content, "<i4", n_tokens, begin).astype(np.int32)
    if tokens.min() < 0 or tokens.max() >= n_vocab:
        raise FormatError(
            f"{path}: a token is not in the vocabulary of {n_vocab}; write the file again"
        )
    records = np.frombuffer(content, _record(n_vocab), n_scored, begin + 4 * n_tokens)
    windows = Windows(tokens, n_ctx, n_ctx, n_ctx // 2, count)
    return LogitFile(path, windows, n_vocab, records)
