"""The loss of tokens, and its mean: the logarithm of the perplexity."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.measure.logit_file import LogitWriter
from engine.measure.softmax import log_sum_exp
from engine.measure.windows import Evaluator, Logits, Tokens, Windows


@dataclass(slots=True)
class Mean:
    """Mean of values that come one after another, and its standard error.

    Attributes
    ----------
    count : int
    total, squares : float
        Sums of the values and of their squares.
    """

    count: int = 0
    total: float = 0.0
    squares: float = 0.0

    def add(self, values: NDArray[np.floating]) -> None:
        """Count some more values."""
        wide = values.astype(np.float64)
        self.count += wide.size
        self.total += float(wide.sum())
        self.squares += float(np.dot(wide, wide))

    @property
    def value(self) -> float:
        """The mean; 0 of no values."""
        return self.total / self.count if self.count else 0.0

    @property
    def error(self) -> float:
        """Standard error of the mean; 0 of one value, or where rounding leaves no spread."""
        if self.count < 2:
            return 0.0
        variance = self.squares / self.count - self.value**2
        return math.sqrt(variance / (self.count - 1)) if variance > 0 else 0.0

    @property
    def perplexity(self) -> float:
        """Of a mean of losses: its exponential; infinite beyond the numbers."""
        return math.exp(self.value) if self.value < 700 else math.inf

    @property
    def perplexity_error(self) -> float:
        """Error of `perplexity`, to the first order."""
        return self.error * self.perplexity

    @property
    def estimate(self) -> tuple[float, float]:
        """Perplexity and its error."""
        return self.perplexity, self.perplexity_error


def token_losses(logits: Logits, targets: Tokens) -> NDArray[np.float64]:
    """Negative log-likelihood of each row's target, in nats.

    Parameters
    ----------
    logits : ndarray of shape (n, n_vocab), float32
    targets : ndarray of shape (n,), int32

    Raises
    ------
    DataError
        If the scores are not finite.
    """
    scratch = np.empty(logits.shape[1], np.float32)  # a row at a time stays in the cache
    sums = np.array([log_sum_exp(row, scratch) for row in logits])
    return sums - logits[np.arange(len(targets)), targets]


def perplexity(
    context: Evaluator, windows: Windows, writer: LogitWriter | None = None
) -> Iterator[Mean]:
    """Mean loss of a text, after each window.

    Parameters
    ----------
    context : Context
    windows : Windows
    writer : LogitWriter, optional
        Gets the log-probabilities of each scored token.

    Yields
    ------
    Mean
        The same one each time.
    """
    loss = Mean()
    for number in range(windows.count):
        for logits, targets in windows.evaluate(context, number):
            loss.add(token_losses(logits, targets))
            if writer is not None:
                writer.add(logits)
        yield loss
