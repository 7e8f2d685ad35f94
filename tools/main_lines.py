"""What `main` tells on standard error about a run, by the original's templates."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from .console import note
from .main_options import MainOptions

if TYPE_CHECKING:
    from engine.generate import Generation, Phase
    from engine.model import Context, Model
    from engine.tokenizer import Tokenizer

Log = Callable[[str], None]

_INTERACTIVE = "== Running in interactive mode. ==\n - Press Ctrl+C to interject at any time.\n"
_CONTROL = {
    False: " - Press Return to return control to the AI.\n"
    " - To return control without starting a new line, end your input with '/'.\n"
    " - If you want to submit another line, end your input with '\\'.\n",
    True: " - To return control to the AI, end your input with '\\'.\n"
    " - To return control without starting a new line, end your input with '/'.\n",
}


def tell_system(log: Log, threads: tuple[int, int], options: MainOptions) -> None:
    """Tell how it is computed."""
    from engine.kernels import active_isa, prefers_pairs

    bf16 = options.bf16 == "fast" and prefers_pairs()
    log(
        f"\nsystem_info: n_threads = {threads[0]} (n_threads_batch = {threads[1]}) / "
        f"{os.cpu_count()} | ISA = {active_isa()} | bf16 products = {int(bf16)} | "
    )


def tell_metadata(log: Log, model: Model) -> None:
    """List the model's keys."""
    for key, value in model.file.metadata.items():
        shown = str(value) if isinstance(value, str | int | float) else f"{len(value)} elements"
        log(f"main: metadata: {key} = {shown[:80]!r}")


def tell_prompt(
    log: Log, tokenizer: Tokenizer, text: bytes, prompt: Sequence[int], n_keep: int
) -> None:
    """List the prompt's tokens, and what of it is kept."""
    _tell_text(log, tokenizer, "prompt", text, prompt)
    if n_keep > tokenizer.declares_bos:
        kept = b"".join(tokenizer.piece(token, True) for token in prompt[:n_keep])
        log(f"main: static prompt based on n_keep: '{shown(kept)}'")
    log("")


def tell_negative_prompt(
    log: Log, tokenizer: Tokenizer, text: bytes, prompt: Sequence[int]
) -> None:
    """List the negative prompt's tokens."""
    _tell_text(log, tokenizer, "negative prompt", text, prompt)


def _tell_text(
    log: Log, tokenizer: Tokenizer, what: str, text: bytes, tokens: Sequence[int]
) -> None:
    log(f"\nmain: {what}: '{shown(text)}'")
    log(f"main: number of tokens in {what} = {len(tokens)}")
    tell_tokens(log, tokenizer, tokens)


def tell_tokens(log: Log, tokenizer: Tokenizer, tokens: Sequence[int]) -> None:
    """List tokens with their texts."""
    for token in tokens:
        log(f"{token:6d} -> '{shown(tokenizer.piece(token, True))}'")


def tell_interactive(
    log: Log,
    tokenizer: Tokenizer,
    options: MainOptions,
    reverse: Sequence[bytes],
    affixes: Sequence[tuple[str, bytes]],
) -> None:
    """Tell that it is interactive, and how.

    Parameters
    ----------
    reverse : sequence of bytes
        Reverse prompts.
    affixes : sequence of (str, bytes)
        What stands before and behind a turn, with its name.
    """
    log("main: interactive mode on.")
    named = [("Reverse prompt", text) for text in reverse]
    if options.input_prefix_bos:
        log("Input prefix with BOS")
    for name, text in [*named, *affixes]:
        if not text:
            continue
        log(f"{name}: '{shown(text)}'")
        if options.verbose_prompt:
            tell_tokens(log, tokenizer, tokenizer.encode(text, parse_special=True))


def tell_control(log: Log, options: MainOptions) -> None:
    """Tell a person how to hand over."""
    log(_INTERACTIVE + _CONTROL[options.multiline_input])


def tell_timings(
    log: Log, generation: Generation, load_seconds: float, total_seconds: float
) -> None:
    """Tell where the time went."""
    timings = generation.timings
    n_tokens = timings.prompt.count + timings.evaluation.count
    head = "llama_print_timings:"
    log(f"\n{head}        load time = {load_seconds * 1e3:10.2f} ms")
    log(f"{head}      sample time = {_rates(timings.sampling, 'runs  ')}")
    log(f"{head} prompt eval time = {_rates(timings.prompt, 'tokens')}")
    log(f"{head}        eval time = {_rates(timings.evaluation, 'runs  ')}")
    log(f"{head}       total time = {total_seconds * 1e3:10.2f} ms / {n_tokens:5d} tokens")
    if generation.drafted:
        log(f"lookup: {generation.confirmed} of {generation.drafted} guesses were right")


def shown(raw: bytes) -> str:
    """Bytes as a line shows them."""
    return raw.decode("utf-8", "replace")


def _rates(phase: Phase, unit: str) -> str:
    return (
        f"{phase.ms:10.2f} ms / {phase.count:5d} {unit} ({phase.ms_each:8.2f} ms per token, "
        f"{phase.per_second:8.2f} tokens per second)"
    )


def tell_perf(context: Context, threads: tuple[int, int]) -> None:
    """Tell where the time went, by op; of single tokens, and of chunks of them."""
    from engine.perf import measure_peaks

    kinds = ("single tokens", "chunks of tokens")
    for times, kind, n_threads in zip(context.op_times(), kinds, threads, strict=True):
        if times.n_runs:
            for line in times.lines(measure_peaks(n_threads), kind):
                note(line)
