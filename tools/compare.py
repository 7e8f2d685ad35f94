"""The command `compare`: how far two models, or two ways of computing one, are from each other."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from engine.errors import DataError
from engine.machine import usable_cores

from . import compare_options
from .compare_options import CompareOptions
from .console import emit, note, run_command, say, thread_count, version_line
from .measured import Computing, load_model, make_context, make_log, text_tokens, window_bos
from .progress import ProgressBar
from .prompt import prompt_bytes

# Everything that loads numpy is imported where it is used: `--help` must not wait for it.
if TYPE_CHECKING:
    from engine.measure import Comparison, Mean, Windows
    from engine.model import Model


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
    return run_command(compare_options.TABLE, lambda: _run(given))


def _run(arguments: Sequence[str]) -> int:
    options, parsed = compare_options.parse(arguments)
    if parsed.stopped_by == "help":
        emit(compare_options.TABLE.usage().encode())
        return 0
    if parsed.stopped_by == "version":
        note(version_line())
        return 0
    log = make_log("compare", options.log)
    for warning in parsed.warnings:
        log(f"warning: {warning}")
    text = prompt_bytes(options.prompt, escape=options.escape)  # refused before numpy is loaded

    from engine.measure import compare, whole

    first = load_model(options.first, log, check_tensors=options.check_tensors)
    second = first
    if options.second:
        second = load_model(options.second, log, check_tensors=options.check_tensors)
    tokens = text_tokens(first, text, log)
    _check_vocabularies(first, second, text, tokens)
    windows = whole(tokens, options.n_ctx, options.chunks, window_bos(first))
    modes = options.modes
    contexts = [
        make_context(model, windows.n_ctx, _computing(options, mode), adapters, log)
        for model, mode, adapters in zip(
            (first, second), modes, (options.adapters, ()), strict=True
        )
    ]
    log(f"A: {options.first}, bf16 {modes[0]}")
    log(f"B: {options.second or options.first}, bf16 {modes[1]}")
    with ProgressBar("compare", windows.count, "chunks") as bar:
        for step in compare(contexts[0], contexts[1], windows):
            result = step
            bar.add(1)
    for line in _report(result, windows, first):
        say(line)
    return 0


def _computing(options: CompareOptions, mode: str) -> Computing:
    threads = thread_count(options.threads, usable_cores())
    both = (threads, thread_count(options.threads_batch, threads))
    return Computing(options.n_batch, options.n_ubatch, both, mode)


def _check_vocabularies(first: Model, second: Model, text: bytes, tokens: list[int]) -> None:
    ours, theirs = first.hparams.n_vocab, second.hparams.n_vocab
    if ours != theirs:
        raise DataError(
            f"{second.file.path}: has a vocabulary of {theirs} tokens, {first.file.path} one of "
            f"{ours}; compare models of one vocabulary"
        )
    if second is not first and text_tokens(second, text, lambda _: None) != tokens:
        raise DataError(
            f"{second.file.path}: cuts the text into other tokens than {first.file.path}; compare "
            "models of one vocabulary"
        )


def _report(result: Comparison, windows: Windows, model: Model) -> list[str]:
    from engine.measure import percentile

    seen = result.divergence
    ordered = seen.summary().divergences
    same, same_error = seen.same_top_share
    at, token = result.place
    before = _shown(model.tokenizer.piece(int(windows.tokens[at]), True))
    scored = _shown(model.tokenizer.piece(token, True))
    return [
        f"Tokens               : {seen.count} in {windows.count} windows of {windows.n_ctx}",
        f"Perplexity of A      : {_estimate(seen.base_loss)}",
        f"Perplexity of B      : {_estimate(seen.loss)}",
        f"Mean KL divergence   : {seen.divergence.value:.6f} +/- {seen.divergence.error:.6f}",
        f"Largest KL divergence: {ordered[-1]:.6f}",
        "99.9 %, 99 %, median : "
        + ", ".join(f"{percentile(ordered, share):.6f}" for share in (0.999, 0.99, 0.5)),
        f"Same top token       : {100 * same:.3f} +/- {100 * same_error:.3f} %",
        f"RMS logit error      : {result.rms_error:.6f}",
        f"Largest logit error  : {result.largest_error:.6f} (of {scored} after {before}, "
        f"token {at} of the text)",
    ]


def _estimate(loss: Mean) -> str:
    return f"{loss.perplexity:.4f} +/- {loss.perplexity_error:.5f}"


def _shown(piece: bytes) -> str:
    return repr(piece.decode("utf-8", "replace"))


if __name__ == "__main__":
    sys.exit(main())
