from typing import Final, final

import numpy as np
from numpy.typing import NDArray

from engine.grammar import GrammarMatcher
from engine.sampling.params import RANDOM_SEED as RANDOM_SEED
from engine.sampling.params import SAMPLERS as SAMPLERS
from engine.sampling.params import SamplingParams

STEPS: Final[dict[str, int]]

@final
class Sampler:
    def __new__(
        cls,
        params: SamplingParams,
        n_vocab: int,
        newline_id: int = ...,
        grammar: GrammarMatcher | None = ...,
    ) -> Sampler: ...
    @property
    def params(self) -> SamplingParams: ...
    @property
    def seed(self) -> int: ...
    @property
    def recent(self) -> NDArray[np.int32]: ...
    def accept(self, token: int, chosen: bool = ...) -> None: ...
    def reset(self) -> None: ...
    def sample(
        self, logits: NDArray[np.float32], guidance: NDArray[np.float32] | None = ...
    ) -> int: ...
    def top(self) -> list[tuple[int, float]]: ...
