"""The command `quantize`: a model's tensors in other types, in a new file.

Standard output holds a line a tensor, as the original's, and how long it took.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from engine.locate import locate_model
from engine.machine import usable_cores

from . import quantize_options
from .console import emit, note, run_command, say, thread_count, version_line
from .progress import ProgressBar
from .quantize_options import QuantizeOptions

# Everything that loads numpy is imported where it is used: `--help` must not wait for it.
if TYPE_CHECKING:
    from engine.imatrix import ImportanceMatrix
    from engine.quantize import Planned

_MIB = 1 << 20


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Parameters
    ----------
    arguments : sequence of str, optional
        Without the program's name; those of the process when absent.

    Returns
    -------
    int
        Exit status: 0; 1 for bad input, when no file is written; 130 when interrupted.
    """
    given = sys.argv[1:] if arguments is None else arguments
    return run_command(quantize_options.TABLE, lambda: _run(given))


def _run(arguments: Sequence[str]) -> int:
    options, parsed = quantize_options.parse(arguments)
    for warning in parsed.warnings:
        note(f"warning: {warning}")
    if parsed.stopped_by == "help":
        emit(quantize_options.TABLE.usage().encode())
    elif parsed.stopped_by == "version":
        note(version_line())
    if options is not None:
        _quantize(options)
    return 0


def _quantize(options: QuantizeOptions) -> None:
    from engine.gguf import read_gguf
    from engine.mixture import Wish
    from engine.quantize import Quantization

    began = time.perf_counter()
    path = locate_model(options.model)
    n_threads = thread_count(options.threads or None, usable_cores())
    note(
        f"main: quantizing '{path}' to '{options.out}' as {options.target.name} using "
        f"{n_threads} threads"
    )
    wish = Wish(
        options.target,
        pure=options.pure,
        leave_output=options.leave_output,
        output_type=options.output_type,
        embedding_type=options.embedding_type,
    )
    with read_gguf(path) as file:
        plan = Quantization(
            file,
            wish,
            imatrix=_read_imatrix(options),
            allow_requantize=options.allow_requantize,
            overrides=dict(options.overrides),
        )
        for warning in plan.warnings:
            note(f"warning: {warning}")
        started = time.perf_counter()
        lines: list[str] = []
        with ProgressBar("quantizing", plan.n_bytes) as bar:
            plan.write(
                options.out,
                n_threads,
                bar.add,
                lambda item: lines.append(_line(len(lines) + 1, len(plan.tensors), item)),
            )
    ended = time.perf_counter()
    for line in lines:
        say(line)
    say(f"model size  = {plan.n_bytes / _MIB:8.2f} MB")
    say(f"quant size  = {plan.new_bytes / _MIB:8.2f} MB")
    say("")
    say(f"main: quantize time = {(ended - started) * 1e3:8.2f} ms")
    say(f"main:    total time = {(ended - began) * 1e3:8.2f} ms")


def _read_imatrix(options: QuantizeOptions) -> ImportanceMatrix | None:
    if not options.imatrix:
        return None
    from engine.imatrix import read_imatrix

    matrix = read_imatrix(options.imatrix)
    note(
        f"loaded {len(matrix.values)} importance matrix entries from {matrix.path} computed on "
        f"{matrix.n_chunks} chunks"
    )
    return matrix.only(options.include, options.exclude)


def _line(number: int, count: int, item: Planned) -> str:
    info, choice = item.info, item.choice
    sizes = [*reversed(info.shape), 1, 1, 1, 1][:4]
    head = (
        f"[{number:4d}/{count:4d}] {info.name:>36s} - [{', '.join(f'{n:5d}' for n in sizes)}], "
        f"type = {info.dtype.name:>6s}, "
    )
    if item.is_copy:
        return f"{head}size = {info.n_bytes / _MIB:8.3f} MB"
    return (
        f"{head}converting to {choice.dtype.name} .. size = {info.n_bytes / _MIB:8.2f} MiB -> "
        f"{item.n_bytes / _MIB:8.2f} MiB"
    )


if __name__ == "__main__":
    sys.exit(main())
