"""A person at a terminal, or behind a pipe: pieces of text go out, lines come in."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable

from .console import emit

RESET, YELLOW, GREEN = b"\x1b[0m", b"\x1b[33m", b"\x1b[1m\x1b[32m"


def is_terminal() -> bool:
    """Whether a person reads and writes."""
    return all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stdout))


def read_turn(read_line: Callable[[], bytes | None], multiline: bool) -> bytes | None:
    r"""Read lines until one hands over.

    A line that ends with ``/`` hands over without its line break. One that ends with ``\`` goes on,
    or, where a turn has many lines, hands over.

    Parameters
    ----------
    read_line : callable
        Returns a line without its line break; None where there are no more.

    Returns
    -------
    bytes or None
        The lines with their breaks; None where there were none.
    """
    turn: bytes | None = None
    more = True
    while more:
        line = read_line()
        if line is None:
            return turn
        more = multiline
        if line.endswith(b"/"):
            return (turn or b"") + line[:-1]
        if line.endswith(b"\\"):
            line, more = line[:-1], not multiline
        turn = (turn or b"") + line + b"\n"
    return turn


class Person:
    r"""Shows the text and asks for turns.

    Lines are edited by readline where a terminal is on both sides. It takes text that is pasted
    with its line breaks as one line, and is told what stands before the cursor, so that long lines
    wrap and are drawn again as they should.

    Parameters
    ----------
    prompted : bool
        Put ``> `` before a turn, if a terminal is there to show it.
    color : bool
        Colour turns, under the same condition.
    simple : bool
        Lines are read as they come, without editing.
    multiline : bool
        See `read_turn`.
    command : callable
        From a turn to whether it was a command, which is done then and no turn of the dialogue.
    """

    def __init__(
        self,
        *,
        prompted: bool,
        color: bool,
        simple: bool,
        multiline: bool,
        command: Callable[[bytes], bool] = lambda _turn: False,
    ) -> None:
        terminal = is_terminal()
        self.is_asking = False
        self._prompted = prompted and terminal
        self._colored = color and terminal
        self._edits = terminal and not simple
        self._multiline = multiline
        self._command = command
        self._line = b""  # what the cursor's line holds
        if self._edits:
            _prepare_readline()

    def show(self, piece: bytes) -> None:
        """Write a piece of the text."""
        emit(piece)
        self._line = (self._line + piece).rpartition(b"\n")[2]

    def show_prompt(self, text: bytes) -> None:
        """Write the text that stands at the beginning."""
        if self._colored and text:
            emit(YELLOW)
        self.show(text)
        if self._colored and text:
            emit(RESET)

    def ask(self) -> bytes | None:
        """Read a turn; None where there will be no more."""
        self.is_asking = True
        try:
            while True:
                if self._prompted:
                    self.show(b"\n> ")
                turn = read_turn(self._read_line, self._multiline)
                self._line = b""
                if turn is None or not self._command(turn):
                    return turn
        finally:
            self.is_asking = False

    def _read_line(self) -> bytes | None:
        if self._edits:
            return self._edited_line()
        if self._colored:
            emit(GREEN)
        line = sys.stdin.buffer.readline() if sys.stdin is not None else b""
        if self._colored:
            emit(RESET)
        return line.removesuffix(b"\n") if line else None

    def _edited_line(self) -> bytes | None:
        before = self._before_the_cursor()
        if before:
            emit(b"\r")
        if self._colored:
            # Marks around what takes no room on the screen.
            before += f"\001{GREEN.decode()}\002"
        try:
            line = input(before)
        except EOFError:
            return None
        finally:
            self._line = b""
            if self._colored:
                emit(RESET)
        return line.encode("utf-8", "surrogateescape")

    def _before_the_cursor(self) -> str:
        """Find what stands in the cursor's row, which readline draws again."""
        text = self._line.decode("utf-8", "ignore")
        columns = shutil.get_terminal_size().columns
        return text[len(text) // columns * columns :] if text.isprintable() else ""


def _prepare_readline() -> None:
    import readline

    readline.parse_and_bind("set enable-bracketed-paste on")
    # Bytes of the terminal that are no UTF-8 are kept.
    for stream in (sys.stdin, sys.stdout):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="surrogateescape")
