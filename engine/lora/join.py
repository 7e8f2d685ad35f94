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
    for name in names:
        if name not in joined or joined[name].a.rows > DOT_RANK:
            continue
        a, b, scale = joined[name]
        half_a, half_b, exponent = rounded_factors(a.numpy(), b.numpy())
        scale *= 2.0**exponent
        halves[name] = AdapterTensors(
            Tensor.external(a.name, half_a, *a.shape, F16.id),
            Tensor.external(b.name, half_b, *b.shape, F16.id),
            scale,
        )
        floats[name] = AdapterTensors(
            Tensor.external(a.name, half_a.astype(np.float32), *a.shape),
            Tensor.external(b.name, half_b.astype(np.float32), *b.shape),
            scale,
        )
    return floats, halves


def rounded_factors(
    a: NDArray[np.float32], b: NDArray[np.float32]
) -> tuple[NDArray[np.float16], NDArray[np.float16], int]:
    """Round A and B to half precision; their product times 2**exponent is that of the given ones.

    Powers of two move from each row of A to that of B until both use the range of halves: nothing
    is lost to small numbers.
    """
    top = 15  # the largest numbers then lie in [2**14, 2**15]
    exponents = np.frexp(np.abs(a).max(axis=1, keepdims=True))[1]
    moved = np.ldexp(b, exponents)
    common = int(np.frexp(np.abs(moved).max())[1])
    a = np.ldexp(a, top - exponents)
    return a.astype(np.float16), np.ldexp(moved, top - common).astype(np.float16), common - 2 * top
