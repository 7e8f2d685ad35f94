"""Where the lines of a run of `finetune` go.

The original's lines go to standard output; remarks to standard error, where a terminal also shows
one line of progress that is written over and over.
"""

from __future__ import annotations

import os
import shutil
import sys
import threading

from engine.errors import EngineError

from .console import CLOSED_OUTPUT, discard_output, note, say

_ERASE = "\r\x1b[K"


class Lines:
    """Writes lines, and keeps the line of progress out of their way.

    Parameters
    ----------
    quiet : bool
        Write nothing: another process writes the same lines.

    Attributes
    ----------
    stop : threading.Event
        Set when the run is to end: on request, or because nobody reads standard output any more.
    closed : bool
        Nobody reads standard output any more.
    failure : EngineError or None
        Why it takes no more, where that is not the reader's going.
    """

    def __init__(self, quiet: bool = False) -> None:
        self._quiet = quiet
        self.stop = threading.Event()
        self.closed = False
        self.failure: EngineError | None = None
        self._terminal = not quiet and sys.stderr is not None and sys.stderr.isatty()
        self._shown = ""

    def say(self, line: str) -> None:
        """Print a line; a reader who is gone ends the run, a full disk only the lines."""
        if self._quiet or self.closed or self.failure:
            return
        self._erase()
        try:
            say(line)
        except BrokenPipeError:
            discard_output()
            self.closed = True
            self.stop.set()
        except EngineError as error:
            self.failure = error
            note(f"warning: {error}; the run goes on without its lines")
        self._draw()

    def status(self) -> int:
        """Give the exit status as far as standard output decides it.

        Raises
        ------
        EngineError
            If it took no more before the end.
        """
        if self.failure is not None:
            raise self.failure
        return CLOSED_OUTPUT if self.closed else 0

    def say_bytes(self, name: str, n_bytes: int) -> None:
        """Print a size in the original's words."""
        self.say(f"main: {name} = {n_bytes} bytes ({n_bytes / 2**20:.1f} MB)")

    def note(self, line: str) -> None:
        """Write a remark to standard error."""
        if self._quiet:
            return
        self._erase()
        note(line)
        self._draw()

    def progress(self, text: str) -> None:
        """Show how far the run is, on a terminal; empty: nothing."""
        if not self._terminal:
            return
        self._erase()
        width = shutil.get_terminal_size().columns - 1
        self._shown = text[:width]
        self._draw()

    def _erase(self) -> None:
        if self._shown:
            note(_ERASE, end="")

    def _draw(self) -> None:
        if self._shown:
            note(self._shown, end="")


def is_terminal_output() -> bool:
    """Whether standard output is a terminal that may be coloured."""
    return sys.stdout is not None and sys.stdout.isatty() and "NO_COLOR" not in os.environ
