"""The options of `perplexity`: one row each, and the dataclass that they fill.

What it shares with `main` are that table's rows; any other option of `main` is refused by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from engine.errors import OptionError

from . import main_options
from .main_model_options import ACCEPTED, CONTEXT, MODEL, ModelOptions
from .main_options import PromptSource
from .options import (
    Option,
    OptionTable,
    Parsed,
    UsageError,
    in_group,
    not_offered,
    text,
    whole,
)


@dataclass(frozen=True, slots=True)
class PerplexityOptions(ModelOptions):
    """What a run of `perplexity` was asked for."""

    model: str
    prompt: tuple[tuple[PromptSource, str], ...]
    escape: bool
    seed: int
    log: bool
    threads: int | None
    threads_batch: int | None
    gpu_layers: int
    without_effect: tuple[str, ...]
    all_logits: bool
    chunks: int
    stride: int
    output_type: int
    kl_divergence: bool
    logit_file: str
    given: frozenset[str] = frozenset()


def shared_rows(*spellings: str) -> tuple[Option, ...]:
    """Give rows of `main` by one of their spellings."""
    rows = tuple(main_options.TABLE.find(spelling) for spelling in spellings)
    return tuple(row for row in rows if row is not None)


def parse_table(table: OptionTable, arguments: Sequence[str]) -> Parsed:
    """Read the arguments of a command whose texts and models are given as `main`'s are.

    Raises
    ------
    UsageError, OptionError
        As `OptionTable.parse` does; an option that only `main` has is named without the usage.
    """
    try:
        return table.parse(arguments)
    except UsageError as error:
        head, _, name = str(error).partition("unknown argument: ")
        if not head and main_options.TABLE.find(name) is not None:
            raise OptionError(f"option {name} is not one of {table.program}") from None
        raise


_TEXT_HELP = {
    "-p": "text to measure",
    "-f": "file to measure, without its last line break; joined to an earlier text",
    "-bf": "file to measure, byte for byte",
    "-e": r"resolve \n \r \t \' \" \\ and \xHH in the text (default)",
    "--no-escape": "take backslashes in the text as they are",
}

# Where the text of a measurement comes from.
TEXT = tuple(replace(row, help=_TEXT_HELP[row.spellings[0]]) for row in shared_rows(*_TEXT_HELP))

_GENERAL = in_group(
    "general",
    *shared_rows("-h", "--version", "-m"),
    *TEXT,
    Option(("-s", "--seed"), "seed", "accepted, without effect: nothing is drawn", (whole("SEED"),),
           default=-1, shown_default=""),
    *shared_rows("--log-enable", "--log-disable"),
)  # fmt: skip

_MEASURE = in_group(
    "measuring",
    Option(("--chunks",), "chunks", "windows of the text to go through; -1: all", (whole(low=-1),),
           default=-1),
    Option(("--ppl-stride",), "stride",
           "let windows begin so many tokens apart and score their last so many; 0: windows do not "
           "overlap, and the second half of each is scored", (whole(low=0),), default=0),
    Option(("--ppl-output-type",), "output_type",
           "0: perplexities in one line; 1: a line for each window with place, perplexity, mean "
           "loss and its error", (whole(low=0, high=1),), default=0),
    Option(("--kl-divergence-base", "--save-all-logits"), "logit_file",
           "file of log-probabilities: written, or read with --kl-divergence", (text("FNAME"),),
           default="", shown_default="none"),
    Option(("--kl-divergence",), "kl_divergence",
           "compare with the predictions in the file; the text is the file's, too", default=False),
    Option(("--all-logits", "--perplexity"), "all_logits", "accepted: all of them are computed",
           default=False),
)  # fmt: skip

_COMPUTATION = in_group(
    "computation",
    *shared_rows("-t", "-tb"),
    Option(("-c", "--ctx-size"), "n_ctx", "tokens of a window", (whole(),), default=512),
    *shared_rows("-b", "-ub", "--check-tensors", "--bf16"),
)  # fmt: skip

_CHOICES = not_offered(
    "not offered: scores of questions with several answers are not computed here",
    "--hellaswag", "--hellaswag-tasks", "--winogrande", "--winogrande-tasks", "--multiple-choice",
    "--multiple-choice-tasks",
)  # fmt: skip

# Positions are grouped as a text grows, which a window does not.
_SELF_EXTEND = ("group_factor", "group_width")

TABLE = OptionTable(
    "perplexity",
    _GENERAL + _MEASURE + _COMPUTATION + MODEL
    + tuple(row for row in CONTEXT if row.dest not in _SELF_EXTEND) + ACCEPTED + _CHOICES,
)  # fmt: skip


def parse(arguments: Sequence[str]) -> tuple[PerplexityOptions, Parsed]:
    """Read the arguments of `perplexity`; see `parse_table` for what is raised."""
    parsed = parse_table(TABLE, arguments)
    values = parsed.values | dict.fromkeys(_SELF_EXTEND, 1)
    options = PerplexityOptions(**values, given=parsed.given)
    if not parsed.stopped_by:
        _check(options)
    return options, parsed


def _check(options: PerplexityOptions) -> None:
    if options.n_ctx < 1:
        raise OptionError(f"--ctx-size: {options.n_ctx} tokens are no window; give 3 or more")
    if options.chunks == 0:
        raise OptionError("--chunks: 0 windows measure nothing; give -1 for all")
    if options.kl_divergence and not options.logit_file:
        raise OptionError("--kl-divergence: needs the file to compare with: --kl-divergence-base")
    if options.logit_file and options.stride:
        raise OptionError(
            "--kl-divergence-base: such files hold no strides; leave --ppl-stride out"
        )
    if not options.kl_divergence and not options.prompt:
        raise OptionError("--file: no text is given to measure")
