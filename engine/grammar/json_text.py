r"""Parts of a grammar for text within JSON strings: literals, and regular expressions.

A pattern speaks of a string's value, the grammar of its JSON text: a quotation mark, a backslash
and control characters stand there as escapes.

Patterns begin with ``^`` and end with ``$``. In between: characters, ``.``, sets, ``\d \w \s`` and
their opposites, groups, ``|``, and ``* + ? {n} {n,} {n,m}``, lazy or not.
"""

from __future__ import annotations

import json
import re
from typing import Any

from engine.grammar.gbnf import LAST_CODE_POINT, GrammarError

Ranges = list[tuple[int, int]]

_DIGITS: Ranges = [(0x30, 0x39)]
_WORD: Ranges = [*_DIGITS, (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A)]
_SPACE: Ranges = [
    (0x09, 0x0D), (0x20, 0x20), (0xA0, 0xA0), (0x1680, 0x1680), (0x2000, 0x200A),
    (0x2028, 0x2029), (0x202F, 0x202F), (0x205F, 0x205F), (0x3000, 0x3000), (0xFEFF, 0xFEFF),
]  # fmt: skip
_SETS = {"d": _DIGITS, "w": _WORD, "s": _SPACE}
_CONTROLS = {"n": 0x0A, "r": 0x0D, "t": 0x09, "f": 0x0C, "v": 0x0B, "0": 0x00}
_LINE_ENDS: Ranges = [(0x0A, 0x0A), (0x0D, 0x0D)]
# What stands as an escape of two characters; other control characters only where they are named.
_ESCAPED = (0x22, 0x5C, 0x08, 0x0C, 0x0A, 0x0D, 0x09)
_NOT_PLAIN: Ranges = [(0x00, 0x1F), (0x22, 0x22), (0x5C, 0x5C)]
_QUANTIFIER = re.compile(r"(?:[*+?]|\{[0-9]*,?[0-9]*\})")


def literal(text: str) -> str:
    """Write a text as a literal of a grammar."""
    escapes = {"\\": r"\\", '"': r"\"", "\n": r"\n", "\r": r"\r"}
    return '"' + "".join(escapes.get(sign, sign) for sign in text) + '"'


def pattern_rule(pattern: Any) -> str:
    """Turn a pattern into alternatives of a rule, for the text between the quotation marks.

    Raises
    ------
    GrammarError
        If it uses what a grammar cannot express; names the pattern and the place.
    """
    if not isinstance(pattern, str):
        raise GrammarError(f"pattern {pattern!r} is no text")
    return _Pattern(pattern).rule()


class _Pattern:
    """One pass over a regular expression."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.place = 1

    def rule(self) -> str:
        is_whole = len(self.text) > 1 and self.text[0] == "^" and self.text[-1] == "$"
        if not is_whole:
            raise self.error("it must begin with ^ and end with $")
        found = self.alternatives()
        if self.place < len(self.text) - 1:
            raise self.error("a parenthesis is closed that was not opened")
        if self.place != len(self.text) - 1:
            raise self.error("it must end with $")
        return found

    def error(self, problem: str) -> GrammarError:
        return GrammarError(f"pattern {self.text!r}: {problem}")

    def next(self) -> str:
        """Return the sign at the place; nothing at the end."""
        return self.text[self.place] if self.place < len(self.text) - 1 else ""

    def taken(self) -> str:
        self.place += 1
        return self.text[self.place - 1]

    def alternatives(self) -> str:
        found = [self.sequence()]
        while self.next() == "|":
            self.place += 1
            found.append(self.sequence())
        return " | ".join(found)

    def sequence(self) -> str:
        found = []
        while self.next() not in ("", "|", ")"):
            found.append(self.atom() + self.quantifier())
        return " ".join(found) or '""'

    def quantifier(self) -> str:
        match = _QUANTIFIER.match(self.text, self.place)
        if match is None:
            return ""
        self.place = match.end()
        if self.next() in ("?", "+"):
            self.place += 1  # lazy and possessive ones match the same texts
        found = match.group()
        if found[0] == "{":
            if found in ("{}", "{,}"):
                raise self.error(f"{found} says no number")
            found = found.replace("{,", "{0,")
        return found

    def atom(self) -> str:
        sign = self.taken()
        if sign == "(":
            return self.group()
        if sign == "[":
            return self.bracketed()
        if sign == ".":
            return _one_of(_without(_LINE_ENDS))
        if sign == "\\":
            code = self.escape()
            return _one_of(code) if isinstance(code, list) else _character(code)
        if sign in "*+?{":
            raise self.error(f"nothing stands before {sign}")
        if sign in "^$":
            raise self.error(f"{sign} inside of it")
        return _character(ord(sign))

    def group(self) -> str:
        if self.next() == "?":
            if self.text[self.place : self.place + 2] != "?:":
                raise self.error("(? is only understood as (?:")
            self.place += 2
        found = self.alternatives()
        if self.next() != ")":
            raise self.error("a parenthesis is never closed")
        self.place += 1
        return f"({found})"

    def escape(self) -> int | Ranges:
        """Read what follows a backslash: one character, or a set."""
        if not self.next():
            raise self.error("nothing follows the last backslash")
        sign = self.taken()
        if sign in _SETS:
            return _SETS[sign]
        if sign.lower() in _SETS:
            return _without(_SETS[sign.lower()])
        if sign in _CONTROLS:
            return _CONTROLS[sign]
        n_digits = {"x": 2, "u": 4}.get(sign, 0)
        if n_digits:
            digits = self.text[self.place : self.place + n_digits]
            if len(digits) < n_digits or not re.fullmatch(r"[0-9A-Fa-f]+", digits):
                raise self.error(f"\\{sign} needs {n_digits} hexadecimal digits")
            self.place += n_digits
            return int(digits, 16)
        if sign.isalnum():
            raise self.error(f"\\{sign} cannot be expressed")
        return ord(sign)

    def bracketed(self) -> str:
        is_negated = self.next() == "^"
        self.place += is_negated
        ranges: Ranges = []
        while self.next() != "]":
            low = self.member()
            if isinstance(low, list):
                ranges += low
                continue
            high: int | Ranges = low
            if self.next() == "-" and self.text[self.place + 1] != "]":
                self.place += 1
                high = self.member()
            if isinstance(high, list) or high < low:
                raise self.error("a range in brackets has no end")
            ranges.append((low, high))
        self.place += 1
        return _one_of(_without(ranges) if is_negated else ranges)

    def member(self) -> int | Ranges:
        if not self.next():
            raise self.error("a bracket is never closed")
        sign = self.taken()
        if sign == "\\" and self.next() == "b":
            self.place += 1
            return 0x08
        return self.escape() if sign == "\\" else ord(sign)


def _without(ranges: Ranges) -> Ranges:
    """Return all other code points."""
    found, begin = [], 0
    for low, high in sorted(ranges):
        if low > begin:
            found.append((begin, low - 1))
        begin = max(begin, high + 1)
    return [*found, (begin, LAST_CODE_POINT)] if begin <= LAST_CODE_POINT else found


def _common(ranges: Ranges, others: Ranges) -> Ranges:
    pairs = [(max(a, c), min(b, d)) for a, b in ranges for c, d in others]
    return [(low, high) for low, high in pairs if low <= high]


def _character(code: int) -> str:
    return literal(json.dumps(chr(code), ensure_ascii=False)[1:-1])


def _one_of(ranges: Ranges) -> str:
    """Write a set of characters as JSON strings have them."""
    plain = _common(ranges, _without(_NOT_PLAIN))
    signs = "".join(f"{_code(low)}-{_code(high)}" for low, high in plain)
    choices = [f"[{signs}]"] if signs else []
    is_named = {low for low, high in ranges if low == high}
    for code in range(0x5D):
        is_within = any(low <= code <= high for low, high in ranges)
        if is_within and (code in _ESCAPED or (code < 0x20 and code in is_named)):
            choices.append(_character(code))
    return "(" + " | ".join(choices) + ")" if choices else "[]"


def _code(code: int) -> str:
    return f"\\U{code:08X}"
