"""What the commands share: where their lines go, and how they end.

The product goes to standard output as bytes and is flushed at once; everything else to standard
error. Bad input ends with one line there and status 1.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from engine.errors import EngineError

from .options import MAX_THREADS, OptionTable, UsageError

FAILED = 1
INTERRUPTED = 130
CLOSED_OUTPUT = 141  # what a shell reports for a program that a closed pipe has ended

GPU_WARNINGS = (
    "warning: not compiled with GPU offload support, {option} option will be ignored",
    "warning: see main README.md for information on enabling GPU BLAS support",
)


def emit(raw: bytes) -> None:
    """Write bytes to standard output, at once.

    Raises
    ------
    BrokenPipeError
        If nobody reads it any more.
    EngineError
        If it takes no more for another reason, a full disk say, or was closed from the start.
    """
    if not raw:
        return
    if sys.stdout is None:
        raise EngineError("standard output: is closed; send it somewhere")
    try:
        sys.stdout.buffer.write(raw)
        sys.stdout.buffer.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        discard_output()
        raise EngineError(
            f"standard output: {error.strerror or error}; send it elsewhere"
        ) from error


def say(line: str) -> None:
    """Write a line to standard output, at once; file names keep their bytes."""
    emit(f"{line}\n".encode("utf-8", "surrogateescape"))


def note(line: str = "", end: str = "\n") -> None:
    """Write a line to standard error; a closed one is no reason to stop."""
    # print() would turn to standard output if standard error were None.
    if sys.stderr is None:
        return
    try:
        sys.stderr.write(line + end)
        sys.stderr.flush()
    except OSError:
        pass


def thread_count(wanted: int | None, otherwise: int) -> int:
    """Choose how many threads run: as many as wanted, all processors where that is not positive."""
    if wanted is None:
        return otherwise
    return wanted if wanted > 0 else min(os.cpu_count() or 1, MAX_THREADS)


def version_line() -> str:
    """Tell the project's version."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return f"version: {version('cylora')} (cylora)"
    except PackageNotFoundError:
        return "version: unknown (cylora, run from its source tree)"


def run_command(table: OptionTable, body: Callable[[], int]) -> int:
    """Run a command; every way in which it can end becomes an exit status.

    Parameters
    ----------
    table : OptionTable
        Its usage follows the message when the arguments cannot be read.
    body : callable
        Returns the exit status; see `engine.errors` for what it may raise.
    """
    try:
        return body()
    except UsageError as error:
        _report(error)
        note(table.usage(), end="")
        return FAILED
    except EngineError as error:
        _report(error)
        return FAILED
    except BrokenPipeError:
        discard_output()
        return CLOSED_OUTPUT
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        _report(f"{where}{error.strerror or error}")
        return FAILED
    except MemoryError:
        _report("not enough memory; try a smaller context or batch")
        return FAILED
    except KeyboardInterrupt:
        return INTERRUPTED


def discard_output() -> None:
    """Let what is still buffered for a closed standard output vanish without a complaint."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.close(null)


def _report(message: object) -> None:
    note("error: " + " ".join(str(message).split("\n")))
