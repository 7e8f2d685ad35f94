"""The command `main`: continue a prompt with a model and any number of adapters.

Standard output holds the text and nothing else.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from engine.errors import DataError
from engine.locate import locate_model
from engine.machine import settle_on_nodes, usable_cores

from . import main_options
from .console import GPU_WARNINGS, emit, note, run_command, thread_count, version_line
from .main_cache import CachedPrompt
from .main_lines import (
    tell_control,
    tell_interactive,
    tell_metadata,
    tell_negative_prompt,
    tell_perf,
    tell_prompt,
    tell_system,
    tell_timings,
)
from .main_log import Log, open_log
from .main_model import context_size, load_model, make_context
from .main_options import MainOptions
from .main_run import Run
from .main_sampling import make_sampler, read_grammar, sampling_params
from .main_talk import Plan, is_interactive, make_plan
from .options import Parsed
from .prompt import prompt_bytes

# Everything that loads numpy is imported where it is used: `--help` must not wait for it.
if TYPE_CHECKING:
    from engine.generate import Generation, Guidance
    from engine.grammar import Grammar
    from engine.model import Context, Model
    from engine.sampling import Sampler
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
    log = open_log(options)
    try:
        _warn(log, options, parsed)
        return _Session(options, log).run()
    finally:
        log.close()


def _warn(log: Log, options: MainOptions, parsed: Parsed) -> None:
    if options.negative_prompt and options.cfg_scale <= 1:
        log("warning: the negative prompt has no effect without a --cfg-scale above 1")
    for line in _alone(options):
        log(f"warning: {line}")
    for warning in parsed.warnings:
        log(f"warning: {warning}")
    if "gpu_layers" in options.given:
        for line in GPU_WARNINGS:
            log(line.format(option="--gpu-layers"))
    for line in dict.fromkeys(options.without_effect):
        log(f"warning: {line}")


def _alone(options: MainOptions) -> Iterator[str]:
    """Name the options that have no effect for want of another one."""
    talks = ("multiline_input", "input_prefix", "input_prefix_bos", "input_suffix")
    caches = ("prompt_cache_all", "prompt_cache_read_only")
    for fields, partner, is_there in (
        (talks, "--interactive", is_interactive(options)),
        (caches, "--prompt-cache", options.prompt_cache),
        (("group_width",), "--grp-attn-n", options.group_factor != 1),
        (("control_layers",), "--control-vector", options.control_vectors),
    ):
        for name in fields:
            if name in options.given and not is_there:
                row = next(row for row in main_options.TABLE.rows if row.dest == name)
                yield f"{row.spellings[-1]} has no effect without {partner}"


class _Session:
    """One run: load, tell, generate, tell."""

    def __init__(self, options: MainOptions, log: Log) -> None:
        self.options = options
        self.log = log
        self.seed = int(time.time()) if options.seed == main_options.CLOCK_SEED else options.seed
        threads = thread_count(options.threads, usable_cores())
        self.threads = (threads, thread_count(options.threads_batch, threads))

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
        if options.numa:
            self.log(f"main: numa: {settle_on_nodes(options.numa)}")
        return self._run(path, text, negative, grammar)

    def _run(self, path: Path, text: bytes, negative: bytes, grammar: Grammar | None) -> int:
        from engine.generate import check_prompt_fits, kept_positions

        options, log = self.options, self.log
        if log.enabled:  # loading the package's metadata takes 15 ms
            log(f"main: {version_line()}")
        log(f"main: seed  = {self.seed}")
        began = time.perf_counter()
        model = load_model(path, options, log, mapped=options.mmap, locked=options.mlock)
        tokenizer = model.tokenizer
        plan = self._plan(model, text)
        if plan is not None:
            text = plan.text
        prompt = self._prompt(tokenizer, text, plan)
        n_ctx = context_size(model, options, log)
        check_prompt_fits(len(prompt), n_ctx)
        context = make_context(model, n_ctx, self.threads, options, log, measure=options.perf)
        cache = CachedPrompt(context, options, log)
        if cache.tokens and not text and not (plan and plan.asks_first):
            prompt = cache.tokens
            check_prompt_fits(len(prompt), n_ctx)
        guidance = self._make_guidance(model, n_ctx, len(prompt), negative)
        sampler = make_sampler(sampling_params(options, self.seed, tokenizer), tokenizer, grammar)
        n_keep = kept_positions(options.n_keep, len(prompt), add_bos=tokenizer.declares_bos)
        generation = self._generation(context, sampler, prompt, n_keep, cache, guidance)
        load_seconds = time.perf_counter() - began

        log.release()
        tell_system(log, self.threads, options)
        if options.verbosity > 0:
            tell_metadata(log, model)
        if options.verbose_prompt:
            tell_prompt(log, tokenizer, text, prompt, n_keep)
            if guidance is not None:
                tell_negative_prompt(log, tokenizer, negative, guidance.tokens)
        self._tell(model, sampler, plan, n_ctx, n_keep)
        run = Run(options, log, context, generation, cache, plan)
        status = run.to_the_end()
        tell_timings(log, generation, load_seconds, run.seconds)
        if options.perf:
            tell_perf(context, self.threads)
        if options.logdir:
            run.write_record({"seed": self.seed, "n_ctx": n_ctx, "n_threads": self.threads})
        return status

    def _plan(self, model: Model, text: bytes) -> Plan | None:
        def warn(line: str) -> None:
            self.log(f"main: warning: {line}")

        if is_interactive(self.options):
            return make_plan(model, text, self.options, warn)
        if self.options.chat_template:
            warn("--chat-template has no effect without --conversation")
        return None

    def _prompt(self, tokenizer: Tokenizer, text: bytes, plan: Plan | None) -> list[int]:
        if plan is not None and plan.prompt is not None:
            return plan.prompt
        return self._prompt_tokens(tokenizer, text)

    def _generation(
        self,
        context: Context,
        sampler: Sampler,
        prompt: Sequence[int],
        n_keep: int,
        cache: CachedPrompt,
        guidance: Guidance | None,
    ) -> Generation:
        from engine import ops
        from engine.generate import Generation
        from engine.lookup import Lookup

        options = self.options
        if options.lookup and (guidance is not None or not context.shifts):
            self.log("main: warning: --lookup has no effect with --cfg-scale or --grp-attn-n")
        return Generation(
            context,
            sampler,
            prompt,
            is_end=context.model.tokenizer.is_eog,
            n_predict=options.n_predict,
            n_keep=n_keep,
            n_cached=cache.restore(prompt),
            drafter=Lookup(ops.DOT_TOKENS - 1) if options.lookup else None,
            guidance=guidance,
        )

    def _make_guidance(
        self, model: Model, n_ctx: int, n_prompt: int, negative: bytes
    ) -> Guidance | None:
        from engine.generate import Guidance

        if self.options.cfg_scale <= 1:
            return None
        tokens = self._prompt_tokens(model.tokenizer, negative, "--cfg-negative-prompt")
        quiet = Log(False)  # the first context has told what stands beside the model
        context = make_context(model, n_ctx, self.threads, self.options, quiet)
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

    def _tell(
        self, model: Model, sampler: Sampler, plan: Plan | None, n_ctx: int, n_keep: int
    ) -> None:
        from engine.sampling import describe

        options, log = self.options, self.log
        if plan is not None:
            tell_interactive(log, model.tokenizer, options, plan.reverse, plan.affixes)
        log(describe(sampler.params))
        log(
            f"generate: n_ctx = {n_ctx}, n_batch = {options.n_batch}, "
            f"n_predict = {options.n_predict}, n_keep = {n_keep}\n\n"
        )
        if plan is not None:
            tell_control(log, options)


if __name__ == "__main__":
    sys.exit(main())
