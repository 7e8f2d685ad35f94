"""A model of two small layers, written once; the engine, float64 and PyTorch interpret it.

It has everything that a llama has: grouped heads, gates, residuals, and an adapter at each tensor,
the norms and the embedding among them.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from engine import ops
from engine.autograd import backward
from engine.dtypes import F32, DType
from engine.graph import Graph
from engine.tensor import Tensor
from tests import reference
from tests.graphs import f32, random, stored

Array = NDArray[Any]
Value = TypeVar("Value")

N_LAYER, RANK, SCALE, EPS, N_VOCAB = 2, 3, 1.5, 1e-5, 41


@dataclass
class Toy:
    """Sizes, weights, adapters and a batch."""

    n_embd: int
    n_head: int
    n_head_kv: int
    head_dim: int
    n_ff: int
    n_seq: int
    n_tokens: int
    dtype: DType = F32
    data: dict[str, Array] = field(default_factory=dict)  # stored bytes by name
    weights: dict[str, Array] = field(default_factory=dict)  # what they mean
    adapters: dict[str, Array] = field(default_factory=dict)  # "q0.A", "q0.B", ...
    ids: Array = field(default_factory=lambda: np.empty(0, np.int32))
    targets: Array = field(default_factory=lambda: np.empty(0, np.int32))

    @property
    def loss_weight(self) -> float:
        return 1 / len(self.ids)

    @property
    def positions(self) -> Array:
        return np.tile(np.arange(self.n_tokens, dtype=np.int32), self.n_seq)

    @property
    def attention_scale(self) -> float:
        return self.head_dim**-0.5

    def tables(self) -> tuple[Array, Array]:
        return reference.rope_tables(self.n_tokens, self.head_dim // 2 // 2 * 2)


def make_toy(rng: np.random.Generator, **sizes: Any) -> Toy:
    """A toy with random weights."""
    defaults: dict[str, Any] = {
        "n_embd": 32,
        "n_head": 4,
        "n_head_kv": 2,
        "head_dim": 8,
        "n_ff": 64,
        "n_seq": 2,
        "n_tokens": 9,
    }
    toy = Toy(**(defaults | sizes))
    n_q, n_kv = toy.n_head * toy.head_dim, toy.n_head_kv * toy.head_dim
    shapes = {"embd": (N_VOCAB, toy.n_embd), "out": (N_VOCAB, toy.n_embd), "norm": (1, toy.n_embd)}
    for layer in range(N_LAYER):
        shapes |= {
            f"norm_a{layer}": (1, toy.n_embd),
            f"q{layer}": (n_q, toy.n_embd),
            f"k{layer}": (n_kv, toy.n_embd),
            f"v{layer}": (n_kv, toy.n_embd),
            f"o{layer}": (toy.n_embd, n_q),
            f"norm_f{layer}": (1, toy.n_embd),
            f"gate{layer}": (toy.n_ff, toy.n_embd),
            f"up{layer}": (toy.n_ff, toy.n_embd),
            f"down{layer}": (toy.n_embd, toy.n_ff),
        }
    for name, (n_out, n_in) in shapes.items():
        is_norm = name.startswith("norm")
        dtype = F32 if is_norm else toy.dtype
        values = random(rng, n_out, n_in) * (1 if is_norm else n_in**-0.5)
        toy.data[name] = reference.encode(dtype, values)
        toy.weights[name] = reference.decode_row(dtype, toy.data[name]).reshape(n_out, n_in)
        toy.adapters[name + ".A"] = random(rng, RANK, n_in) * f32(n_in**-0.5)
        b_shape = (1, RANK) if is_norm else (RANK, n_out)
        toy.adapters[name + ".B"] = random(rng, *b_shape) * f32(0.3)
    n = toy.n_seq * toy.n_tokens
    toy.ids = rng.integers(0, N_VOCAB, n, np.int32)
    toy.targets = rng.integers(0, N_VOCAB, n, np.int32)
    toy.targets[n // 3] = -1
    return toy


class Interpreter(Protocol[Value]):
    """What the model is written against."""

    def segment(self, name: str) -> None: ...
    def embed(self) -> Value: ...
    def norm(self, x: Value, name: str) -> Value: ...
    def linear(self, x: Value, name: str) -> Value: ...
    def rope(self, x: Value, n_head: int) -> Value: ...
    def attention(self, q: Value, k: Value, v: Value) -> Value: ...
    def silu_mul(self, g: Value, u: Value) -> Value: ...
    def add(self, a: Value, b: Value) -> Value: ...


def logits(toy: Toy, do: Interpreter[Value]) -> Value:
    do.segment("embedding")
    x = do.embed()
    for layer in range(N_LAYER):
        do.segment(f"layer {layer}")
        n = do.norm(x, f"norm_a{layer}")
        q = do.rope(do.linear(n, f"q{layer}"), toy.n_head)
        k = do.rope(do.linear(n, f"k{layer}"), toy.n_head_kv)
        x = do.add(x, do.linear(do.attention(q, k, do.linear(n, f"v{layer}")), f"o{layer}"))
        n = do.norm(x, f"norm_f{layer}")
        gated = do.silu_mul(do.linear(n, f"gate{layer}"), do.linear(n, f"up{layer}"))
        x = do.add(x, do.linear(gated, f"down{layer}"))
    do.segment("head")
    return do.linear(do.norm(x, "norm"), "out")


class InGraph:
    """The engine's interpreter: adds nodes."""

    def __init__(self, toy: Toy, graph: Graph) -> None:
        self.toy, self.graph = toy, graph
        self.grads = {name: np.zeros_like(value) for name, value in toy.adapters.items()}
        self.parameters = {
            name: Tensor.parameter(name, value, self.grads[name])
            for name, value in toy.adapters.items()
        }

    def weight(self, name: str) -> Tensor:
        dtype = F32 if name.startswith("norm") else self.toy.dtype
        return stored(self.toy.data[name], dtype, *self.toy.weights[name].shape)

    def adapter(self, name: str) -> tuple[Tensor, Tensor]:
        return self.parameters[name + ".A"], self.parameters[name + ".B"]

    def segment(self, name: str) -> None:
        self.graph.segment = name

    def embed(self) -> Tensor:
        a, b = self.adapter("embd")
        n = len(self.toy.ids)
        x = ops.embed(self.graph, self.weight("embd"), self.toy.ids, n)
        u = ops.lora_gather(self.graph, b, self.toy.ids, n)
        return ops.lora_up(self.graph, x, u, a, SCALE)

    def norm(self, x: Tensor, name: str) -> Tensor:
        a, b = self.adapter(name)
        w = ops.lora_up(self.graph, self.weight(name), b, a, SCALE)
        return ops.rms_norm(self.graph, x, w, EPS)

    def linear(self, x: Tensor, name: str) -> Tensor:
        return ops.linear(self.graph, x, self.weight(name), (*self.adapter(name), SCALE))

    def rope(self, x: Tensor, n_head: int) -> Tensor:
        return ops.rope(self.graph, x, self.toy.positions, self.toy.tables(), n_head)

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        t = self.toy
        return ops.attention(self.graph, q, k, v, t.n_seq, t.n_head, t.n_head_kv, t.attention_scale)

    def silu_mul(self, g: Tensor, u: Tensor) -> Tensor:
        return ops.silu_mul(self.graph, g, u)

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        return ops.add(self.graph, a, b)


class Training:
    """The toy's training graph: run it, then read ``loss`` and ``grads``."""

    def __init__(
        self,
        toy: Toy,
        isa: str,
        n_threads: int = 1,
        checkpoints: bool = False,
        keep: bool = False,
        kept: Collection[str] = (),
    ) -> None:
        self.graph = Graph(n_threads, isa)
        interpreter = InGraph(toy, self.graph)
        last = logits(toy, interpreter)
        forward = list(self.graph.nodes)
        weight = np.array([toy.loss_weight], f32)
        loss, slope = ops.cross_entropy(self.graph, last, toy.targets, weight)
        self._loss = self.graph.keep(loss)
        backward(self.graph, forward, {last: slope}, checkpoints, kept)
        if keep:
            for node in self.graph.nodes:
                for tensor in node.outputs:
                    if tensor is not last and tensor.base is None:
                        self.graph.keep(tensor)
        self.graph.plan()
        self.grads = interpreter.grads

    def run(self) -> None:
        for grad in self.grads.values():
            grad[...] = 0
        self.graph.run()

    @property
    def loss(self) -> Array:
        return self._loss.numpy().copy()

    def results(self) -> dict[str, Array]:
        """Loss and gradients of a run."""
        self.run()
        return {"loss": self.loss} | {name: grad.copy() for name, grad in self.grads.items()}


class InFloat64:
    """The reference's interpreter; `adapters` may be float64."""

    def __init__(self, toy: Toy, adapters: dict[str, Array]) -> None:
        self.toy, self.adapters = toy, adapters

    def adapter(self, name: str) -> tuple[Array, Array]:
        return self.adapters[name + ".A"], self.adapters[name + ".B"]

    def segment(self, name: str) -> None:
        pass

    def embed(self) -> Array:
        a, b = self.adapter("embd")
        x, ids = reference.embed(self.toy.weights["embd"], self.toy.ids), self.toy.ids
        return reference.lora_up(x, reference.lora_gather(b, ids), a, SCALE)

    def norm(self, x: Array, name: str) -> Array:
        a, b = self.adapter(name)
        return reference.rms_norm(x, reference.lora_up(self.toy.weights[name], b, a, SCALE), EPS)

    def linear(self, x: Array, name: str) -> Array:
        a, b = self.adapter(name)
        return reference.linear(x, self.toy.weights[name], reference.lora_down(x, a), b, SCALE)

    def rope(self, x: Array, n_head: int) -> Array:
        return reference.rope(x, self.toy.positions, self.toy.tables(), n_head)

    def attention(self, q: Array, k: Array, v: Array) -> Array:
        t = self.toy
        return reference.attention(q, k, v, t.n_seq, t.n_head, t.n_head_kv, t.attention_scale)

    def silu_mul(self, g: Array, u: Array) -> Array:
        return reference.silu_mul(g, u)

    def add(self, a: Array, b: Array) -> Array:
        return a + b

    def loss(self, eps: float = 1e-9) -> Array:
        """Loss of each row."""
        values = logits(self.toy, self)
        return reference.cross_entropy(values, self.toy.targets, self.toy.loss_weight, eps)[0]
