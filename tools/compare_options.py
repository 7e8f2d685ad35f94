"""The options of `compare`: one row each, and the dataclass that they fill."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from engine.errors import OptionError

from .main_options import PromptSource
from .options import Option, OptionTable, Parsed, argument, choice, in_group, whole
from .perplexity_options import TEXT, parse_table, shared_rows


@dataclass(frozen=True, slots=True)
class CompareOptions:
    """What a run of `compare` was asked for."""

    first: str
    second: str
    prompt: tuple[tuple[PromptSource, str], ...]
    escape: bool
    log: bool
    threads: int | None
    threads_batch: int | None
    n_ctx: int
    n_batch: int
    n_ubatch: int
    chunks: int
    check_tensors: bool
    bf16: tuple[str, ...]
    adapters: tuple[tuple[str, float], ...]
    given: frozenset[str] = frozenset()

    @property
    def modes(self) -> tuple[str, str]:
        """Arithmetic of the first and of the second."""
        if self.bf16:
            return self.bf16[0], self.bf16[-1]
        return ("fast", "fast") if self.second else ("exact", "fast")


TABLE = OptionTable(
    "compare",
    in_group(
        "general",
        argument("A", "first", "the model that is the measure: a GGUF file, or a model package"),
        argument("B", "second", "the model that is measured; without it A in another arithmetic",
                 required=False),
        *shared_rows("-h", "--version"),
        *TEXT,
        *shared_rows("--log-enable", "--log-disable"),
    )
    + in_group(
        "computation",
        Option(("--bf16",), "bf16",
               "activations that meet BF16 weights: rounded to bf16 where that is faster, or "
               "exact; given twice: of A, of B", (choice("fast", "exact"),), repeat=True,
               shown_default="fast; of one model: exact, then fast"),
        Option(("-c", "--ctx-size"), "n_ctx", "tokens of a window", (whole(low=2),), default=512),
        Option(("--chunks",), "chunks", "windows of the text to go through; -1: all",
               (whole(low=-1),), default=-1),
        *shared_rows("-t", "-tb", "-b", "-ub", "--check-tensors"),
        *(replace(row, help=row.help.replace("an adapter", "an adapter to A"))
          for row in shared_rows("--lora", "--lora-scaled")),
    ),
)  # fmt: skip


def parse(arguments: Sequence[str]) -> tuple[CompareOptions, Parsed]:
    """Read the arguments of `compare`; see `parse_table` for what is raised."""
    parsed = parse_table(TABLE, arguments)
    options = CompareOptions(**parsed.values, given=parsed.given)
    if not parsed.stopped_by:
        _check(options)
    return options, parsed


def _check(options: CompareOptions) -> None:
    if len(options.bf16) > 2:
        raise OptionError(f"--bf16: is given {len(options.bf16)} times; two models have two modes")
    if options.chunks == 0:
        raise OptionError("--chunks: 0 windows measure nothing; give -1 for all")
    if not options.prompt:
        raise OptionError("--file: no text is given to compare on")
    first, second = options.modes
    if not options.second and first == second and not options.adapters:
        raise OptionError(
            f"--bf16: {options.first} would be compared with itself; give B, or two modes"
        )
