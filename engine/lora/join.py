"""Several adapters as one: what a model's graph takes beside its weights."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from engine.dtypes import F16
from engine.llama import AdapterTensors
from engine.lora.adapter import Adapter, AdapterShape
from engine.ops import DOT_RANK
from engine.tensor import Tensor


def join_adapters(
    adapters: Sequence[tuple[Adapter, float]], shapes: Iterable[AdapterShape]
) -> dict[str, AdapterTensors]:
    """Stack adapters by rank, so that any number of them costs one pair of thin products.

    Parameters
    ----------
    adapters : sequence of (Adapter, scale)
        Each adapter's own scale alpha / r is multiplied in.
    shapes : from `adapter_shapes`
        Tensors of the model.
    """
    joined = {}
    for name, n_in, n_out, _ in shapes:
        pairs = [(a.pairs[name], s * a.scale) for a, s in adapters if name in a.pairs]
        if not pairs:
            continue
        a = np.concatenate([pair.a for pair, _ in pairs])
        b = np.concatenate([pair.b * np.float32(scale) for pair, scale in pairs])
        if n_out == 1:
            b = b.reshape(1, -1)
        rank = len(a)
        joined[name] = AdapterTensors(
            Tensor.external(name + ".a", a, rank, n_in),
            Tensor.external(name + ".b", b, *b.shape),
            1.0,
        )
    return joined


def in_halves(
    joined: Mapping[str, AdapterTensors], names: Collection[str]
) -> tuple[dict[str, AdapterTensors], dict[str, AdapterTensors]]:
    """Factors beside quantized weights rounded to half precision: as float32, and as halves.

    A token reads all factors, which take some percent of the bytes that quantized weights take. A
    rounded factor is off by 2**-12 of itself, less than the product's 8-bit activations are.

    Parameters
    ----------
    joined : from `join_adapters`
    names : collection of str
        Weights that meet 8-bit activations. Adapters of others, and of ranks that a product of few
        tokens does not take, are passed on as they are.

    Returns
    -------
    floats, halves : dict of str to AdapterTensors
        The same numbers twice: for products of many tokens, and for those of few.
    """
    floats, halves = dict(joined), dict(joined)
    rounded = {}
    for name in names:
        if name in joined and joined[name].a.rows <= DOT_RANK:
            rounded[name] = rounded_factors(joined[name].a.numpy(), joined[name].b.numpy())
    if not rounded:
        return floats, halves
    together = _Beside(sum(a.size + b.size for a, b, _ in rounded.values()), 2 * len(rounded))
    for name, (half_a, half_b, exponent) in rounded.items():
        a, b, scale = joined[name]
        scale *= 2.0**exponent
        halves[name] = AdapterTensors(
            Tensor.external(a.name, together.place(half_a), *a.shape, F16.id),
            Tensor.external(b.name, together.place(half_b), *b.shape, F16.id),
            scale,
        )
        floats[name] = AdapterTensors(
            Tensor.external(a.name, half_a.astype(np.float32), *a.shape),
            Tensor.external(b.name, half_b.astype(np.float32), *b.shape),
            scale,
        )
    return floats, halves


class _Beside:
    """Halves in one array, each matrix from a line of 64 bytes on.

    A token would meet every page once and wait for its address; arrays of at least 4 MiB get large
    pages from NumPy, where the system has them.
    """

    LINE = 32

    def __init__(self, size: int, count: int) -> None:
        size = max(size + self.LINE * (count + 1), 3 << 20)
        self.array = np.zeros(size, np.float16)
        self.used = -(self.array.ctypes.data // 2) % self.LINE

    def place(self, values: NDArray[np.float16]) -> NDArray[np.float16]:
        """Copy some values to the next place."""
        at = self.array[self.used : self.used + values.size]
        at[:] = values.reshape(-1)
        self.used += -(-values.size // self.LINE) * self.LINE
        return at


def rounded_factors(
    a: NDArray[np.float32], b: NDArray[np.float32]
) -> tuple[NDArray[np.float16], NDArray[np.float16], int]:
    """Round A and B to half precision; their product times 2**exponent is that of the given ones.

    Powers of two move from each row of A to that of B until both use the range of halves: nothing
    is lost to small numbers.
    """
    top = 15  # the largest numbers then lie in [2**14, 2**15]
    with np.errstate(over="ignore", invalid="ignore"):  # products that float32 cannot hold either
        exponents = np.frexp(np.abs(a).max(axis=1, keepdims=True))[1]
        # What meets a row of zeros adds nothing, and must not decide the range of the others.
        moved = np.where(a.any(axis=1, keepdims=True), np.ldexp(b, exponents), np.float32(0))
        common = int(np.frexp(np.abs(moved).max())[1])
        half_a = np.ldexp(a, top - exponents).astype(np.float16)
        half_b = np.ldexp(moved, top - common).astype(np.float16)
    return half_a, half_b, common - 2 * top
