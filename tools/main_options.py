"""The options of `main`: one row each, and the dataclass that they fill.

Every option that the shared parser of the original's commands knows has a row, so that none is
ever ignored: those that are not offered are refused by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from engine.errors import OptionError

from .main_compared import compared
from .main_model_options import ACCEPTED, CONTEXT, MODEL
from .main_talk_options import CACHE, LOG, TALK
from .options import (
    Option,
    OptionTable,
    Parsed,
    Value,
    choice,
    in_group,
    leading_float,
    not_offered,
    real,
    seed,
    text,
    threads,
    whole,
)

CLOCK_SEED = 2**32 - 1

# The queue as --sampling-seq writes it, and as --samplers does.
DEFAULT_SEQUENCE = "kfypmt"
DEFAULT_SAMPLERS = "top_k;tfs_z;typical_p;top_p;min_p;temperature"

_BIAS = re.compile(r"\s*([+-]?[0-9]+)\s*([+-])(.+)", re.DOTALL)


class PromptSource(Enum):
    """Where a part of the prompt comes from."""

    TEXT = "text"
    FILE = "file"
    BINARY_FILE = "binary file"


class GrammarSource(Enum):
    """Where a grammar, or a part of it, comes from."""

    TEXT = "--grammar"
    FILE = "--grammar-file"
    SCHEMA = "--json-schema"


class QueueForm(Enum):
    """How a queue of samplers is written."""

    NAMES = "--samplers"
    LETTERS = "--sampling-seq"


@dataclass(frozen=True, slots=True)
class MainOptions:
    """What a run of `main` was asked for."""

    model: str
    prompt: tuple[tuple[PromptSource, str], ...]
    escape: bool
    n_predict: int
    n_keep: int
    n_ctx: int
    n_batch: int
    n_ubatch: int
    threads: int | None
    threads_batch: int | None
    seed: int
    display_prompt: bool
    verbose_prompt: bool
    special: bool
    interactive: bool
    interactive_first: bool
    instruct: bool
    chatml: bool
    conversation: bool
    chat_template: str
    reverse_prompts: tuple[str, ...]
    multiline_input: bool
    input_prefix: str
    input_suffix: str
    input_prefix_bos: bool
    color: bool
    simple_io: bool
    lookup: bool
    prompt_cache: str
    prompt_cache_all: bool
    prompt_cache_read_only: bool
    print_token_count: int
    log: bool
    log_file: str
    log_new: bool
    log_append: bool
    logdir: str
    verbosity: int
    mlock: bool
    mmap: bool
    numa: str
    perf: bool
    check_tensors: bool
    bf16: str
    gpu_layers: int
    adapters: tuple[tuple[str, float], ...]
    lora_base: str
    control_vectors: tuple[tuple[str, float], ...]
    control_layers: tuple[int, int]
    overrides: tuple[tuple[str, int | float | bool | str], ...]
    cache_type_k: str
    cache_type_v: str
    flash_attention: bool
    group_factor: int
    group_width: int
    rope_scaling: str | None
    rope_freq_base: float | None
    rope_freq_scale: float | None
    yarn_orig_ctx: int | None
    yarn_ext_factor: float | None
    yarn_attn_factor: float
    yarn_beta_slow: float
    yarn_beta_fast: float
    without_effect: tuple[str, ...]
    samplers: tuple[QueueForm, str]
    temp: float
    top_k: int
    top_p: float
    min_p: float
    tfs_z: float
    typical_p: float
    repeat_last_n: int
    repeat_penalty: float
    frequency_penalty: float
    presence_penalty: float
    penalize_nl: bool
    dynatemp_range: float
    dynatemp_exponent: float
    mirostat: int
    mirostat_eta: float
    mirostat_tau: float
    ignore_eos: bool
    logit_bias: tuple[tuple[int, float], ...]
    negative_prompt: tuple[tuple[PromptSource, str], ...]
    cfg_scale: float
    grammar: tuple[tuple[GrammarSource, str], ...]
    given: frozenset[str] = frozenset()


def _bias() -> Value:
    def convert(argument: str) -> tuple[tuple[int, float], str]:
        match = _BIAS.fullmatch(argument)
        if match is None:
            raise ValueError("a token id, a sign and a number, such as 15043+1 or 2-inf")
        value, rest = leading_float(match.group(3))
        if math.isnan(value) or (math.isinf(value) and match.group(2) == "+"):
            raise ValueError("a token id, a sign and a number, such as 15043+1 or 2-inf")
        return (int(match.group(1)), -value if match.group(2) == "-" else value), rest

    return Value("TOKEN_ID(+/-)BIAS", convert)


def _prompt(source: PromptSource, spellings: tuple[str, ...], metavar: str, help: str) -> Option:
    return Option(spellings, "prompt", help, (text(metavar),), repeat=True,
                  make=lambda value: (source, value), shown_default="")  # fmt: skip


def _negative_prompt(source: PromptSource, spelling: str, metavar: str, help: str) -> Option:
    return Option((spelling,), "negative_prompt", help, (text(metavar),), repeat=True,
                  make=lambda value: (source, value), shown_default="")  # fmt: skip


def _grammar(source: GrammarSource, spellings: tuple[str, ...], metavar: str,
             help: str) -> Option:  # fmt: skip
    return Option(spellings, "grammar", help, (text(metavar),), repeat=True,
                  make=lambda value: (source, value), shown_default="")  # fmt: skip


def _flag(spellings: tuple[str, ...], dest: str, help: str, constant: bool = True,
          on: bool = False) -> Option:  # fmt: skip
    return Option(spellings, dest, help, default=on, constant=constant)


_GENERAL = in_group(
    "general",
    Option(("-h", "--help", "--usage"), "help", "show this text and exit", stops=True),
    Option(("--version",), "version", "show the version and exit", stops=True),
    Option(("-m", "--model"), "model",
           "model: a GGUF file, or the name of an installed model package", (text("FNAME"),),
           default="models/7B/ggml-model-f16.gguf"),
    _prompt(PromptSource.TEXT, ("-p", "--prompt"), "PROMPT", "text to begin with"),
    _prompt(PromptSource.FILE, ("-f", "--file"), "FNAME",
            "file to begin with, without its last line break; joined to an earlier prompt"),
    _prompt(PromptSource.BINARY_FILE, ("-bf", "--binary-file"), "FNAME",
            "file to begin with, byte for byte"),
    _flag(("-e", "--escape"), "escape",
          r"resolve \n \r \t \' \" \\ and \xHH in the prompt (default)", on=True),
    _flag(("--no-escape",), "escape", "take backslashes in the prompt as they are", False,
          on=True),
    Option(("-n", "--predict", "--n-predict"), "n_predict",
           "tokens to generate; -1: without end, -2: until the context is full", (whole(),),
           default=-1),
    Option(("--keep",), "n_keep",
           "tokens of the prompt to keep when the context is full; -1: all", (whole(),),
           default=0),
    Option(("-s", "--seed"), "seed", "seed of the sampling; -1 takes the clock", (seed(),),
           default=CLOCK_SEED, shown_default="-1"),
    _flag(("--display-prompt",), "display_prompt", "print the prompt (default)", on=True),
    _flag(("--no-display-prompt",), "display_prompt", "do not print the prompt", False, on=True),
    _flag(("--verbose-prompt",), "verbose_prompt", "list the tokens of the prompt"),
    _flag(("-sp", "--special"), "special", "print special tokens, too"),
    _flag(("--perf",), "perf",
          "print at the end where the time went, by op, and what part of the machine's measured "
          "peaks was reached"),
)  # fmt: skip

_COMPUTATION = in_group(
    "computation",
    Option(("-t", "--threads"), "threads",
           "threads while generating; 0 or less: all processors", (threads(),),
           shown_default="the physical cores that may be used"),
    Option(("-tb", "--threads-batch"), "threads_batch",
           "threads while reading the prompt; 0 or less: all processors", (threads(),),
           shown_default="the value of --threads"),
    Option(("-c", "--ctx-size"), "n_ctx", "tokens of context; 0: as many as the model's",
           (whole(low=0),), default=0),
    Option(("-b", "--batch-size"), "n_batch", "tokens of the prompt that are read together",
           (whole(low=1),), default=2048),
    Option(("-ub", "--ubatch-size"), "n_ubatch", "tokens that are computed together",
           (whole(low=1),), default=512),
    _flag(("--check-tensors",), "check_tensors", "look for invalid numbers in the weights"),
    _flag(("--mlock",), "mlock", "keep the model in memory, if the system lets the process"),
    _flag(("--no-mmap",), "mmap", "read the model into memory instead of mapping its file", False,
          on=True),
    Option(("--numa",), "numa",
           "on machines with several nodes of memory: threads on all nodes, on the node that the "
           "command starts on, or as the numactl program has set it",
           (choice("distribute", "isolate", "numactl"),), default="", shown_default="not placed"),
    _flag(("--lookup",), "lookup",
          "guess what comes next from what stands in the text, and evaluate guesses together; "
          "the text is the same"),
    Option(("--bf16",), "bf16",
           "activations that meet BF16 weights: rounded to bf16 where that is faster, or exact",
           (choice("fast", "exact"),), default="fast"),
)  # fmt: skip

_SAMPLING = in_group(
    "sampling",
    Option(("--samplers",), "samplers", "samplers in their order, separated by ;",
           (text("SAMPLERS"),), default=(QueueForm.NAMES, DEFAULT_SAMPLERS),
           make=lambda value: (QueueForm.NAMES, value), shown_default=DEFAULT_SAMPLERS),
    Option(("--sampling-seq",), "samplers", "the same by their letters", (text("SEQUENCE"),),
           default=(QueueForm.NAMES, DEFAULT_SAMPLERS),
           make=lambda value: (QueueForm.LETTERS, value), shown_default=DEFAULT_SEQUENCE),
    _flag(("--ignore-eos",), "ignore_eos", "never choose the end-of-sequence token"),
    Option(("-l", "--logit-bias"), "logit_bias",
           "make a token likelier or less likely, as in 15043+1; may be repeated", (_bias(),),
           repeat=True),
    Option(("--temp",), "temp", "temperature; 0 or less takes the likeliest token", (real(),),
           default=0.8, make=lambda value: max(value, 0.0)),
    Option(("--top-k",), "top_k", "keep the k likeliest tokens; 0 or less: all", (whole(),),
           default=40),
    Option(("--top-p",), "top_p", "keep the likeliest tokens that make up p; 1: all", (real(),),
           default=0.95),
    Option(("--min-p",), "min_p", "keep tokens with p times the likeliest's chance; 0: all",
           (real(),), default=0.05),
    Option(("--tfs",), "tfs_z", "tail-free sampling, z; 1: off", (real(),), default=1.0),
    Option(("--typical",), "typical_p", "locally typical sampling, p; 1: off", (real(),),
           default=1.0),
    Option(("--repeat-last-n",), "repeat_last_n",
           "last tokens that penalties look at; 0: none, -1: all", (whole(low=-1),), default=64),
    Option(("--repeat-penalty",), "repeat_penalty", "divisor for tokens met there; 1: off",
           (real(),), default=1.0),
    Option(("--presence-penalty",), "presence_penalty", "subtracted from tokens met; 0: off",
           (real(),), default=0.0),
    Option(("--frequency-penalty",), "frequency_penalty",
           "subtracted from tokens as often as met; 0: off", (real(),), default=0.0),
    _flag(("--penalize-nl",), "penalize_nl", "penalties apply to line breaks, too"),
    Option(("--dynatemp-range",), "dynatemp_range",
           "dynamic temperature: how far it moves around --temp; 0: off", (real(),),
           default=0.0),
    Option(("--dynatemp-exp",), "dynatemp_exponent", "dynamic temperature: exponent", (real(),),
           default=1.0),
    Option(("--mirostat",), "mirostat", "0: off, 1: Mirostat, 2: Mirostat 2.0",
           (whole(low=0, high=2),), default=0),
    Option(("--mirostat-lr",), "mirostat_eta", "Mirostat: learning rate, eta", (real(),),
           default=0.1),
    Option(("--mirostat-ent",), "mirostat_tau", "Mirostat: target entropy, tau", (real(),),
           default=5.0),
    _negative_prompt(PromptSource.TEXT, "--cfg-negative-prompt", "PROMPT",
                     "guidance: a second context reads this in place of the prompt"),
    _negative_prompt(PromptSource.FILE, "--cfg-negative-prompt-file", "FNAME",
                     "the same from a file, without its last line break; joined to a text before"),
    Option(("--cfg-scale",), "cfg_scale",
           "guidance: how far to lead away from the second context; 1 or less: off", (real(),),
           default=1.0),
)  # fmt: skip

_GRAMMAR = in_group(
    "grammar",
    _grammar(GrammarSource.TEXT, ("--grammar",), "GRAMMAR",
             "what the generated text must follow, in GBNF"),
    _grammar(GrammarSource.FILE, ("--grammar-file",), "FNAME",
             "the same from a file; joined to a grammar before"),
    _grammar(GrammarSource.SCHEMA, ("-j", "--json-schema"), "SCHEMA",
             "generate JSON that follows a schema: a text in braces, or a file"),
)  # fmt: skip

_LOG_TEST = not_offered(
    "not offered here: it tries out the original's own log; leave it out", "--log-test",
)  # fmt: skip

_DOWNLOADS = not_offered(
    "not offered here: download the file yourself and give it with -m",
    "-mu|--model-url", "-hfr|--hf-repo", "-hff|--hf-file",
)  # fmt: skip

_SPECULATIVE = not_offered(
    "not offered here: there is no draft model; leave it out, or give --lookup instead",
    "-md|--model-draft", "-td|--threads-draft", "-tbd|--threads-batch-draft", "--draft",
    "-ps|--p-split", "-ngld|--gpu-layers-draft", "-lcs|--lookup-cache-static",
    "-lcd|--lookup-cache-dynamic",
)  # fmt: skip

_DEVICES = not_offered(
    "not offered here: everything is computed on this processor; leave it out",
    "--rpc",
)  # fmt: skip

_OTHER_COMMANDS = not_offered(
    "not an option of this command, but of another command of the original",
    "-dkvc|--dump-kv-cache", "--chunks", "--in-file", "--mmproj", "--image",
    "--embedding|--embeddings", "--pooling", "--infill", "--save-all-logits|--kl-divergence-base",
    "--perplexity|--all-logits", "--ppl-stride", "--ppl-output-type", "--hellaswag",
    "--hellaswag-tasks", "--winogrande", "--winogrande-tasks", "--multiple-choice",
    "--multiple-choice-tasks", "--kl-divergence", "-a|--alias", "--host", "--port", "--path",
    "--api-key", "--api-key-file", "--ssl-key-file", "--ssl-cert-file", "-to|--timeout",
    "--threads-http", "-spf|--system-prompt-file", "--log-format", "--no-slots", "--metrics",
    "--slot-save-path", "-sps|--slot-prompt-similarity", "-npp", "-ntg", "-npl",
    "--context-file", "--chunk-size", "--chunk-separator", "--junk", "--pos",
    "-o|--output|--output-file", "-ofreq|--output-frequency", "--save-frequency",
    "--process-output", "--no-ppl", "--chunk|--from-chunk",
)  # fmt: skip

TABLE = OptionTable(
    "main",
    compared(
        _GENERAL + _COMPUTATION + MODEL + CONTEXT + TALK + CACHE + _SAMPLING + _GRAMMAR + LOG
        + ACCEPTED + _LOG_TEST + _DOWNLOADS + _SPECULATIVE + _DEVICES + _OTHER_COMMANDS
    ),
    compares=True,
)  # fmt: skip


def parse(arguments: Sequence[str]) -> tuple[MainOptions, Parsed]:
    """Read the arguments of `main`; see `OptionTable.parse` for what is raised."""
    parsed = TABLE.parse(arguments)
    options = MainOptions(**parsed.values, given=parsed.given)
    if not parsed.stopped_by and not options.model:
        raise OptionError("--model: the name is empty")
    return options, parsed
