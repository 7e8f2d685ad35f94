"""What a training run tells: its figures; how durations, bars, forecasts and names are written."""

from __future__ import annotations

import math
import time
from collections import deque
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
    validation_loss : float or None
        When it was taken in this iteration.
    """

    iteration: int
    sample: int
    n_samples: int
    sched: float
    loss: float
    first_loss: float
    dt_ms: float | None
    eta_ms: float | None
    validation_loss: float | None = None


@dataclass(frozen=True, slots=True)
class EvaluationReport:
    """Figures of one evaluation, taken behind it; the loss is the one of these very weights.

    Attributes
    ----------
    iteration : int
        Updates done so far, over all runs of the checkpoint.
    samples, tokens : int
        Drawn so far, over all runs, this evaluation's included.
    sched : float
        Factor of the learning rate for the next update.
    loss : float
    validation_loss : float or None
        Of the same weights, when it was taken.
    gradient_norm : float
        Before clipping.
    n_tokens : int
        Of this evaluation.
    evaluation_ms, elapsed_ms : float
        Time of this evaluation, and since the run began.
    """

    iteration: int
    samples: int
    tokens: int
    sched: float
    loss: float
    validation_loss: float | None
    gradient_norm: float
    n_tokens: int
    evaluation_ms: float
    elapsed_ms: float

    @property
    def tokens_per_second(self) -> float:
        """Speed of this evaluation; 0 where the clock did not tick."""
        return 1000 * self.n_tokens / self.evaluation_ms if self.evaluation_ms > 0 else 0.0


def duration_text(ms: float) -> str:
    """Write a duration: ``12.5ms`` below a second, else ``01:02:03`` or ``4d 01:02:03``."""
    if ms < 1000:
        return f"{ms:.1f}ms"
    seconds = int(ms) // 1000
    days, seconds = divmod(seconds, 86400)
    clock = f"{seconds // 3600:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"
    return f"{days}d {clock}" if days else clock


def end_text(ms_to_go: float, now: float | None = None) -> str:
    """Write when something ends, in local time: ``14:05``, on another day ``2024-06-30 14:05``.

    Parameters
    ----------
    ms_to_go : float
    now : float, optional
        Seconds since the epoch.
    """
    begin = time.time() if now is None else now
    today, end = time.localtime(begin), time.localtime(begin + ms_to_go / 1000)
    same_day = today[:3] == end[:3]
    return time.strftime("%H:%M" if same_day else "%Y-%m-%d %H:%M", end)


def forecast_text(n_updates: int, n_done: int, ms_per_update: float, more_ms: float = 0.0) -> str:
    """Say how long a whole run takes, once some of its updates are done.

    Parameters
    ----------
    n_updates, n_done : int
        Of this run. An evaluation more than updates is made.
    ms_per_update : float
    more_ms : float, optional
        What comes to it over the whole run, validation for one.
    """
    total = (n_updates + 1) * ms_per_update + more_ms
    left = total * (n_updates - n_done) / max(1, n_updates)
    return (
        f"the whole run of {n_updates} iterations will take about {duration_text(total)},"
        f" until {end_text(left)}"
    )


class Progress:
    """The line of progress: place, speed, time to go and loss, over the last ten evaluations.

    Parameters
    ----------
    first, n_updates : int
        Updates done before this run, and updates of it.
    """

    def __init__(self, first: int, n_updates: int) -> None:
        self._end = first + n_updates
        self._last: deque[EvaluationReport] = deque(maxlen=10)

    def text(self, report: EvaluationReport) -> str:
        """Take an evaluation and write the line."""
        last = self._last
        last.append(report)
        spent = sum(r.evaluation_ms for r in last)
        tokens = sum(r.n_tokens for r in last)
        loss = sum(r.loss for r in last) / len(last)
        speed = f"{1000 * tokens / spent:.0f} tokens/s" if spent > 0 else ""
        to_go = max(0, self._end - report.iteration) * spent / len(last)
        parts = (
            f"iteration {report.iteration}/{self._end}",
            speed,
            f"ETA {duration_text(to_go)}" if spent > 0 else "",
            f"loss {loss:.4f}",
        )
        return "  ".join(part for part in parts if part)


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
