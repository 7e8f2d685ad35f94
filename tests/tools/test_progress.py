"""The bar of long work."""

from __future__ import annotations

import io
import sys

import pytest

from engine.tools.progress import ProgressBar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_line_tells_share_amount_and_time_to_go():
    bar = ProgressBar("writing", 4_000_000)
    bar.add(1_000_000)
    assert bar.text(2.0) == "writing [#######.......................]  25%  1/4 MB  ETA 6 s"


def test_other_units_are_counted():
    bar = ProgressBar("chunks", 8, "chunks")
    assert bar.text(0.0) == f"chunks [{'.' * 30}]   0%  0/8 chunks"
    bar.add(8)
    assert bar.text(1.0) == f"chunks [{'#' * 30}] 100%  8/8 chunks  ETA 0 s"


def test_a_terminal_sees_the_end_and_then_an_erased_line(monkeypatch: pytest.MonkeyPatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with ProgressBar("writing", 10, "things") as bar:
        bar.add(10)
    assert "100%" in terminal.getvalue()
    assert terminal.getvalue().endswith("\r\x1b[K")


def test_what_is_no_terminal_sees_nothing(monkeypatch: pytest.MonkeyPatch):
    plain = io.StringIO()
    monkeypatch.setattr(sys, "stderr", plain)
    with ProgressBar("writing", 10) as bar:
        bar.add(10)
    assert plain.getvalue() == ""
