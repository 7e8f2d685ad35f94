"""The command `convert-hf-to-gguf`: a publisher's folder to a GGUF file."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from . import convert_hf_to_gguf_options
from .console import emit, note, run_command
from .convert_hf_to_gguf_options import ConvertOptions
from .progress import ProgressBar


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
    return run_command(convert_hf_to_gguf_options.TABLE, lambda: _run(given))


def _run(arguments: Sequence[str]) -> int:
    options, parsed = convert_hf_to_gguf_options.parse(arguments)
    if parsed.stopped_by == "help":
        emit(convert_hf_to_gguf_options.TABLE.usage().encode())
        return 0
    _convert(options)
    return 0


def _convert(options: ConvertOptions) -> None:
    # Loads numpy, and `--help` must not wait for it.
    from engine.convert import read_folder

    conversion = read_folder(
        Path(options.model),
        options.outtype,
        name=options.model_name,
        vocab_only=options.vocab_only,
    )
    for warning in conversion.warnings:
        note(f"warning: {warning}")
    if options.verbose:
        for tensor in conversion.tensors:
            sizes = ", ".join(map(str, reversed(tensor.shape)))
            source = tensor.source.entry.dtype
            note(f"{tensor.name + ',':32} {source} --> {tensor.dtype.name}, shape = {{{sizes}}}")
    path = conversion.outfile(options.outfile)
    with ProgressBar("writing", conversion.n_bytes) as bar:
        conversion.write(path, bar.add)
    what = "vocabulary" if options.vocab_only else f"{conversion.outtype} model"
    note(f"{what} of {len(conversion.tensors)} tensors written to {path}")


if __name__ == "__main__":
    sys.exit(main())
