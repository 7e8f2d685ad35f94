from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.graph import Graph, Node
from engine.tensor import Tensor

_Ints = NDArray[np.int32]
_Floats = NDArray[np.float32]

DOT_TOKENS: int
DOT_RANK: int

def embed(graph: Graph, w: Tensor, ids: _Ints, n_tokens: int) -> Tensor: ...
def linear(
    graph: Graph,
    x: Tensor,
    w: Tensor,
    adapter: tuple[Tensor, Tensor, float] | None = None,
    base: Tensor | None = None,
    type: int = 0,
    u: Tensor | None = None,
) -> Tensor: ...
def linears(
    graph: Graph,
    x: Tensor,
    weights: Sequence[Tensor],
    adapters: Sequence[tuple[Tensor, Tensor, float] | None],
    types: Sequence[int],
) -> list[Tensor]: ...
def meets_within(x: Tensor, adapter: tuple[Tensor, Tensor, float]) -> bool: ...
def feed_forward(
    graph: Graph,
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    base: Tensor,
    adapters: tuple[tuple[Tensor, Tensor, float] | None, ...] = ...,
) -> Tensor: ...
def lora_down(graph: Graph, x: Tensor, m: Tensor) -> Tensor: ...
def lora_up(graph: Graph, base: Tensor, u: Tensor, m: Tensor, scale: float) -> Tensor: ...
def lora_gather(graph: Graph, m: Tensor, ids: _Ints, n_tokens: int) -> Tensor: ...
def rms_norm(graph: Graph, x: Tensor, w: Tensor, eps: float, type: int = 0) -> Tensor: ...
def rope(
    graph: Graph,
    x: Tensor,
    positions: _Ints,
    tables: tuple[_Floats, _Floats],
    n_head: int,
    round_f16: bool = False,
    type: int = 0,
) -> Tensor: ...
def silu_mul(graph: Graph, g: Tensor, u: Tensor, type: int = 0) -> Tensor: ...
def add(graph: Graph, a: Tensor, b: Tensor) -> Tensor: ...
def zero(graph: Graph, name: str, rows: int, cols: int) -> Tensor: ...
def cache_store(graph: Graph, x: Tensor, cache: Tensor, n_past: _Ints) -> None: ...
def attention(
    graph: Graph,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    n_seq: int,
    n_head: int,
    n_head_kv: int,
    scale: float,
    n_past: _Ints | None = None,
    first_key: _Ints | None = None,
    pairs: bool = False,
    type: int = 0,
) -> Tensor: ...
def multiplies_pairs(graph: Graph, w: Tensor) -> bool: ...
def kept_type(graph: Graph, n_tokens: int, weights: list[Tensor]) -> int: ...
def cross_entropy(
    graph: Graph, logits: Tensor, targets: _Ints, weight: _Floats, type: int = 0
) -> tuple[Tensor, Tensor]: ...
def probe(graph: Graph, steps: int = 0, data: Tensor | None = None, unit: str = "fma") -> int: ...

# The nodes that the functions above make, with the arguments that these give them.
class Embed(Node):
    def __init__(self, *args: Any) -> None: ...

class Pack(Node):
    def __init__(self, *args: Any) -> None: ...

class Linear(Node):
    def __init__(self, *args: Any) -> None: ...

class FeedForward(Node):
    def __init__(self, *args: Any) -> None: ...

class LinearBack(Node):
    def __init__(self, *args: Any) -> None: ...

class LoraDown(Node):
    def __init__(self, *args: Any) -> None: ...

class LoraUp(Node):
    def __init__(self, *args: Any) -> None: ...

class LoraOuter(Node):
    def __init__(self, *args: Any) -> None: ...

class LoraGather(Node):
    def __init__(self, *args: Any) -> None: ...

class LoraScatter(Node):
    def __init__(self, *args: Any) -> None: ...

class RmsNorm(Node):
    def __init__(self, *args: Any) -> None: ...

class RmsNormBack(Node):
    def __init__(self, *args: Any) -> None: ...

class Rope(Node):
    def __init__(self, *args: Any) -> None: ...

class SiluMul(Node):
    def __init__(self, *args: Any) -> None: ...

class SiluMulBack(Node):
    def __init__(self, *args: Any) -> None: ...

class Add(Node):
    def __init__(self, *args: Any) -> None: ...

class Zero(Node):
    def __init__(self, *args: Any) -> None: ...

class CacheStore(Node):
    def __init__(self, *args: Any) -> None: ...

class Attention(Node):
    def __init__(self, *args: Any) -> None: ...

class AttentionBack(Node):
    def __init__(self, *args: Any) -> None: ...

class CrossEntropy(Node):
    def __init__(self, *args: Any) -> None: ...

class Probe(Node):
    def __init__(self, *args: Any) -> None: ...
