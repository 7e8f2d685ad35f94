from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.graph import Graph, Node
from engine.tensor import Tensor

_Ints = NDArray[np.int32]
_Floats = NDArray[np.float32]

def embed(graph: Graph, w: Tensor, ids: _Ints, n_tokens: int) -> Tensor: ...
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

# The nodes that these make, with the arguments that they give them.
class Embed(Node):
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
