"""The command `perplexity`: how well a model predicts a text, and how far it is from another.

Standard output holds the figures, a window at a time, as the original prints them.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, TypeVar

from engine.locate import locate_model
from engine.machine import usable_cores

from . import perplexity_options
from .console import (
    GPU_WARNINGS,
    emit,
    note,
    run_command,
    say,
    thread_count,
    version_line,
)
from .main_model import load_model, make_context
from .measured import make_log, text_tokens, time_to_go, warn_of_length, window_bos
from .perplexity_options import PerplexityOptions
from .progress import ProgressBar
from .prompt import prompt_bytes

# Everything that loads numpy is imported where it is used: `--help` must not wait for it.
if TYPE_CHECKING:
    from engine.measure import Divergence, LogitFile, Mean, Windows
    from engine.model import Context, Model

_FEWEST = 100  # scored tokens below which the original draws no conclusions

_Step = TypeVar("_Step")


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
    return run_command(perplexity_options.TABLE, lambda: _run(given))


def _run(arguments: Sequence[str]) -> int:
    options, parsed = perplexity_options.parse(arguments)
    if parsed.stopped_by == "help":
        emit(perplexity_options.TABLE.usage().encode())
        return 0
    if parsed.stopped_by == "version":
        note(version_line())
        return 0
    measurement = _Measurement(options)
    for warning in parsed.warnings:
        measurement.log(f"warning: {warning}")
    if "gpu_layers" in options.given:
        for line in GPU_WARNINGS:
            measurement.log(line.format(option="--gpu-layers"))
    for line in dict.fromkeys(options.without_effect):
        measurement.log(f"warning: {line}")
    measurement.run()
    return 0


class _Measurement:
    """One run: load, measure window by window, tell."""

    def __init__(self, options: PerplexityOptions) -> None:
        self.options = options
        self.log = make_log("perplexity", options.log)

    def run(self) -> None:
        options = self.options
        text = prompt_bytes(options.prompt, escape=options.escape)  # refused before numpy is loaded
        path = locate_model(options.model)
        if options.kl_divergence:
            from engine.measure import read_logit_file

            base = read_logit_file(options.logit_file)
            self._divergence(load_model(path, options, self.log), base)
            return
        model = load_model(path, options, self.log)
        if options.stride:
            self._strided(model, text)
        else:
            self._halves(model, text)

    def _context(self, model: Model, n_ctx: int) -> Context:
        options = self.options
        warn_of_length(model, n_ctx, self.log)
        threads = thread_count(options.threads, usable_cores())
        both = (threads, thread_count(options.threads_batch, threads))
        return make_context(model, n_ctx, both, options, self.log)

    def _halves(self, model: Model, text: bytes) -> None:
        from engine.measure import halves, open_logit_writer, perplexity

        options = self.options
        tokens = text_tokens(model, text, self.log)
        windows = halves(tokens, options.n_ctx, options.chunks, window_bos(model))
        context = self._context(model, windows.n_ctx)
        self._tell_plan(windows)
        with ExitStack() as files:
            writer = None
            if options.logit_file:
                self.log(f"saving all logits to {options.logit_file}")
                opened = open_logit_writer(options.logit_file, windows, model.hparams.n_vocab)
                writer = files.enter_context(opened)
            for number, loss in self._steps(windows, perplexity(context, windows, writer)):
                self._say_step(number, windows, loss)
            say("")
        if loss.error > 0:
            say(f"Final estimate: PPL = {loss.perplexity:.4f} +/- {loss.perplexity_error:.5f}")
        else:
            say("Unexpected negative standard deviation of log(prob)")

    def _strided(self, model: Model, text: bytes) -> None:
        from engine.generate import context_size
        from engine.measure import perplexity, strided

        options = self.options
        # A window is the original's whole context: as many as a batch holds, and half a stride.
        n_all = options.n_ctx * max(1, options.n_batch // options.n_ctx)
        n_ctx = context_size(
            n_all + options.stride // 2, model.hparams.n_ctx_train, flash=options.flash_attention
        )
        self.log(
            "Will perform strided perplexity calculation -> adjusting context size from "
            f"{n_all} to {n_ctx}"
        )
        tokens = text_tokens(model, text, self.log)
        windows = strided(tokens, n_ctx, options.stride, options.chunks)
        context = self._context(model, n_ctx)
        self._tell_plan(windows)
        for number, loss in self._steps(windows, perplexity(context, windows)):
            if options.output_type == 0:
                emit(f"[{number + 1}]{loss.perplexity:.4f},".encode())
            else:
                say(f"{number * windows.step:8d}  {loss.perplexity:.4f}")
        say("")

    def _divergence(self, model: Model, base: LogitFile) -> None:
        from engine.measure import divergence

        windows = base.windows
        context = self._context(model, windows.n_ctx)
        found = divergence(context, model.hparams.n_vocab, base, window_bos(model))
        for number, seen in self._steps(windows, found):
            if number == 0:
                say(
                    "\nchunk             PPL               ln(PPL(Q)/PPL(base))          "
                    "KL Divergence              Δp RMS            Same top p"
                )
            say(_divergence_line(number, seen))
        say("")
        if seen.count >= _FEWEST:
            emit("\n".join(_report(seen)).encode() + b"\n")

    def _steps(self, windows: Windows, steps: Iterator[_Step]) -> Iterator[tuple[int, _Step]]:
        """Count the windows, and tell after the first how long all will take."""
        began = time.monotonic()
        shown = sys.stdout is not None and not sys.stdout.isatty()
        with ProgressBar("perplexity", windows.count if shown else 0, "chunks") as bar:
            for number, step in enumerate(steps):
                if number == 0:
                    self.log(time_to_go(time.monotonic() - began, windows.count))
                yield number, step
                if shown:
                    bar.add(1)

    def _tell_plan(self, windows: Windows) -> None:
        self.log(
            f"calculating perplexity over {windows.count} chunks, n_ctx={windows.n_ctx}, "
            f"batch_size={min(self.options.n_batch, windows.n_ctx)}, n_seq=1"
        )

    def _say_step(self, number: int, windows: Windows, loss: Mean) -> None:
        if self.options.output_type == 0:
            emit(f"[{number + 1}]{loss.perplexity:.4f},".encode())
        else:
            say(
                f"{number * windows.n_ctx:8d}  {loss.perplexity:.4f}  {loss.value:4f}  "
                f"{loss.error:4f}"
            )


def _divergence_line(number: int, seen: Divergence) -> str:
    ratio, ratio_error = seen.log_ratio
    rms, rms_error = seen.rms_change
    share, share_error = seen.same_top_share
    return (
        f"{number + 1:4d}    {seen.loss.perplexity:9.4f} ± {seen.loss.perplexity_error:9.4f}"
        f"    {ratio:10.5f} ± {ratio_error:10.5f}"
        f"    {seen.divergence.value:10.5f} ± {seen.divergence.error:10.5f}"
        f"    {100 * rms:6.3f} ± {100 * rms_error:6.3f} %"
        f"    {100 * share:6.3f} ± {100 * share_error:6.3f} %"
    )


def _report(seen: Divergence) -> list[str]:
    """Write what the whole text has shown, in the original's lines."""
    summary = seen.summary()
    ratio, ratio_error = seen.log_ratio
    rms, rms_error = seen.rms_change
    share, share_error = seen.same_top_share
    change = seen.change
    return [
        "====== Perplexity statistics ======",
        f"Mean PPL(Q)                   : {_pair(*seen.loss.estimate)}",
        f"Mean PPL(base)                : {_pair(*seen.base_loss.estimate)}",
        f"Cor(ln(PPL(Q)), ln(PPL(base))): {100 * summary.correlation:6.2f}%",
        f"Mean ln(PPL(Q)/PPL(base))     : {_pair(ratio, ratio_error)}",
        f"Mean PPL(Q)/PPL(base)         : {_pair(*summary.ratio)}",
        f"Mean PPL(Q)-PPL(base)         : {_pair(*summary.difference)}",
        "",
        "====== KL divergence statistics ======",
        f"Mean    KLD: {_pair(seen.divergence.value, seen.divergence.error)}",
        *(f"{name} KLD: {value:10.6f}" for name, value in summary.divergence_percentiles()),
        "",
        "====== Token probability statistics ======",
        f"Mean    Δp: {100 * change.value:6.3f} ± {100 * change.error:5.3f} %",
        *(f"{name} Δp: {100 * value:6.3f}%" for name, value in summary.change_percentiles()),
        f"RMS Δp    : {100 * rms:6.3f} ± {100 * rms_error:5.3f} %",
        f"Same top p: {100 * share:6.3f} ± {100 * share_error:5.3f} %",
    ]


def _pair(value: float, error: float) -> str:
    return f"{value:10.6f} ± {error:10.6f}"


if __name__ == "__main__":
    sys.exit(main())
