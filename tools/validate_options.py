"""The options of `validate`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .options import Option, OptionTable, Parsed, argument, in_group, whole


@dataclass(frozen=True, slots=True)
class ValidateOptions:
    """What a run of `validate` was asked for."""

    model: str
    shown: int


TABLE = OptionTable(
    "validate",
    in_group(
        "arguments",
        argument("MODEL", "model", "a GGUF file, or the name of an installed model package"),
    )
    + in_group(
        "options",
        Option(("-h", "--help"), "help", "show this text and exit", stops=True),
        Option(("--show",), "shown", "list at most so many rows; all are counted",
               (whole(low=0),), default=20),
    ),
    strict_numbers=True,
)  # fmt: skip


def parse(arguments: Sequence[str]) -> tuple[ValidateOptions, Parsed]:
    """Read the arguments; see `OptionTable.parse` for what is raised."""
    parsed = TABLE.parse(arguments)
    return ValidateOptions(**parsed.values), parsed
