"""Options of a command as rows of a table: the parser, the usage text and the documentation.

The commands read their arguments as the original programs do, which no parser of the standard
library can: from left to right, a value is always the next argument (it may begin with ``-``),
``--opt=value`` is unknown, and ``_`` equals ``-`` in names that begin with ``--`` only.

``python -m engine.tools.options COMMAND`` prints the table for the documentation; without COMMAND
it prints the names of `COMMANDS`.
"""

from __future__ import annotations

import math
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from engine.errors import OptionError

FLOAT_MAX = 3.4028234663852886e38
MAX_THREADS = 512
INT_MIN, INT_MAX, SEED_MAX = -(2**31), 2**31 - 1, 2**32 - 1
SIZE_MAX = 2**40

# Commands with a table, which is in `engine.tools.NAME_options`, with underscores for hyphens.
COMMANDS = (
    "finetune",
    "main",
    "perplexity",
    "compare",
    "export-lora",
    "quantize",
    "convert-hf-to-gguf",
    "dtype-report",
    "validate",
)

_WHOLE = re.compile(r"\s*[+-]?[0-9]+")
_REAL = re.compile(
    r"\s*[+-]?(?:inf(?:inity)?|nan|(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e[+-]?[0-9]+)?)", re.IGNORECASE
)

_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}
HELP_COLUMN = 34
WIDTH = 100


class UsageError(OptionError):
    """Arguments that cannot be read; the usage is shown after the message."""


@dataclass(frozen=True, slots=True)
class Value:
    """One value of an option.

    Parameters
    ----------
    metavar : str
        What stands for it in the usage.
    convert : callable
        From the argument to the value and the part of the argument that was left over;
        raises ValueError with what was expected.
    problem : callable
        From the value to what is wrong with it; empty when nothing is.
    """

    metavar: str
    convert: Callable[[str], tuple[Any, str]]
    problem: Callable[[Any], str] = lambda _value: ""


@dataclass(frozen=True, slots=True)
class Option:
    """One row of a command's table.

    Parameters
    ----------
    spellings : tuple of str
        Names, with ``-`` inside; long names are also accepted with ``_``.
    dest : str
        The field of the command's dataclass that it sets.
    help : str
        One or two sentences for the usage and the documentation.
    values : tuple of Value
        What follows; nothing for a flag.
    default : object
        The field's value when the option is absent.
    constant : object
        What a flag stores.
    make : callable, optional
        From the values to what is stored; the value itself (or their tuple) when absent.
    repeat : bool
        Every occurrence counts and they are kept in order; else the last one counts.
    shown_default : str, optional
        What the usage calls the default, where the value does not say it.
    stops : bool
        Acts where it stands: nothing after it is read.
    refused : str
        Why the option is known but not offered; empty for an offered one.
    group : str
        Heading under which it is listed.
    positional : bool
        Stands for an argument that is no option, by its place among those; its one spelling is what
        the usage calls it. With `repeat` it takes all that are left.
    required : bool
        Of a positional one: its absence is an error.
    better : str
        What is better than with the original; empty where it is the same.
    new : bool
        The original does not have it.
    """

    spellings: tuple[str, ...]
    dest: str = ""
    help: str = ""
    values: tuple[Value, ...] = ()
    default: Any = None
    constant: Any = True
    make: Callable[..., Any] | None = None
    repeat: bool = False
    shown_default: str | None = None
    stops: bool = False
    refused: str = ""
    group: str = ""
    positional: bool = False
    required: bool = False
    better: str = ""
    new: bool = False


@dataclass(frozen=True, slots=True)
class Parsed:
    """What the arguments said: every field's value, the fields that were given, remarks."""

    values: dict[str, Any]
    given: frozenset[str]
    warnings: tuple[str, ...]
    stopped_by: str = ""


def whole(metavar: str = "N", low: int = INT_MIN, high: int = INT_MAX) -> Value:
    """Make a 32-bit whole number within ``low`` and ``high``."""
    return Value(metavar, _convert_whole(INT_MIN, INT_MAX), _between(low, high))


def threads() -> Value:
    """Make a number of threads; the engine runs at most `MAX_THREADS` together."""
    return whole(high=MAX_THREADS)


def seed(metavar: str = "SEED") -> Value:
    """Make a seed: 32 bits, signed or unsigned; kept unsigned, so -1 is 2³² - 1."""
    convert = _convert_whole(INT_MIN, SEED_MAX)

    def unsigned(text: str) -> tuple[int, str]:
        value, rest = convert(text)
        return value & SEED_MAX, rest

    return Value(metavar, unsigned)


def real(
    metavar: str = "N",
    low: float = -FLOAT_MAX,
    high: float = FLOAT_MAX,
    *,
    above: float | None = None,
    below: float | None = None,
) -> Value:
    """Make a float32 number within ``low`` and ``high``, or strictly above or below a bound."""
    within = _between(low, high)

    def problem(value: float) -> str:
        if above is not None and not value > above:
            return f"{value:g} is not above {above:g}"
        if below is not None and not value < below:
            return f"{value:g} is not below {below:g}"
        return within(value)

    return Value(metavar, _convert_real, problem)


def size(metavar: str = "SIZE") -> Value:
    """Make a number of bytes, 1 at least; K, M or G behind it count in powers of 1024."""
    convert = _convert_whole(1, SIZE_MAX)

    def with_unit(argument: str) -> tuple[int, str]:
        value, rest = convert(argument)
        unit = rest[:1].upper()
        if not unit or unit not in _UNITS:
            return value, rest
        return value * _UNITS[unit], rest[1:]

    return Value(metavar, with_unit)


def text(metavar: str) -> Value:
    """Make a value that is taken as it is."""
    return Value(metavar, lambda argument: (argument, ""))


def choice(*names: str) -> Value:
    """Make one of some words."""

    def convert(argument: str) -> tuple[str, str]:
        if argument not in names:
            raise ValueError(f"one of {', '.join(names)}")
        return argument, ""

    return Value("{" + ",".join(names) + "}", convert)


def leading_float(argument: str) -> tuple[float, str]:
    """Read the number at the beginning of a text, as C's ``strtof`` does for decimal numbers.

    Returns
    -------
    tuple of float and str
        The number (infinite and NaN included) and the rest of the text.

    Raises
    ------
    ValueError
        If the text begins with no number, or with one beyond float32.
    """
    match = _REAL.match(argument)
    if match is None:
        raise ValueError("a number")
    value = float(match.group())
    if math.isfinite(value) and abs(value) > FLOAT_MAX:
        raise ValueError("a number that a 32-bit float can hold")
    return value, argument[match.end() :]


def _convert_real(argument: str) -> tuple[float, str]:
    value, rest = leading_float(argument)
    if not math.isfinite(value):
        raise ValueError("a finite number")
    return value, rest


def _convert_whole(low: int, high: int) -> Callable[[str], tuple[int, str]]:
    def convert(argument: str) -> tuple[int, str]:
        match = _WHOLE.match(argument)
        if match is None:
            raise ValueError("a whole number")
        # Longer than any number in range: not worth converting, and Python caps the length.
        digits = match.group().strip().lstrip("+-").lstrip("0")
        value = int(match.group()) if len(digits) <= 20 else high + 1
        if not low <= value <= high:
            raise ValueError(f"a whole number from {low} to {high}")
        return value, argument[match.end() :]

    return convert


def _between(low: float, high: float) -> Callable[[Any], str]:
    def problem(value: float) -> str:
        if value < low:
            return f"{value:g} is below {low:g}"
        if value > high:
            return f"{value:g} is above {high:g}"
        return ""

    return problem


def argument(
    name: str, dest: str, help: str, kind: Value | None = None, *, default: Any = "",
    required: bool = True, repeat: bool = False,
) -> Option:  # fmt: skip
    """Make the row of an argument that is no option: a file, say, which the usage calls `name`."""
    values = (text(name) if kind is None else kind,)
    return Option((name,), dest, help, values, default=default, repeat=repeat,
                  shown_default="", positional=True, required=required)  # fmt: skip


def in_group(title: str, *rows: Option) -> tuple[Option, ...]:
    """List rows under a heading."""
    return tuple(replace(row, group=title) for row in rows)


def not_offered(reason: str, *spellings: str) -> tuple[Option, ...]:
    """Make the rows of known options that are refused; spellings of one option joined by ``|``."""
    return tuple(Option(tuple(names.split("|")), refused=reason) for names in spellings)


@dataclass(frozen=True, slots=True)
class OptionTable:
    """Every option of a command.

    Parameters
    ----------
    program : str
        The command's name in the usage.
    rows : tuple of Option
    strict_numbers : bool
        Refuse a number with anything after it, instead of taking the number with a warning.
    joined_values : bool
        Take ``--name=value`` too, as the originals that are Python programs do.
    compares : bool
        The documentation tells how each row stands to the original's.
    epilog : str
        What follows the rows, as it is.
    """

    program: str
    rows: tuple[Option, ...]
    strict_numbers: bool = False
    joined_values: bool = False
    compares: bool = False
    epilog: str = ""
    _by_name: dict[str, Option] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Index the rows; a name that stands twice is a mistake in the table."""
        named = [row for row in self.rows if not row.positional]
        names = [(name, row) for row in named for name in row.spellings]
        by_name = dict(names)
        if len(by_name) != len(names):
            raise ValueError(f"{self.program}: an option is spelled the same way in two rows")
        object.__setattr__(self, "_by_name", by_name)

    def offered(self) -> tuple[Option, ...]:
        """Rows that the command accepts."""
        return tuple(row for row in self.rows if not row.refused)

    def positionals(self) -> tuple[Option, ...]:
        """Rows of arguments that are no options, in their order."""
        return tuple(row for row in self.rows if row.positional)

    def find(self, name: str) -> Option | None:
        """Find the row with a (normalised) spelling."""
        return self._by_name.get(name)

    def defaults(self) -> dict[str, Any]:
        """Give the value of every field when no option is given."""
        values: dict[str, Any] = {}
        for row in self.offered():
            if not row.stops and row.dest:
                values.setdefault(row.dest, () if row.repeat else row.default)
        return values

    def parse(self, arguments: Iterable[str]) -> Parsed:
        """Read the arguments from left to right.

        Raises
        ------
        UsageError
            For an unknown argument, a missing value, or a value that is no number; the message
            ends where the usage is to follow.
        OptionError
            For a refused option, or a value out of range; names the option.
        """
        reader = _Reader(self, list(arguments))
        return reader.read()

    def usage(self) -> str:
        """Make the usage text."""
        places = "".join(f" {_placeholder(row)}" for row in self.positionals())
        lines = [f"usage: {self.program} [options]{places}"]
        group = None
        for row in self.offered():
            if row.group != group:
                group = row.group
                lines += ["", f"{group}:"]
            lines += _usage_lines(row)
        refused = [row.spellings[-1] for row in self.rows if row.refused]
        if refused:
            lines += ["", "options of the original that are refused:"]
            lines += textwrap.wrap(
                " ".join(refused), WIDTH - 2, initial_indent="  ", subsequent_indent="  ",
                break_on_hyphens=False, break_long_words=False,
            )  # fmt: skip
        if self.epilog:
            lines += ["", self.epilog.rstrip("\n")]
        return "\n".join(lines) + "\n"

    def markdown(self) -> str:
        """Make the table for the documentation, one part a group."""
        lines: list[str] = []
        group = None
        for row in self.offered():
            if row.group != group:
                group = row.group
                columns = ["option", "default", "effect", *["the original's"] * self.compares]
                lines += ["", f"### {group}", "", *_table_head(columns)]
            names = ", ".join(f"`{_signature(name, row)}`" for name in row.spellings)
            cells = [names, _cell(_default_text(row)), _cell(row.help)]
            lines.append(_table_line(cells + [_cell(_status(row))] * self.compares))
        refused = [row for row in self.rows if row.refused]
        if refused:
            why = "refused" if self.compares else "it is"
            lines += ["", "### known, but refused", "", *_table_head(["option", why])]
            for row in refused:
                names = ", ".join(f"`{name}`" for name in row.spellings)
                lines.append(_table_line([names, _cell(row.refused)]))
        if self.epilog:
            lines += ["", "```text", self.epilog.rstrip("\n"), "```"]
        return "\n".join(lines).lstrip("\n") + "\n"


class _Reader:
    """One pass over the arguments of a command."""

    def __init__(self, table: OptionTable, arguments: list[str]) -> None:
        self.table = table
        self.arguments = arguments
        self.place = 0
        self.values = table.defaults()
        self.given: set[str] = set()
        self.warnings: list[str] = []
        # Ranges are checked after the last argument: of a repeated option only the last counts.
        self.to_check: dict[str, list[tuple[str, Value, Any]]] = {}

    def read(self) -> Parsed:
        while self.place < len(self.arguments):
            name = self._next_name()
            row = self.table.find(name)
            if row is None:
                self._store_positional(name)
                continue
            if row.refused:
                raise OptionError(f"option {name} of the original is {row.refused}")
            if row.stops:
                return self._result(stopped_by=row.dest)
            self._store(name, row)
        for row in self.table.positionals():
            if row.required and row.dest not in self.given:
                raise UsageError(f"{row.spellings[0]} is missing")
        for checks in self.to_check.values():
            for name, kind, value in checks:
                problem = kind.problem(value)
                if problem:
                    raise OptionError(f"{name}: {problem}")
        return self._result()

    def _next_name(self) -> str:
        argument = self.arguments[self.place]
        self.place += 1
        if not argument.startswith("--"):
            return argument
        if self.table.joined_values and "=" in argument:
            argument, value = argument.split("=", 1)
            self.arguments.insert(self.place, value)
        return argument.replace("_", "-")

    def _store_positional(self, name: str) -> None:
        free = (r for r in self.table.positionals() if r.repeat or r.dest not in self.given)
        row = None if name.startswith("-") else next(free, None)
        if row is None:
            raise UsageError(f"unknown argument: {name}")
        self.place -= 1  # the argument is the value itself
        self._store(row.spellings[0], row)

    def _store(self, name: str, row: Option) -> None:
        converted = [self._value(name, kind) for kind in row.values]
        self.given.add(row.dest)
        checks = [(name, kind, value) for kind, value in zip(row.values, converted, strict=True)]
        kept = self.to_check.get(row.dest, []) if row.repeat else []
        self.to_check[row.dest] = kept + checks
        value = _made(row, converted)
        if row.repeat:
            self.values[row.dest] = (*self.values[row.dest], value)
        else:
            self.values[row.dest] = value

    def _value(self, name: str, kind: Value) -> Any:
        if self.place >= len(self.arguments):
            raise UsageError(f"invalid parameter for argument: {name}")
        argument = self.arguments[self.place]
        self.place += 1
        try:
            value, rest = kind.convert(argument)
        except ValueError as error:
            raise UsageError(
                f"invalid parameter for argument: {name}: '{argument}' is not {error}"
            ) from None
        if rest.strip():
            used = argument[: len(argument) - len(rest)]
            if self.table.strict_numbers:
                raise UsageError(
                    f"invalid parameter for argument: {name}: '{argument}' is not a number:"
                    f" '{rest}' stands after {used}"
                )
            self.warnings.append(f"{name}: '{argument}' is read as {used}")
        return value

    def _result(self, stopped_by: str = "") -> Parsed:
        return Parsed(self.values, frozenset(self.given), tuple(self.warnings), stopped_by)


def _made(row: Option, values: Sequence[Any]) -> Any:
    if not row.values:
        return row.constant
    if row.make is not None:
        return row.make(*values)
    return values[0] if len(values) == 1 else tuple(values)


def _placeholder(row: Option) -> str:
    name = row.spellings[0] + (" ..." if row.repeat else "")
    return name if row.required else f"[{name}]"


def _signature(name: str, row: Option) -> str:
    if row.positional:
        return name
    return " ".join([name, *(kind.metavar for kind in row.values)])


def _default_text(row: Option) -> str:
    if row.shown_default is not None:
        return row.shown_default
    if not row.values:
        return ""
    if row.repeat or row.default is None:
        return "none"
    if isinstance(row.default, float):
        return f"{row.default:g}"
    if row.default == "":
        return "empty"
    return str(row.default)


def _usage_lines(row: Option) -> list[str]:
    values = "" if row.positional else "".join(f" {kind.metavar}" for kind in row.values)
    left = "  " + ", ".join(row.spellings) + values
    shown = _default_text(row)
    sentence = f"{row.help} (default: {shown})" if shown else row.help
    right = textwrap.wrap(sentence, WIDTH - HELP_COLUMN, break_on_hyphens=False)
    indent = " " * HELP_COLUMN
    if len(left) > HELP_COLUMN - 2:
        return [left, *(indent + line for line in right)]
    first, *others = right
    return [left.ljust(HELP_COLUMN) + first, *(indent + line for line in others)]


def _status(row: Option) -> str:
    """How a row stands to the original's."""
    if row.new:
        return "new"
    return f"better: {row.better}" if row.better else "same"


def _table_head(columns: Sequence[str]) -> list[str]:
    return [_table_line(columns), _table_line(["---"] * len(columns))]


def _table_line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(content: str) -> str:
    return content.replace("|", r"\|")


def table_of(command: str) -> OptionTable:
    """Give the table of one of `COMMANDS`."""
    from importlib import import_module

    module = import_module(f"engine.tools.{command.replace('-', '_')}_options")
    table: OptionTable = module.TABLE
    return table


def _document(arguments: Sequence[str]) -> int:
    if not arguments:
        print(*COMMANDS)
        return 0
    if len(arguments) > 1 or arguments[0] not in COMMANDS:
        print(f"usage: python -m engine.tools.options [{'|'.join(COMMANDS)}]", file=sys.stderr)
        return 1
    print(table_of(arguments[0]).markdown(), end="")
    return 0


if __name__ == "__main__":
    sys.exit(_document(sys.argv[1:]))
