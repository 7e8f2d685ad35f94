"""The command `dtype-report`: what f16 would lose of a file's values, and of bf16 as a type."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from engine.locate import locate_model

from . import dtype_report_options
from .console import emit, run_command, say
from .dtype_report_options import DtypeReportOptions
from .progress import ProgressBar

# Loads numpy, and `--help` must not wait for it.
if TYPE_CHECKING:
    from engine.dtype_report import Losses

_HEAD = ("values", "not exact", "overflow", "subnormal", "to zero", "not finite")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Parameters
    ----------
    arguments : sequence of str, optional
        Without the program's name; those of the process when absent.

    Returns
    -------
    int
        Exit status: 0; 1 for bad input.
    """
    given = sys.argv[1:] if arguments is None else arguments
    return run_command(dtype_report_options.TABLE, lambda: _run(given))


def _run(arguments: Sequence[str]) -> int:
    options, parsed = dtype_report_options.parse(arguments)
    if parsed.stopped_by == "help":
        emit(dtype_report_options.TABLE.usage().encode())
        return 0
    _report(options)
    return 0


def _report(options: DtypeReportOptions) -> None:
    from engine.dtype_report import Losses, bf16_losses, tensor_losses
    from engine.gguf import read_gguf
    from engine.gguf_write import shown

    with read_gguf(locate_model(options.model)) as file:
        found = []
        with ProgressBar("counting", sum(info.n_bytes for info in file.tensors.values())) as bar:
            for info in file.tensors.values():
                found.append((info, tensor_losses(file, info, bar.add)))
        width = max([len("tensor"), *(len(shown(info.name)) for info, _ in found)])
        say(f"{file.path}: rounded to f16")
        heads = "".join(f" {head:>12}" for head in _HEAD)
        say(f"{'tensor':<{width}} type {heads}  largest relative error")
        total = Losses()
        for info, losses in found:
            total += losses
            if losses.inexact or losses.not_finite or not options.damaged:
                say(_line(shown(info.name), info.dtype.name, losses, width))
        say(_line("all", "", total, width))
        say("")
        for line in _type_lines(bf16_losses()):
            say(line)


def _line(name: str, dtype: str, losses: Losses, width: int) -> str:
    numbers = (
        losses.n_values,
        losses.inexact,
        losses.overflow,
        losses.subnormal,
        losses.zero,
        losses.not_finite,
    )
    cells = "".join(f" {n:>12}" for n in numbers)
    return f"{name:<{width}} {dtype:<5}{cells}  {losses.largest_error:.3g}"


def _type_lines(bf16: Losses) -> list[str]:
    """Say of bf16 itself how much of it f16 holds; NaN counts as neither exact nor lost."""
    finite = bf16.n_values - bf16.not_finite
    exact = finite - bf16.inexact
    n_infinite = 2
    return [
        f"bf16 has {bf16.n_values} patterns: {finite} finite values, {n_infinite} infinities, "
        f"{bf16.not_finite - n_infinite} NaN.",
        f"f16 holds {exact} of the finite ones exactly ({exact / finite:.2%} of them), and the "
        f"infinities: {(exact + n_infinite) / bf16.n_values:.2%} of all patterns, NaN counted as "
        "not held.",
        f"Of the others {bf16.overflow} overflow, {bf16.zero} become zero and "
        f"{bf16.inexact - bf16.overflow - bf16.zero} are rounded to a subnormal.",
    ]


if __name__ == "__main__":
    sys.exit(main())
