from typing import Any

from engine.graph import Graph, Node
from engine.tensor import Tensor

def probe(graph: Graph, steps: int = 0, data: Tensor | None = None, unit: str = "fma") -> int: ...

# The nodes that these make, with the arguments that they give them.
class Probe(Node):
    def __init__(self, *args: Any) -> None: ...
