"""What changes while training, and is kept between runs."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from engine.lora import FloatArray
from engine.training.data import ShuffleState


@dataclass(slots=True)
class ValidationState:
    """What is known of the loss on data that is not trained on.

    Attributes
    ----------
    samples_hash : int
        Of the validation samples: losses on others cannot be compared.
    iteration : int
        Updates done when it was last taken; -1: never.
    loss, best_loss : float
        The last one and the lowest.
    no_improvement : int
        How often in a row it was not lower than the lowest before.
    """

    samples_hash: int = 0
    iteration: int = -1
    loss: float = math.inf
    best_loss: float = math.inf
    no_improvement: int = 0

    def take(self, iteration: int, loss: float) -> bool:
        """Enter a loss; tell whether it is the lowest so far."""
        # A checkpoint holds float32: a resumed run must compare what the first one compared.
        self.iteration, self.loss = iteration, float(np.float32(loss))
        if self.loss < self.best_loss:
            self.best_loss, self.no_improvement = self.loss, 0
            return True
        self.no_improvement += 1
        return False


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
    validation : ValidationState or None
        None in a run without validation data.
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
    validation: ValidationState | None = None

    @classmethod
    def fresh(cls, n_parameters: int, opt_past: int = 0) -> TrainingState:
        """Make the state in which a first run begins."""
        m, v, past = (np.zeros(n, dtype=np.float32) for n in (n_parameters, n_parameters, opt_past))
        return cls(m, v, past)
