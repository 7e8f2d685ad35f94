from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.graph import Graph, Node
from engine.tensor import Tensor

_Ints = NDArray[np.int32]

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

# The nodes that these make, with the arguments that they give them.
class Attention(Node):
    def __init__(self, *args: Any) -> None: ...

class AttentionBack(Node):
    def __init__(self, *args: Any) -> None: ...
