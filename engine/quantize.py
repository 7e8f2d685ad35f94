"""A model's tensors in other types: a new file, as llama.cpp's quantize of June 2024 writes it.

Some rows at a time are decoded, encoded and looked at; memory is bounded by these, not by tensors.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from engine.dtypes import F32, Q2_K, DType
from engine.errors import DataError, EngineError, FormatError
from engine.gguf import GGUFFile, KeyType, TensorInfo, ValueType, write_gguf
from engine.gguf_write import shown
from engine.imatrix import ImportanceMatrix
from engine.kernels import decode, find_invalid
from engine.kernels import quantize as quantize_rows
from engine.mixture import EMBEDDING, Choice, Wish, choose_types, read_sizes

_PART_BYTES = 4 << 20  # of float32 values that a worker has at a time

Scalar = int | float | bool | str

_NEW_KEYS: dict[type, ValueType] = {
    int: ValueType.I32,
    float: ValueType.F32,
    bool: ValueType.BOOL,
    str: ValueType.STRING,
}

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Planned:
    """A tensor of the new file.

    Attributes
    ----------
    info : TensorInfo
        As it is stored now.
    choice : Choice
        What it becomes.
    importance : ndarray of shape (n_in,), float32, optional
    n_bytes : int
        That it will take.
    """

    info: TensorInfo
    choice: Choice
    importance: NDArray[np.float32] | None
    n_bytes: int

    @property
    def is_copy(self) -> bool:
        """Whether its bytes stay as they are."""
        return self.choice.dtype is self.info.dtype


class Quantization:
    """A planned run: what every tensor becomes, found to be possible before anything is written.

    Parameters
    ----------
    file : GGUFFile
    wish : Wish
        Its `important` is set here.
    imatrix : ImportanceMatrix, optional
    allow_requantize : bool
        Take tensors that are quantized already.
    overrides : dict of str to int, float, bool or str
        Keys of the new file.

    Attributes
    ----------
    tensors : list of Planned
        In the order of the file.
    warnings : list of str

    Raises
    ------
    FormatError, DataError
        Naming the tensor or the key that is in the way.
    """

    def __init__(
        self,
        file: GGUFFile,
        wish: Wish,
        *,
        imatrix: ImportanceMatrix | None = None,
        allow_requantize: bool = False,
        overrides: dict[str, Scalar] | None = None,
    ) -> None:
        if file.kind != "model":
            raise FormatError(f"{file.path}: holds no model but one {file.kind}; give a model")
        self.file, self.target = file, wish.target
        self.imatrix = imatrix if imatrix and imatrix.values else None
        self.warnings: list[str] = []
        if wish.target.name == "Q2_K_S" and self.imatrix is None:
            raise EngineError(
                "Q2_K_S needs an importance matrix; give one with --imatrix, or choose Q2_K"
            )
        wish = replace(wish, important=self.imatrix is not None)
        infos = file.tensors.values()
        choices = choose_types(infos, read_sizes(file), wish, str(file.path))
        self.tensors = [self._plan(info, choices[info.name], allow_requantize) for info in infos]
        self._keys = self._new_keys(dict(overrides or {}))

    @property
    def n_bytes(self) -> int:
        """Bytes of the tensors as they are now: what `write` goes through."""
        return sum(item.info.n_bytes for item in self.tensors)

    @property
    def new_bytes(self) -> int:
        """Bytes of the tensors of the new file."""
        return sum(item.n_bytes for item in self.tensors)

    def write(
        self,
        path: Path | str,
        n_threads: int = 1,
        on_bytes: Callable[[int], None] = lambda _n: None,
        on_tensor: Callable[[Planned], None] = lambda _item: None,
    ) -> None:
        """Write the new file; it takes its place when it is complete.

        Parameters
        ----------
        path : path of the new file
        n_threads : int
        on_bytes, on_tensor : callable
            Told of stored bytes that are done, and of each tensor when it is.

        Raises
        ------
        DataError
            If a value is infinite or NaN, or becomes so; names tensor and place.
        EngineError
            If the file cannot be written; the former file is whole then.
        """
        if os.path.exists(path) and os.path.samefile(path, self.file.path):
            raise EngineError(f"{path}: is the model itself; choose another name")
        with ThreadPoolExecutor(n_threads) as pool:

            def tensor(item: Planned) -> tuple[str, DType, tuple[int, ...], Any]:
                def parts() -> Iterator[NDArray[np.uint8]]:
                    steps = _steps(item)
                    done = in_order(
                        pool, lambda step: self._part(item, *step), steps, 2 * n_threads
                    )
                    for data, n_stored in done:
                        yield data
                        on_bytes(n_stored)
                    on_tensor(item)

                return item.info.name, item.choice.dtype, item.info.shape, parts

            write_gguf(path, self._keys, [tensor(item) for item in self.tensors])

    def _plan(self, info: TensorInfo, choice: Choice, allow_requantize: bool) -> Planned:
        name = f"{self.file.path}: tensor {shown(info.name)}"
        n_bytes = prod(info.shape) // choice.dtype.block * choice.dtype.block_bytes
        if choice.dtype is info.dtype:
            return Planned(info, choice, None, n_bytes)
        if info.dtype.block > 1 and not allow_requantize:
            raise DataError(
                f"{name}: requantizing from type {info.dtype.name} is disabled, as it adds to the "
                "error; give the unquantized model, or --allow-requantize"
            )
        if choice.instead_of is not None:
            self.warnings.append(
                f"tensor {shown(info.name)}: rows of {info.shape[-1]} are not whole blocks of "
                f"{choice.instead_of.name}: {choice.dtype.name} instead"
            )
        importance = self._importance(info) if choice.dtype.block > 1 else None
        low = choice.dtype is Q2_K and self.target.name == "Q2_K_S" and info.name != EMBEDDING
        if low and importance is None:
            raise DataError(f"{name}: the importance matrix lacks it, which Q2_K_S needs")
        return Planned(info, choice, importance, n_bytes)

    def _importance(self, info: TensorInfo) -> NDArray[np.float32] | None:
        if self.imatrix is None:
            return None
        values, n = self.imatrix.values.get(info.name), info.shape[-1]
        if values is None:
            self.warnings.append(f"tensor {shown(info.name)}: the importance matrix lacks it")
            return None
        if len(values) == n:
            return values
        problem = f"tensor {shown(info.name)}: {len(values)} importances for rows of {n}"
        if info.name != EMBEDDING:
            raise DataError(f"{self.imatrix.path}: {problem}; give the matrix of this model")
        self.warnings.append(problem)
        return None

    def _new_keys(self, overrides: dict[str, Scalar]) -> list[tuple[str, KeyType, Any]]:
        values: dict[str, Any] = {
            key: value for key, value in self.file.metadata.items() if not key.startswith("split.")
        }
        types = dict(self.file.value_types)
        added: dict[str, tuple[KeyType, Any]] = {
            "general.quantization_version": (ValueType.U32, 2),
        }
        if not self.target.is_copy:
            added["general.file_type"] = (ValueType.U32, self.target.file_type)
        if self.imatrix is not None:
            overrides = {**overrides, **_provenance(self.imatrix)}
        self.file.overridden(overrides)  # a key of another type is refused
        for key, value in overrides.items():
            added[key] = (types.get(key, _NEW_KEYS[type(value)]), value)
        for key, (kind, value) in added.items():
            types[key], values[key] = kind, value
        return [(key, types[key], value) for key, value in values.items()]

    def _part(self, item: Planned, begin: int, end: int) -> tuple[NDArray[np.uint8], int]:
        """Rows in their new type, and the bytes of which they were made."""
        old, new, n = item.info.dtype, item.choice.dtype, _row(item.info)
        row_bytes = old.row_bytes(n)
        stored = self.file.data(item.info.name)[begin * row_bytes : end * row_bytes]
        self._check(item, old, stored, begin, "is infinite or NaN; get the file again")
        if item.is_copy:
            return stored, stored.size
        values = decode(old.id, stored, (end - begin) * n)
        if old is not F32:  # a sound scale times a code can still overflow
            self._check(item, F32, values.view(np.uint8), begin, "is infinite")
        data = quantize_rows(new.id, values.reshape(end - begin, n), item.importance)
        data = data.reshape(-1)
        self._check(item, new, data, begin, f"is beyond {new.name}; choose another type")
        return data, stored.size

    def _check(
        self, item: Planned, dtype: DType, data: NDArray[np.uint8], first_row: int, problem: str
    ) -> None:
        n = _row(item.info)
        found = find_invalid(dtype.id, data, data.size // dtype.row_bytes(n) * n)
        if found >= 0:
            row, element = divmod(found * dtype.block, n)
            what = "value" if dtype.block == 1 else "block"
            raise DataError(
                f"{self.file.path}: tensor {shown(item.info.name)}: the {what} at row "
                f"{first_row + row}, element {element} {problem}"
            )


def in_order(
    pool: ThreadPoolExecutor, work: Callable[[T], Any], items: Iterable[T], ahead: int
) -> Iterator[Any]:
    """Give the results of `work` in the order of the items, up to `ahead` of them made before."""
    waiting: deque[Future[Any]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def _row(info: TensorInfo) -> int:
    return info.shape[-1] if info.shape else 1


def _steps(item: Planned) -> Iterator[tuple[int, int]]:
    """Rows that are worked on together."""
    n_rows = prod(item.info.shape[:-1])
    step = max(1, _PART_BYTES // (4 * _row(item.info)))
    return ((begin, min(begin + step, n_rows)) for begin in range(0, n_rows, step))


def _provenance(imatrix: ImportanceMatrix) -> dict[str, Scalar]:
    """Keys that tell of the importance matrix, as the original writes them."""
    keys: dict[str, Scalar] = {"quantize.imatrix.file": imatrix.path}
    if imatrix.dataset:
        keys["quantize.imatrix.dataset"] = imatrix.dataset
    keys["quantize.imatrix.entries_count"] = len(imatrix.values)
    if imatrix.n_chunks > 0:
        keys["quantize.imatrix.chunks_count"] = imatrix.n_chunks
    return keys
