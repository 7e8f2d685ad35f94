"""Small graphs for the tests of ops: one node, its inputs, its result, its gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine import ops
from engine.autograd import backward
from engine.dtypes import BF16, F32, DType
from engine.graph import Graph
from engine.tensor import Tensor
from tests import reference

Array = NDArray[Any]
f32 = np.float32


def random(rng: np.random.Generator, *shape: int) -> NDArray[np.float32]:
    return rng.standard_normal(shape, f32)


def given(array: Array, name: str = "given", *, writable: bool = False) -> Tensor:
    """A float32 matrix as an external tensor."""
    rows, cols = array.shape
    return Tensor.external(name, array, rows, cols, 0, writable)


def given_bf16(
    array: Array, name: str = "given", guard: Callable[[Array], Array] = np.copy
) -> Tensor:
    """A float32 matrix, rounded, as an external BF16 tensor; `guard` copies its bytes."""
    rows, cols = array.shape
    return Tensor.external(name, guard(reference.encode(BF16, array)), rows, cols, BF16.id)


def shown(graph: Graph, tensor: Tensor) -> Tensor:
    """The numbers of a tensor of any type as F32: itself, or all of its rows as an embedding."""
    if tensor.type == F32.id:
        return tensor
    return ops.embed(graph, tensor, np.arange(tensor.rows, dtype=np.int32), tensor.rows)


def stored(data: Array, dtype: DType, rows: int, cols: int) -> Tensor:
    """Encoded bytes as a frozen weight."""
    return Tensor.external("w", data, rows, cols, dtype.id)


def planned(graph: Graph, array: Array, name: str = "x") -> Tensor:
    """A tensor in the graph's arena that holds `array` and wants a gradient.

    It is ``array + 0 * parameter``, which is exact for every value, -0 apart.
    """
    rows, cols = array.shape
    zeros, ones = np.zeros((1, cols), f32), np.ones((rows, 1), f32)
    parameter = Tensor.parameter(name, zeros, np.zeros_like(zeros))
    return ops.lora_up(graph, given(array, name), given(ones), parameter, 1.0)


def trained(value: Array, name: str = "parameter") -> tuple[Tensor, Array]:
    """A parameter and its gradient, which begins at zero."""
    grad = np.zeros_like(value)
    return Tensor.parameter(name, value, grad), grad


def adapter_of(x: Array, sizes: list[tuple[int, int, int]]) -> SimpleNamespace:
    """What the optimizer asks of an adapter; sizes are those of A, of B, and n_out."""
    pairs, begin = {}, 0
    for a_size, b_size, n_out in sizes:
        a, b = x[begin : begin + a_size], x[begin + a_size : begin + a_size + b_size]
        pairs[f"w{len(pairs)}"] = SimpleNamespace(a=a, b=b, n_out=n_out)
        begin += a_size + b_size
    assert begin == x.size
    return SimpleNamespace(flat=x, pairs=pairs)


def weight(rng: np.random.Generator, dtype: DType, rows: int, cols: int) -> tuple[Array, Array]:
    """Stored bytes of a random matrix, and what they mean."""
    data = reference.encode(dtype, random(rng, rows, cols))
    return data, reference.decode_row(dtype, data).reshape(rows, cols)


Build = Callable[..., Tensor | Sequence[Tensor]]


def compute(isa: str, build: Callable[[Graph], Any], n_threads: int = 1) -> list[Array]:
    """Values of the tensors that `build` makes, as float32."""
    graph = Graph(n_threads, isa)
    made = build(graph)
    outputs = [shown(graph, tensor) for tensor in ([made] if isinstance(made, Tensor) else made)]
    for tensor in outputs:
        graph.keep(tensor)
    graph.plan()
    graph.run()
    return [tensor.numpy().copy() for tensor in outputs]


def gradients(
    isa: str, arrays: Sequence[Array], build: Build, dy: Array, n_threads: int = 1
) -> list[Array]:
    """Value of ``build(graph, *tensors)`` and gradients of ``sum(dy * value)``, one an array."""
    graph = Graph(n_threads, isa)
    tensors = [planned(graph, array) for array in arrays]
    first = len(graph.nodes)
    y = build(graph, *tensors)
    graph.keep(y)
    seed = given(np.ascontiguousarray(dy, f32), "dy")
    found = backward(graph, graph.nodes[first:], {y: seed})
    for tensor in tensors:
        graph.keep(found[tensor])
    graph.plan()
    graph.run()
    return [y.numpy().copy()] + [found[tensor].numpy().copy() for tensor in tensors]
