"""The options of `finetune`: one row each, and the dataclass that they fill."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from engine.errors import OptionError

from .options import (
    MAX_THREADS,
    Option,
    OptionTable,
    Parsed,
    choice,
    in_group,
    real,
    seed,
    size,
    text,
    whole,
)

CLOCK_SEED = 2**32 - 1

# Command line name, field of the adapter's rank, and the tensor that the field ranks.
RANKS = (
    ("--rank-tok-embd", "token_embd", "the token embeddings"),
    ("--rank-out-norm", "output_norm", "the output norm"),
    ("--rank-out", "output", "the output"),
    ("--rank-att-norm", "attn_norm", "every attention norm"),
    ("--rank-wq", "attn_q", "every query projection"),
    ("--rank-wk", "attn_k", "every key projection"),
    ("--rank-wv", "attn_v", "every value projection"),
    ("--rank-wo", "attn_output", "every attention output"),
    ("--rank-ffn-norm", "ffn_norm", "every feed-forward norm"),
    ("--rank-ffn-gate", "ffn_gate", "every feed-forward gate"),
    ("--rank-ffn-down", "ffn_down", "every feed-forward down projection"),
    ("--rank-ffn-up", "ffn_up", "every feed-forward up projection"),
)
NORMS = frozenset({"output_norm", "attn_norm", "ffn_norm"})


@dataclass(frozen=True, slots=True)
class FinetuneOptions:
    """What a run of `finetune` was asked for; `given` names the fields set by the user."""

    train_data: str
    checkpoint_in: str
    checkpoint_out: str
    pattern_fn_it: str
    fn_latest: str
    save_every: int
    seed: int
    ctx: int
    threads: int
    batch: int
    grad_acc: int
    sample_start: str
    include_sample_start: bool
    escape: bool
    overlapping_samples: bool
    fill_with_next_samples: bool
    separate_with_eos: bool
    separate_with_bos: bool
    sample_random_offsets: bool
    pack_samples: bool
    force_reshuffle: bool
    use_flash: bool
    use_checkpointing: bool
    memory_limit: int | None
    compute: str
    warmup: int
    cos_decay_steps: int
    cos_decay_restart: float
    cos_decay_min: float
    enable_restart: bool
    opt_past: int
    opt_delta: float
    opt_max_no_improvement: int
    epochs: int
    adam_iter: int
    adam_alpha: float
    adam_min_alpha: float
    adam_decay: float
    adam_decay_min_ndim: int
    adam_beta1: float
    adam_beta2: float
    adam_gclip: float
    adam_epsf: float
    gpu_layers: str
    model_base: str
    lora_out: str
    only_write_lora: bool
    norm_rms_eps: float | None
    rope_freq_base: float | None
    rope_freq_scale: float | None
    lora_r: int
    lora_alpha: int | None
    rank_token_embd: int | None
    rank_output_norm: int | None
    rank_output: int | None
    rank_attn_norm: int | None
    rank_attn_q: int | None
    rank_attn_k: int | None
    rank_attn_v: int | None
    rank_attn_output: int | None
    rank_ffn_norm: int | None
    rank_ffn_gate: int | None
    rank_ffn_down: int | None
    rank_ffn_up: int | None
    rslora: bool
    mask_prompt: bool | None
    append_eos: bool | None
    show_sample: bool
    val_data: str
    val_split: float
    eval_every: int
    early_stop: int
    log_csv: str
    plot: str
    report: bool
    dry_run: bool
    perf: bool
    given: frozenset[str] = frozenset()

    def ranks(self) -> dict[str, int]:
        """Give the rank of each kind of tensor; norms have 1 whatever the default rank is."""
        ranks = {}
        for _, tensor, _ in RANKS:
            own = getattr(self, f"rank_{tensor}")
            default = 1 if tensor in NORMS else self.lora_r
            ranks[tensor] = default if own is None else own
        return ranks

    def names_a_rank(self) -> bool:
        """Tell whether the user asked for ranks, so that a checkpoint's must equal them."""
        kinds = {tensor for _, tensor, _ in RANKS} - self.left_out()
        return bool({"lora_r", *(f"rank_{kind}" for kind in kinds)} & self.given)

    def left_out(self) -> frozenset[str]:
        """Give the kinds of tensor that a conversion leaves out of what it writes."""
        if not self.only_write_lora:
            return frozenset()
        return frozenset(tensor for _, tensor, _ in RANKS if getattr(self, f"rank_{tensor}") == 0)


def _flag(
    spelling: str, dest: str, help: str, constant: bool = True, on: bool | None = False
) -> Option:
    return Option((spelling,), dest, help, default=on, constant=constant)


_FILES = in_group(
    "files",
    Option(("--model-base",), "model_base",
           "base model: a GGUF file, or the name of an installed model package",
           (text("FNAME"),), default=""),
    Option(("--train-data",), "train_data",
           "text to train on; of a name that ends in .jsonl every line is an object with "
           "messages, with prompt and completion, or with text", (text("FNAME"),),
           default="shakespeare.txt"),
    Option(("--checkpoint-in",), "checkpoint_in",
           "checkpoint to resume from; a missing file or an empty name starts anew",
           (text("FNAME"),), default="checkpoint.gguf"),
    Option(("--checkpoint-out",), "checkpoint_out",
           "name of the checkpoints written; an empty name writes none",
           (text("FNAME"),), default="checkpoint-ITERATION.gguf"),
    Option(("--lora-out",), "lora_out",
           "name of the adapters written; an empty name writes none. The name says the form: "
           ".gguf is what current llama.cpp loads; .safetensors, a folder, or a name with / at "
           "the end is PEFT's; anything else is the .bin form, and so is the default name",
           (text("FNAME"),), default="ggml-lora-ITERATION-f32.gguf"),
    Option(("--pattern-fn-it",), "pattern_fn_it",
           "part of an output name that the iteration number replaces", (text("STR"),),
           default="ITERATION"),
    Option(("--fn-latest",), "fn_latest",
           "word that replaces it in the name of the latest copy", (text("STR"),),
           default="LATEST"),
    Option(("--save-every",), "save_every",
           "iterations between saves; 0 or less saves at the end only", (whole(),), default=10),
    _flag("--only-write-lora", "only_write_lora",
          "write the adapter of --checkpoint-in (or a new one) in the form that --lora-out names, "
          "and end; a tensor whose rank is given as 0 is left out"),
)  # fmt: skip

_RUN = in_group(
    "run",
    Option(("-h", "--help"), "help", "show this text and exit", stops=True),
    Option(("-s", "--seed"), "seed",
           "seed of a new adapter and of a new shuffle; -1 takes the clock", (seed(),),
           default=CLOCK_SEED, shown_default="-1"),
    Option(("-c", "--ctx"), "ctx",
           "tokens in a row; when resuming, the checkpoint's unless given", (whole(low=1),),
           default=128),
    Option(("-b", "--batch"), "batch", "rows in an evaluation", (whole(low=1),), default=8),
    Option(("--grad-acc",), "grad_acc", "evaluations in an update; below 1 means 1", (whole(),),
           default=1),
    Option(("-t", "--threads"), "threads",
           "threads that compute; unless given, no more than the cores that may be used",
           (whole(low=1, high=MAX_THREADS),), default=6),
    Option(("--compute",), "compute", "arithmetic of matrix products; auto is bf16 where the "
           "processor has it and the weights allow it", (choice("f32", "bf16", "auto"),),
           default="auto"),
    _flag("--use-checkpointing", "use_checkpointing",
          "compute activations again in the backward pass; saves memory, changes no result "
          "(default)", on=True),
    _flag("--no-checkpointing", "use_checkpointing", "keep all activations", False, on=True),
    Option(("--memory-limit",), "memory_limit",
           "memory that the run may take besides the model's mapped file, as 800M or 2G: as many "
           "layers as fit keep their activations, the others compute them again; changes no result",
           (size(),), shown_default="none"),
    _flag("--use-flash", "use_flash", "accepted, without effect"),
    _flag("--no-flash", "use_flash", "accepted, without effect", False),
    _flag("--dry-run", "dry_run",
          "load, tokenize and plan, then print samples, tokens, trainable parameters, peak memory, "
          "a measured speed and the expected end; nothing is trained or written"),
    Option(("-ngl", "--n-gpu-layers"), "gpu_layers", "accepted with a warning, without effect",
           (text("N"),), default="0", shown_default=""),
)  # fmt: skip

_SAMPLES = in_group(
    "samples",
    Option(("--sample-start",), "sample_start",
           "text before each sample; empty starts a sample at every token", (text("STR"),),
           default=""),
    _flag("--include-sample-start", "include_sample_start",
          "the sample begins with that text, not behind it"),
    _flag("--escape", "escape", r"resolve \n \r \t \' \" \\ and \xHH in --sample-start"),
    _flag("--overlapping-samples", "overlapping_samples",
          "a sample does not end where the next begins"),
    _flag("--fill-with-next-samples", "fill_with_next_samples",
          "other samples follow a short one in its row, instead of padding"),
    _flag("--separate-with-eos", "separate_with_eos",
          "when filling, an end-of-sequence token between samples"),
    _flag("--no-separate-with-eos", "separate_with_eos",
          "when filling, no end-of-sequence token between samples (default)", False),
    _flag("--separate-with-bos", "separate_with_bos",
          "when filling, a begin-of-sequence token between samples (default)", on=True),
    _flag("--no-separate-with-bos", "separate_with_bos",
          "when filling, no begin-of-sequence token between samples", False, on=True),
    _flag("--sample-random-offsets", "sample_random_offsets",
          "begin the first sample of a row at a random token of it"),
    _flag("--pack-samples", "pack_samples",
          "as many samples as fit whole lie in a row, each as it would be in one of its own: none "
          "sees another, positions begin anew, and no padding counts"),
    _flag("--force-reshuffle", "force_reshuffle",
          "forget the checkpoint's order of samples and shuffle anew from --seed"),
    _flag("--mask-prompt", "mask_prompt",
          "conversations: only what is answered counts in the loss (default for messages and for "
          "prompt and completion)", on=None),
    _flag("--no-mask-prompt", "mask_prompt", "conversations: every token counts in the loss",
          False, on=None),
    _flag("--append-eos", "append_eos",
          "an end-of-sequence token, which counts, behind every sample (default for messages and "
          "for prompt and completion)", on=None),
    _flag("--no-append-eos", "append_eos", "no end-of-sequence token behind samples", False,
          on=None),
    _flag("--show-sample", "show_sample",
          "print the first sample as the model will see it, with marks around what counts in the "
          "loss"),
)  # fmt: skip

_SCHEDULE = in_group(
    "schedule and optimizer",
    Option(("--epochs",), "epochs", "end after so many further epochs; 0 or less is off",
           (whole(),), default=-1),
    Option(("--adam-iter",), "adam_iter", "updates in this run", (whole(low=0),), default=256),
    Option(("--adam-alpha",), "adam_alpha", "learning rate", (real(low=0.0),), default=1e-3),
    Option(("--adam-min-alpha",), "adam_min_alpha",
           "floor of the learning rate, in the warm-up too", (real(low=0.0),), default=0.0),
    Option(("--adam-decay",), "adam_decay", "decoupled weight decay", (real(low=0.0),),
           default=0.1),
    Option(("--adam-decay-min-ndim",), "adam_decay_min_ndim",
           "decay only tensors of at least so many dimensions", (whole(),), default=2),
    Option(("--adam-beta1",), "adam_beta1", "smoothing of the gradient",
           (real(low=0.0, below=1.0),), default=0.9),
    Option(("--adam-beta2",), "adam_beta2", "smoothing of the squared gradient",
           (real(low=0.0, below=1.0),), default=0.999),
    Option(("--adam-gclip",), "adam_gclip",
           "largest norm of the whole gradient; 0 or less is off", (real(),), default=1.0),
    Option(("--adam-epsf",), "adam_epsf",
           "end when the loss changes by a smaller part; 0 or less is off", (real(),),
           default=0.0),
    Option(("--warmup",), "warmup", "iterations over which the learning rate rises", (whole(),),
           default=100),
    Option(("--cos-decay-steps",), "cos_decay_steps", "iterations of the cosine's fall",
           (whole(low=1),), default=1000),
    Option(("--cos-decay-restart",), "cos_decay_restart",
           "factor by which the fall grows longer at a restart", (real(low=1.0),), default=1.1),
    Option(("--cos-decay-min",), "cos_decay_min", "floor of the cosine", (real(),), default=0.1),
    _flag("--enable-restart", "enable_restart", "begin the cosine anew when it has fallen"),
    _flag("--disable-restart", "enable_restart", "stay at the floor (default)", False),
    Option(("--opt-past",), "opt_past",
           "iterations back with which the delta test compares; 0 is off. Must equal the "
           "checkpoint's", (whole(low=0, high=1_000_000),), default=0),
    Option(("--opt-delta",), "opt_delta", "threshold of the delta test", (real(),),
           default=1e-5),
    Option(("--opt-max-no-improvement",), "opt_max_no_improvement",
           "end after so many iterations without a better loss; 0 or less is off", (whole(),),
           default=0),
)  # fmt: skip

_WATCH = in_group(
    "validation and reports",
    Option(("--val-data",), "val_data",
           "text or .jsonl file whose loss is watched and not trained on", (text("FNAME"),),
           default="", shown_default="none"),
    Option(("--val-split",), "val_split",
           "part of the samples that is taken out of the training data to be watched instead",
           (real(above=0.0, below=1.0),), default=0.0, shown_default="none"),
    Option(("--eval-every",), "eval_every",
           "iterations between looks at the validation loss; 0 or less looks at the end only",
           (whole(),), default=10),
    Option(("--early-stop",), "early_stop",
           "end after so many looks in a row without a lower validation loss; 0 or less is off",
           (whole(),), default=0),
    Option(("--log-csv",), "log_csv",
           "file for a row an iteration: iteration, samples, tokens, learning rate, loss, "
           "validation loss, gradient norm, tokens per second, seconds", (text("FNAME"),),
           default="", shown_default="none"),
    Option(("--plot",), "plot",
           "picture of the loss curves, .svg or .png (needs matplotlib: pip install "
           "'cylora[plot]')", (text("FNAME"),), default="", shown_default="none"),
    _flag("--perf", "perf",
          "print at the end where an evaluation's time went, by op, and what part of the machine's "
          "measured peaks was reached"),
    _flag("--no-report", "report",
          "leave out the proof of learning at the end: loss on the last 2 % of the data (at most "
          "2048 tokens) before and after, how many tensors moved and which most; without it a "
          "run in which nothing moved ends like any other", False, on=True),
)  # fmt: skip

_LORA = in_group(
    "adapter",
    Option(("--lora-r",), "lora_r",
           "default rank, and r of the scale alpha / r; when resuming, the checkpoint's ranks "
           "unless a rank is given", (whole(low=1),), default=4),
    Option(("--lora-alpha",), "lora_alpha", "alpha of the scale alpha / r", (whole(low=1),),
           shown_default="the value of --lora-r"),
    _flag("--rslora", "rslora", "scale by alpha / √r instead (rank-stabilized LoRA)"),
    *(
        Option((name,), f"rank_{tensor}", f"rank for {what}; 0: no adapter",
               (whole(low=0),),
               shown_default="1" if tensor in NORMS else "the value of --lora-r")
        for name, tensor, what in RANKS
    ),
    Option(("--norm-rms-eps",), "norm_rms_eps", "epsilon of the norms in this run",
           (real(low=0.0),), shown_default="the model's"),
    Option(("--rope-freq-base",), "rope_freq_base", "base of RoPE in this run",
           (real(above=0.0),), shown_default="the model's"),
    Option(("--rope-freq-scale",), "rope_freq_scale", "factor on RoPE's positions in this run",
           (real(above=0.0),), shown_default="the model's"),
)  # fmt: skip

TABLE = OptionTable(
    "finetune", _RUN + _FILES + _SAMPLES + _SCHEDULE + _WATCH + _LORA, strict_numbers=True
)


def parse(arguments: Sequence[str]) -> tuple[FinetuneOptions, Parsed]:
    """Read the arguments of `finetune`; see `OptionTable.parse` for what is raised.

    Raises
    ------
    OptionError
        For options that contradict each other, too.
    """
    parsed = TABLE.parse(arguments)
    options = FinetuneOptions(**parsed.values, given=parsed.given)
    _check_together(options)
    return options, parsed


def _check_together(options: FinetuneOptions) -> None:
    given = options.given
    if options.pack_samples and options.fill_with_next_samples:
        raise OptionError(
            "--pack-samples: --fill-with-next-samples is given too; give one of the two"
        )
    if options.memory_limit is not None and "use_checkpointing" in given:
        raise OptionError(
            "--memory-limit: it chooses what is computed again; leave out --use-checkpointing and"
            " --no-checkpointing"
        )
    if options.val_data and options.val_split:
        raise OptionError("--val-split: --val-data is given too; give one of the two")
    if not (options.val_data or options.val_split):
        for name in ("eval_every", "early_stop"):
            if name in given:
                option = "--" + name.replace("_", "-")
                raise OptionError(
                    f"{option}: there is no validation; give --val-data or --val-split"
                )
