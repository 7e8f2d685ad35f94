"""The command `export-lora`: a base model and adapters merged into a model of their own.

Standard output holds a line for each tensor that adapters touch or whose type changes.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from engine.machine import usable_cores

from . import export_lora_options
from .console import emit, note, run_command, say, thread_count, version_line
from .export_lora_options import ExportLoraOptions
from .measured import load_adapters, load_model, make_log
from .progress import ProgressBar

# Everything that loads numpy is imported where it is used: `--help` must not wait for it.
if TYPE_CHECKING:
    from engine.merge import TensorReport


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Parameters
    ----------
    arguments : sequence of str, optional
        Without the program's name; those of the process when absent.

    Returns
    -------
    int
        Exit status: 0; 1 for bad input; 130 when interrupted; 141 when standard output is closed.
    """
    given = sys.argv[1:] if arguments is None else arguments
    return run_command(export_lora_options.TABLE, lambda: _run(given))


def _run(arguments: Sequence[str]) -> int:
    options, parsed = export_lora_options.parse(arguments)
    if parsed.stopped_by == "help":
        emit(export_lora_options.TABLE.usage().encode())
        return 0
    if parsed.stopped_by == "version":
        note(version_line())
        return 0
    for warning in parsed.warnings:
        note(f"warning: {warning}")
    _export(options)
    return 0


def _export(options: ExportLoraOptions) -> None:
    from engine.merge import merge, total_bytes

    log = make_log("export-lora", True)
    model = load_model(options.model_base, log)
    adapters = load_adapters(model, options.adapters, log)
    if not adapters:
        note("warning: no lora adapters will be applied.")
    lines = [
        f"{'tensor':28s} {'type':12s} {'rms change':>11s} {'rms error':>11s} {'max error':>11s}"
    ]
    drowned: list[str] = []
    stored = model.file.tensors
    with ProgressBar("export-lora", total_bytes(model)) as bar:

        def on_tensor(report: TensorReport) -> None:
            bar.add(stored[report.name].n_bytes if report.name in stored else 0)
            if report.touched or report.before is not report.after:
                lines.append(_line(report))
            if report.touched and report.rms_error > report.rms_change:
                drowned.append(report.name)

        merge(
            model,
            adapters,
            options.model_out,
            dtype=export_lora_options.TYPES.get(options.type),
            rescue=bool(options.rescue),
            n_threads=thread_count(options.threads, usable_cores()),
            on_tensor=on_tensor,
        )
    for line in lines:
        say(line)
    if drowned:
        mend = "--type f32 keeps" if options.rescue else "--rescue bf16 or --type f32 keeps more of"
        note(
            f"warning: in {len(drowned)} tensors ({drowned[0]} the first) rounding is larger than "
            f"what the adapters change; {mend} such changes"
        )
    log(f"wrote '{options.model_out}'")


def _line(report: TensorReport) -> str:
    kinds = report.before.name
    if report.after is not report.before:
        kinds += f" > {report.after.name}"
    return (
        f"{report.name:28s} {kinds:12s} {report.rms_change:11.3e} {report.rms_error:11.3e} "
        f"{report.largest_error:11.3e}"
    )


if __name__ == "__main__":
    sys.exit(main())
