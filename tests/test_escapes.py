"""Backslash escapes of prompts and of sample starts."""

from __future__ import annotations

import pytest

from engine.escapes import resolve_escapes


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        (b"", b""),
        (rb"a\nb\tc\rd", b"a\nb\tc\rd"),
        (rb"\n\r\t", b"\n\r\t"),
        (rb"\'\"\\", b"'\"\\"),
        (rb"\x41\xfF\x00z", b"A\xff\x00z"),
        (rb"\x4", rb"\x4"),
        (rb"\xg1\q", rb"\xg1\q"),
        (rb"\q\0", rb"\q\0"),
        (b"end\\", b"end\\"),
        (rb"\\n", rb"\n"),
        (rb"\\\n", b"\\\n"),
        (rb"\x\n", b"\\x\n"),
    ],
)
def test_escapes_are_resolved_in_one_pass(written: bytes, meant: bytes) -> None:
    assert resolve_escapes(written) == meant
