"""Adapters in memory: the pairs, their names and order, initial values, the base they fit."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from engine.errors import FormatError, ShapeError
from engine.llama import LAYER_TENSORS
from engine.lora.bin_form import write_bin
from engine.mt19937 import MT19937, NormalFloat

FloatArray = NDArray[np.float32]
AdapterShape = tuple[str, int, int, int]  # name, n_in, n_out, rank

MODEL_KINDS = ("token_embd", "output_norm", "output")
LAYER_KINDS = LAYER_TENSORS
KINDS = MODEL_KINDS + LAYER_KINDS
# The option of finetune that leaves a norm out.
NORM_OPTIONS = {
    "output_norm": "--rank-out-norm 0",
    "attn_norm": "--rank-att-norm 0",
    "ffn_norm": "--rank-ffn-norm 0",
}


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


class _Model(Protocol):
    """What `BaseInfo.of` asks of a model."""

    hparams: Any
    weights: Any
    file: Any


@dataclass(frozen=True, slots=True)
class BaseInfo:
    """What the forms must know of the model that an adapter belongs to.

    Attributes
    ----------
    n_head, n_head_kv, head_dim, n_layer : int
    tied : bool
        The output takes the embedding's weights, and there is no tensor ``output.weight``.
    name : str
        Where PEFT finds the model, or what it is called.
    architecture : str
    """

    n_head: int
    n_head_kv: int
    head_dim: int
    n_layer: int
    tied: bool
    name: str = ""
    architecture: str = "llama"

    @classmethod
    def of(cls, model: _Model) -> BaseInfo:
        """Describe a loaded `Model`."""
        h, file = model.hparams, model.file
        return cls(
            h.n_head,
            h.n_head_kv,
            h.head_dim,
            h.n_layer,
            model.weights.tied,
            file.get_str("general.source.huggingface.repository", file.path.name),
            file.get_str("general.architecture"),
        )


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
    rslora : bool
        Scale by alpha / √r in place of alpha / r (arXiv:2312.03732).

    Attributes
    ----------
    flat : ndarray of shape (n_parameters,), float32
        Every `LoraPair.a` and `LoraPair.b` is a view of it. Zeros at first.
    pairs : dict of str to LoraPair
        In the order of `shapes`.
    unused : list of str
        Tensors of its file that cannot be applied beside the base's weights, as whole norms are.

    Raises
    ------
    ShapeError
        If a size is below 1, a rank below 0, or a name is given twice.
    """

    def __init__(
        self,
        shapes: Iterable[AdapterShape],
        r: int,
        alpha: float,
        source: str = "new adapter",
        rslora: bool = False,
    ) -> None:
        self.r = r
        self.alpha = alpha
        self.source = source
        self.rslora = rslora
        self.unused: list[str] = []
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
        """Factor of the product: alpha / r or alpha / √r, whatever a tensor's own rank."""
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)

    @property
    def n_bytes(self) -> int:
        """Bytes of all parameters."""
        return self.flat.nbytes

    @property
    def shapes(self) -> list[AdapterShape]:
        """Name, n_in, n_out and rank of every pair, in order."""
        return [(p.name, p.n_in, p.n_out, p.rank) for p in self.pairs.values()]

    def without(self, kinds: Collection[str]) -> Adapter:
        """Copy the adapter but for some kinds of tensor, as ``attn_norm``."""
        shapes = [shape for shape in self.shapes if kind_of(shape[0]) not in kinds]
        kept = Adapter(shapes, self.r, self.alpha, self.source, self.rslora)
        for name, pair in kept.pairs.items():
            pair.a[:], pair.b[:] = self.pairs[name].a, self.pairs[name].b
        return kept

    def write_bin(self, path: Path | str) -> None:
        """Write the ``.bin`` form beside `path`, then rename.

        The header knows nothing of alpha / √r: B takes up the factor √r of an adapter so scaled,
        which is then read back as a plain one of the same effect.

        Raises
        ------
        FormatError
            If alpha is no whole number, which the header cannot hold.
        """
        fold = np.float32(math.sqrt(self.r) if self.rslora else 1.0)
        tensors = (
            (f"{pair.name}.weight{suffix}", file_order(factor))
            for pair in self.pairs.values()
            for suffix, factor in ((".loraA", pair.a), (".loraB", pair.b * fold))
        )
        write_bin(path, self.r, self.alpha, tensors)


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


class Factors(NamedTuple):
    """A tensor's factors as a file has them, rank-major, and what its B is to be multiplied by."""

    a: NDArray[np.floating]
    b: NDArray[np.floating]
    fold: float = 1.0


def join_factors(
    found: Mapping[str, Factors], r: int, alpha: float, source: str, rslora: bool = False
) -> Adapter:
    """Make the adapter that a file holds.

    Raises
    ------
    FormatError
        If there are no tensors, the ranks of A and B differ, or a number is not finite.
    """
    if not found:
        raise FormatError(f"{source}: the adapter holds no tensors")
    for name, (a, b, _) in found.items():
        if len(a) != len(b):
            raise FormatError(f"{source}: tensor {name}: A has rank {len(a)}, B {len(b)}")
    shapes = [(name, a.shape[1], b.shape[1], len(a)) for name, (a, b, _) in found.items()]
    adapter = Adapter(shapes, r, alpha, source, rslora)
    for name, (a, b, fold) in found.items():
        pair = adapter.pairs[name]
        with np.errstate(over="ignore", invalid="ignore"):  # seen below
            pair.a[:] = a
            pair.b[:] = b
            if fold != 1.0:
                pair.b *= np.float32(fold)
        for suffix, factor in (("A", pair.a), ("B", pair.b)):
            if not np.isfinite(factor).all():
                raise FormatError(
                    f"{source}: tensor {name}: its {suffix} holds an infinite or NaN number"
                )
    return adapter


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
    shapes: Sequence[AdapterShape],
    r: int,
    alpha: float,
    seed: int,
    source: str = "new adapter",
    rslora: bool = False,
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
    rslora : bool
        Scale by alpha / √r.
    """
    adapter = Adapter(shapes, r, alpha, source, rslora)
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


def norm_refusals(shapes: Iterable[AdapterShape], form: str) -> list[str]:
    """Say that a form holds no adapters of norms, and by which options they are left out."""
    kinds = {kind_of(name) for name, *_ in shapes}
    norms = [kind for kind in NORM_OPTIONS if kind in kinds]
    if not norms:
        return []
    options = " ".join(NORM_OPTIONS[kind] for kind in norms)
    return [f"{form} cannot hold adapters of norms ({', '.join(norms)}); add {options}"]


def file_order(factor: FloatArray) -> FloatArray:
    """Copy a rank-major factor into the order of files: (rank, n) → (n, rank), contiguous."""
    return np.ascontiguousarray(factor.T, dtype="<f4")
