"""What a training run tells: an iteration's figures; how durations, bars and names are written."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class IterationReport:
    """Figures of one iteration, taken before its batch is drawn.

    Attributes
    ----------
    iteration : int
        Updates done so far, over all runs of the checkpoint.
    sample, n_samples : int
        Position of the next sample, from 1, and how many there are.
    sched : float
        Factor of the learning rate for the next update.
    loss : float
        Mean loss of this run's previous evaluation; 0 before the first.
    first_loss : float
        Mean loss of this run's first evaluation; 0 before it.
    dt_ms, eta_ms : float or None
        Smoothed time of an iteration and time to go; None until measured.
    """

    iteration: int
    sample: int
    n_samples: int
    sched: float
    loss: float
    first_loss: float
    dt_ms: float | None
    eta_ms: float | None


def duration_text(ms: float) -> str:
    """Write a duration: ``12.5ms`` below a second, else ``01:02:03`` or ``4d 01:02:03``."""
    if ms < 1000:
        return f"{ms:.1f}ms"
    seconds = int(ms) // 1000
    days, seconds = divmod(seconds, 86400)
    clock = f"{seconds // 3600:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"
    return f"{days}d {clock}" if days else clock


def bar_text(first_loss: float, loss: float) -> str:
    """Draw the fall of the loss: ten dashes for 1.0, one for standing still, none for a rise."""
    if not (math.isfinite(first_loss) and math.isfinite(loss)):
        return ""
    return "-" * int(1 + 10 * (first_loss - loss) + 0.5)


def output_name(pattern: str, placeholder: str, value: str | int) -> str:
    """Name of a file: the first `placeholder` in `pattern`, directories included, is replaced.

    An empty placeholder is found at the front. Without the placeholder the name is the pattern.
    """
    return pattern.replace(placeholder, str(value), 1)
