"""What changes while training, and is kept between runs."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from engine.lora import FloatArray
from engine.training.data import ShuffleState


@dataclass(slots=True)
class TrainingState:
    """Everything that changes while training, the adapter itself excepted.

    Attributes
    ----------
    m, v : ndarray of shape (n_parameters,), float32
        First and second moments, laid out like `Adapter.flat`.
    past_losses : ndarray of shape (opt_past,), float32
        Window of the delta test.
    iterations, samples, tokens, epochs : int
        Counters over all runs; iterations and tokens grow when a checkpoint is saved.
    shuffle : ShuffleState
    opt_iteration : int
        Updates done, over all runs.
    just_initialized : bool
        No evaluation has been made yet.
    best_loss, previous_loss : float
    no_improvement : int
    """

    m: FloatArray
    v: FloatArray
    past_losses: FloatArray
    iterations: int = 0
    samples: int = 0
    tokens: int = 0
    epochs: int = 0
    shuffle: ShuffleState = field(default_factory=ShuffleState)
    opt_iteration: int = 0
    just_initialized: bool = True
    best_loss: float = 0.0
    previous_loss: float = 0.0
    no_improvement: int = 0

    @classmethod
    def fresh(cls, n_parameters: int, opt_past: int = 0) -> TrainingState:
        """Make the state in which a first run begins."""
        m, v, past = (np.zeros(n, dtype=np.float32) for n in (n_parameters, n_parameters, opt_past))
        return cls(m, v, past)
