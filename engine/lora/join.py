"""Several adapters as one: what a model's graph takes beside its weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from engine.llama import AdapterTensors
from engine.lora.adapter import Adapter, AdapterShape
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
