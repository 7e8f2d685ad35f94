"""The arguments of `quantize`: one row each, and the dataclass that they fill."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.dtypes import BY_ID, DType
from engine.errors import OptionError
from engine.file_types import NOT_OFFERED, TARGETS, Target, find_target, is_known

from .main_model_options import key_override
from .options import (
    Option,
    OptionTable,
    Parsed,
    UsageError,
    Value,
    argument,
    in_group,
    not_offered,
    text,
    threads,
)

_TYPES = {dtype.name: dtype for dtype in BY_ID.values()}


@dataclass(frozen=True, slots=True)
class QuantizeOptions:
    """What a run of `quantize` was asked for."""

    model: str
    out: str
    target: Target
    threads: int
    allow_requantize: bool
    leave_output: bool
    pure: bool
    imatrix: str
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    output_type: DType | None
    embedding_type: DType | None
    overrides: tuple[tuple[str, Any], ...]


def _tensor_type() -> Value:
    def convert(argument: str) -> tuple[DType, str]:
        if argument.upper() not in _TYPES:
            raise ValueError("one of " + ", ".join(_TYPES))
        return _TYPES[argument.upper()], ""

    return Value("TYPE", convert)


def _types() -> str:
    """List the targets for the usage."""
    lines = ["types:"]
    for target in TARGETS:
        number = "  " if target.is_copy else f"{target.file_type:2d}"
        bits = "" if target.is_copy else f"{target.bits:7.4f} bits a weight"
        note = f"; {target.note}" if bits and target.note else target.note
        lines.append(f"  {number}  {target.name:<7} {bits}{note}")
    lines.append("      Q3_K, Q4_K and Q5_K mean Q3_K_M, Q4_K_M and Q5_K_M")
    return "\n".join(lines) + "\n"


_ARGUMENTS = in_group(
    "arguments",
    argument("IN", "model", "model to quantize: a GGUF file, or a model package"),
    argument("OUT", "out", "file to write; left out, TYPE comes second and the file is "
             "ggml-model-TYPE.gguf beside IN", required=False),
    argument("TYPE", "type", "name or number of one of the types below", required=False),
    argument("THREADS", "n_threads", "threads; 0 or left out: all processors", required=False),
)  # fmt: skip

_GENERAL = in_group(
    "options",
    Option(("-h", "--help"), "help", "show this text and exit", stops=True),
    Option(("--version",), "version", "show the version and exit", stops=True),
    Option(("--allow-requantize",), "allow_requantize",
           "take tensors that are quantized already; their errors add up", default=False),
    Option(("--leave-output-tensor",), "leave_output", "leave output.weight as it is",
           default=False),
    Option(("--pure",), "pure", "no mixture: all matrices get one type", default=False),
    Option(("--imatrix",), "imatrix",
           "importance matrix, a file of llama.cpp's imatrix: errors go to where they matter less",
           (text("FNAME"),), default="", shown_default="none"),
    Option(("--include-weights",), "include",
           "use the importance matrix for tensors with this in their names; may be repeated",
           (text("NAME"),), repeat=True, shown_default="all"),
    Option(("--exclude-weights",), "exclude",
           "do not use it for tensors with this in their names; may be repeated",
           (text("NAME"),), repeat=True),
    Option(("--output-tensor-type",), "output_type", "type of output.weight", (_tensor_type(),),
           shown_default="the mixture's"),
    Option(("--token-embedding-type",), "embedding_type", "type of token_embd.weight",
           (_tensor_type(),), shown_default="the mixture's"),
    Option(("--override-kv",), "overrides", "set a key of the new file; may be repeated",
           (key_override(),), repeat=True),
)  # fmt: skip

_REFUSED = not_offered(
    "not offered here: models in several parts are not read; merge the parts first", "--keep-split"
)

TABLE = OptionTable("quantize", _ARGUMENTS + _GENERAL + _REFUSED, epilog=_types())


def parse(arguments: Sequence[str]) -> tuple[QuantizeOptions | None, Parsed]:
    """Read the arguments of `quantize`; no options where one of them acts by itself.

    Raises
    ------
    UsageError, OptionError
        As `OptionTable.parse` does; also for a type that is none, and for more arguments than there
        are places.
    """
    parsed = TABLE.parse(arguments)
    if parsed.stopped_by:
        return None, parsed
    values = dict(parsed.values)
    places = [values.pop(name) for name in ("out", "type", "n_threads")]
    if is_known(places[0]):  # the original's way to leave the output's name out
        places = ["", *places[:2]] if not places[2] else places
    out, kind, n_threads = places
    target = _target(kind)
    if values["include"] and values["exclude"]:
        raise UsageError("--include-weights and --exclude-weights exclude one another")
    default = Path(values["model"]).parent / f"ggml-model-{target.name}.gguf"
    options = QuantizeOptions(
        out=out or str(default), target=target, threads=_threads(n_threads), **values
    )
    return options, parsed


def _target(name: str) -> Target:
    if not name:
        raise UsageError("TYPE is missing")
    target = find_target(name)
    if target is None and is_known(name):
        raise OptionError(
            f"type {name.upper()}: one of {', '.join(NOT_OFFERED)}, which cannot be made here; "
            "choose another type"
        )
    if target is None:
        raise UsageError(f"invalid type '{name}'")
    return target


def _threads(written: str) -> int:
    kind = threads()
    try:
        value, rest = kind.convert(written or "0")
    except ValueError as error:
        raise UsageError(f"THREADS: '{written}' is not {error}") from None
    if rest.strip() or kind.problem(value):
        raise UsageError(f"THREADS: {kind.problem(value) or repr(written) + ' is no number'}")
    return int(value)
