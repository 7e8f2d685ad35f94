r"""Read a grammar in GBNF, the notation of llama.cpp, into rules over code points.

    root   ::= greeting (", " name)* "."      # a rule, a comment
    name   ::= [A-Z] [a-z]{1,9} | "J\u00f6rg"

A rule is a name, ``::=`` and alternatives separated by ``|``. An alternative is a sequence of
literals ``"..."``, sets of characters ``[a-z]`` or ``[^a-z]``, any character ``.``, names of rules
and groups in parentheses, each of them followed by ``*``, ``+``, ``?``, ``{m}``, ``{m,}`` or
``{m,n}`` where it repeats. A line ends a rule, except within parentheses and behind ``|``.
Escapes: ``\n \r \t \\ \" \[ \] \xHH \uHHHH \UHHHHHHHH``. Of two rules of one name the last counts.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from engine.errors import DataError

ROOT = "root"
LAST_CODE_POINT = 0x10FFFF

# Terminals and references to rules that a grammar may consist of once repetitions are written out.
MAX_ELEMENTS = 200_000
MAX_NESTING = 100

_NAME = re.compile(r"[A-Za-z0-9-]+")
_INLINE_SPACE = re.compile(r"(?:[ \t]|#[^\r\n]*)*")
_SPACE = re.compile(r"(?:[ \t\r\n]|#[^\r\n]*)*")
_REPETITION = re.compile(r"\{%s([0-9]+)%s(?:(,)%s(?:([0-9]+)%s)?)?\}" % ((r"[ \t\r\n]*",) * 4))
_ESCAPES = {"t": "\t", "r": "\r", "n": "\n", "\\": "\\", '"': '"', "[": "[", "]": "]"}
_HEX_DIGITS = {"x": 2, "u": 4, "U": 8}

# Ranges of code points, both ends included, ascending and apart from each other.
CharSet = tuple[tuple[int, int], ...]
# An element of a sequence: the index of a terminal, or the complement (~) of that of a rule.
Sequence = tuple[int, ...]


class GrammarError(DataError):
    """A grammar that cannot be read or used; says where."""


@dataclass(frozen=True, slots=True)
class Grammar:
    """Rules as alternatives of sequences of elements.

    Attributes
    ----------
    rules : tuple of tuple of Sequence
        The alternatives of each rule; a negative element ``e`` refers to rule ``~e``.
    terminals : tuple of CharSet
        What an element that is not negative stands for: one code point of its ranges.
    root : int
        The rule that a whole text follows.
    """

    rules: tuple[tuple[Sequence, ...], ...]
    terminals: tuple[CharSet, ...]
    root: int


def parse_grammar(text: str) -> Grammar:
    """Read a grammar.

    Parameters
    ----------
    text : str

    Raises
    ------
    GrammarError
        If it does not follow the notation, refers to a rule that it does not define, has no rule
        ``root``, is left-recursive or too large; names line and column.
    """
    return _Parser(text).grammar()


class _Parser:
    """One pass over the text, one method a construct."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.place = 0
        self.nesting = 0
        self.n_elements = 0
        self.rule_ids: dict[str, int] = {}
        # By rule: its alternatives, None until it is defined, and where it stands or is asked for.
        self.rules: list[list[Sequence] | None] = []
        self.places: list[int] = []
        self.repeating: set[int] = set()
        self.terminal_ids: dict[CharSet, int] = {}

    def grammar(self) -> Grammar:
        self.skip(_SPACE)
        if not self.rest(1):
            raise GrammarError("the grammar is empty; it needs at least a rule named root")
        while self.rest(1):
            self.rule()
        if ROOT not in self.rule_ids:
            raise GrammarError("the grammar has no rule named root; a text begins with that")
        rules = self.defined_rules()
        self.refuse_left_recursion(rules)
        return Grammar(rules, tuple(self.terminal_ids), self.rule_ids[ROOT])

    def defined_rules(self) -> tuple[tuple[Sequence, ...], ...]:
        rules = []
        for name, alternatives, place in zip(self.names(), self.rules, self.places, strict=True):
            if alternatives is None:
                raise self.error(f"the rule {name} is not defined", place)
            rules.append(tuple(alternatives))
        return tuple(rules)

    def names(self) -> list[str]:
        """Names of the rules; those that repetitions and groups made are empty."""
        names = [""] * len(self.rules)
        for name, rule in self.rule_ids.items():
            names[rule] = name
        return names

    # ---- what stands at the place -------------------------------------------------------------

    def error(self, problem: str, place: int | None = None) -> GrammarError:
        before = self.text[: self.place if place is None else place]
        lines = re.split(r"\r\n|\r|\n", before)
        return GrammarError(f"line {len(lines)}, column {len(lines[-1]) + 1}: {problem}")

    def rest(self, n: int) -> str:
        return self.text[self.place : self.place + n]

    def skip(self, pattern: re.Pattern[str]) -> str:
        match = pattern.match(self.text, self.place)
        if match is None:
            return ""
        self.place = match.end()
        return match.group()

    def skip_space(self) -> None:
        self.skip(_SPACE if self.nesting else _INLINE_SPACE)

    def shown(self) -> str:
        """Say what stands at the place, for messages."""
        line = re.match(r"[^\r\n]{0,16}", self.rest(16))
        return repr(line.group()) if line and line.group() else "the end of the line"

    # ---- constructs, from large to small ------------------------------------------------------

    def rule(self) -> None:
        place = self.place
        name = self.skip(_NAME)
        if not name:
            raise self.error(f"expected the name of a rule, not {self.shown()}")
        self.skip(_INLINE_SPACE)
        if self.rest(3) != "::=":
            raise self.error(f"expected ::= behind the name {name}, not {self.shown()}")
        self.place += 3
        self.skip(_SPACE)
        rule = self.rule_id(name, place)
        self.rules[rule], self.places[rule] = self.alternatives(), place
        if self.rest(1) not in ("", "\r", "\n"):
            raise self.error(f"expected the end of the rule {name}, not {self.shown()}")
        self.skip(_SPACE)

    def alternatives(self) -> list[Sequence]:
        found = [self.sequence()]
        while self.rest(1) == "|":
            self.place += 1
            self.skip(_SPACE)
            found.append(self.sequence())
        return found

    def sequence(self) -> Sequence:
        elements: list[int] = []
        item: list[int] = []
        while sign := self.rest(1):
            if sign in "*+?{":
                item = self.repeated(item)
            elif (read := self.item(sign)) is not None:
                elements += item
                item = read
            else:
                break
            self.skip_space()
        return (*elements, *item)

    def item(self, sign: str) -> list[int] | None:
        """Read what a repetition would refer to; None where the sequence ends."""
        if sign == '"':
            return self.literal()
        if sign == "[":
            return self.char_set()
        if sign == "(":
            return [self.group()]
        if sign == ".":
            self.place += 1
            return [self.terminal([(0, LAST_CODE_POINT)])]
        place = self.place
        name = self.skip(_NAME)
        return [self.counted(~self.rule_id(name, place))] if name else None

    def group(self) -> int:
        opened = self.place
        self.nesting += 1
        if self.nesting > MAX_NESTING:
            raise self.error(f"more than {MAX_NESTING} parentheses within each other")
        self.place += 1
        self.skip_space()
        alternatives = self.alternatives()
        if self.rest(1) != ")":
            if not self.rest(1):
                raise self.error("this parenthesis is never closed", opened)
            raise self.error(f"expected ), not {self.shown()}")
        self.place += 1
        self.nesting -= 1
        return self.new_rule(alternatives, opened)

    def literal(self) -> list[int]:
        opened = self.place
        self.place += 1
        found = []
        while self.rest(1) != '"':
            code = self.character(opened, "literal")
            found.append(self.terminal([(code, code)]))
        self.place += 1
        return found

    def char_set(self) -> list[int]:
        opened = self.place
        self.place += 1
        is_negated = self.rest(1) == "^"
        self.place += is_negated
        ranges = []
        while self.rest(1) != "]":
            low = high = self.character(opened, "set")
            if self.rest(1) == "-" and self.rest(2) != "-]":
                self.place += 1
                high = self.character(opened, "set")
            ranges.append((low, high))
        self.place += 1
        if not ranges:
            return []  # as in the original: it stands for no character at all
        return [self.terminal(_complement(ranges) if is_negated else ranges)]

    def character(self, opened: int, what: str) -> int:
        sign = self.rest(1)
        if not sign:
            raise self.error(f"this {what} is never closed", opened)
        if sign != "\\":
            self.place += 1
            return ord(sign)
        escape = self.rest(2)[1:]
        if escape in _ESCAPES:
            self.place += 2
            return ord(_ESCAPES[escape])
        n_digits = _HEX_DIGITS.get(escape, 0)
        digits = self.rest(2 + n_digits)[2:]
        if len(digits) < max(n_digits, 1) or not re.fullmatch(r"[0-9A-Fa-f]+", digits):
            raise self.error(f"unknown escape {self.rest(2 + n_digits)!r}")
        self.place += 2 + n_digits
        return int(digits, 16)

    # ---- repetition ---------------------------------------------------------------------------

    def repeated(self, item: list[int]) -> list[int]:
        place = self.place
        sign = self.rest(1)
        low, high = {"*": (0, None), "+": (1, None), "?": (0, 1)}.get(sign) or self.bounds()
        if sign != "{":
            self.place += 1
        if not item:
            raise self.error(f"nothing stands before {sign} to repeat", place)
        if len(item) > 1:
            item = [self.new_rule([tuple(item)], place)]
        n_optional = 0 if high is None else high - low
        if self.n_elements + low + 2 * n_optional > MAX_ELEMENTS:
            raise self.error(
                f"the repetition makes the grammar larger than {MAX_ELEMENTS} elements", place
            )
        self.n_elements += low
        tail = self.endless(item, place) if high is None else self.optional(item, n_optional, place)
        return item * low + tail

    def bounds(self) -> tuple[int, int | None]:
        place = self.place
        match = _REPETITION.match(self.text, place)
        if match is None:
            raise self.error("expected {m}, {m,} or {m,n} with whole numbers")
        self.place = match.end()
        low, comma, high = match.groups()
        # Nine digits are beyond every limit, and within what int() reads at once.
        first = int(low[-9:]) if len(low.lstrip("0")) < 10 else MAX_ELEMENTS + 1
        if comma is None:
            return first, first
        if high is None:
            return first, None
        last = int(high[-9:]) if len(high.lstrip("0")) < 10 else MAX_ELEMENTS + 1
        if last < first:
            raise self.error(f"at most {last} is less than at least {first}", place)
        return first, last

    def endless(self, item: list[int], place: int) -> list[int]:
        """Any number of an item: a rule R ::= item R | nothing."""
        element = self.new_rule(None, place)
        self.rules[~element] = [(*item, self.counted(element)), ()]
        self.repeating.add(~element)
        return [element]

    def optional(self, item: list[int], n: int, place: int) -> list[int]:
        """At most n of an item: rules R(i) ::= item R(i - 1) | nothing."""
        tail: list[int] = []
        for _ in range(n):
            tail = [self.new_rule([(*item, *tail), ()], place)]
        return tail

    # ---- what elements refer to ---------------------------------------------------------------

    def counted(self, element: int) -> int:
        self.n_elements += 1
        if self.n_elements > MAX_ELEMENTS:
            raise self.error(f"the grammar is larger than {MAX_ELEMENTS} elements")
        return element

    def terminal(self, ranges: list[tuple[int, int]]) -> int:
        return self.counted(self.terminal_ids.setdefault(_merged(ranges), len(self.terminal_ids)))

    def rule_id(self, name: str, place: int) -> int:
        if name not in self.rule_ids:
            self.rule_ids[name] = ~self.new_rule(None, place)
        return self.rule_ids[name]

    def new_rule(self, alternatives: list[Sequence] | None, place: int) -> int:
        """Add a rule; returns the element that refers to it."""
        self.rules.append(alternatives)
        self.places.append(place)
        return self.counted(~(len(self.rules) - 1))

    # ---- left recursion -----------------------------------------------------------------------

    def refuse_left_recursion(self, rules: tuple[tuple[Sequence, ...], ...]) -> None:
        """Refuse rules that can begin with themselves: no text would tell how often.

        A repeating rule behind an item that may be empty is the exception: going round once more
        changes nothing there.
        """
        may_be_empty = _rules_that_may_be_empty(rules)
        begins_with: list[list[int]] = []
        for rule, alternatives in enumerate(rules):
            firsts: dict[int, None] = {}
            for sequence in alternatives:
                for element in sequence:
                    if element >= 0:
                        break
                    if ~element != rule or rule not in self.repeating:
                        firsts[~element] = None
                    if not may_be_empty[~element]:
                        break
            begins_with.append(list(firsts))
        found = _rule_on_a_circle(begins_with)
        if found is not None:
            name = self.names()[found]
            which = f"the rule {name}" if name else "this"
            raise self.error(
                f"{which} can begin with itself (left recursion); write it as a repetition",
                self.places[found],
            )


def _merged(ranges: list[tuple[int, int]]) -> CharSet:
    """Sort and join ranges; one whose end is before its beginning holds nothing."""
    merged: list[tuple[int, int]] = []
    for low, high in sorted(ranges):
        if low > high:
            continue
        if merged and low <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
        else:
            merged.append((low, high))
    return tuple(merged)


def _complement(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    found, begin = [], 0
    for low, high in _merged(ranges):
        found.append((begin, low - 1))
        begin = high + 1
    return [*found, (begin, LAST_CODE_POINT)]


def _rules_that_may_be_empty(rules: tuple[tuple[Sequence, ...], ...]) -> list[bool]:
    """Mark the rules that can stand for the empty text."""
    may = [any(not sequence for sequence in alternatives) for alternatives in rules]
    # Alternatives that refer to rules alone, to be looked at again when one of those may be empty.
    users: list[list[tuple[int, Sequence]]] = [[] for _ in rules]
    for rule, alternatives in enumerate(rules):
        for sequence in alternatives:
            if all(element < 0 for element in sequence):
                for element in sequence:
                    users[~element].append((rule, sequence))
    waiting = [rule for rule, is_empty in enumerate(may) if is_empty]
    while waiting:
        for rule, sequence in users[waiting.pop()]:
            if not may[rule] and all(may[~element] for element in sequence):
                may[rule] = True
                waiting.append(rule)
    return may


def _rule_on_a_circle(begins_with: list[list[int]]) -> int | None:
    """Find a rule from which a path of first rules leads back to it."""
    unseen, open_, done = 0, 1, 2
    state = [unseen] * len(begins_with)
    for start in range(len(begins_with)):
        path = [(start, iter(begins_with[start]))] if state[start] == unseen else []
        state[start] = open_ if path else state[start]
        while path:
            rule, others = path[-1]
            for other in others:
                if state[other] == open_:
                    return other
                if state[other] == unseen:
                    state[other] = open_
                    path.append((other, iter(begins_with[other])))
                    break
            else:
                state[rule] = done
                path.pop()
    return None
