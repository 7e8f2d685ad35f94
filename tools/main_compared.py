"""How each option of `main` stands to the original's, where it is more than the same."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from .options import Option

# Options that the original (June 2024) does not have.
NEW = {"--lookup", "--bf16", "--display-prompt", "--instruct", "--chatml", "--perf"}

# What is better here. Differences in behaviour are told in docs/differences.md.
BETTER = {
    "--model": "also the name of an installed model package",
    "--threads": "cores that the process may use: affinity and quotas of control groups",
    "--interactive": "the end of standard input ends the session; /scale NAME X changes an adapter",
    "--conversation": "finds the model's chat template; nothing is prompted for in a pipe",
    "--chat-template": "any Jinja template, by text, file or name",
    "--reverse-prompt": "words longer than --predict are answered, too",
    "--color": "never in a pipe or a file",
    "--prompt-cache": "knows model, adapters with their scales, cache types; written in one go",
    "--prompt-cache-all": "knows the last token, and what a full context dropped; interactive, too",
    "--lora": "three forms, told apart by content; beside the weights, which stay mapped",
    "--lora-scaled": "as --lora; any number of adapters",
    "--lora-base": "not needed",
    "--check-tensors": "names tensor, row and element",
    "--penalize-nl": "without it the line feed is spared, also in BPE vocabularies",
    "--samplers": "an unknown name is an error",
    "--sampling-seq": "an unknown letter is an error",
    "--cache-type-k": "also bf16; a full context goes on with any type",
    "--cache-type-v": "also bf16; any type without --flash-attn, too",
    "--grp-attn-n": "a full context ends the run without an error",
    "--override-kv": "a type that is not the file's is an error; a new key is named",
    "--control-vector": "several may end at different layers; NaN is refused",
    "--rope-freq-scale": "used also where the model's file says none",
    "--no-kv-offload": "said, not only ignored",
    "--parallel": "said, not only ignored",
    "--sequences": "said, not only ignored",
    "--cont-batching": "said, not only ignored",
    "--defrag-thold": "said, not only ignored",
    "-pps": "said, not only ignored",
    "--json-schema": "also a file; what no grammar says is told",
    "--grammar": "an error has line and column",
    "--grammar-file": "an error has line and column",
    "--log-enable": "no file is written unless --log-file, --log-new or --log-append asks for it",
    "--verbose": "lists the metadata; the original takes it and does nothing",
    "--verbosity": "as --verbose",
    "--mlock": "says what the system allows",
}


def compared(rows: Iterable[Option]) -> tuple[Option, ...]:
    """Mark the rows that are new or better.

    Raises
    ------
    ValueError
        If a spelling above is in no row: a mistake in the table.
    """
    marked = []
    left = NEW | BETTER.keys()
    for row in rows:
        here = left.intersection(row.spellings)
        left -= here
        better = next((BETTER[name] for name in here if name in BETTER), "")
        marked.append(replace(row, better=better, new=bool(NEW & here)))
    if left:
        raise ValueError(f"no row of main is spelled {', '.join(sorted(left))}")
    return tuple(marked)
