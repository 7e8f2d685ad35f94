"""A bar on a terminal's standard error: how far long work is, how fast, how long it will take."""

from __future__ import annotations

import shutil
import sys
import time
from types import TracebackType

from .console import note

_ERASE = "\r\x1b[K"
_SECONDS_BETWEEN = 0.1
_WIDTH = 30


class ProgressBar:
    """A line that is drawn over and over, and erased at the end; nothing where no terminal is.

    Use as a context manager.

    Parameters
    ----------
    label : str
    total : int
        What the work amounts to, in `unit`.
    unit : str
        ``B`` for bytes, which are shown in MB; anything else is counted.
    """

    def __init__(self, label: str, total: int, unit: str = "B") -> None:
        self.label, self.total, self.unit = label, total, unit
        self.done = 0
        self._terminal = sys.stderr is not None and sys.stderr.isatty()
        self._began = self._drawn = time.monotonic()

    def __enter__(self) -> ProgressBar:
        """Return the bar."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Erase the line."""
        if self._terminal:
            note(_ERASE, end="")

    def add(self, amount: int) -> None:
        """Tell that so much more is done."""
        self.done += amount
        if not self._terminal:
            return
        now = time.monotonic()
        if now - self._drawn >= _SECONDS_BETWEEN or self.done >= self.total:
            self._drawn = now
            width = shutil.get_terminal_size().columns - 1
            note(_ERASE + self.text(now - self._began)[:width], end="")

    def text(self, seconds: float) -> str:
        """Write the line as it is after so many seconds."""
        share = min(1.0, self.done / max(1, self.total))
        filled = int(share * _WIDTH)
        bar = "#" * filled + "." * (_WIDTH - filled)
        parts = [f"{self.label} [{bar}] {share:4.0%}", self._amount()]
        if seconds > 0 and self.done:
            parts.append(f"ETA {(self.total - self.done) * seconds / self.done:.0f} s")
        return "  ".join(parts)

    def _amount(self) -> str:
        if self.unit == "B":
            return f"{self.done / 1e6:.0f}/{self.total / 1e6:.0f} MB"
        return f"{self.done}/{self.total} {self.unit}"
