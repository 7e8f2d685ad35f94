"""The options of `export-lora`: one row each, and the dataclass that they fill."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from engine.file_types import UNIFORM

from .options import (
    Option,
    OptionTable,
    Parsed,
    UsageError,
    choice,
    in_group,
    real,
    text,
    threads,
)

# Types that a merged model's matrices can be given, as --type writes them.
TYPES = {dtype.name.lower(): dtype for dtype in UNIFORM}


@dataclass(frozen=True, slots=True)
class ExportLoraOptions:
    """What a run of `export-lora` was asked for."""

    model_base: str
    model_out: str
    adapters: tuple[tuple[str, float], ...]
    threads: int | None
    type: str
    rescue: str
    given: frozenset[str] = frozenset()


TABLE = OptionTable(
    "export-lora",
    in_group(
        "options",
        Option(("-h", "--help"), "help", "show this text and exit", stops=True),
        Option(("--version",), "version", "show the version and exit", stops=True),
        Option(("-m", "--model-base"), "model_base",
               "model that the adapters were trained on: a GGUF file, or a model package",
               (text("FNAME"),), default=""),
        Option(("-o", "--model-out"), "model_out", "file that the merged model is written to",
               (text("FNAME"),), default=""),
        Option(("-l", "--lora"), "adapters",
               "merge an adapter: .bin, GGUF or PEFT, told apart by content; may be repeated",
               (text("FNAME"),), repeat=True, make=lambda name: (name, 1.0)),
        Option(("-s", "--lora-scaled"), "adapters",
               "merge an adapter with a scale; may be repeated", (text("FNAME"), real("S")),
               repeat=True),
        Option(("-t", "--threads"), "threads", "threads; 0 or less: all processors", (threads(),),
               shown_default="the cores that may be used"),
        Option(("--type",), "type", "type of all matrices whose rows are whole blocks of it",
               (choice(*TYPES),), default="", shown_default="each tensor's own"),
        Option(("--rescue",), "rescue",
               "store matrices that adapters touch as bf16 where they would be quantized",
               (choice("bf16"),), default="", shown_default="off"),
    ),
)  # fmt: skip


def parse(arguments: Sequence[str]) -> tuple[ExportLoraOptions, Parsed]:
    """Read the arguments of `export-lora`.

    Raises
    ------
    UsageError, OptionError
        As `OptionTable.parse` does; also if no base or no output is named.
    """
    parsed = TABLE.parse(arguments)
    options = ExportLoraOptions(**parsed.values, given=parsed.given)
    if not parsed.stopped_by:
        for name, option in ((options.model_base, "-m"), (options.model_out, "-o")):
            if not name:
                raise UsageError(f"{option}: no file is named")
    return options, parsed
