"""A session at a terminal, driven through a pseudo-terminal."""

from __future__ import annotations

import os
import pty
import select
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from time import monotonic

import pytest

from engine.tools.main_terminal import read_turn

DATA = Path(__file__).parents[1] / "data"
CODE = (
    "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "from engine.tools.main import main; sys.exit(main())"
)
CTRL_C, CTRL_D = b"\x03", b"\x04"
# The terminal is asked to mark what is pasted, when a line is about to be read.
READING = b"\x1b[?2004h"
WAIT = 60.0
# A signal between readline's prompt and its select() is seen with the next line only (CPython's
# module waits without a bound), so an interrupt that nothing answers is followed by Enter.
UNANSWERED = 3.0


class Session:
    """The command at a terminal of its own."""

    def __init__(self, *arguments: str) -> None:
        model = ["-m", str(DATA / "mini-f32.gguf"), "--temp", "0", *arguments]
        self.pid, self.terminal = pty.fork()
        if self.pid == 0:
            os.environ.update(TERM="xterm", COLUMNS="200", LINES="50", LC_ALL="C.UTF-8")
            os.execv(sys.executable, [sys.executable, "-c", CODE, *model])
        self.seen = b""

    def until(self, text: bytes) -> bytes:
        """Read until a text has come; returns all since the last time."""
        end = monotonic() + WAIT  # what goes on talking must not be listened to for ever
        while text not in self.seen:
            ready = self._something_comes(end - monotonic())
            assert ready, f"{text!r} has not come, but {self.seen[-1000:]!r}"
            self.seen += self._read()
        before, _, self.seen = self.seen.partition(text)
        return before + text

    def type(self, keys: bytes) -> None:
        os.write(self.terminal, keys)

    def status(self) -> int:
        """Wait for the end; the rest of what came is in `seen`."""
        end = monotonic() + WAIT
        while self._something_comes(end - monotonic()):
            piece = self._read(at_end=True)
            if not piece:
                return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
            self.seen += piece
        raise AssertionError(f"the command does not end, after {self.seen[-1000:]!r}")

    def status_of_an_interrupt(self) -> int:
        """Ctrl-C while a line is read, and `status`."""
        self.type(CTRL_C)
        while self._something_comes(UNANSWERED):
            piece = self._read(at_end=True)
            if not piece:
                break
            self.seen += piece
        else:
            self.type(b"\r")
        return self.status()

    def _something_comes(self, seconds: float) -> bool:
        return bool(select.select([self.terminal], [], [], max(0.0, seconds))[0])

    def _read(self, at_end: bool = False) -> bytes:
        try:
            return os.read(self.terminal, 4096)
        except OSError:  # the other side is closed
            assert at_end, f"the command has ended after {self.seen!r}"
            return b""

    def end(self) -> None:
        try:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        except (ProcessLookupError, ChildProcessError):
            pass
        os.close(self.terminal)


@pytest.fixture
def session() -> Iterator:
    opened: list[Session] = []

    def start(*arguments: str) -> Session:
        opened.append(Session(*arguments))
        return opened[-1]

    yield start
    for each in opened:
        each.end()


def test_a_session_with_reverse_prompt_lines_and_exit(session) -> None:
    talk = session("-p", "FERRYMAN: hi", "-n", "400", "-i", "-r", "be", "--log-disable")
    talk.until(b" FERRYMAN: hi golden2 wES mornch be")
    assert b"MESSENGER" not in talk.until(READING)  # which would come next
    talk.type(b"one\\\r")
    talk.until(READING)
    talk.type(b"two\r")
    talk.until(b"be")
    talk.until(READING)
    talk.type(CTRL_D)
    assert talk.status() == 0
    assert b"Traceback" not in talk.seen


def test_ctrl_c_hands_over_first_and_leaves_then(session) -> None:
    talk = session("-p", "FERRYMAN:", "-n", "-1", "-i", "--ignore-eos", "--in-prefix", "[YOU]",
                   "--in-suffix", "[OK]")  # fmt: skip
    talk.until(b" FERRYMAN:")
    talk.type(CTRL_C)
    talk.until(READING)
    talk.type(b"so?\r")
    talk.until(b"[OK]")
    talk.type(CTRL_C)
    talk.until(READING)
    assert talk.status_of_an_interrupt() == 130
    assert b"llama_print_timings:       total time =" in talk.seen
    assert b"Traceback" not in talk.seen


def test_lines_pasted_together_are_one_turn(session) -> None:
    talk = session("-p", "A", "-n", "6", "-if", "--log-disable", "--in-suffix", "[END]")
    talk.until(READING)
    talk.type(b"\x1b[200~first\nsecond\x1b[201~")
    assert b"[END]" not in talk.until(b"second")
    talk.type(b"\r")
    talk.until(b"[END]")
    talk.until(READING)
    talk.type(CTRL_D)
    assert talk.status() == 0


def test_many_lines_end_with_a_backslash(session) -> None:
    talk = session("-p", "A", "-n", "6", "-if", "-mli", "--simple-io", "--log-disable",
                   "--in-suffix", "[END]")  # fmt: skip
    talk.until(b" A")
    talk.type(b"first\nsecond\n")
    talk.until(b"second")
    talk.type(b"third\\\n")
    talk.until(b"third")
    talk.until(b"[END]")
    talk.type(CTRL_D)
    assert talk.status() == 0


def test_lines_can_be_edited_and_called_back(session) -> None:
    talk = session("-p", "A", "-n", "4", "-if", "--log-disable", "--in-prefix", "[A]",
                   "--in-suffix", "[B]")  # fmt: skip
    talk.until(READING)
    talk.type(b"helpo\x7f\x7flo\r")
    talk.until(b"[B]")
    talk.until(READING)
    talk.type(b"\x1b[A")  # arrow up
    talk.until(b"hello")
    assert talk.status_of_an_interrupt() == 130


def test_a_conversation_shows_a_coloured_prompt(session) -> None:
    talk = session("-p", "A", "-n", "4", "-cnv", "--color", "--log-disable")
    talk.until(b"\x1b[33m A\x1b[0m")
    talk.until(b"\n> ")
    talk.until(READING)
    talk.until(b"\x1b[1m\x1b[32m")
    talk.type(b"hello\r")
    talk.until(b"\x1b[0m")
    talk.until(READING)
    talk.type(CTRL_D)
    assert talk.status() == 0


def test_a_run_that_was_not_asked_to_talk_leaves_the_keyboard_alone(session) -> None:
    run = session("-p", "FERRYMAN:", "-n", "5", "--log-disable")
    assert run.status() == 0
    assert run.seen.startswith(b" FERRYMAN:")
    assert b"\x1b" not in run.seen and b">" not in run.seen


@pytest.mark.parametrize(
    ("lines", "multiline", "turn", "left"),
    [
        ([b"a", b"b"], False, b"a\n", 1),
        ([b"a\\", b"b", b"c"], False, b"a\nb\n", 1),
        ([b"a/", b"b"], False, b"a", 1),
        ([b"a", b"b\\", b"c"], True, b"a\nb\n", 1),
        ([b"a", b"b/", b"c"], True, b"a\nb", 1),
        ([b"a", b"b"], True, b"a\nb\n", 0),
        ([b""], False, b"\n", 0),
        ([], False, None, 0),
        ([b"/"], False, b"", 0),
    ],
)
def test_lines_make_a_turn(lines, multiline, turn, left) -> None:
    rest = list(lines)
    assert read_turn(lambda: rest.pop(0) if rest else None, multiline) == turn
    assert len(rest) == left
