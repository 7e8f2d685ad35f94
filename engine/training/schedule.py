"""The learning rate's factor at every update: warm-up, then a cosine, with or without restarts.

Everything is float32, as in the programs whose runs must be repeated; the cosine itself is taken
in double and rounded, which is what a good ``cosf`` returns, and the last sum is fused.

Source: Loshchilov and Hutter, "SGDR: Stochastic Gradient Descent with Warm Restarts",
arXiv:1608.03983.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from engine.errors import OptionError

_PI = np.float32(3.14159265359)
_LONGEST = 2**31 - 1  # a period at least as long as any run


@dataclass(frozen=True, slots=True)
class Schedule:
    """Factor of the learning rate; `Schedule(...)(step)` is the factor after `step` updates.

    Attributes
    ----------
    warmup : int
        Updates of linear growth from 0; the cosine begins as if it had run all along, unless
        restarts are on.
    decay_steps : int
        Length of the (first) cosine's half period.
    decay_min : float
        Where the cosine ends.
    restart : bool
        Begin again at the end of each period.
    restart_factor : float
        Growth of the period at each restart.
    alpha, min_alpha : float
        The learning rate and its floor, which holds in warm-up too.

    Raises
    ------
    OptionError
        If a period could become 0 (a division by zero, or an endless chain of restarts), or a
        number is not finite; names the option.
    """

    warmup: int = 100
    decay_steps: int = 1000
    decay_min: float = 0.1
    restart: bool = False
    restart_factor: float = 1.1
    alpha: float = 1e-3
    min_alpha: float = 0.0

    def __post_init__(self) -> None:
        """Refuse what `__call__` cannot compute."""
        named = {
            "--cos-decay-min": self.decay_min,
            "--cos-decay-restart": self.restart_factor,
            "--adam-alpha": self.alpha,
            "--adam-min-alpha": self.min_alpha,
        }
        for option, value in named.items():
            if not math.isfinite(value):
                raise OptionError(f"{option} {value}: give a finite number")
        if self.decay_steps < 1:
            raise OptionError(f"--cos-decay-steps {self.decay_steps}: give 1 or more")
        if self.restart_factor < 1:
            raise OptionError(f"--cos-decay-restart {self.restart_factor:g}: give 1 or more")

    def __call__(self, step: int) -> float:
        """Return the factor for the update that follows `step` updates, a float32 value."""
        if step < self.warmup:
            s = np.float32(step) / np.float32(self.warmup)
        elif self.restart:
            s = self._cosine(*self._within_period(step - self.warmup))
        else:
            s = self._cosine(step, self.decay_steps)
        return float(self._lifted(s))

    def _within_period(self, q: int) -> tuple[int, int]:
        """Count the steps since the last restart; also returns the running period's length."""
        period = self.decay_steps
        factor = np.float32(self.restart_factor)
        while q > period:
            product = float(factor) * float(np.float32(period))
            longer = int(np.float32(product)) if product < _LONGEST else _LONGEST
            if longer == period:  # truncation keeps a short period: skip all equal ones at once
                return (q - 1) % period + 1, period
            q -= period
            period = longer
        return q, period

    def _cosine(self, q: int, period: int) -> np.float32:
        low = np.float32(self.decay_min)
        angle = _PI * np.float32(min(q, period)) / np.float32(period)
        half = np.float32(0.5) * (np.float32(1) + np.float32(math.cos(float(angle))))
        return _fused(np.float32(1) - low, half, low)

    def _lifted(self, s: np.float32) -> np.float32:
        """Raise the factor to the floor; a learning rate of 0 has no floor to speak of."""
        if self.alpha == 0:
            return np.float32(1)
        low = np.float32(self.min_alpha) / np.float32(self.alpha)
        return _fused(s, np.float32(1) - low, low)


def _fused(a: np.float32, b: np.float32, c: np.float32) -> np.float32:
    """Compute a · b + c with one rounding, as compilers do for CPUs with FMA.

    Recorded factors differ in their sixth decimal without it.
    """
    return np.float32(float(a) * float(b) + float(c))
