"""LoRA adapters in memory, and the files they are kept in.

An adapter adds to a weight W of n_out rows of n_in elements the product scale · Bᵀ · A, where A is
``(rank, n_in)`` and B ``(rank, n_out)``: both rank-major, so that the two thin products of a
forward pass read rows. Files hold them the other way round, one row of `rank` numbers for every
input or output; reading and writing transpose.

Forms of a file are told apart by its first four bytes (`_READERS`): ``ggla`` is the older
``.bin`` form. A GGUF adapter (``GGUF``) and a PEFT folder find their place in the same map.

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.errors import FormatError, ShapeError
from engine.gguf import atomic_write
from engine.mt19937 import MT19937, NormalFloat

FloatArray = NDArray[np.float32]
AdapterShape = tuple[str, int, int, int]  # name, n_in, n_out, rank

MODEL_KINDS = ("token_embd", "output_norm", "output")
LAYER_KINDS = (
    "attn_norm",
    "attn_q",
    "attn_k",
    "attn_v",
    "attn_output",
    "ffn_norm",
    "ffn_gate",
    "ffn_down",
    "ffn_up",
)
KINDS = MODEL_KINDS + LAYER_KINDS

_BIN_MAGIC = b"algg"  # the number 0x67676c61, little-endian
_BIN_VERSION = 1
_BIN_ALIGNMENT = 32
_BIN_TYPES: dict[int, np.dtype] = {0: np.dtype("<f4"), 1: np.dtype("<f2")}
_MAX_NAME_BYTES = 255
_MAX_SIZE = 2**31 - 1


@dataclass(slots=True)
class LoraPair:
    """The two factors of one adapted tensor.

    Attributes
    ----------
    name : str
        The tensor without a suffix, as ``blk.0.attn_q``.
    n_in, n_out, rank : int
        Sizes; `n_out` is 1 for norms.
    a : ndarray of shape (rank, n_in), float32
    b : ndarray of shape (rank, n_out), float32
    """

    name: str
    n_in: int
    n_out: int
    rank: int
    a: FloatArray
    b: FloatArray


class Adapter:
    """Pairs over one contiguous array, in the order given, A then B of each.

    Parameters
    ----------
    shapes : iterable of (name, n_in, n_out, rank)
        The adapted tensors; those of rank 0 get no pair.
    r : int
        Rank of the file's header; single tensors may have another.
    alpha : float
        Numerator of the scale.
    source : str, optional
        Where the adapter comes from, for messages.

    Attributes
    ----------
    flat : ndarray of shape (n_parameters,), float32
        Every `LoraPair.a` and `LoraPair.b` is a view of it. Zeros at first.
    pairs : dict of str to LoraPair
        In the order of `shapes`.

    Raises
    ------
    ShapeError
        If a size is below 1, a rank below 0, or a name is given twice.
    """

    def __init__(
        self, shapes: Iterable[AdapterShape], r: int, alpha: float, source: str = "new adapter"
    ) -> None:
        self.r = r
        self.alpha = alpha
        self.source = source
        kept = _checked_shapes(shapes, source)
        self.flat: FloatArray = np.zeros(
            sum(rank * (n_in + n_out) for _, n_in, n_out, rank in kept), dtype=np.float32
        )
        self.pairs: dict[str, LoraPair] = {}
        begin = 0
        for name, n_in, n_out, rank in kept:
            middle = begin + rank * n_in
            end = middle + rank * n_out
            a = self.flat[begin:middle].reshape(rank, n_in)
            b = self.flat[middle:end].reshape(rank, n_out)
            self.pairs[name] = LoraPair(name, n_in, n_out, rank, a, b)
            begin = end

    @property
    def scale(self) -> float:
        """Factor of the product: alpha / r, whatever a tensor's own rank."""
        return self.alpha / self.r

    @property
    def n_bytes(self) -> int:
        """Bytes of all parameters."""
        return self.flat.nbytes

    @property
    def shapes(self) -> list[AdapterShape]:
        """Name, n_in, n_out and rank of every pair, in order."""
        return [(p.name, p.n_in, p.n_out, p.rank) for p in self.pairs.values()]

    def write_bin(self, path: Path | str) -> None:
        """Write the ``.bin`` form beside `path`, then rename.

        Raises
        ------
        FormatError
            If alpha is no whole number, which the header cannot hold.
        """
        if self.alpha != int(self.alpha):
            raise FormatError(
                f"{path}: alpha {self.alpha} is not a whole number, as the .bin form needs"
            )
        with atomic_write(path) as out:
            head = _BIN_MAGIC + struct.pack("<3I", _BIN_VERSION, self.r, int(self.alpha))
            position = out.write(head)
            for pair in self.pairs.values():
                for suffix, factor in ((".loraA", pair.a), (".loraB", pair.b)):
                    head = _bin_record_head(f"{pair.name}.weight{suffix}", factor, position)
                    position += out.write(head) + out.write(file_order(factor).data)


def _checked_shapes(shapes: Iterable[AdapterShape], source: str) -> list[AdapterShape]:
    kept: dict[str, AdapterShape] = {}
    for name, n_in, n_out, rank in shapes:
        if n_in < 1 or n_out < 1 or rank < 0:
            raise ShapeError(
                f"{source}: tensor {name}: {n_in} × {n_out} at rank {rank} cannot be adapted"
            )
        if name in kept:
            raise ShapeError(f"{source}: tensor {name} is named twice")
        if rank:
            kept[name] = (name, n_in, n_out, rank)
    return list(kept.values())


def kind_of(name: str) -> str:
    """Name of a tensor without its layer: ``attn_q`` of ``blk.3.attn_q``."""
    return name.rpartition(".")[2]


def layer_of(name: str) -> int:
    """Layer of a tensor, -1 when it belongs to no layer.

    Raises
    ------
    ValueError
        If `name` is not a name of an adapted tensor.
    """
    if name in MODEL_KINDS:
        return -1
    prefix, _, rest = name.partition(".")
    number, _, kind = rest.partition(".")
    plain = number.isascii() and number.isdecimal() and str(int(number[:9])) == number
    if prefix != "blk" or not plain or kind not in LAYER_KINDS:
        raise ValueError(name)
    return int(number)


def table_position(name: str) -> tuple[int, int]:
    """Key that sorts names into the order of files and of initial values.

    Raises
    ------
    ValueError
        If `name` is not a name of an adapted tensor.
    """
    return layer_of(name), KINDS.index(kind_of(name))


def table_names(n_layer: int) -> Iterator[str]:
    """Names of all adapted tensors of a model, in the table's order."""
    yield from MODEL_KINDS
    for layer in range(n_layer):
        yield from (f"blk.{layer}.{kind}" for kind in LAYER_KINDS)


def create_adapter(
    shapes: Sequence[AdapterShape], r: int, alpha: float, seed: int, source: str = "new adapter"
) -> Adapter:
    """Make an untrained adapter: B zero, A random, so that it changes nothing yet.

    An element of A is s · clamp(z, -1, 1) with z normal and s = 1 / √(rank + n_in), drawn in the
    order of `shapes` and, within a tensor, of its file.

    Parameters
    ----------
    shapes : sequence of (name, n_in, n_out, rank)
        In the table's order; those of rank 0 get no pair and draw nothing.
    r, alpha : int, float
        Of the header.
    seed : int
        From 0 to 2**32 - 1.
    source : str, optional
        For messages.
    """
    adapter = Adapter(shapes, r, alpha, source)
    normal = NormalFloat(MT19937(seed))
    for pair in adapter.pairs.values():
        scale = np.float32(1) / np.sqrt(np.float32(pair.rank) + np.float32(pair.n_in))
        drawn = np.empty(pair.n_in * pair.rank, dtype=np.float32)
        normal.fill(drawn, float(scale))
        pair.a[:] = drawn.reshape(pair.n_in, pair.rank).T
    return adapter


def check_fits(adapter: Adapter, shapes: Iterable[AdapterShape]) -> None:
    """Refuse an adapter that was made for another model.

    Parameters
    ----------
    adapter : Adapter
    shapes : iterable of (name, n_in, n_out, rank)
        The model's tensors; their ranks are not looked at.

    Raises
    ------
    ShapeError
        Names the adapter, the tensor and both sizes.
    """
    sizes = {name: (n_in, n_out) for name, n_in, n_out, _ in shapes}
    for pair in adapter.pairs.values():
        if pair.name not in sizes:
            raise ShapeError(
                f"{adapter.source}: tensor {pair.name}: the model has no such tensor;"
                " the adapter was made for another model"
            )
        if sizes[pair.name] != (pair.n_in, pair.n_out):
            n_in, n_out = sizes[pair.name]
            raise ShapeError(
                f"{adapter.source}: tensor {pair.name}: adapts {pair.n_in} × {pair.n_out},"
                f" the model has {n_in} × {n_out}; the adapter was made for another model"
            )


def file_order(factor: FloatArray) -> FloatArray:
    """Copy a rank-major factor into the order of files: (rank, n) → (n, rank), contiguous."""
    return np.ascontiguousarray(factor.T, dtype="<f4")


def read_adapter(path: Path | str) -> Adapter:
    """Read an adapter, whatever its form.

    Raises
    ------
    FormatError
        If the file cannot be read, is of an unknown form, or contradicts itself; names the file,
        the tensor and the reason.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise FormatError(f"{path}: cannot be read: {error.strerror}") from error
    reader = _READERS.get(content[:4])
    if reader is None:
        raise FormatError(
            f"{path}: not an adapter: begins with {content[:4]!r}, expected {_BIN_MAGIC!r}"
        )
    return reader(content, str(path))


# The .bin form: u32 magic, version, r, alpha; then records to the end of the file.


@dataclass(slots=True)
class _Record:
    """One tensor of a ``.bin`` file; `rows` is (n, rank), in the file's type."""

    name: str
    rows: NDArray[np.floating]


def _bin_record_head(name: str, factor: FloatArray, position: int) -> bytes:
    """Sizes, name and padding of a tensor that begins at `position` of the file."""
    rank, n = factor.shape
    sizes = (rank, n) if n > 1 else (rank,)
    encoded = name.encode()
    head = struct.pack(f"<3I{len(sizes)}I", len(sizes), len(encoded), 0, *sizes) + encoded
    return head + bytes(-(position + len(head)) % _BIN_ALIGNMENT)


def _read_bin(content: bytes, source: str) -> Adapter:
    version, r, alpha = _unpack("<3I", content, 4, source, "the header")
    if version != _BIN_VERSION:
        raise FormatError(f"{source}: adapter version {version} is unknown, expected 1")
    if r == 0 or r > _MAX_SIZE:
        raise FormatError(f"{source}: r is {r}, expected a rank from 1 to {_MAX_SIZE}")
    records = {}
    position = 16
    while position < len(content):
        record, position = _bin_record(content, position, source)
        if record.name in records:
            raise FormatError(f"{source}: tensor {record.name} is there twice")
        records[record.name] = record
    if not records:
        raise FormatError(f"{source}: the adapter holds no tensors")
    return _paired(records, r, alpha, source)


def _bin_record(content: bytes, position: int, source: str) -> tuple[_Record, int]:
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
    if type_id not in _BIN_TYPES:
        raise FormatError(
            f"{source}: tensor {name} has type {type_id}, expected 0 (F32) or 1 (F16)"
        )
    if not all(1 <= size <= _MAX_SIZE for size in sizes):
        shape = " × ".join(map(str, sizes))
        raise FormatError(f"{source}: tensor {name} has an impossible size {shape}")
    rank, n = sizes if n_dims == 2 else (sizes[0], 1)
    dtype = _BIN_TYPES[type_id]
    begin += n_name
    begin += -begin % _BIN_ALIGNMENT
    end = begin + rank * n * dtype.itemsize
    if end > len(content):
        raise FormatError(
            f"{source}: tensor {name} ends at byte {end}, the file after {len(content)};"
            " it is cut off"
        )
    rows = np.frombuffer(content, dtype, rank * n, begin).reshape(n, rank)
    return _Record(name, rows), end


def _paired(records: dict[str, _Record], r: int, alpha: float, source: str) -> Adapter:
    """Join the records ``NAME.weight.loraA`` and ``.loraB`` of each tensor."""
    found: dict[str, tuple[_Record, _Record]] = {}
    for full_name in records:
        name, _, suffix = full_name.rpartition(".weight.")
        if not name or suffix not in ("loraA", "loraB"):
            raise FormatError(
                f"{source}: tensor {full_name}: expected a name that ends in"
                " .weight.loraA or .weight.loraB"
            )
        pair = [records.get(f"{name}.weight.{half}") for half in ("loraA", "loraB")]
        if pair[0] is None or pair[1] is None:
            missing = "loraA" if pair[0] is None else "loraB"
            raise FormatError(f"{source}: tensor {name}.weight.{missing} is missing")
        found[name] = (pair[0], pair[1])
    shapes = []
    for name, (a, b) in found.items():
        if a.rows.shape[1] != b.rows.shape[1]:
            raise FormatError(
                f"{source}: tensor {name}: loraA has rank {a.rows.shape[1]},"
                f" loraB {b.rows.shape[1]}"
            )
        shapes.append((name, len(a.rows), len(b.rows), a.rows.shape[1]))
    adapter = Adapter(shapes, r, alpha, source)
    for name, (a, b) in found.items():
        adapter.pairs[name].a[:] = a.rows.T
        adapter.pairs[name].b[:] = b.rows.T
    return adapter


def _unpack(layout: str, content: bytes, position: int, source: str, what: str) -> tuple[Any, ...]:
    """Unpack `layout` at `position`, or say that the file ends within `what`."""
    if position + struct.calcsize(layout) > len(content):
        raise FormatError(
            f"{source}: the file ends after {len(content)} bytes, within {what}; it is cut off"
        )
    return struct.unpack_from(layout, content, position)


_READERS: dict[bytes, Callable[[bytes, str], Adapter]] = {_BIN_MAGIC: _read_bin}
