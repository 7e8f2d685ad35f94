"""The command `main`: continue a prompt with a model and any number of adapters.

Standard output holds the text and nothing else.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from engine.errors import DataError
from engine.locate import locate_model

from . import main_options
from .console import (
    CLOSED_OUTPUT,
    GPU_WARNINGS,
    INTERRUPTED,
    discard_output,
    emit,
    note,
    run_command,
    thread_count,
    usable_cores,
    version_line,
)
from .main_model import context_size, load_model, make_context
from .main_options import MainOptions
from .main_sampling import make_sampler, read_grammar, sampling_params
from .options import Parsed
from .prompt import prompt_bytes

# Everything that loads numpy is imported where it is used: `--help` must not wait for it.
if TYPE_CHECKING:
    from engine.generate import Generation, Guidance, Phase
    from engine.grammar import Grammar
    from engine.model import Model
    from engine.tokenizer import Tokenizer


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
    return run_command(main_options.TABLE, lambda: _run(given))


def _run(arguments: Sequence[str]) -> int:
    options, parsed = main_options.parse(arguments)
    if parsed.stopped_by == "help":
        emit(main_options.TABLE.usage().encode())
        return 0
    if parsed.stopped_by == "version":
        note(version_line())
        return 0
    log = _Log(options.log)
    _warn(log, options, parsed)
    return _Session(options, log).run()


class _Log:
    """Progress on standard error; silent where the user wants none.

    Lines are held back until `release`: an error in what the user gave then stands alone.
    """

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled
        self.held: list[str] | None = []

    def __call__(self, line: str = "") -> None:
        if not self.enabled:
            return
        if self.held is None:
            note(line)
        else:
            self.held.append(line)

    def release(self) -> None:
        held, self.held = self.held or [], None
        for line in held:
            self(line)


def _warn(log: _Log, options: MainOptions, parsed: Parsed) -> None:
    if options.negative_prompt and options.cfg_scale <= 1:
        log("warning: the negative prompt has no effect without a --cfg-scale above 1")
    for warning in parsed.warnings:
        log(f"warning: {warning}")
    if "gpu_layers" in options.given:
        for line in GPU_WARNINGS:
            log(line.format(option="--gpu-layers"))
    for line in dict.fromkeys(options.without_effect):
        log(f"warning: {line}")


class _Session:
    """One run: load, tell, generate, tell."""

    def __init__(self, options: MainOptions, log: _Log) -> None:
        self.options = options
        self.log = log
        self.seed = int(time.time()) if options.seed == main_options.CLOCK_SEED else options.seed
        self.threads = thread_count(options.threads, usable_cores())
        self.threads_batch = thread_count(options.threads_batch, self.threads)

    def run(self) -> int:
        # What needs no numpy is refused before it is loaded.
        options = self.options
        text = prompt_bytes(options.prompt, escape=options.escape)
        negative = prompt_bytes(
            options.negative_prompt,
            escape=options.escape,
            file_option="--cfg-negative-prompt-file",
        )
        path = locate_model(options.model)
        grammar = read_grammar(options, self.log)
        return self._complete(path, text, negative, grammar)

    def _complete(self, path: Path, text: bytes, negative: bytes, grammar: Grammar | None) -> int:
        from engine.generate import Generation, check_prompt_fits, kept_positions
        from engine.sampling import describe

        options, log = self.options, self.log
        log(f"main: {version_line()}")
        log(f"main: seed  = {self.seed}")
        began = time.perf_counter()
        model = load_model(path, options, log)
        tokenizer = model.tokenizer
        prompt = self._prompt_tokens(tokenizer, text)
        n_ctx = context_size(model, options, log)
        check_prompt_fits(len(prompt), n_ctx)
        threads = (self.threads, self.threads_batch)
        context = make_context(model, n_ctx, threads, options, log)
        guidance = self._make_guidance(model, n_ctx, len(prompt), negative)
        params = sampling_params(options, self.seed, tokenizer)
        sampler = make_sampler(params, tokenizer, grammar)
        load_seconds = time.perf_counter() - began

        log.release()
        n_keep = kept_positions(options.n_keep, len(prompt), add_bos=tokenizer.declares_bos)
        self._tell_system()
        if options.verbose_prompt:
            self._tell_prompt(tokenizer, text, prompt, n_keep)
            if guidance is not None:
                self._tell_tokens(tokenizer, "negative prompt", negative, guidance.tokens)
        log(describe(params))
        log(
            f"generate: n_ctx = {n_ctx}, n_batch = {options.n_batch}, "
            f"n_predict = {options.n_predict}, n_keep = {n_keep}\n\n"
        )
        generation = Generation(
            context,
            sampler,
            prompt,
            is_end=tokenizer.is_eog,
            n_predict=options.n_predict,
            n_keep=n_keep,
            guidance=guidance,
        )
        return self._generate(generation, tokenizer, prompt, load_seconds)

    def _make_guidance(
        self, model: Model, n_ctx: int, n_prompt: int, negative: bytes
    ) -> Guidance | None:
        from engine.generate import Guidance

        if self.options.cfg_scale <= 1:
            return None
        tokens = self._prompt_tokens(model.tokenizer, negative, "--cfg-negative-prompt")
        threads = (self.threads, self.threads_batch)
        quiet = _Log(False)  # the first context has told what stands beside the model
        context = make_context(model, n_ctx, threads, self.options, quiet)
        return Guidance(context, tokens, n_prompt)

    def _prompt_tokens(self, tokenizer: Tokenizer, text: bytes, option: str = "-p") -> list[int]:
        tokens = tokenizer.encode(text, add_special=True, parse_special=True)
        if tokenizer.add_eos and tokens and tokens[-1] == tokenizer.eos_id:
            # Some models end every text; generation is to go on.
            tokens = tokens[:-1]
        if tokenizer.add_bos and tokens[:2] == [tokenizer.bos_id] * 2:
            self.log("main: warning: the prompt begins with BOS, and the model adds another one")
        if not tokens and tokenizer.bos_id < 0:
            raise DataError(
                f"the prompt is empty and the model has no BOS token; give one with {option}"
            )
        return tokens or [tokenizer.bos_id]

    def _tell_system(self) -> None:
        from engine.kernels import active_isa, prefers_pairs

        batch = f" (n_threads_batch = {self.threads_batch})" if self.options.threads_batch else ""
        bf16 = self.options.bf16 == "fast" and prefers_pairs()
        self.log(
            f"\nsystem_info: n_threads = {self.threads}{batch} / {os.cpu_count()} | "
            f"ISA = {active_isa()} | bf16 products = {int(bf16)} | "
        )

    def _tell_prompt(
        self, tokenizer: Tokenizer, text: bytes, prompt: Sequence[int], n_keep: int
    ) -> None:
        self._tell_tokens(tokenizer, "prompt", text, prompt)
        if n_keep > tokenizer.declares_bos:
            kept = b"".join(tokenizer.piece(token, True) for token in prompt[:n_keep])
            self.log(f"main: static prompt based on n_keep: '{_shown(kept)}'")
        self.log()

    def _tell_tokens(
        self, tokenizer: Tokenizer, what: str, text: bytes, tokens: Sequence[int]
    ) -> None:
        self.log(f"\nmain: {what}: '{_shown(text)}'")
        self.log(f"main: number of tokens in {what} = {len(tokens)}")
        for token in tokens:
            self.log(f"{token:6d} -> '{_shown(tokenizer.piece(token, True))}'")

    def _generate(
        self,
        generation: Generation,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        load_seconds: float,
    ) -> int:
        began = time.perf_counter()
        status = self._stream(generation, tokenizer, prompt)
        self._tell_timings(generation, load_seconds, time.perf_counter() - began)
        return status

    def _stream(self, generation: Generation, tokenizer: Tokenizer, prompt: Sequence[int]) -> int:
        from engine.generate import StopReason

        options = self.options
        try:
            if options.display_prompt and options.n_predict != 0:
                emit(b"".join(self._shown(tokenizer, token) for token in prompt))
            for token in generation:
                emit(self._shown(tokenizer, token))
        except KeyboardInterrupt:
            emit(b"\n")
            return INTERRUPTED
        except BrokenPipeError:
            discard_output()
            return CLOSED_OUTPUT
        if generation.stopped is StopReason.END_OF_GENERATION:
            self.log(" [end of text]")
        elif generation.stopped is StopReason.CONTEXT_FULL:
            grouped = options.group_factor != 1
            why = "groups are not dropped" if grouped else "n_predict == -2"
            self.log(f"\n\nmain: context full and {why} => stopping")
        return 0

    def _shown(self, tokenizer: Tokenizer, token: int) -> bytes:
        # The original prints C strings: a piece ends at its first zero byte.
        return tokenizer.piece(token, self.options.special).partition(b"\0")[0]

    def _tell_timings(
        self, generation: Generation, load_seconds: float, total_seconds: float
    ) -> None:
        timings = generation.timings
        n_tokens = timings.prompt.count + timings.evaluation.count
        head = "llama_print_timings:"
        self.log(f"\n{head}        load time = {load_seconds * 1e3:10.2f} ms")
        self.log(f"{head}      sample time = {_rates(timings.sampling, 'runs  ')}")
        self.log(f"{head} prompt eval time = {_rates(timings.prompt, 'tokens')}")
        self.log(f"{head}        eval time = {_rates(timings.evaluation, 'runs  ')}")
        self.log(f"{head}       total time = {total_seconds * 1e3:10.2f} ms / {n_tokens:5d} tokens")


def _shown(raw: bytes) -> str:
    return raw.decode("utf-8", "replace")


def _rates(phase: Phase, unit: str) -> str:
    return (
        f"{phase.ms:10.2f} ms / {phase.count:5d} {unit} ({phase.ms_each:8.2f} ms per token, "
        f"{phase.per_second:8.2f} tokens per second)"
    )


if __name__ == "__main__":
    sys.exit(main())
