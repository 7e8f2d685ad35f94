"""The command `validate`: every row of a GGUF file looked at for values that cannot be."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from engine.errors import EngineError
from engine.locate import locate_model

from . import validate_options
from .console import FAILED, emit, note, run_command, say
from .progress import ProgressBar
from .validate_options import ValidateOptions

# Loads numpy, and `--help` must not wait for it.
if TYPE_CHECKING:
    from engine.gguf import GGUFFile


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Parameters
    ----------
    arguments : sequence of str, optional
        Without the program's name; those of the process when absent.

    Returns
    -------
    int
        Exit status: 0 for a sound file, 1 for any other.
    """
    given = sys.argv[1:] if arguments is None else arguments
    return run_command(validate_options.TABLE, lambda: _run(given))


def _run(arguments: Sequence[str]) -> int:
    options, parsed = validate_options.parse(arguments)
    if parsed.stopped_by == "help":
        emit(validate_options.TABLE.usage().encode())
        return 0
    return _validate(options)


def _validate(options: ValidateOptions) -> int:
    from engine.gguf import read_gguf
    from engine.validate import find_faults, n_rows

    with read_gguf(locate_model(options.model)) as file:
        tensors = file.tensors.values()
        n_bytes = sum(info.n_bytes for info in tensors)
        faults = []
        with ProgressBar("looking", n_bytes) as bar:
            for fault in find_faults(file, bar.add):
                faults.append(fault)
        for fault in faults[: options.shown]:
            say(f"{file.path}: {fault}")
        if len(faults) > options.shown:
            say(f"{file.path}: {len(faults) - options.shown} rows more")
        problem = _loading_problem(file)
        if problem:
            say(problem)
        what = f"{len(tensors)} tensors, {sum(map(n_rows, tensors))} rows, {n_bytes / 1e6:.1f} MB"
        if not (faults or problem):
            say(f"{file.path}: sound: {what}")
            return 0
        n_tensors = len({fault.tensor for fault in faults})
        wrong = f"{len(faults)} rows of {n_tensors} tensors hold values that cannot be"
        say(f"{file.path}: not sound: {wrong if faults else 'it cannot be loaded'}; {what}")
        return FAILED


def _loading_problem(file: GGUFFile) -> str:
    """Say what keeps a model of a known architecture from being loaded, if anything does."""
    from engine.model import ARCHITECTURES, Model

    if file.kind != "model" or not file.tensors:
        return ""
    if file.get_str("general.architecture", "") not in ARCHITECTURES:
        note(f"{file.path}: of an architecture that is not known here: values alone are looked at")
        return ""
    try:
        for warning in Model.load(file.path).warnings:
            note(f"warning: {warning}")
    except EngineError as error:
        return str(error)
    return ""


if __name__ == "__main__":
    sys.exit(main())
