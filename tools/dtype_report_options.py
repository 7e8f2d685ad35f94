"""The options of `dtype-report`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .options import Option, OptionTable, Parsed, argument, in_group


@dataclass(frozen=True, slots=True)
class DtypeReportOptions:
    """What a run of `dtype-report` was asked for."""

    model: str
    damaged: bool


TABLE = OptionTable(
    "dtype-report",
    in_group(
        "arguments",
        argument("MODEL", "model", "a GGUF file, or the name of an installed model package"),
    )
    + in_group(
        "options",
        Option(("-h", "--help"), "help", "show this text and exit", stops=True),
        Option(("--damaged",), "damaged", "list only tensors that f16 does not hold exactly",
               default=False),
    ),
)  # fmt: skip


def parse(arguments: Sequence[str]) -> tuple[DtypeReportOptions, Parsed]:
    """Read the arguments; see `OptionTable.parse` for what is raised."""
    parsed = TABLE.parse(arguments)
    return DtypeReportOptions(**parsed.values), parsed
