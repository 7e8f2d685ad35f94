from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.graph import Node
from engine.lora import Adapter
from engine.perf import OpTimes

@dataclass(frozen=True, slots=True)
class AdamWParams:
    alpha: float = ...
    beta1: float = ...
    beta2: float = ...
    decay: float = ...
    decay_min_ndim: int = ...
    gclip: float = ...

class SquareSums(Node):
    def __init__(self, *args: Any) -> None: ...

class Update(Node):
    def __init__(self, *args: Any) -> None: ...

class AdamW:
    params: AdamWParams
    m: NDArray[np.float32]
    v: NDArray[np.float32]
    def __init__(
        self,
        adapter: Adapter,
        params: AdamWParams,
        n_threads: int = 1,
        isa: str | None = None,
        measure: bool = False,
    ) -> None: ...
    def add_times(self, times: OpTimes) -> None: ...
    def norm(self, grad: NDArray[np.float32]) -> float: ...
    def step(
        self,
        grad: NDArray[np.float32],
        sched: float,
        iteration: int,
        norm: float | None = None,
    ) -> float: ...
