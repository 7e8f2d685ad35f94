"""Adapters merged into a model's weights: a new GGUF file that needs no adapter.

A weight W that adapters touch becomes W + scale · BᵀA, scaled as prediction scales it: it is
decoded, added to and encoded again, some rows at a time. Every other tensor is copied as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.dtypes import BF16, DType
from engine.errors import DataError
from engine.file_types import UNIFORM
from engine.gguf import KeyType, TensorInfo, ValueType, write_gguf
from engine.kernels import decode, quantize
from engine.llama import AdapterTensors
from engine.lora import KINDS, Adapter, join_adapters
from engine.model import Model
from engine.quantize import in_order

# Weights that are decoded together, with a copy and their sum.
_PART_BYTES = 4 << 20

_FILE_TYPE = "general.file_type"

_EMBEDDING, _OUTPUT = "token_embd.weight", "output.weight"


@dataclass(slots=True)
class TensorReport:
    """What has become of a tensor.

    Attributes
    ----------
    name : str
    before, after : DType
    touched : bool
        Whether an adapter changes it.
    n_values : int
    change, error : float
        Sums of squares: of what the adapters add, and of what is stored less what it was to be.
    largest_error : float
    n_bytes : int
        That were written.
    """

    name: str
    before: DType
    after: DType
    touched: bool
    n_values: int = 0
    change: float = 0.0
    error: float = 0.0
    largest_error: float = 0.0
    n_bytes: int = 0

    @property
    def rms_change(self) -> float:
        """Root of the mean square of what the adapters add."""
        return math.sqrt(self.change / self.n_values) if self.n_values else 0.0

    @property
    def rms_error(self) -> float:
        """Root of the mean square of the rounding error."""
        return math.sqrt(self.error / self.n_values) if self.n_values else 0.0


@dataclass(frozen=True, slots=True)
class _Delta:
    """Adapters of some rows: all of a tensor, or queries, keys or values of a joint one."""

    first: int
    adapter: AdapterTensors

    def of_rows(self, begin: int, end: int) -> tuple[slice, NDArray[np.float32]] | None:
        """Give what is added to the rows from `begin` to `end`, and to which of these."""
        a, b = self.adapter.a.numpy(), self.adapter.b.numpy()
        if len(b) != len(a):  # a norm's B is one number a rank, a row in memory
            b = b.reshape(-1, 1)
        low, high = max(begin, self.first), min(end, self.first + b.shape[1])
        if low >= high:
            return None
        rows = b[:, low - self.first : high - self.first]
        return slice(low - begin, high - begin), rows.T @ a * np.float32(self.adapter.scale)


@dataclass(frozen=True, slots=True)
class _Planned:
    """A tensor of the new file: the base's tensor, what is added, the type it gets."""

    name: str
    info: TensorInfo
    data: NDArray[np.uint8]
    dtype: DType
    deltas: Sequence[_Delta] = field(default=())

    @property
    def rows(self) -> int:
        return math.prod(self.info.shape[:-1])

    @property
    def row_length(self) -> int:
        return self.info.shape[-1] if self.info.shape else 1

    @property
    def is_copy(self) -> bool:
        return not self.deltas and self.dtype is self.info.dtype


def merge(
    model: Model,
    adapters: Sequence[tuple[Adapter, float]],
    path: Path | str,
    *,
    dtype: DType | None = None,
    rescue: bool = False,
    n_threads: int = 1,
    on_tensor: Callable[[TensorReport], None] = lambda _: None,
) -> None:
    """Write a model with adapters merged into its weights.

    Where the output shares the embedding's weights and either of them is adapted, the file gets an
    output of its own.

    Parameters
    ----------
    model : Model
    adapters : sequence of (Adapter, scale)
        Checked to fit the model; see `engine.lora.check_fits`.
    path : path of the new file
    dtype : DType, optional
        Type of all matrices; by default each tensor keeps its own. Vectors always do.
    rescue : bool
        Store matrices that adapters touch as BF16 where they would be quantized.
    n_threads : int
    on_tensor : callable
        Is told of each tensor once it is written, in the order of the file.

    Raises
    ------
    DataError
        If a merged weight is not finite or beyond its type.
    EngineError
        If the file cannot be written; the former file is whole then.
    """
    planned = _plan(model, adapters, dtype, rescue)
    keys = _keys(model, dtype)
    with ThreadPoolExecutor(n_threads) as pool:

        def tensor(item: _Planned) -> tuple[str, DType, tuple[int, ...], Any]:
            def parts() -> Iterator[Any]:
                return _write(item, pool, 2 * n_threads, on_tensor)

            return item.name, item.dtype, item.info.shape, parts

        write_gguf(path, keys, [tensor(item) for item in planned])


def total_bytes(model: Model) -> int:
    """Bytes of the base's tensors: what `merge` has to go through."""
    return sum(info.n_bytes for info in model.file.tensors.values())


def _plan(
    model: Model, adapters: Sequence[tuple[Adapter, float]], dtype: DType | None, rescue: bool
) -> list[_Planned]:
    file, tied = model.file, model.weights.tied
    joined = join_adapters(adapters, model.adapter_shapes(dict.fromkeys(KINDS, 1)))

    def plan(name: str, info: TensorInfo, deltas: Sequence[_Delta]) -> _Planned:
        chosen = info.dtype
        if len(info.shape) > 1:
            if dtype is not None and info.shape[-1] % dtype.block == 0:
                chosen = dtype
            if deltas and rescue and chosen.block > 1:
                chosen = BF16
        return _Planned(name, info, file.data(info.name), chosen, deltas)

    planned = [
        plan(name, info, _deltas(model, name, joined)) for name, info in file.tensors.items()
    ]
    if tied and {"token_embd", "output"} & joined.keys():
        own = [_Delta(0, joined["output"])] if "output" in joined else []
        planned.append(plan(_OUTPUT, file.tensors[_EMBEDDING], own))
    return planned


def _deltas(model: Model, name: str, joined: dict[str, AdapterTensors]) -> list[_Delta]:
    base, _, suffix = name.rpartition(".")
    if suffix != "weight":
        return []
    if base in joined:
        return [_Delta(0, joined[base])]
    prefix, _, kind = base.rpartition(".")
    if kind != "attn_qkv":
        return []
    found, first = [], 0
    for part in ("attn_q", "attn_k", "attn_v"):
        weight = f"{prefix}.{part}"
        if weight in joined:
            found.append(_Delta(first, joined[weight]))
        first += model.weights.by_name[weight].rows
    return found


def _keys(model: Model, dtype: DType | None) -> list[tuple[str, KeyType, Any]]:
    file = model.file
    keys = [(key, file.value_types[key], value) for key, value in file.metadata.items()]
    if dtype is None:
        return keys
    kept = [key for key in keys if key[0] != _FILE_TYPE]
    return [*kept, (_FILE_TYPE, ValueType.U32, UNIFORM[dtype])]


def _write(
    item: _Planned, pool: ThreadPoolExecutor, ahead: int, on_tensor: Callable[[TensorReport], None]
) -> Iterator[Any]:
    """Give a tensor's bytes part by part, some of them made ahead; tell of it at the end."""
    report = TensorReport(item.name, item.info.dtype, item.dtype, bool(item.deltas))
    if item.is_copy:
        yield item.data
        report.n_bytes = item.info.n_bytes
    else:
        step = max(1, _PART_BYTES // (4 * item.row_length))
        steps = ((begin, min(begin + step, item.rows)) for begin in range(0, item.rows, step))
        for part in in_order(pool, lambda rows: _merge_rows(item, *rows), steps, ahead):
            yield _count(report, part)
    on_tensor(report)


@dataclass(frozen=True, slots=True)
class _Part:
    """Rows as they are stored, and sums of squares of what was added and of what was lost."""

    data: NDArray[np.uint8]
    n_values: int
    change: float
    error: float
    largest_error: float


def _count(report: TensorReport, part: _Part) -> NDArray[np.uint8]:
    report.n_values += part.n_values
    report.change += part.change
    report.error += part.error
    report.largest_error = max(report.largest_error, part.largest_error)
    report.n_bytes += part.data.nbytes
    return part.data


def _merge_rows(item: _Planned, begin: int, end: int) -> _Part:
    n, old = item.row_length, item.info.dtype
    row_bytes = old.row_bytes(n)
    stored = item.data[begin * row_bytes : end * row_bytes]
    values = decode(old.id, stored, (end - begin) * n).reshape(end - begin, n)
    change = 0.0
    with np.errstate(over="ignore", invalid="ignore"):  # seen below
        for delta in item.deltas:
            added = delta.of_rows(begin, end)
            if added is not None:
                rows, addend = added
                values[rows] += addend
                change += _squares(addend)
    flat = values.reshape(-1)
    mend = "look at the base with --check-tensors, and at the scales of the adapters"
    _check(item, flat, f"infinite or NaN; {mend}")
    data = quantize(item.dtype.id, values).reshape(-1)
    back = decode(item.dtype.id, data, flat.size)
    _check(item, back, f"beyond {item.dtype.name}; choose another --type")
    np.subtract(back, flat, out=back)
    return _Part(data, flat.size, change, _squares(back), float(np.abs(back).max()))


def _check(item: _Planned, values: NDArray[np.float32], problem: str) -> None:
    if not np.isfinite(values).all():
        raise DataError(f"tensor {item.name}: a merged weight is {problem}")


def _squares(values: NDArray[np.float32]) -> float:
    flat = values.reshape(-1).astype(np.float64)
    return float(np.dot(flat, flat))
