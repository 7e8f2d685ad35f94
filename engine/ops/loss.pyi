from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.graph import Graph, Node
from engine.tensor import Tensor

_Ints = NDArray[np.int32]
_Floats = NDArray[np.float32]

def cross_entropy(
    graph: Graph, logits: Tensor, targets: _Ints, weight: _Floats, type: int = 0
) -> tuple[Tensor, Tensor]: ...

# The nodes that these make, with the arguments that they give them.
class CrossEntropy(Node):
    def __init__(self, *args: Any) -> None: ...
