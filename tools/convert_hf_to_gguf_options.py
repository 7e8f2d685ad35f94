"""The options of `convert-hf-to-gguf`: one row each, and the dataclass that they fill."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .options import (
    Option,
    OptionTable,
    Parsed,
    argument,
    choice,
    in_group,
    not_offered,
    text,
)


@dataclass(frozen=True, slots=True)
class ConvertOptions:
    """What a run of `convert-hf-to-gguf` was asked for."""

    model: str
    outfile: str
    outtype: str
    model_name: str
    vocab_only: bool
    use_temp_file: bool
    no_lazy: bool
    verbose: bool


_ARGUMENTS = in_group(
    "arguments",
    argument("DIR", "model", "folder of a llama model as its publisher made it: config.json, "
             "safetensors (one file, or shards with their index), and the tokenizer's files"),
)  # fmt: skip

_GENERAL = in_group(
    "options",
    Option(("-h", "--help"), "help", "show this text and exit", stops=True),
    Option(("--outfile",), "outfile",
           "the file to write; {ftype} in it becomes the type; a folder gets the default name",
           (text("FNAME"),), default="", shown_default="DIR/ggml-model-{ftype}.gguf"),
    Option(("--outtype",), "outtype",
           "type of the matrices; vectors are always f32. auto: bf16 where the folder has it, bit "
           "for bit, else f16",
           (choice("f32", "f16", "bf16", "q8_0", "auto"),), default="auto"),
    Option(("--model-name",), "model_name", "name of the model in the file",
           (text("NAME"),), default="", shown_default="the folder's name"),
    Option(("--vocab-only",), "vocab_only", "write the keys and no tensors", default=False),
    Option(("--verbose",), "verbose", "tell of every tensor", default=False),
    Option(("--use-temp-file",), "use_temp_file",
           "accepted, without effect: tensors always pass through in pieces", default=False),
    Option(("--no-lazy",), "no_lazy", "accepted, without effect", default=False),
)  # fmt: skip

_REFUSED = (
    not_offered("not offered here: files are little-endian", "--bigendian")
    + not_offered("not offered here: scales of another quantizer", "--awq-path")
    + not_offered(
        "of later versions, and not offered here",
        "--split-max-tensors", "--split-max-size", "--no-tensor-first-split", "--dry-run",
        "--metadata", "--remote", "--mmproj", "--mistral-format", "--print-supported-models",
        "--sentence-transformers-dense-modules", "--disable-mistral-community-chat-template",
    )
)  # fmt: skip

TABLE = OptionTable(
    "convert-hf-to-gguf", _ARGUMENTS + _GENERAL + _REFUSED, joined_values=True
)  # fmt: skip


def parse(arguments: Sequence[str]) -> tuple[ConvertOptions, Parsed]:
    """Read the arguments; see `OptionTable.parse` for what is raised."""
    parsed = TABLE.parse(arguments)
    return ConvertOptions(**parsed.values), parsed
