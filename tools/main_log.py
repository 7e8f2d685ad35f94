"""Where the lines of `main` go: standard error, and a file where one is asked for."""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO

from engine.errors import OptionError

from .console import note
from .main_options import MainOptions

DEFAULT_NAME = "main"


class Log:
    """Progress, a line at a time; silent where the user wants none.

    Lines are held back until `release`: an error in what the user gave then stands alone.

    Parameters
    ----------
    enabled : bool
    file : text file, optional
        Gets the same lines.
    """

    def __init__(self, enabled: bool, file: IO[str] | None = None) -> None:
        self.enabled = enabled
        self.held: list[str] | None = []
        self._file = file

    def __call__(self, line: str = "") -> None:
        """Write a line, now or when lines are released."""
        if not self.enabled:
            return
        if self.held is None:
            self._write(line)
        else:
            self.held.append(line)

    def release(self) -> None:
        """Write what was held back; from now on lines are written at once."""
        held, self.held = self.held or [], None
        for line in held:
            self(line)

    def close(self) -> None:
        """Close the file; lines still go to standard error."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self, line: str) -> None:
        note(line)
        if self._file is None:
            return
        try:
            self._file.write(line + "\n")
            self._file.flush()
        except OSError:
            # As with standard error: a log that cannot be kept is no reason to stop.
            self._file = None


def open_log(options: MainOptions) -> Log:
    """Make the log that the options ask for.

    Raises
    ------
    OptionError
        If its file cannot be opened.
    """
    wanted = options.log_file or options.log_new or options.log_append
    if not options.log or not wanted:
        return Log(options.log)
    name = options.log_file or DEFAULT_NAME
    path = Path(f"{name}.{os.getpid()}.log" if options.log_new else f"{name}.log")
    try:
        file = path.open("a" if options.log_append else "w", errors="surrogateescape")
    except OSError as error:
        raise OptionError(f"--log-file: {path}: {error.strerror}") from None
    return Log(True, file)
