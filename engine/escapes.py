r"""Backslash escapes in texts given as options, as the original commands resolve them."""

from __future__ import annotations

import re

_ESCAPE = re.compile(rb"""\\(?:x([0-9A-Fa-f]{2})|([nrt'"\\]))""")
_MEANING = {b"n": b"\n", b"r": b"\r", b"t": b"\t"}


def resolve_escapes(text: bytes) -> bytes:
    r"""Resolve ``\n \r \t \' \" \\`` and ``\xHH``; any other backslash stays as it is."""

    def resolved(match: re.Match[bytes]) -> bytes:
        digits, letter = match.groups()
        return bytes.fromhex(digits.decode()) if digits else _MEANING.get(letter, letter)

    return _ESCAPE.sub(resolved, text)
