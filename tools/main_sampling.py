"""From the options of `main` to what samples: parameters, grammar, negative prompt."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from engine.errors import OptionError

from .main_options import GrammarSource, MainOptions, QueueForm
from .prompt import file_bytes

# What loads numpy is imported where it is used.
if TYPE_CHECKING:
    from engine.grammar import Grammar
    from engine.sampling import Sampler, SamplingParams
    from engine.tokenizer import Tokenizer


def sampling_params(options: MainOptions, seed: int, tokenizer: Tokenizer) -> SamplingParams:
    """Collect the parameters of sampling.

    Raises
    ------
    OptionError
        If a value cannot be used; names the option.
    """
    from engine.sampling import SamplingParams, sampler_order

    bias = dict(options.logit_bias)
    if options.ignore_eos and tokenizer.eos_id >= 0:
        bias[tokenizer.eos_id] = float("-inf")
    form, queue = options.samplers
    with _spelled_out():
        return SamplingParams(
            temp=options.temp,
            dynatemp_range=options.dynatemp_range,
            dynatemp_exponent=options.dynatemp_exponent,
            top_k=options.top_k,
            top_p=options.top_p,
            min_p=options.min_p,
            tfs_z=options.tfs_z,
            typical_p=options.typical_p,
            penalty_last_n=options.repeat_last_n,
            penalty_repeat=options.repeat_penalty,
            penalty_freq=options.frequency_penalty,
            penalty_present=options.presence_penalty,
            penalize_nl=options.penalize_nl,
            mirostat=options.mirostat,
            mirostat_tau=options.mirostat_tau,
            mirostat_eta=options.mirostat_eta,
            logit_bias=bias,
            samplers=sampler_order(queue, form is QueueForm.LETTERS),
            seed=seed,
            cfg_scale=options.cfg_scale,
        )


def make_sampler(params: SamplingParams, tokenizer: Tokenizer, grammar: Grammar | None) -> Sampler:
    """Make the sampler of a run.

    Raises
    ------
    OptionError
        If a logit bias is for a token that the model does not have; names the option.
    """
    from engine.grammar import GrammarMatcher, TokenTable
    from engine.sampling import Sampler

    matcher = None
    if grammar is not None:
        pieces = [tokenizer.piece(token, True) for token in range(tokenizer.n_vocab)]
        matcher = GrammarMatcher(grammar, TokenTable(pieces, tokenizer.eog_ids))
    with _spelled_out():
        return Sampler(params, tokenizer.n_vocab, tokenizer.newline_id, matcher)


def read_grammar(options: MainOptions, log: Callable[[str], None]) -> Grammar | None:
    """Put the grammar together in the order of its options; None if there is none.

    Raises
    ------
    OptionError
        If it cannot be read; names the option, line and column.
    """
    if not options.grammar:
        return None
    from engine.grammar import GrammarError, parse_grammar

    grammar, where = "", ""
    for source, value in options.grammar:
        where = source.value
        if source is GrammarSource.TEXT:
            grammar = _decoded(os.fsencode(value), where)
        elif source is GrammarSource.FILE:
            where = f"{where}: {value}"
            grammar += _decoded(file_bytes(source.value, value), where)
        else:
            grammar = _schema_grammar(value, log)
    try:
        return parse_grammar(grammar)
    except GrammarError as error:
        raise OptionError(f"{where}: {error}") from None


def _schema_grammar(value: str, log: Callable[[str], None]) -> str:
    from engine.grammar import GrammarError
    from engine.grammar.json_schema import schema_to_grammar

    where = GrammarSource.SCHEMA.value
    raw = os.fsencode(value)
    if not value.lstrip().startswith("{"):
        raw = file_bytes(where, value)
        where = f"{where}: {value}"
    try:
        grammar, ignored = schema_to_grammar(_decoded(raw, where))
    except GrammarError as error:
        raise OptionError(f"{where}: {error}") from None
    if ignored:
        log(f"warning: {where}: ignored, as no grammar says it: {', '.join(ignored)}")
    return grammar


def _decoded(raw: bytes, where: str) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise OptionError(f"{where}: byte {error.start} is not UTF-8; save it as UTF-8") from None


# The options behind the fields that engine.sampling names in its messages.
_SPELLINGS = {
    "temp": "--temp",
    "top_p": "--top-p",
    "min_p": "--min-p",
    "tfs_z": "--tfs",
    "typical_p": "--typical",
    "penalty_last_n": "--repeat-last-n",
    "penalty_repeat": "--repeat-penalty",
    "penalty_freq": "--frequency-penalty",
    "penalty_present": "--presence-penalty",
    "dynatemp_range": "--dynatemp-range",
    "dynatemp_exponent": "--dynatemp-exp",
    "mirostat": "--mirostat",
    "mirostat_tau": "--mirostat-ent",
    "mirostat_eta": "--mirostat-lr",
    "logit_bias": "--logit-bias",
    "samplers": "--samplers",
    "sampling_seq": "--sampling-seq",
    "seed": "--seed",
}


@contextmanager
def _spelled_out() -> Iterator[None]:
    """Name the option where the engine's message names a field."""
    try:
        yield
    except OptionError as error:
        field, _, problem = str(error).partition(":")
        raise OptionError(f"{_SPELLINGS.get(field, field)}:{problem}") from None
