from collections.abc import Sequence
from typing import Any

from engine.graph import Graph, Node
from engine.tensor import Tensor

DOT_TOKENS: int
DOT_RANK: int

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
def multiplies_pairs(graph: Graph, w: Tensor) -> bool: ...
def kept_type(graph: Graph, n_tokens: int, weights: list[Tensor]) -> int: ...

# The nodes that these make, with the arguments that they give them.
class Pack(Node):
    def __init__(self, *args: Any) -> None: ...

class Linear(Node):
    def __init__(self, *args: Any) -> None: ...

class FeedForward(Node):
    def __init__(self, *args: Any) -> None: ...

class LinearBack(Node):
    def __init__(self, *args: Any) -> None: ...
    @property
    def adds_up(self) -> bool: ...
    def add_up(self, scale: float, *parts: Tensor) -> None: ...
