from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.graph import Graph, Node
from engine.tensor import Tensor

_Ints = NDArray[np.int32]

def lora_down(graph: Graph, x: Tensor, m: Tensor) -> Tensor: ...
def lora_up(graph: Graph, base: Tensor, u: Tensor, m: Tensor, scale: float) -> Tensor: ...
def lora_gather(graph: Graph, m: Tensor, ids: _Ints, n_tokens: int) -> Tensor: ...

# The nodes that these make, with the arguments that they give them.
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
