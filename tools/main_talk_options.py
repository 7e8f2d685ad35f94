"""The options of `main` about people's turns, the prompt's cache and the log: one row each."""

from __future__ import annotations

from .options import Option, in_group, text, whole


def _flag(
    spellings: tuple[str, ...], dest: str, help: str, constant: bool = True, on: bool = False
) -> Option:
    return Option(spellings, dest, help, default=on, constant=constant)


TALK = in_group(
    "talking",
    _flag(("-i", "--interactive"), "interactive",
          "hand over at a reverse prompt, at the end of an answer and on Ctrl-C"),
    _flag(("-if", "--interactive-first"), "interactive_first",
          "interactive, and the person begins"),
    _flag(("-cnv", "--conversation"), "conversation",
          "interactive, by the model's chat template, unless --in-prefix or --in-suffix is given; "
          "--prompt is then the system's message; control tokens, prefix and suffix are not shown"),
    Option(("--chat-template",), "chat_template",
           "template of --conversation: its text, a file, chatml, or one that the model names",
           (text("TEMPLATE"),), default="", shown_default="the model's"),
    _flag(("-ins", "--instruct"), "instruct",
          "interactive, for models that know ### Instruction: and ### Response:"),
    _flag(("-cml", "--chatml"), "chatml",
          "interactive, for models that know <|im_start|>; --prompt is the system's message"),
    Option(("-r", "--reverse-prompt"), "reverse_prompts",
           "hand over, or end, where the text ends with this; may be repeated",
           (text("PROMPT"),), repeat=True),
    _flag(("-mli", "--multiline-input"), "multiline_input",
          r"a turn has many lines, until one ends with \ or /"),
    Option(("--in-prefix",), "input_prefix", "put before each turn", (text("STRING"),),
           default=""),
    _flag(("--in-prefix-bos",), "input_prefix_bos", "put BOS before each turn's prefix"),
    Option(("--in-suffix",), "input_suffix", "put behind each turn", (text("STRING"),),
           default=""),
    _flag(("-co", "--color"), "color",
          "colour the prompt and the turns, where standard output is a terminal"),
    _flag(("--simple-io",), "simple_io", "read lines without editing, also from a terminal"),
)  # fmt: skip

CACHE = in_group(
    "prompt cache",
    Option(("--prompt-cache",), "prompt_cache",
           "keep the prompt's evaluation in a file, and take it from there; what another model or "
           "adapter has evaluated is written anew",
           (text("FNAME"),), default="", shown_default="none"),
    _flag(("--prompt-cache-all",), "prompt_cache_all",
          "keep turns and answers, too; without --prompt a run goes on where the last one ended"),
    _flag(("--prompt-cache-ro",), "prompt_cache_read_only", "never write the file"),
)  # fmt: skip

LOG = in_group(
    "log",
    _flag(("--log-enable",), "log", "print progress on the error stream (default)", on=True),
    _flag(("--log-disable",), "log", "print nothing but errors on the error stream", False,
          on=True),
    Option(("--log-file",), "log_file", "write the same lines to FNAME.log", (text("FNAME"),),
           default="", shown_default="none"),
    _flag(("--log-new",), "log_new", "write them to a file of this run's own, FNAME.ID.log"),
    _flag(("--log-append",), "log_append", "write them behind what the file has"),
    Option(("-ld", "--logdir"), "logdir",
           "write what was asked for, made and measured to a YAML file in this folder",
           (text("LOGDIR"),), default="", shown_default="none"),
    Option(("-ptc", "--print-token-count"), "print_token_count",
           "tell every N tokens how much of the context is filled; below 1: never", (whole(),),
           default=-1),
    Option(("-v", "--verbose"), "verbosity", "list the model's metadata", default=0, constant=1),
    Option(("--verbosity",), "verbosity", "the same from 1 on", (whole(),), default=0),
)  # fmt: skip
